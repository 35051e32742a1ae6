"""A training step in the steady state runs through few files of the package."""

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

import lightning_ief
from lightning_ief import IEF
from tests.helpers import Classifier

MOST = 15
PACKAGE = Path(lightning_ief.__file__).parent


class Profiled(Classifier):
    """Notes the files of the package that each training step runs through."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.files: list[set[str]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        files: set[str] = set()

        def note(frame: FrameType, event: str, arg: object) -> None:
            if event == "call":
                files.add(frame.f_code.co_filename)

        before = sys.getprofile()
        sys.setprofile(note)
        try:
            return super().training_step(batch, batch_idx)
        finally:
            sys.setprofile(before)
            self.files.append({str(Path(f).relative_to(PACKAGE)) for f in files if Path(f).is_relative_to(PACKAGE)})


def test_a_step_runs_through_few_files() -> None:
    model = Profiled(lambda p: IEF(p, lr=0.5, damping=1e-3))
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = TensorDataset(torch.randn(40, 6), torch.randint(3, (40,)))
    trainer.fit(model, DataLoader(data, 8))
    first, *_, fourth, _ = model.files  # the last one ends the epoch
    assert {"module.py", "optim/base.py", "objectives/softmax.py"} < fourth < first  # the profile sees them, and fewer
    assert not [file for file in fourth if file.startswith(("training/", "distributed/"))]  # nothing to do for them
    assert len(fourth) <= MOST, f"{len(fourth)} files: {sorted(fourth)}"
