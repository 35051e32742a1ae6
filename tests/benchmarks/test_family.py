"""γ of the curvature family: against the package's γ, drawn, told and resumed."""

import pytest
import torch

pytest.importorskip("psutil")

from benchmarks import family, family_measure, report
from benchmarks.family_measure import DIRECTIONS, OPTIMIZERS, STAGES, Cost, Measured, Source, Task
from benchmarks.loop import CONTESTANTS, load, stepping
from lightning_ief import directions, linearize, objectives
from lightning_ief.directions.registry import names
from lightning_ief.indicators import gammas
from lightning_ief.tasks import MLP, vision
from tests.tasks.stand_ins import write_fashion_mnist


def clusters(_root):
    """Points around the centres of three classes."""
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(64) % 3
    x = torch.randn(3, 6, generator=generator)[y] + 0.3 * torch.randn(64, 6, generator=generator)
    return Source(lambda: MLP([6, 4, 3]), 64, lambda chosen: (x[chosen], y[chosen]))


SMOKE = Task(
    "mlp", "a small MLP", clusters,
    steps=20, samples=16, evaluated=16, batches=2, dampings=(1.0,), turns=2, timed=2,
)  # fmt: skip


def test_gammas_by_rows_are_those_of_forward_passes(float64):
    torch.manual_seed(0)
    net, x, y = MLP([5, 4, 3]), torch.randn(7, 5), torch.arange(7) % 3
    lin = linearize(net, x, y, objectives.CrossEntropy())
    found = [directions.sgd(lin), directions.ief(lin, 0.1), {n: torch.randn_like(p) for n, p in net.named_parameters()}]
    found.append({name: torch.zeros_like(entry) for name, entry in found[2].items()})
    by_rows = family_measure.gammas_by_rows(lin, iter(found))
    assert by_rows == pytest.approx(gammas(lin, found).tolist())
    assert by_rows[-1] == float("inf") and len({*by_rows}) == 4


def test_the_study_is_measured_drawn_and_written(tmp_path):
    told = []
    page = family.study([SMOKE], tmp_path / "docs", {"mlp": tmp_path}, told.append)
    rows = report.read(tmp_path / "docs" / "curvature_family" / "gamma.csv", Measured)
    assert len(rows) == len(STAGES) * len(DIRECTIONS) * 2 and {row.damping for row in rows} == {16**2 * 1e-7, 1.0}
    assert all(0 < row.ratio < float("inf") for row in rows)
    # With hardly any damping nothing comes closer than the natural gradient; F is singular in no other metric.
    least = {row.stage: row.ratio for row in rows if row.direction == "natural_gradient" and row.damping < 1}
    assert all(row.ratio > 0.999 * least[row.stage] for row in rows)
    # At the beginning it is the network as it was made, on batches that each seed gives alike.
    torch.manual_seed(0)
    source = SMOKE.source(tmp_path)
    net, ratios, losses = source.net(), [], []
    for seed in (0, 1):
        x, y = source.draw(torch.randperm(64, generator=torch.Generator().manual_seed(seed))[:16])
        lin = linearize(net, x, y, objectives.CrossEntropy())
        sgd, ief = gammas(lin, [directions.sgd(lin), directions.ief(lin, 1.0)]).tolist()
        ratios.append(ief / sgd)
        losses.append(float(lin.losses.mean()))
    first = next(row for row in rows if (row.stage, row.direction, row.damping) == (0.0, "ief", 1.0))
    assert first.ratio == pytest.approx(sum(ratios) / 2, rel=1e-3) and first.loss == pytest.approx(
        sum(losses) / 2, rel=1e-4
    )
    assert first.spread == pytest.approx(abs(ratios[0] - ratios[1]) / 2**0.5, rel=0.02, abs=1e-4)
    assert rows[-1].loss < first.loss
    times = report.read(tmp_path / "docs" / "curvature_family" / "costs.csv", Cost)
    assert {row.optimizer for row in times} == {*OPTIMIZERS}
    kept = {row.optimizer: row.state for row in times}
    sides = [(7, 4), (5, 3)]  # averages and eigenbases, with eigenvalues
    parameters = sum(a * b for a, b in sides)
    assert kept["sgd"] == 1 and kept["adamw"] == 2 and kept["ief"] == 0
    assert kept["kfac_improved"] == pytest.approx(
        sum(2 * x * x + x for side in sides for x in side) / parameters, rel=1e-4
    )
    assert (tmp_path / "docs" / "curvature_family" / "gamma.png").stat().st_size > 10_000
    text = page.read_text()
    assert all(f"| {CONTESTANTS[name].title} | " in text for name in OPTIMIZERS)
    assert all(f"| {family._plain(name)} | " in text for name in DIRECTIONS)
    # What is there is not done again.
    family.study([SMOKE], tmp_path / "docs", {}, told.append)
    assert len(told) == 2 and page.read_text() == text


