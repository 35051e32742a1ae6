"""A direction is known by its registration alone: no list of names elsewhere, and a new one is seen everywhere."""

import ast
import csv
import re
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from torch.utils.data import DataLoader

import lightning_ief
from lightning_ief import GammaIndicators, directions
from lightning_ief.directions import registry
from lightning_ief.experiments.evaluation import Result
from lightning_ief.experiments.figures import draw_runs, drawing, panels, training
from lightning_ief.experiments.figures.training import draw_training
from lightning_ief.experiments.tables import read_table
from tests.callbacks.gamma_stand_ins import Mixed, Samples, net
from tests.experiments.test_evaluation import DigitsDataModule, evaluated

PACKAGE = Path(lightning_ief.__file__).parent
READERS = [
    path.relative_to(PACKAGE).as_posix()
    for folder in ("callbacks", "experiments")
    for path in sorted((PACKAGE / folder).rglob("*.py"))
]
# What may name directions all the same: figures that are the paper's.
PAPER = {
    "experiments/figures/fields.py": None,  # all of it: SGD, NGD, iEF and EF on problems of two parameters
    "experiments/figures/panels.py": ("_OF_THE_PAPER", "_PANELS"),
}


def literals(source: str, allowed: tuple[str, ...] = ()) -> Iterator[tuple[int, str]]:
    """Strings that name a direction, but for docstrings, defaults of arguments and what the allowed names are set to.

    A name stands alone or among others that are no letters, as in gamma/ief; in sentences it stands for itself.
    """
    names = re.compile(rf"(?<![\w-])({'|'.join(registry.names())})(?![\w-])")
    tree, skipped = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(node.value)  # a docstring
        elif isinstance(node, ast.FunctionDef | ast.Lambda):
            for default in [*node.args.defaults, *filter(None, node.args.kw_defaults)]:
                skipped.update(ast.walk(default))
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id in allowed for target in targets):
                skipped.update(ast.walk(node))
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
        if node not in skipped and names.search(text):
            yield node.lineno, text


@pytest.mark.parametrize("file", READERS)
def test_no_direction_is_named(file):
    allowed = PAPER.get(file, ())
    if allowed is not None:
        assert [*literals((PACKAGE / file).read_text(encoding="utf-8"), allowed)] == []


def test_the_exceptions_are_needed():
    for file, allowed in PAPER.items():
        found = [text for _, text in literals((PACKAGE / file).read_text(encoding="utf-8"))]
        assert len(found) > 5, (file, allowed)


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("x = 'ief'", [1]),
        ("y = 1\nx = f'gamma/ief {y}'", [2]),
        ("x = 'the damping of sampled_fisher'", [1]),
        ("if name == 'sgd':\n    pass", [1]),
        ("_PANELS = 'ef'\nother = 'ef'", [2]),
        ("def f(x=('ief', 'ef'), *, y='sgd'):\n    '''By ief.'''", []),
        ("x = 'lightning-ief'\ny = 'brief'", []),
        ("'''About ief.'''\nx = 1\n'''It is ief.'''", []),
    ],
)
def test_planted_names_are_found(source, lines):
    assert [line for line, _ in literals(source, ("_PANELS",))] == lines


