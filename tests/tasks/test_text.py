"""T5 that answers by a word, classifiers of transformers: scores, gradients, metrics, weights."""

import time
import warnings

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
sklearn_metrics = pytest.importorskip("sklearn.metrics")

from lightning_ief import IEF, linearize, objectives  # noqa: E402
from lightning_ief.tasks.glue import GlueDataModule  # noqa: E402
from lightning_ief.tasks.text import SequenceClassifier, T5Classifier, TextClassifier  # noqa: E402
from tests.helpers import relative_error  # noqa: E402
from tests.tasks.text_stand_ins import t5_config, write_glue, write_t5, write_tokenizer  # noqa: E402

ENTROPY = objectives.CrossEntropy()
LABELS = [[7, 9, 1], [8, 1], [9, 9, 4, 1]]  # of one to three tokens, and the end of text
BASE = {"vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
BERT = {
    "model_type": "bert", "vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 24,
}  # fmt: skip


def prompt(tokens: int = 20) -> "peft.PromptTuningConfig":
    return peft.PromptTuningConfig(num_virtual_tokens=tokens)


def lora(rank: int = 8, **options) -> "peft.LoraConfig":
    options = {"lora_alpha": rank, "lora_dropout": 0.1, "target_modules": ["q", "v"], **options}
    return peft.LoraConfig(r=rank, **options)


def awake(net: nn.Module) -> nn.Module:
    """In evaluation, no trained weight at a special value such as zero."""
    for p in net.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p), alpha=0.05)
    return net.eval()


def small(adapter=None, **options) -> T5Classifier:
    return awake(T5Classifier(config=t5_config(), adapter=adapter, label_tokens=LABELS, **options))


def batch(samples: int = 5, length: int = 7, classes: int = 3) -> tuple[dict[str, Tensor], Tensor]:
    mask = torch.ones(samples, length, dtype=torch.int64)
    mask[0, -2:] = 0
    ids = torch.randint(2, 300, (samples, length)) * mask
    return {"input_ids": ids, "attention_mask": mask}, torch.arange(samples) % classes


def trainer(**options) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return L.Trainer(**{**quiet, "enable_model_summary": False, "max_epochs": 1, **options})


# --- networks


@pytest.mark.parametrize(("adapter", "count"), [(prompt(), 15_360), (lora(), 884_736)], ids=["prompt", "LoRA"])
def test_t5_base_has_the_papers_number_of_trained_parameters(adapter, count):
    with torch.device("meta"):
        net = T5Classifier(config=BASE, adapter=adapter)
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == count
    assert sum(p.numel() for p in net.parameters() if not p.requires_grad) == 222_903_552  # T5-base


@pytest.mark.parametrize("adapter", [None, prompt(4), lora(2)], ids=["all", "prompt", "LoRA"])
def test_scores_are_sums_over_the_tokens_of_a_word(adapter):
    net = small(adapter)
    inputs, _ = batch()
    with torch.no_grad():
        scores = net.scores(**inputs)
        for n in range(5):
            kept = int(inputs["attention_mask"][n].sum())
            ids = inputs["input_ids"][n : n + 1, :kept]
            for c, word in enumerate(LABELS):
                expected = 0.0
                for t, token in enumerate(word):
                    so_far = torch.tensor([[0, *word[:t]]])
                    logits = net.net(
                        input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=so_far
                    ).logits
                    expected += float(logits[0, -1].log_softmax(-1)[token])
                assert float(scores[n, c]) == pytest.approx(expected, rel=1e-4)


def test_training_loss_is_the_score_of_the_right_word():
    net = small(lora(2))
    inputs, classes = batch()
    posed, targets = net.pose(inputs, classes)
    assert targets.tolist()[:2] == [[7, 9, 1, -100], [8, 1, -100, -100]]
    logits = net(**posed)
    assert logits.shape == (5, 4, 300)  # over the whole vocabulary
    scores = net.scores(**inputs)
    torch.testing.assert_close(ENTROPY.losses(logits, targets), -scores.gather(1, classes[:, None])[:, 0])
    assert bool((scores.exp().sum(1) < 1).all())


@pytest.mark.parametrize(
    "make",
    [
        lambda: small(prompt(4)),
        lambda: small(lora(2)),
        lambda: awake(SequenceClassifier(3, config=BERT, adapter=lora(2, target_modules=["query", "value"]))),
    ],
    ids=["prompt", "LoRA", "BERT, LoRA"],
)
def test_gradients_of_samples_are_exact(make):
    """As one at a time; T5's norms compute in float32, so that not all digits agree."""
    net = make().double()
    inputs, targets = net.pose(*batch())
    jacobian = linearize(net, inputs, targets, ENTROPY).jacobian.to_dense()
    trained = [p for p in net.parameters() if p.requires_grad]
    rows = []
    for n in range(5):
        loss = ENTROPY.losses(net(**{name: x[n : n + 1] for name, x in inputs.items()}), targets[n : n + 1]).sum()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)]))
    assert jacobian.shape == (5, sum(p.numel() for p in trained))
    assert relative_error(jacobian, torch.stack(rows)) < 5e-6