def test_the_page_says_what_the_numbers_say():
    ratios = {"kfac_improved": (0.4, 0.2), "kfac_empirical": (0.5, 0.1)}
    rows = [
        Measured("mlp", stage, 1.0, name, damping, ratio * (1 + (damping == 1.0)), 0.1)
        for name in DIRECTIONS
        for stage, ratio in zip(STAGES[:2], ratios.get(name, (0.9, 0.9)), strict=True)
        for damping in (2.56e-5, 1.0)
    ]
    text = family.report([SMOKE], rows, [Cost("mlp", "kfac_improved", 2.0, 10.04, 9.0, 11.0, 3.0)])
    assert "| ieKFAC | 0.28 | 0.28 | 2.6e-05 | 0.40 | 0.20 |\n" in text  # √(0.4 · 0.2)
    assert "| ieKFAC / eKFAC | 1.26, 1 of 2 | 1.26, 1 of 2 |" in text  # √(0.8 · 2)
    assert "| iEF / EF | 1.00, 0 of 2 | 1.00, 0 of 2 |" in text
    assert "| ieKFAC: λ = 10 | 10.0 | 9.0 – 11.0 | 3.0 |" in text


def test_directions_and_optimizers_are_there():
    assert {*DIRECTIONS} <= {*names()} and {*OPTIMIZERS} <= CONTESTANTS.keys()


def test_steps_on_inputs_by_name():
    """Networks of text take a dictionary; parameters that are frozen stay."""

    class Named(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.frozen = MLP([3, 2]), MLP([3, 3])
            self.frozen.requires_grad_(False)

        def forward(self, x):
            return self.inner(self.frozen(x))

    for name in ("sgd", "kfac_improved"):
        torch.manual_seed(0)
        net = Named()
        before = {key: p.detach().clone() for key, p in net.named_parameters()}
        step, _ = stepping(net, CONTESTANTS[name], 0.1, 10)
        step({"x": torch.randn(4, 3)}, torch.arange(4) % 2)
        assert {key.split(".")[0] for key, p in net.named_parameters() if not torch.equal(p, before[key])} == {"inner"}


def test_images_are_those_of_from_scratch(monkeypatch, tmp_path):
    monkeypatch.setattr(vision, "_DEBIAN", tmp_path / "no_such_package")
    write_fashion_mnist(tmp_path, 5_000 + 64)
    source = family_measure.mlp(tmp_path, 64, 4)
    x, y = source.draw(torch.tensor([3, 5]))
    train = load(64, tmp_path).train
    assert torch.equal(x, train[0][[3, 5]]) and torch.equal(y, train[1][[3, 5]]) and source.size == 64
    assert source.net()(x).shape == (2, 10)


def test_sentences_are_those_of_movie_reviews(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("peft")
    from tests.tasks.text_stand_ins import write_bert, write_glue

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_bert(tmp_path / "minilm")
    write_glue(tmp_path, "sst2", 24, 4, "jsonl")
    source = family_measure.minilm(tmp_path, 20)
    torch.manual_seed(0)
    net, (x, y) = source.net(), source.draw(torch.tensor([3, 5, 7]))
    assert len(y) == 3 and {len(entry) for entry in x.values()} == {3} and source.size == 20 and not net.training
    trained = [name for name, p in net.named_parameters() if p.requires_grad]
    assert trained and all("lora" in name or "classifier" in name for name in trained)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    step, _ = stepping(net, CONTESTANTS["kfac_improved"], 0.1, 10)
    step(x, y)
    changed = [name for name, p in net.named_parameters() if not torch.equal(p, before[name])]
    assert changed and {*changed} <= {*trained}
