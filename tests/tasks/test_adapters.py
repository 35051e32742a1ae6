"""Checkpoints without the backbone: small, complete, and refused where they do not belong."""

from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from lightning_ief import IEF  # noqa: E402
from lightning_ief.tasks.adapters import export_adapter  # noqa: E402
from lightning_ief.tasks.text import SequenceClassifier, TextClassifier  # noqa: E402

CONFIG = {
    "model_type": "bert", "vocab_size": 2000, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 32,
}  # fmt: skip


def classifier(seed: int = 0, targets: tuple[str, ...] = ("query", "value")) -> TextClassifier:
    torch.manual_seed(seed)
    adapter = peft.LoraConfig(r=2, lora_alpha=2, target_modules=list(targets))
    net = SequenceClassifier(2, config=CONFIG, adapter=adapter)
    return TextClassifier(net, partial(IEF, lr=0.5, damping=1e-6), dropout=False)


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 2000, (32, 8), generator=generator)
    samples = [({"input_ids": x, "attention_mask": torch.ones_like(x)}, x[0] % 2) for x in ids]
    return DataLoader(samples, 8)


def trained(folder: Path, epochs: int, module: TextClassifier, checkpoint: Path | None = None, *more) -> Path:
    found = [ModelCheckpoint(folder, filename="last"), *more]
    options = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    L.Trainer(max_epochs=epochs, callbacks=found, **options).fit(module, loader(), ckpt_path=checkpoint)
    return folder / "last.ckpt"


def trainable(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def test_a_checkpoint_holds_what_was_trained_and_resumes(tmp_path):
    whole, first, resumed = classifier(), classifier(), classifier()
    start = trainable(whole)
    trained(tmp_path / "whole", 2, whole)
    path = trained(tmp_path / "first", 1, first)
    saved = torch.load(path, weights_only=True)
    assert {*saved["state_dict"]} == {*start} and any("lora_A" in name for name in start)
    total = sum(p.numel() for p in first.parameters())
    assert path.stat().st_size < total  # a quarter of the backbone's bytes
    trained(tmp_path / "resumed", 2, resumed, path)
    for name, value in trainable(resumed).items():
        assert torch.equal(value, trainable(whole)[name]), name
        assert not torch.equal(value, start[name]) or "lora_A" in name


@pytest.mark.skipif(not hasattr(callbacks, "EMAWeightAveraging"), reason="came with lightning 2.6")
def test_with_averaged_weights_too(tmp_path):
    def averaging() -> L.Callback:
        return callbacks.EMAWeightAveraging(decay=0.5)

    whole, first, resumed = classifier(), classifier(), classifier()
    start = trainable(whole)
    trained(tmp_path / "whole", 2, whole, None, averaging())
    path = trained(tmp_path / "first", 1, first, None, averaging())
    saved = torch.load(path, weights_only=True)
    assert {*saved["state_dict"]} == {*saved["current_model_state"]} == {*start}
    assert path.stat().st_size < sum(p.numel() for p in first.parameters())
    trained(tmp_path / "resumed", 2, resumed, path, averaging())
    for name, value in trainable(resumed).items():
        assert torch.equal(value, trainable(whole)[name]), name


def test_another_backbone_is_refused(tmp_path):
    path = trained(tmp_path, 1, classifier())
    with pytest.raises(MisconfigurationException, match=r"trained on another backbone: [\d,]+ frozen .* here"):
        trained(tmp_path / "other", 2, classifier(seed=1), path)


def test_the_same_weights_in_another_order_are_another_backbone(tmp_path):
    path, module = trained(tmp_path, 1, classifier()), classifier()
    layer = module.get_submodule("net.net.base_model.model.bert.encoder.layer.0.output.dense")
    layer.weight.data = layer.weight.data.flip(0)
    with pytest.raises(MisconfigurationException, match="trained on another backbone"):
        trained(tmp_path / "other", 2, module, path)


def test_other_adapters_are_refused(tmp_path):
    path = trained(tmp_path, 1, classifier())
    with pytest.raises(RuntimeError, match=r"missing \['net.*key.*lora_A"):
        trained(tmp_path / "more", 2, classifier(targets=("query", "value", "key")), path)
    with pytest.raises(RuntimeError, match=r"unknown \['net.*value.*lora_A"):
        classifier(targets=("query",)).load_state_dict(torch.load(path, weights_only=True)["state_dict"], strict=False)


def test_a_full_state_dict_loads_too():
    a, b = classifier(), classifier(seed=1)
    b.load_state_dict(a.state_dict())
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_peft_loads_what_is_exported(tmp_path):
    module = classifier()
    trained(tmp_path, 1, module)
    folder = export_adapter(module, tmp_path / "adapter")
    torch.manual_seed(0)
    backbone = SequenceClassifier(2, config=CONFIG).net
    inputs = next(iter(loader()))[0]
    again = peft.PeftModel.from_pretrained(backbone, folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, module.net.eval()(**inputs))
    with pytest.raises(ValueError, match="Linear holds no model of PEFT"):
        export_adapter(nn.Linear(2, 2), tmp_path / "none")
