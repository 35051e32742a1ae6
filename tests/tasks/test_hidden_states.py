"""The last layer alone says what the whole model says; what was computed for other weights or texts is not used."""

from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from lightning_ief.tasks.glue import GlueDataModule  # noqa: E402
from lightning_ief.tasks.hidden_states import HiddenStatesDataModule, LastLayer  # noqa: E402
from lightning_ief.tasks.text import SequenceClassifier  # noqa: E402
from tests.tasks.text_stand_ins import write_bert, write_glue  # noqa: E402

LORA = {"r": 2, "lora_alpha": 2, "target_modules": r".*layer\.1\.attention\.(self\.(query|value)|output\.dense)"}


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_bert(Path("bert"))
    write_glue(Path("glue"), "sst2", train=8, validation=6, kind="jsonl")


def module(**options) -> HiddenStatesDataModule:
    found = HiddenStatesDataModule("sst2", "bert", "glue", "hidden", **{"max_length": 16, "batch_size": 5, **options})
    found.prepare_data()
    found.setup()
    return found


def test_logits_are_those_of_the_whole_model():
    """With adapters that are not at their start, in the last layer alone, and sentences of different lengths."""
    torch.manual_seed(0)
    last = LastLayer(2, "bert", peft.LoraConfig(**LORA))
    whole = SequenceClassifier(2, "bert", adapter=peft.LoraConfig(**LORA))
    net = whole.net.get_base_model()
    for one, other in ((net.bert.encoder.layer[-1], last.layer), (net.classifier, last.classifier)):
        with torch.no_grad():
            for p, q in zip(one.parameters(), other.parameters(), strict=True):
                q.copy_(p.normal_(0.0, 0.3) if p.requires_grad else p)
    assert [p.shape for p in last.parameters() if p.requires_grad] == [
        p.shape for p in whole.parameters() if p.requires_grad
    ]
    text = GlueDataModule("sst2", "bert", "glue", "pair", batch_size=5, max_length=16)
    text.prepare_data()
    text.setup()
    whole.eval(), last.eval()
    lengths = set()
    for name in ("train_set", "val_set"):
        pairs = zip(DataLoader(getattr(text, name), 5), DataLoader(getattr(module(), name), 5), strict=True)
        for (inputs, classes), (states, same) in pairs:
            assert torch.equal(classes, same)
            lengths.add(states["attention_mask"].shape[1])
            assert states["attention_mask"].shape == inputs["attention_mask"].shape
            logits = whole(**inputs)
            torch.testing.assert_close(last(**states), logits, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(last.scores(**states), whole.scores(**inputs), atol=1e-5, rtol=1e-5)
            assert logits.std() > 0.1
    assert len(lengths) > 1


def test_states_of_other_weights_texts_or_lengths_are_computed_anew():
    first = module().val_set[0][0]["hidden_states"]
    files = {*Path("hidden").iterdir()}
    assert len(files) == 1 and torch.equal(module().val_set[0][0]["hidden_states"], first)
    assert {*Path("hidden").iterdir()} == files  # nothing is computed twice
    module(max_length=12)
    assert len([*Path("hidden").iterdir()]) == 2
    model = transformers.BertModel.from_pretrained("bert")
    with torch.no_grad():
        model.encoder.layer[0].output.dense.bias[0] += 1.0
    model.save_pretrained("bert")
    assert not torch.allclose(module().val_set[0][0]["hidden_states"], first)
    path = Path("glue/sst2/validation.jsonl")
    path.write_text(path.read_text().replace("often", "always"))
    assert len([*Path("hidden").iterdir()]) == 3
    module()
    assert len([*Path("hidden").iterdir()]) == 4