def test_prompts_start_from_the_text_unless_weights_were_loaded():
    class Data:
        label_tokens = LABELS
        prompt_tokens = [5, 6, 1]

    net = T5Classifier(config=t5_config(), adapter=prompt(8))
    weight = net.net.prompt_encoder["default"].embedding.weight
    net.adopt(Data())
    expected = net.net.get_input_embeddings().weight[[5, 6, 1, 5, 6, 1, 5, 6]]
    assert torch.equal(weight, expected) and weight.requires_grad
    with torch.no_grad():
        weight.add_(1)
    net.adopt(Data())  # as for an evaluation after training
    assert torch.equal(weight, expected + 1)
    loaded = T5Classifier(config=t5_config(), adapter=prompt(8))
    loaded.load_state_dict(net.state_dict())
    loaded.adopt(Data())
    assert torch.equal(loaded.net.prompt_encoder["default"].embedding.weight, expected + 1)


def test_networks_come_from_folders(tmp_path):
    write_t5(tmp_path / "t5")
    net = T5Classifier(str(tmp_path / "t5"), adapter=lora(2), label_tokens=LABELS)
    kept = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "t5")
    assert torch.equal(net.net.get_input_embeddings().weight, kept.shared.weight)
    transformers.BertModel(transformers.BertConfig(**BERT)).save_pretrained(tmp_path / "bert")
    found = SequenceClassifier(3, str(tmp_path / "bert"), adapter=lora(2, target_modules=["query"]))
    assert found(**batch()[0]).shape == (5, 3)
    trained = {name for name, p in found.named_parameters() if p.requires_grad}
    assert {"lora" in name or "classifier" in name for name in trained} == {True}
    assert any("classifier" in name for name in trained)  # a new one is trained, too


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: T5Classifier(), "T5Classifier.*give one of them"),
        (lambda: T5Classifier("some/model", config={}), "T5Classifier.*give one of them"),
        (lambda: T5Classifier(config={"d_modle": 16}), "T5Config knows no d_modle"),
        (lambda: SequenceClassifier(2), "SequenceClassifier.*give one of them"),
        (lambda: SequenceClassifier(1, config=BERT), "num_labels=1"),
        (lambda: SequenceClassifier(2, config={}), "no model_type"),
    ],
)
def test_impossible_networks_are_refused(make, named):
    with pytest.raises(ValueError, match=named):
        make()


@pytest.mark.parametrize("make", [T5Classifier, lambda name: SequenceClassifier(2, name)], ids=["T5", "sequence"])
def test_missing_weights_say_what_to_get_and_where_to_put_them(make):
    start = time.perf_counter()
    with pytest.raises(
        FileNotFoundError, match="hf download google-t5/t5-base --local-dir t5-base.*model_name_or_path"
    ):
        make("google-t5/t5-base")
    assert time.perf_counter() - start < 2.5


# --- training and evaluation


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Make a data module on a stand-in of its task."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_tokenizer(tmp_path / "tokenizer")

    def module(task: str, **options) -> GlueDataModule:
        write_glue(tmp_path, task, **{name: options.pop(name) for name in ("train",) if name in options})
        return GlueDataModule(task, str(tmp_path / "tokenizer"), str(tmp_path), **options)

    return module


def sgd(lr: float = 0.1):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