@pytest.fixture
def toy(monkeypatch):
    """A direction between SGD and iEF, registered for the length of a test."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))

    @registry.register(
        label="Toy", color="#56B4E9", linestyle=(0, (1, 3)), marker="P", damping="> 0", default_damping=0.25, draws=True
    )
    def toy(linearization, damping, num_samples, generator):
        assert isinstance(generator, torch.Generator)
        sgd, ief = directions.sgd(linearization), directions.ief(linearization, damping)
        return {name: num_samples * sgd[name] + ief[name] for name in sgd}

    return toy


def test_a_registered_direction_is_in_the_table_of_the_callback_and_in_the_figures(toy, tmp_path, monkeypatch, capsys):
    saved = {}
    monkeypatch.setattr(training, "save", lambda figure, path: saved.setdefault(path.name, figure) and path)
    callback = GammaIndicators(["ief", "toy"], batch_size=8)
    L.Trainer(
        max_epochs=2, accelerator="cpu", logger=CSVLogger(tmp_path), callbacks=[callback], log_every_n_steps=1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(Mixed(net()), DataLoader(Samples(), 6))  # fmt: skip
    rows = [line for line in capsys.readouterr().out.splitlines() if re.match(r"│ toy\s+│\s+0.25 │", line)]
    assert len(rows) == 3  # at the start and after both epochs

    folder = next(tmp_path.rglob("metrics.csv")).parent
    draw_training(folder / "metrics.csv", tmp_path)
    lines = {line.get_label(): line for line in saved["gamma_ratios.png"].axes[0].lines}
    assert lines["Toy"].get_color() == "#56B4E9" and lines["Toy"].get_marker() == "P"
    with (folder / "metrics.csv").open() as file:
        logged = [float(row["gamma_relative/toy"]) for row in csv.DictReader(file) if row["gamma_relative/toy"]]
    assert lines["Toy"].get_ydata().tolist() == logged and len(set(logged)) == 3

    figures = []
    for name in ("gamma_figure", "cosine_figure"):
        original = getattr(panels, name)

        def spy(*args, original=original):
            figures.append(original(*args))
            return figures[-1]

        monkeypatch.setattr(f"lightning_ief.experiments.figures.runs.{name}", spy)
    draw_runs([folder], tmp_path / "figures", figures=["gamma_over_training", "cosine_over_training"])
    titles = [[axes.get_title() for axes in figure.axes] for figure in figures]
    assert titles == [
        ["γ(iEF) / γ(SGD)", "γ(Toy) / γ(SGD)", "gradient-norm imbalance"],
        ["cosine(iEF, SGD)", "cosine(Toy, SGD)"],
    ]
    assert figures[0].axes[1].containers[0].lines[0].get_ydata().tolist() == logged


def test_a_registered_direction_is_in_the_table_of_evaluate(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = ["sgd", "ief", "toy"]
    evaluated(DigitsDataModule(), directions=given, dampings=[0.5, 2.0], num_samples=3, projections="projections.csv")
    rows = [row for row in read_table(Path("evaluation.csv"), Result) if row.direction == "toy"]
    assert [row.damping for row in rows] == [0.5, 2.0]
    assert len({row.gamma for row in rows}) == 2 and all(0 < row.gamma < float("inf") for row in rows)
    assert Path("projections.csv").read_text().count(",toy,0.5,") == 16
    assert len(re.findall(r"│ toy\s+│", capsys.readouterr().out)) == 2
    with pytest.raises(ValueError, match="the damping of 'toy' must be finite and > 0, got 0.0"):
        evaluated(DigitsDataModule(), directions=given, dampings=[0.0])

    saved = {}
    monkeypatch.setattr(
        "lightning_ief.experiments.figures.runs.save_both",
        lambda figure, directory, name: saved.setdefault(name, figure) and (directory, directory),
    )
    wanted = {"evaluations": [Path("evaluation.csv")], "projections": [Path("projections.csv")]}
    draw_runs([], tmp_path, **wanted, figures=["gamma_against_damping", "projections"])
    for figure in saved.values():
        handles, labels = figure.axes[0].get_legend_handles_labels()
        drawn = handles[labels.index("Toy")]
        line = drawn[0] if hasattr(drawn, "has_yerr") else drawn
        assert line.get_color() == "#56B4E9" and line.get_marker() == "P"


def test_directions_that_are_not_registered_take_what_is_left_over(toy):
    styles = drawing.direction_styles(["z", "ief", "a", "toy"])
    assert [*styles] == ["ief", "toy", "a", "z"]
    assert styles["toy"]["marker"] == "P" and styles["ief"] == registry.find("ief").style
    assert len({style["color"] for style in styles.values()}) == 4
    many = drawing.direction_styles([f"own{n}" for n in range(12)])
    assert len(many) == 12 and all(many.values())
    assert drawing.direction_label("toy") == "Toy" and drawing.direction_label("a") == "a"


def test_a_table_shows_a_direction_without_damping_with_none():
    values = {f"{measure}/{name}": 1.0 for measure in ("gamma", "gamma_relative") for name in ("sgd", "ief")}
    console = Console(record=True, width=80)
    console.print(GammaIndicators(["sgd", "ief"]).render({**values, "gradient_norm_imbalance": 2.0}, "title"))
    lines = console.export_text().splitlines()
    assert any(re.match(r"│ sgd\s+│\s+│ 1.000", line) for line in lines)
    assert any(re.match(r"│ ief\s+│ 1e-07 │ 1.000", line) for line in lines)
