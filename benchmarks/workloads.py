"""What is trained: networks of the sizes that the targets speak of, on random data, the same for every contestant.

A network takes the inputs as positional arguments and returns logits; inputs are always a tuple.
"""

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_ief.tasks import MLP, next_token_targets

__all__ = [
    "GROWTH_N",
    "GROWTH_P",
    "OVERHEAD",
    "SMOKE",
    "SMOKE_N",
    "SMOKE_P",
    "WORKLOADS",
    "Batch",
    "Instance",
    "Workload",
    "find",
]


class Batch(NamedTuple):
    """Inputs of the network, and a class for every position of its logits."""

    inputs: tuple[Tensor, ...]
    targets: Tensor


class Instance(NamedTuple):
    """A network with a batch for it."""

    net: nn.Module
    batch: Batch

    @property
    def samples(self) -> int:
        """N."""
        return len(self.batch.targets)

    @property
    def parameters(self) -> int:
        """P, the trainable ones."""
        return sum(p.numel() for p in self.net.parameters() if p.requires_grad)


@dataclass(frozen=True)
class Workload:
    """A network of full size, and a small one of the same kind on which updates are checked.

    Attributes:
        name: On the command line and in file names.
        title: In the report.
        make: Makes the full instance.
        make_small: Makes the small one.
        steps: Steps that are timed in each round.
        warmup: Steps before those: memory is touched for the first time, the capture looks around.
    """

    name: str
    title: str
    make: Callable[[], Instance]
    make_small: Callable[[], Instance]
    steps: int = 10
    warmup: int = 2

    def full(self, device: torch.device) -> Instance:
        """The instance that is timed: the same numbers at every call."""
        torch.manual_seed(0)
        return _moved(self.make(), device, torch.float32)

    def small(self, device: torch.device) -> Instance:
        """The instance for the check, in float64; no parameter is at a special value such as zero."""
        torch.manual_seed(0)
        instance = self.make_small()
        for p in instance.net.parameters():
            if p.requires_grad:
                p.data.add_(torch.randn_like(p), alpha=0.05)
        return _moved(instance, device, torch.float64)


def _moved(instance: Instance, device: torch.device, dtype: torch.dtype) -> Instance:
    inputs = (x.to(device, dtype if x.is_floating_point() else None) for x in instance.batch.inputs)
    batch = Batch(tuple(inputs), instance.batch.targets.to(device))
    return Instance(instance.net.to(device, dtype).train(), batch)


# --- perceptrons


def _mlp_instance(widths: list[int], samples: int) -> Instance:
    batch = Batch((torch.randn(samples, widths[0]),), torch.randint(0, widths[-1], (samples,)))
    return Instance(MLP(widths), batch)


def _mlp(name: str, widths: list[int], samples: int, **options: Any) -> Workload:
    return Workload(
        name,
        f"MLP {'-'.join(map(str, widths))}, N={samples}",
        lambda: _mlp_instance(widths, samples),
        lambda: _mlp_instance([12, 8, 8, 5], 6),
        **options,
    )


# --- vision transformers, all parameters


def _vit_instance(name: str, size: int, classes: int, samples: int, **options: Any) -> Instance:
    import timm

    net = timm.create_model(name, pretrained=False, img_size=size, num_classes=classes, **options)
    return Instance(net, Batch((torch.randn(samples, 3, size, size),), torch.randint(0, classes, (samples,))))


def _vit(name: str, model: str, size: int) -> Workload:
    return Workload(
        name,
        f"timm {model} at {size}×{size}, all parameters, N=32",
        lambda: _vit_instance(model, size, classes=100, samples=32),
        lambda: _vit_instance(model, 16, classes=5, samples=4, patch_size=8, embed_dim=12, depth=2, num_heads=2),
        steps=3,
        warmup=1,
    )


# --- T5 with adapters


class _Seq2Seq(nn.Module):
    """An encoder-decoder of transformers that returns logits."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.net(input_ids=source, decoder_input_ids=target).logits


_T5_BASE = {"vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
_T5_SMALL = {"vocab_size": 30, "d_model": 16, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2}


def _t5_instance(shape: dict[str, int], adapter: Callable[[], Any], samples: int, source: int, target: int) -> Instance:
    import peft
    import transformers
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    config = transformers.T5Config(**shape, dropout_rate=0.0, decoder_start_token_id=0, use_cache=False)
    net = peft.get_peft_model(transformers.T5ForConditionalGeneration(config), adapter())
    if shape is _T5_SMALL:  # T5's norm computes in float32 whatever the model's precision, the check in float64
        for module in net.modules():
            if isinstance(module, T5LayerNorm):
                module.forward = types.MethodType(_norm, module)
    tokens = [torch.randint(1, shape["vocab_size"], (samples, length)) for length in (source, target, target)]
    return Instance(_Seq2Seq(net), Batch((tokens[0], tokens[1]), tokens[2]))


def _norm(self: nn.Module, x: Tensor) -> Tensor:
    return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


def _prompt(tokens: int) -> Any:
    from peft import PromptTuningConfig

    return PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=tokens, num_transformer_submodules=1)


def _lora(rank: int) -> Any:
    from peft import LoraConfig

    options = {"r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "target_modules": ["q", "v"]}
    # With PEFT's usual B = 0 the gradient of A would be zero at first, unlike in all later steps.
    return LoraConfig(task_type="SEQ_2_SEQ_LM", init_lora_weights=False, **options)


def _t5(name: str, title: str, adapter: Callable[[int], Any], size: int) -> Workload:
    return Workload(
        name,
        f"T5-base shape, {title}, N=32, 64 tokens in, 2 out",
        lambda: _t5_instance(_T5_BASE, lambda: adapter(size), samples=32, source=64, target=2),
        lambda: _t5_instance(_T5_SMALL, lambda: adapter(4), samples=3, source=6, target=3),
        steps=2,
        warmup=1,
    )


# --- GPT-2 with LoRA


class _Causal(nn.Module):
    """A causal language model of transformers that returns logits."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(input_ids=tokens, use_cache=False).logits


