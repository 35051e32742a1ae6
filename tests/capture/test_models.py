"""Whole models of transformers, peft, timm and torch, all parameters, against one sample at a time in float64."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ief import directions, linearize, objectives
from lightning_ief.capture import Linearization
from tests.helpers import assert_exact, flatten, random_direction, relative_error

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
timm = pytest.importorskip("timm")
modeling_t5 = pytest.importorskip("transformers.models.t5.modeling_t5")

N, C = 3, 5  # samples, classes
ENTROPY = objectives.CrossEntropy()


@pytest.fixture(autouse=True)
def _norm_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """T5's norm takes its variance in float32 whatever the model's precision; the truth needs float64."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(modeling_t5.T5LayerNorm, "forward", forward)


def awake(model: nn.Module) -> nn.Module:
    """In float64 and evaluation, no parameter at a special value: LoRA's B, norms, biases, tokens and LayerScale."""
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p), alpha=0.05)
    return model.double().eval()


def t5(**options: Any) -> nn.Module:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=30, d_model=16, d_kv=4, d_ff=12, num_layers=2, num_heads=2, decoder_start_token_id=0, **options
        )
    )


def adapted(model: nn.Module, config: Any) -> nn.Module:
    return peft.get_peft_model(model, config)


def prompt_tuning() -> nn.Module:
    return adapted(
        t5(), peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4, num_transformer_submodules=1)
    )


def t5_lora() -> nn.Module:
    return adapted(t5(), peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules=["q", "v"], lora_dropout=0.1))


def vit(**options: Any) -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=12, depth=2, num_heads=2, num_classes=C, **options
    )


def vit_lora() -> nn.Module:
    return adapted(
        vit(), peft.LoraConfig(r=2, target_modules=r".*\.attn\.qkv", bias="lora_only", modules_to_save=["head"])
    )


def swin() -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=16, window_size=2, depths=(2, 1), embed_dim=8, num_heads=(1, 2), num_classes=C,
    )  # fmt: skip


def convnext() -> nn.Module:
    return timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(4, 8, 8, 8), num_classes=C)


def resnet() -> nn.Module:
    return timm.create_model("resnet10t", channels=(4, 4, 8, 8), num_classes=C)


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=30, n_embd=8, n_layer=2, n_head=2, n_positions=16)
    )


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, num_labels=C
        )
    )


