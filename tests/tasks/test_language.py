"""Causal language models: the shift, padding, exact gradients of texts, units of what is logged, checkpoints."""

import warnings

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from torchmetrics.text import Perplexity  # noqa: E402

from lightning_ief import IEF, linearize, objectives  # noqa: E402
from lightning_ief.capture.messages import not_shifted  # noqa: E402
from lightning_ief.tasks import LanguageModel, TextFolderDataModule, causal_lm, next_token_targets  # noqa: E402
from lightning_ief.tasks.hub import MissingError  # noqa: E402
from tests.helpers import relative_error  # noqa: E402
from tests.tasks.text_stand_ins import write_texts  # noqa: E402

ENTROPY = objectives.CrossEntropy()
GPT2 = {"model_type": "gpt2", "vocab_size": 384, "n_embd": 12, "n_layer": 2, "n_head": 2, "n_positions": 32}
LENGTHS = (7, 4, 2, 6)


def lora(**options) -> "peft.LoraConfig":
    options = {"r": 2, "lora_alpha": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True, **options}
    return peft.LoraConfig(**options)


def small(adapter=None, **options) -> nn.Module:
    """In evaluation, no trained weight at a special value such as zero."""
    torch.manual_seed(0)
    net = causal_lm(config={**GPT2, **options}, adapter=adapter)
    for p in net.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p), alpha=0.05)
    return net.eval()


def batch(side: str = "right") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids, mask = (torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.int64) for _ in range(2))
    for n, length in enumerate(LENGTHS):
        where = slice(0, length) if side == "right" else slice(max(LENGTHS) - length, None)
        ids[n, where] = torch.randint(3, 384, (length,), generator=generator)
        mask[n, where] = 1
    return {"input_ids": ids, "attention_mask": mask}


def module(net: nn.Module, lr: float = 1.0, **options) -> LanguageModel:
    return LanguageModel(net, lambda p: IEF(p, lr=lr, damping=None, relative_damping=1.0), dropout=False, **options)


def trainer(**options) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return L.Trainer(**{**quiet, "enable_model_summary": False, "max_epochs": 1, **options})


# --- the shift


@pytest.mark.parametrize("side", ["right", "left"])
def test_targets_are_the_next_tokens_of_the_text_alone(side):
    given = batch(side)
    targets = next_token_targets(given["input_ids"], given["attention_mask"])
    for n, length in enumerate(LENGTHS):
        text = given["input_ids"][n][given["attention_mask"][n] == 1]
        assert targets[n][targets[n] != -100].tolist() == text[1:].tolist()
        start = 0 if side == "right" else max(LENGTHS) - length
        assert targets[n, start : start + length - 1].tolist() == text[1:].tolist()


def test_loss_is_that_of_transformers_for_its_labels():
    """With a prompt that is not to be learnt, and padding that its labels leave out."""
    net, given = small(), batch()
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    labels[0, :3] = -100
    with torch.no_grad():
        output = net(**given, labels=labels)
    _, targets = module(net).unpack_batch({**given, "labels": labels})
    tokens = int((targets != -100).sum())
    assert tokens == sum(LENGTHS) - len(LENGTHS) - 2  # the second and third of the first text
    assert float(ENTROPY.losses(output.logits, targets).sum() / tokens) == pytest.approx(float(output.loss), rel=1e-6)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"labels \[N, T\].*attention_mask \(2, 3\)"):
        next_token_targets(torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"got \(4,\)"):
        next_token_targets(torch.zeros(4, dtype=torch.int64))


class Copies(LanguageModel):
    """As who hands the labels of transformers on as targets."""

    def unpack_batch(self, given):
        return given, given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)


@pytest.mark.parametrize("optimizer", [IEF, torch.optim.AdamW])
def test_labels_that_are_not_shifted_are_told_once_with_either_optimizer(optimizer):
    def told(kind: type[LanguageModel]) -> list[str]:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            trainer().fit(
                kind(small(lora()), lambda p: optimizer(p, lr=1e-3)), DataLoader([batch()] * 3, batch_size=None)
            )
        return [str(each.message) for each in seen if "next_token_targets" in str(each.message)]

    (message,) = told(Copies)
    assert "would learn to copy its input" in message
    assert "return inputs, lightning_ief.tasks.next_token_targets(labels, attention_mask)" in message
    assert not told(LanguageModel)


@pytest.mark.parametrize(
    ("inputs", "targets"),
    [
        ([[5, 6, 7]], [[6, 7, -100]]),
        ([[5, 5, 5]], [[5, 5, -100]]),  # a text of one token: its shift, too
        ([[5, 6, 7]], [[-100, -100, -100]]),
        ([[3, 6, 3, 7]], [[-100, 6, 9, -100]]),  # masked tokens, of which one was left as it is
        ([[4]], [[4]]),
    ],
)
def test_targets_of_other_tasks_are_not_told_of(inputs, targets):
    assert not_shifted([torch.tensor(inputs)], torch.tensor(targets)) is None


