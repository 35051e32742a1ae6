"""The figures of a run: drawn from what was logged, left out where nothing was."""

import csv
import importlib.util
import math

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from matplotlib.image import imread

from lightning_ief.experiments.figures import TrainingFigures, callback, draw_training, training


@pytest.fixture
def metrics(tmp_path):
    """Write a metrics.csv as CSVLogger does: a row for each call of log, empty where a column was not logged."""

    def write(*rows):
        path = tmp_path / "metrics.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["step", *sorted(set().union(*rows) - {"step"})])
            writer.writeheader()
            writer.writerows(rows)
        return path

    return write


TRAIN = [{"step": step, "train/loss": 1.0 / (step + 1)} for step in range(6)]
VAL = [{"step": 2, "val/loss": 0.5}, {"step": 5, "val/loss": 0.4}]
GAMMA = [
    {"step": step, "gamma_relative/sgd": 1.0, "gamma_relative/ef": 3.0, "gamma_relative/ief": 0.3} for step in (2, 5)
]


def curves(figure):
    """Label → points of each curve that belongs in the legend."""
    axes = figure.axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines if line.get_label() in labels}


@pytest.fixture
def figures(monkeypatch):
    """Figures by file name, as they are saved."""
    saved = {}
    save = training.save

    def spy(figure, path):
        saved[path.name] = figure
        return save(figure, path)

    monkeypatch.setattr(training, "save", spy)
    return saved


def test_draws_what_was_logged(metrics, tmp_path, figures):
    drawn = draw_training(metrics(*TRAIN, *VAL, *GAMMA), tmp_path / "new" / "figures")
    assert [path.name for path in drawn] == ["gamma_ratios.png", "loss.png"]
    for path in drawn:
        height, width, _ = imread(path).shape
        assert width > height > 500
    assert curves(figures["gamma_ratios.png"]) == {"EF": [[2, 3.0], [5, 3.0]], "iEF": [[2, 0.3], [5, 0.3]]}
    assert curves(figures["loss.png"]) == {
        "training, each batch": [[row["step"], row["train/loss"]] for row in TRAIN],
        "validation": [[2, 0.5], [5, 0.4]],
    }
    for figure in figures.values():
        axes = figure.axes[0]
        assert axes.get_xlabel() and axes.get_ylabel() and axes.get_yscale() == "log"


def test_curves_differ_without_colour(metrics, tmp_path, figures):
    names = ["ef", "ief", "sampled_fisher", "natural_gradient", "mine"]
    draw_training(metrics(*TRAIN, {"step": 1, **{f"gamma_relative/{name}": 0.5 for name in names}}), tmp_path)
    lines = [line for line in figures["gamma_ratios.png"].axes[0].lines if line.get_marker() != "None"]
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == len(names)
    assert {"mine"} <= set(curves(figures["gamma_ratios.png"]))  # a direction of the user's own keeps its name


@pytest.mark.parametrize("missing", [[], [{"step": 1, "gamma_relative/ef": math.nan, "gamma_relative/sgd": 1.0}]])
def test_figure_of_gamma_is_left_out_with_a_note(metrics, tmp_path, missing):
    with pytest.warns(UserWarning, match=r"gamma_ratios\.png was left out: .*GammaIndicators"):
        drawn = draw_training(metrics(*TRAIN, *missing), tmp_path)
    assert [path.name for path in drawn] == ["loss.png"]
    assert not (tmp_path / "gamma_ratios.png").exists()


def test_figure_of_loss_is_left_out_with_a_note(metrics, tmp_path):
    with pytest.warns(UserWarning, match=r"loss\.png was left out"):
        assert [path.name for path in draw_training(metrics(*GAMMA), tmp_path)] == ["gamma_ratios.png"]


def test_values_that_are_not_finite_are_left_out(metrics, tmp_path, figures):
    rows = [{"step": 0, "val/loss": math.inf}, {"step": 1, "val/loss": 2.0}, {"step": 2, "val/loss": math.nan}]
    draw_training(metrics(*rows, *GAMMA), tmp_path)
    assert curves(figures["loss.png"]) == {"validation": [[1, 2.0]]}


def test_losses_that_are_not_positive_get_a_linear_axis(metrics, tmp_path, figures):
    draw_training(metrics({"step": 0, "val/loss": -1.0}, {"step": 1, "val/loss": 2.0}, *GAMMA), tmp_path)
    assert figures["loss.png"].axes[0].get_yscale() == "linear"


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.csv"):
        draw_training(tmp_path / "nothing.csv", tmp_path)


class Toy(L.LightningModule):
    def __init__(self, logs: bool = True) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.logs = logs

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).square().mean()
        if self.logs:
            self.log("train/loss", loss)
            self.log("gamma_relative/ief", 0.5)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(logger, module=None, **options):
    trainer = L.Trainer(
        max_steps=4,
        log_every_n_steps=1,
        logger=logger,
        callbacks=[TrainingFigures()],
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module or Toy(), torch.utils.data.DataLoader(torch.ones(8, 2), batch_size=2))


def test_callback_draws_beside_the_metrics(tmp_path):
    fit(CSVLogger(tmp_path, name="run", version=0))
    run = tmp_path / "run" / "version_0"
    assert {path.name for path in (run / "figures").iterdir()} == {"gamma_ratios.png", "loss.png"}
    assert (run / "metrics.csv").is_file()


def test_callback_needs_a_csv_logger():
    with pytest.raises(MisconfigurationException, match="CSVLogger"):
        fit(False)


def test_callback_names_the_extra_if_matplotlib_is_missing(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(callback, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-ief\[plots\]'"):
        fit(CSVLogger(tmp_path))


def test_callback_says_if_nothing_was_logged(tmp_path):
    with pytest.warns(UserWarning, match="nothing was logged"):
        fit(CSVLogger(tmp_path), Toy(logs=False))


def test_callback_leaves_a_fast_dev_run_alone(tmp_path):
    fit(CSVLogger(tmp_path), fast_dev_run=True)
    assert not list(tmp_path.iterdir())