class OfTokens(nn.Module):
    """A classifier of sequences by a recurrent layer, from its outputs and its last states."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 6, padding_idx=0)
        self.rnn = kind(6, 4, num_layers=2, bidirectional=True, batch_first=True, **options)
        self.head = nn.LazyLinear(C)
        self(torch.zeros(1, 2, dtype=torch.int64))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        y, states = self.rnn(self.embedding(input_ids * mask))
        pooled = (y * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        states = states if isinstance(states, tuple) else (states,)
        return self.head(torch.cat([pooled, *(s[-1] for s in states)], 1))


Batch = tuple[Any, Tensor]


def tokens(length: int, samples: int = N) -> dict[str, Tensor]:
    mask = torch.ones(samples, length, dtype=torch.int64)
    mask[0, -2:] = 0
    return {"input_ids": torch.randint(1, 30, (samples, length)), "attention_mask": mask}


def sequences() -> Batch:
    targets = torch.randint(0, 30, (N, 3))
    targets[1, 2] = -100
    return tokens(6) | {"decoder_input_ids": torch.randint(1, 30, (N, 3))}, targets


def without_mask() -> Batch:
    inputs, targets = sequences()
    return {name: x for name, x in inputs.items() if name != "attention_mask"}, targets


def images(size: int = 16) -> Batch:
    return torch.randn(N, 3, size, size, dtype=torch.float64), torch.randint(0, C, (N,))


def text() -> Batch:
    inputs = tokens(5)
    return inputs, inputs["input_ids"].roll(-1, 1).masked_fill(inputs["attention_mask"] == 0, -100)


def labelled() -> Batch:
    return tokens(5), torch.randint(0, C, (N,))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch]]] = {
    "T5, tied": (t5, sequences),
    "T5, untied, gated": (lambda: t5(tie_word_embeddings=False, feed_forward_proj="gated-gelu"), sequences),
    "T5, without a mask": (t5, without_mask),
    "T5, prompt tuning": (prompt_tuning, sequences),
    "T5, LoRA": (t5_lora, sequences),
    "ViT": (vit, images),
    "ViT, LayerScale": (lambda: vit(init_values=0.1), images),
    "ViT, LoRA with biases and head": (vit_lora, images),
    "Swin": (swin, images),
    "ConvNeXt": (convnext, lambda: images(32)),
    "ResNet": (resnet, lambda: images(32)),
    "GPT-2": (gpt2, text),
    "BERT": (bert, labelled),
    "LSTM": (lambda: OfTokens(nn.LSTM, proj_size=3), labelled),
    "GRU": (lambda: OfTokens(nn.GRU), labelled),
}


@pytest.mark.parametrize(("make", "batch"), MODELS.values(), ids=MODELS)
def test_model_is_exact(make: Callable[[], nn.Module], batch: Callable[[], Batch]):
    model = awake(make())
    lin = assert_exact(model, *batch(), ENTROPY)
    weighted = lin.jacobian.rmatvec(torch.randn(lin.num_samples))
    assert [name for name, entry in weighted.items() if not entry.any()] == []
    assert set(lin.parameters) == {name for name, p in model.named_parameters() if p.requires_grad}
    again = batch()
    assert_exact(model, *again, ENTROPY)  # the same plan, other numbers
    d = random_direction(lin.parameters)
    change = (lin.jvp(d) * lin.logit_gradients).flatten(1).sum(1)
    assert relative_error(change, lin.jacobian.matvec(d)) < 1e-8


def test_numbers_of_trainable_parameters():
    """What is captured is what is trained: a prompt, adapters with their biases, everything."""
    counts = {
        name: sum(p.numel() for p in make().parameters() if p.requires_grad) for name, (make, _) in MODELS.items()
    }
    assert counts["T5, prompt tuning"] == 4 * 16
    assert counts["T5, LoRA"] == 12 * (2 * 16 + 2 * 8) * 1
    assert counts["ViT, LoRA with biases and head"] == 2 * (2 * 12 + 2 * 36 + 36) + 12 * C + C


def test_tokenised_text_as_transformers_hands_it_over():
    """A BatchEncoding is a mapping, but no dict."""
    inputs, targets = labelled()
    model = awake(bert())
    expected = linearize(model, inputs, targets, ENTROPY).jacobian.gram()
    encoding = transformers.BatchEncoding({name: x.clone() for name, x in inputs.items()})
    assert relative_error(linearize(awake(bert()), encoding, targets, ENTROPY).losses, torch.ones(N)) > 0
    fresh = awake(bert())
    fresh.load_state_dict(model.state_dict())
    assert relative_error(linearize(fresh, encoding, targets, ENTROPY).jacobian.gram(), expected) < 1e-12


def dropped_out(make: Callable[[], nn.Module], batch: Callable[[], Batch]) -> Linearization:
    return linearize(awake(make()).train(), *batch(), ENTROPY)


@pytest.mark.parametrize("name", ["T5, tied", "T5, LoRA", "BERT", "GPT-2"])
def test_dropout_in_training(name: str):
    """Rows belong to the mask that was drawn; the derivative along a direction to the same one."""
    lin = dropped_out(*MODELS[name])
    losses = ENTROPY.losses(lin.output, lin.targets)
    parameters = list(lin.parameters.values())
    v, d = torch.randn(N, dtype=torch.float64), random_direction(lin.parameters)
    truth = torch.autograd.grad(losses @ v, parameters, retain_graph=True)
    assert relative_error(flatten(lin.jacobian.rmatvec(v)), torch.cat([g.flatten() for g in truth])) < 1e-10
    change = (lin.jvp(d) * lin.logit_gradients).flatten(1).sum(1)
    assert relative_error(change, lin.jacobian.matvec(d)) < 1e-8


def test_a_step_along_ief_changes_all_losses_alike():
    """J d_iEF = s at small damping, on a model where every kind of use occurs."""
    lin = linearize(awake(vit(init_values=0.1)), *images(), ENTROPY)
    d = directions.ief(lin, damping=1e-12)
    assert relative_error(lin.jacobian.matvec(d), lin.logit_gradient_norms) < 1e-6