# --- gradients


@pytest.mark.parametrize("adapter", [None, lora()], ids=["all", "LoRA"])
def test_gradients_of_texts_are_those_of_each_alone_without_padding(adapter):
    net = small(adapter).double()
    inputs, targets = module(net).unpack_batch(batch())
    found = linearize(net, inputs, targets, ENTROPY)
    trained = [p for p in net.parameters() if p.requires_grad]
    rows, losses = [], []
    for n, length in enumerate(LENGTHS):
        ids = inputs["input_ids"][n : n + 1, :length]
        log_p = net(input_ids=ids).logits[0, :-1].log_softmax(-1)
        loss = -log_p.gather(1, ids[0, 1:, None]).sum()
        losses.append(loss.detach())
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)]))
    assert relative_error(found.losses, torch.stack(losses)) < 1e-12
    assert relative_error(found.jacobian.to_dense(), torch.stack(rows)) < 1e-10


# --- what is logged


def test_losses_are_per_text_and_per_token_and_perplexity_is_that_of_torchmetrics(tmp_path):
    data = TextFolderDataModule(str(write_texts(tmp_path / "texts")), max_length=24, separator="\n", batch_size=16)
    own = module(small(lora()), lr=0.0)
    fitted = trainer(limit_train_batches=1, limit_val_batches=3, num_sanity_val_steps=0)
    fitted.fit(own, data)
    logged = fitted.logged_metrics | fitted.callback_metrics
    losses, tokens, perplexity = [], 0, Perplexity(ignore_index=-100)
    own.eval()
    for n, given in enumerate(data.val_dataloader()):
        if n == 3:
            break
        inputs, targets = own.unpack_batch(given)
        assert n or bool((inputs["attention_mask"] == 0).any())
        with torch.no_grad():
            logits = own(**inputs)
        perplexity.update(logits, targets)
        losses.append(ENTROPY.losses(logits, targets))
        tokens += int((inputs["attention_mask"].sum(1) - 1).sum())
    assert float(logged["val/perplexity"]) == pytest.approx(float(perplexity.compute()), rel=1e-5)
    assert float(logged["val/loss_per_token"]) == pytest.approx(float(torch.cat(losses).sum()) / tokens, rel=1e-6)
    assert float(logged["val/loss"]) == pytest.approx(float(torch.cat(losses).mean()), rel=1e-6)
    # One step was taken, of lr 0, on the first batch of the epoch.
    inputs, targets = own.unpack_batch(next(iter(fitted.train_dataloader)))
    with torch.no_grad():
        losses_of_batch = ENTROPY.losses(own(**inputs), targets)
    assert float(logged["train/loss"]) == pytest.approx(float(losses_of_batch.mean()), rel=1e-5)
    tokens = int((targets != -100).sum())
    assert float(logged["train/loss_per_token"]) == pytest.approx(float(losses_of_batch.sum()) / tokens, rel=1e-5)


def test_a_run_learns_and_its_checkpoint_is_adapted(tmp_path):
    """Trained in full by AdamW, then by LoRA from the checkpoint, which is kept out of the next one."""
    texts = write_texts(tmp_path / "texts", files=1, lines=80)
    data = TextFolderDataModule(str(texts), max_length=16, separator="\n", batch_size=16)
    first = LanguageModel(causal_lm(config=GPT2), lambda p: torch.optim.AdamW(p, lr=1e-2))
    fitted = trainer(max_epochs=2, default_root_dir=tmp_path)
    fitted.fit(first, data)
    assert float(fitted.callback_metrics["val/perplexity"]) < 384 / 2
    fitted.save_checkpoint(path := str(tmp_path / "first.ckpt"))
    net = causal_lm(config=GPT2, adapter=lora(), checkpoint_path=path)
    given = batch()
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(**given).logits, first.eval()(**given))
    second = module(net)
    fitted = trainer(max_epochs=1, default_root_dir=tmp_path)
    fitted.fit(second, data)
    fitted.save_checkpoint(adapted := str(tmp_path / "second.ckpt"))
    assert all("lora" in name for name in torch.load(adapted, weights_only=True)["state_dict"])
    with pytest.raises(ValueError, match=r"another config.*weights are missing or of another shape"):
        causal_lm(config={**GPT2, "n_layer": 1}, checkpoint_path=path)
    with pytest.raises(MissingError, match=r"nowhere\.ckpt: there is no such file"):
        causal_lm(config=GPT2, checkpoint_path="nowhere.ckpt")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "give one of them"),
        ({"config": {"vocab_size": 3}}, "no model_type"),
        ({"model_name_or_path": "gpt2", "checkpoint_path": "x.ckpt"}, "give config beside a checkpoint"),
    ],
)
def test_wrong_sources_of_weights_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        causal_lm(**options)
