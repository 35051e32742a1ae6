"""Vision transformers with LoRA: counts, exact captures, where weights come from, checkpoints and exports."""

import time
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

timm = pytest.importorskip("timm")
peft = pytest.importorskip("peft")
hub = pytest.importorskip("huggingface_hub")

from lightning_ief import IEF, objectives  # noqa: E402
from lightning_ief.tasks.adapters import export_adapter  # noqa: E402
from lightning_ief.tasks.classifier import Classifier  # noqa: E402
from lightning_ief.tasks.hub import MissingError  # noqa: E402
from lightning_ief.tasks.vit import AdaptedClassifier, split_qkv, timm_lora, timm_vit  # noqa: E402
from tests.helpers import assert_exact, trainable  # noqa: E402
from tests.tasks.stand_ins import write_vit  # noqa: E402

PAPER = "vit_base_patch16_224.orig_in21k_ft_in1k"
C = 5
small_lora = partial(timm_lora, "test_vit", img_size=32)


@pytest.fixture
def weights(tmp_path) -> str:
    write_vit(tmp_path / "vit.pt")
    return str(tmp_path / "vit.pt")


def images(count: int = 4, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, dtype=dtype, generator=torch.Generator().manual_seed(0))


def awake(model: nn.Module) -> nn.Module:
    """Adapters start at zero, where half of their gradients vanish."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.05)
    return model


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 313_344),  # the paper's
        ({"bias": "none"}, 294_912),
        ({"split_qkv": False, "bias": "none"}, 294_912),
        ({"split_qkv": False}, 294_912 + 12 * 3 * 768),
        ({"projections": ["q", "k", "v"]}, 313_344 * 3 // 2),
        ({"num_classes": 100, "train_head": True}, 313_344 + 100 * 769),
        ({"train_head": True}, 313_344 + 1000 * 769),
    ],
    ids=str,
)
def test_numbers_of_trained_parameters_of_vit_base(options, count):
    with torch.device("meta"):
        net = timm_lora(PAPER, pretrained=False, **options)
    assert sum(p.numel() for p in trainable(net).values()) == count


def test_split_projections_compute_what_the_fused_one_does():
    fused = timm_vit("test_vit", pretrained=False, img_size=32, split_qkv=False).double().eval()
    split = timm_vit("test_vit", pretrained=False, img_size=32, split_qkv=False).double().eval()
    split.load_state_dict(fused.state_dict())
    assert split_qkv(split) is split
    names = [name for name, part in split.named_modules() if name.endswith((".qkv.q", ".qkv.k", ".qkv.v"))]
    assert len(names) == 3 * len(split.blocks)
    x = images()
    torch.testing.assert_close(split(x), fused(x), atol=1e-12, rtol=1e-12)
    assert sum(p.numel() for p in split.parameters()) == sum(p.numel() for p in fused.parameters())


@pytest.mark.parametrize("options", [{}, {"num_classes": C, "train_head": True}, {"split_qkv": False}], ids=str)
def test_gradients_of_samples_are_exact(options):
    net = awake(small_lora(pretrained=False, r=2, **options).double()).eval()
    lin = assert_exact(net, images(3), torch.tensor([0, 3, 4]), objectives.CrossEntropy())
    assert list(lin.parameters) == list(trainable(net))
    assert lin.jacobian.to_dense().count_nonzero(1).min() > 0.9 * sum(p.numel() for p in lin.parameters.values())


def test_weights_come_from_a_file_or_a_folder(weights, tmp_path):
    from safetensors.torch import save_file

    state = torch.load(weights, weights_only=True)
    save_file(state, tmp_path / "model.safetensors")
    expected = timm.create_model("test_vit").eval()
    expected.load_state_dict(state)
    x = torch.randn(2, 3, 160, 160)
    for path in (weights, str(tmp_path)):
        net = timm_lora("test_vit", checkpoint_path=path).eval()
        torch.testing.assert_close(net(x), expected(x))
    adapted = timm_lora("test_vit", C, checkpoint_path=weights, train_head=True)
    assert adapted(x).shape == (2, C)
    assert torch.equal(adapted.get_parameter("base_model.model.cls_token"), state["cls_token"])


SMALL = {"patch_size": 14, "in_chans": 1, "embed_dim": 12, "depth": 2, "num_heads": 2}
tiny = partial(timm_vit, "vit_tiny_patch16_224", img_size=28, pretrained=False, model_kwargs=SMALL)


def run_checkpoint(folder: Path, seed: int = 0, **options) -> tuple[nn.Module, str]:
    """A network, and the checkpoint of a run that trained it in full."""
    torch.manual_seed(seed)
    module = Classifier(tiny(num_classes=3, **options), partial(torch.optim.SGD, lr=0.1), 3)
    data = TensorDataset(torch.randn(8, 1, 28, 28), torch.arange(8) % 3)
    return module.net.eval(), str(trained(folder, module, data=data).rename(folder / "run.ckpt"))


def test_further_options_shape_the_network():
    net = tiny(num_classes=3)
    assert net(torch.randn(2, 1, 28, 28)).shape == (2, 3)
    width, layer = 12, 12 * 12 * 12 + 13 * 12  # qkv, projection, two of the MLP: 12 d² + 9 d; two norms: 4 d
    patches = 14 * 14 * width + width + width + 5 * width  # weights and bias, class token, 4 + 1 positions
    assert sum(p.numel() for p in net.parameters()) == patches + 2 * layer + 2 * width + 3 * (width + 1)


def test_a_run_of_the_first_stage_is_adapted_to_other_classes(tmp_path):
    first, path = run_checkpoint(tmp_path, split_qkv=False)
    net = timm_lora(
        "vit_tiny_patch16_224", 4, checkpoint_path=path, img_size=28, train_head=True, model_kwargs=SMALL
    ).eval()
    x = torch.randn(2, 1, 28, 28)
    assert net(x).shape == (2, 4)
    # LoRA starts at zero: what comes before the classifier is that of the first stage.
    torch.testing.assert_close(net.base_model.model.forward_features(x), first.forward_features(x))


@pytest.mark.parametrize(
    ("stage", "asked", "named"),
    [
        ({"split_qkv": True}, {}, r"split_qkv=True: 4 weights are missing, such as blocks\.0\.attn\.qkv\.weight"),
        ({"split_qkv": False}, {"depth": 3}, r"12 weights are missing, such as blocks\.2\.norm1\.weight"),
    ],
)
def test_a_run_of_another_network_is_refused(stage, asked, named, tmp_path):
    _, path = run_checkpoint(tmp_path, **stage)
    with pytest.raises(ValueError, match=named):
        tiny(num_classes=4, checkpoint_path=path, model_kwargs={**SMALL, **asked})


@pytest.mark.parametrize("offline", [True, False])
def test_missing_weights_say_what_to_get_and_where_to_put_it(offline, monkeypatch, tmp_path):
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("lightning_ief.tasks.hub.urlopen", refuse)
    start = time.perf_counter()
    with pytest.raises(MissingError, match=rf"hf download timm/{PAPER} .*checkpoint_path=PATH/TO/"):
        timm_lora(PAPER)
    assert time.perf_counter() - start < 2


def refuse(*args, **kwargs):
    raise OSError("no network")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"name": "vit_base_patch16_225"}, "no model 'vit_base_patch16_225'; similar are .*vit_base_patch16_224"),
        ({"name": "vit_base_patch16_224.in20k"}, r"no weights 'vit_base_patch16_224.in20k'; there are .*augreg_in21k"),
        ({"name": "test_vit", "num_classes": C}, r"for 1000 classes.*set train_head=True"),
        ({"name": "vit_base_patch16_224.orig_in21k"}, "has no classifier; set num_classes, and train_head=True"),
        ({"name": "test_vit", "split_qkv": False, "projections": ["q"]}, "fused projections have one adapter"),
        ({"name": "resnet10t", "pretrained": False}, r"split_qkv\(ResNet\): it has no attention"),
        ({"name": "vit_base_patch32_plus_256"}, r"no pretrained weights for 'vit_base.*pretrained=False"),
        ({"name": "test_vit", "model_kwargs": {"img_size": 32}}, "give img_size beside it, not in it"),
    ],
)
def test_impossible_networks_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        timm_lora(**options)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(MissingError, match=r"checkpoint_path=.*model\.safetensors"):
        timm_vit("test_vit", checkpoint_path=str(tmp_path))


# --- training


def classifier(weights: str, seed: int = 0, optimizer=None, dropout: bool = False) -> AdaptedClassifier:
    torch.manual_seed(seed)
    net = small_lora(C, checkpoint_path=weights, train_head=True, r=2)
    return AdaptedClassifier(net, optimizer or partial(IEF, lr=0.5, damping=1e-4), C, dropout=dropout)


def trained(
    folder: Path, module: Classifier, epochs: int = 1, checkpoint: Path | None = None, data: Dataset | None = None
) -> Path:
    data = data or TensorDataset(images(8, torch.float32), torch.arange(8) % C)
    options = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    callback = ModelCheckpoint(folder, filename="last")
    trainer = L.Trainer(max_epochs=epochs, callbacks=[callback], **options)
    trainer.fit(module, DataLoader(data, 4), ckpt_path=checkpoint)
    return folder / "last.ckpt"


def test_a_checkpoint_holds_adapters_biases_and_head(weights, tmp_path):
    module = classifier(weights)
    path = trained(tmp_path, module)
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert {*saved} == {*trainable(module)}
    kinds = ("lora_A.default.weight", "lora_B.default.weight", "base_layer.bias", "head.modules_to_save.default.weight")
    assert all(any(name.endswith(kind) for name in saved) for kind in kinds)
    assert path.stat().st_size < Path(weights).stat().st_size / 4

    # The head that PEFT puts aside is random, yet no part of the backbone.
    again = classifier(weights, seed=1)
    again.on_load_checkpoint(torch.load(path, weights_only=True))
    again.load_state_dict(saved, strict=again.strict_loading)
    x = images(3, torch.float32)
    assert torch.equal(again.eval()(x), module.eval()(x))


def test_another_backbone_is_refused(weights, tmp_path):
    path = trained(tmp_path, classifier(weights))
    write_vit(tmp_path / "other.pt", seed=1)
    with pytest.raises(MisconfigurationException, match="trained on another backbone"):
        trained(tmp_path / "other", classifier(str(tmp_path / "other.pt")), 2, path)


def test_peft_loads_what_is_exported(weights, tmp_path):
    module = classifier(weights)
    trained(tmp_path, module)
    folder = export_adapter(module, tmp_path / "adapter")
    backbone = timm_vit("test_vit", C, checkpoint_path=weights, img_size=32)
    again = peft.PeftModel.from_pretrained(backbone, folder).eval()
    x = images(3, torch.float32)
    torch.testing.assert_close(again(x), module.net.eval()(x))


@pytest.mark.parametrize("dropout", [True, False])
def test_only_what_trains_is_optimized_and_dropout_is_as_asked(weights, tmp_path, dropout):
    seen = []
    module = classifier(weights, optimizer=partial(torch.optim.SGD, lr=0.1), dropout=dropout)
    module.net.register_forward_hook(lambda net, inputs, output: seen.append(net.training))
    trained(tmp_path, module)
    assert set(seen) == {dropout}
    (group,) = module.optimizers().optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in module.parameters() if p.requires_grad]