def _gpt2_instance(samples: int, length: int, **shape: int) -> Instance:
    import peft
    import transformers

    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    net = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **dropout))
    options = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    # With PEFT's usual B = 0 the gradient of A would be zero at first, unlike in all later steps.
    adapted = peft.get_peft_model(net, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options))
    tokens = torch.randint(0, net.config.vocab_size, (samples, length))
    return Instance(_Causal(adapted), Batch((tokens,), next_token_targets(tokens)))


_GPT2_SMALL = {"vocab_size": 30, "n_positions": 8, "n_embd": 12, "n_layer": 2, "n_head": 2}


def _named(*workloads: Workload) -> dict[str, Workload]:
    return {workload.name: workload for workload in workloads}


_WIDE = [3072, 2048, 2048, 10]

WORKLOADS = _named(
    _mlp("mlp-64", _WIDE, 64),
    _mlp("mlp-256", _WIDE, 256),
    _mlp("mlp-1024", _WIDE, 1024, steps=5),
    _vit("vit-tiny-224", "vit_tiny_patch16_224", 224),
    _vit("vit-base-96", "vit_base_patch16_224", 96),
    _t5("t5-prompt", "prompt tuning with 20 virtual tokens", _prompt, 20),
    _t5("t5-lora", "LoRA with r=8 on q and v", _lora, 8),
    Workload(
        "gpt2-lora",
        "GPT-2 (124M, 50,257 tokens), LoRA with r=8 on q, k, v, N=8, 128 tokens",
        lambda: _gpt2_instance(samples=8, length=128),
        lambda: _gpt2_instance(samples=3, length=6, **_GPT2_SMALL),
        steps=2,
        warmup=1,
    ),
    _mlp("digits", [64, 512, 256, 10], 64, steps=50, warmup=10),
)

# At T = 1 the Gram costs N² (d_in + d_out): the widths are such that it overtakes the rest, N d_in d_out, on the way.
GROWTH_N = _named(*(_mlp(f"growth-n-{2**k}", [784, 512, 512, 10], 2**k) for k in range(4, 12)))

# P ≈ 2 w² for widths w-w-w-10.
GROWTH_P = _named(
    *(_mlp(f"growth-p-{p:.0e}".replace("e+0", "e"), [round((p / 2) ** 0.5)] * 3 + [10], 64, steps=5)
      for p in (1e5, 3e5, 1e6, 3e6, 1e7, 3e7, 1e8))
)  # fmt: skip

# Real depth, tiny width: what remains of a step is what the host does to call the operations. `find` knows them not.


def _narrow_vit(adapted: bool) -> Instance:
    shape = {"patch_size": 8, "embed_dim": 24, "num_heads": 2}  # the 12 blocks are left as they are
    instance = _vit_instance("vit_base_patch16_224", 16, classes=10, samples=4, **shape)
    return Instance(_with_lora_on_qkv(instance.net), instance.batch) if adapted else instance


def _with_lora_on_qkv(net: nn.Module) -> nn.Module:
    import peft

    # With PEFT's usual B = 0 the gradient of A would be zero at first, unlike in all later steps.
    options = {"r": 2, "lora_alpha": 2, "lora_dropout": 0.0, "target_modules": ["qkv"]}
    return peft.get_peft_model(net, peft.LoraConfig(init_lora_weights=False, **options))


_T5_NARROW = {"vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 12, "num_heads": 2}


class _Recurrent(nn.Module):
    """An LSTM and a linear layer behind its last step."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def _lstm_instance(width: int, samples: int, length: int) -> Instance:
    batch = Batch((torch.randn(samples, length, width),), torch.randint(0, 10, (samples,)))
    return Instance(_Recurrent(width, 10), batch)


def _deep(name: str, title: str, make: Callable[[], Instance]) -> Workload:
    return Workload(name, title, make, make)


OVERHEAD = _named(
    _deep("mlp", "MLP, 3 layers", lambda: _mlp_instance([16, 16, 16, 10], 8)),
    _deep("vit-lora", "ViT-B depth, LoRA on qkv", lambda: _narrow_vit(adapted=True)),
    _deep("vit", "ViT-B depth, all parameters", lambda: _narrow_vit(adapted=False)),
    _deep("t5-lora", "T5-base depth, LoRA on q, v", lambda: _t5_instance(_T5_NARROW, lambda: _lora(2), 4, 6, 2)),
    _deep("lstm", "LSTM, 64 units, 32 steps, N=32", lambda: _lstm_instance(64, 32, 32)),
)

# In seconds, to see that everything works.
SMOKE = _named(_mlp("smoke", [256, 512, 10], 8, steps=2))
SMOKE_N = _named(*(_mlp(f"smoke-n-{n}", [64, 128, 10], n, steps=2) for n in (4, 16)))
SMOKE_P = _named(*(_mlp(f"smoke-p-{width}", [width, width, 10], 8, steps=2) for width in (64, 256)))


def find(name: str) -> Workload:
    """The workload of that name; raises SystemExit with the names there are."""
    named = WORKLOADS | GROWTH_N | GROWTH_P | SMOKE | SMOKE_N | SMOKE_P
    if name not in named:
        raise SystemExit(f"There is no workload '{name}'; there are: {', '.join(WORKLOADS)}.")
    return named[name]