@pytest.mark.parametrize("task", ["cola", "mrpc", "mnli", "rte"])
@pytest.mark.parametrize("encoding", ["instruction", "pair"])
def test_metrics_are_those_of_sklearn(task, encoding, data):
    module = data(task, batch_size=5, encoding=encoding)
    if encoding == "instruction":
        net = awake(T5Classifier(config=t5_config(), adapter=lora(2)))
    else:
        net = awake(SequenceClassifier(3 if task == "mnli" else 2, config=BERT))
    model = TextClassifier(net, sgd())
    (logged,) = trainer().validate(model, module, verbose=False)
    module.batch_size = 24
    ((inputs, classes),) = module.val_dataloader()
    with torch.no_grad():
        scores = net.scores(**inputs)
        guessed = scores.argmax(1)
        posed, targets = net.pose(inputs, classes)
        losses = ENTROPY.losses(net(**posed), targets)
    expected = {"val/loss": losses.mean(), "val/accuracy": sklearn_metrics.accuracy_score(classes, guessed)}
    if task == "cola":
        expected["val/matthews"] = sklearn_metrics.matthews_corrcoef(classes, guessed)
    if task == "mrpc":
        expected["val/f1"] = sklearn_metrics.f1_score(classes, guessed)
    assert logged.keys() == expected.keys()
    for name, value in expected.items():
        assert logged[name] == pytest.approx(float(value), rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("kind", ["T5", "sequence"])
def test_training_finds_the_word_that_tells_the_class(kind, data):
    module = data("sst2", train=96, encoding="instruction" if kind == "T5" else "pair", batch_size=16)
    config = t5_config(d_model=32, num_layers=1)
    net = T5Classifier(config=config) if kind == "T5" else SequenceClassifier(2, config={**BERT, "hidden_size": 32})
    model = TextClassifier(net, lambda parameters: IEF(parameters, lr=0.3, damping=1e-2), dropout=False)
    fitted = trainer(max_epochs=8)
    fitted.fit(model, module)
    assert fitted.callback_metrics["val/accuracy"] > 0.9
    assert "train/loss" in fitted.callback_metrics


def test_labels_that_the_caller_gives_need_no_data_module():
    loader = torch.utils.data.DataLoader(
        [({name: x[0] for name, x in batch(1)[0].items()}, n % 3) for n in range(6)], batch_size=3
    )
    model = TextClassifier(small(prompt(4)), sgd(1.0), metrics=["accuracy", "matthews"])
    fitted = trainer()
    fitted.fit(model, loader, loader)
    assert {"val/accuracy", "val/matthews", "val/loss", "train/loss"} <= fitted.callback_metrics.keys()
    nameless = TextClassifier(T5Classifier(config=t5_config()), sgd())
    with pytest.raises(MisconfigurationException, match="label_tokens="):
        trainer().fit(nameless, loader)
    with pytest.raises(MisconfigurationException, match="f1 is of two classes, there are 3"):
        trainer().fit(TextClassifier(small(), sgd(), metrics=["f1"]), loader)


def test_numbers_of_classes_are_compared(data):
    model = TextClassifier(SequenceClassifier(2, config=BERT), sgd())
    with pytest.raises(MisconfigurationException, match="Set num_labels=3"):
        trainer().fit(model, data("mnli", encoding="pair"))


class Watch(L.Callback):
    def __init__(self):
        self.rates, self.modes = [], set()

    def on_train_batch_start(self, trainer, pl_module, *args):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.modes |= {module.training for module in pl_module.net.modules()}


@pytest.mark.parametrize("dropout", [True, False])
def test_linear_schedule_ends_at_zero_and_dropout_is_as_asked(dropout, data):
    watch = Watch()
    model = TextClassifier(small(lora(2)), sgd(0.6), lr_scheduler="linear", dropout=dropout)
    run = trainer(max_epochs=2, callbacks=[watch], num_sanity_val_steps=1)
    model.net._knows_labels = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's, of modules in evaluation
        run.fit(model, data("rte", batch_size=16))
    assert watch.rates == pytest.approx([0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert run.optimizers[0].param_groups[0]["lr"] == 0
    assert watch.modes == {dropout}


def test_linear_schedule_needs_an_end(data):
    model = TextClassifier(T5Classifier(config=t5_config()), sgd(), lr_scheduler="linear")
    with pytest.raises(MisconfigurationException, match="max_epochs or max_steps"):
        trainer(max_epochs=-1).fit(model, data("rte"))


def test_other_schedules_are_stepped_after_each_epoch(data):
    model = TextClassifier(
        T5Classifier(config=t5_config(), adapter=prompt(4)),
        sgd(1.0),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
    )
    run = trainer(max_epochs=2)
    run.fit(model, data("rte"))
    assert run.optimizers[0].param_groups[0]["lr"] == 0.25
    assert sum(p.numel() for p in run.optimizers[0].param_groups[0]["params"]) == 4 * 16  # what is trained, no more


def test_a_checkpoint_brings_its_prompt_back(tmp_path, data):
    module = data("rte")

    def model() -> TextClassifier:
        torch.manual_seed(1)
        return TextClassifier(T5Classifier(config=t5_config(), adapter=prompt(4)), sgd(1.0))

    run, first = trainer(), model()
    run.fit(first, module)
    run.save_checkpoint(tmp_path / "some.ckpt")
    again = model()
    (logged,) = trainer().validate(again, module, ckpt_path=tmp_path / "some.ckpt", verbose=False)
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert logged["val/loss"] == pytest.approx(float(run.callback_metrics["val/loss"]), rel=1e-5)
