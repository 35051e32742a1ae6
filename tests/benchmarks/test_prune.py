"""The study of pruning runs, is resumed, and its page says what is in the file."""

import statistics
from dataclasses import replace

import pytest
import torch

pytest.importorskip("psutil")

from benchmarks import prune, prune_page, report
from benchmarks.prune import METHODS, SMOKE, Pruned, best_dampings
from lightning_ief.tasks import MLP, vision
from tests.tasks.stand_ins import write_fashion_mnist


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(vision, "_DEBIAN", tmp_path / "no_such_package")
    write_fashion_mnist(tmp_path, 5_000 + SMOKE.train_size)
    return tmp_path


def test_the_study(root, tmp_path):
    told = []
    page = prune.study(SMOKE, tmp_path / "docs", root, told.append)
    path = tmp_path / "docs" / "pruning" / "pruned.csv"
    rows = report.read(path, Pruned)
    assert len(told) == len(rows) == 6 * 2 + 2 * (1 + 7 * 2 + 2 * 2)
    best = best_dampings(rows)
    assert best.keys() == METHODS.keys() - {"magnitude"}
    for row in rows:
        assert row.seed == SMOKE.search if row.part == "search" else row.seed in SMOKE.seeds
        assert row.damping == best.get(row.method, 0.0) or row.part == "search"
    assert {row.method for row in rows if row.part == "gradual"} == {"magnitude", "ief"}
    assert (tmp_path / "docs" / "pruning" / "accuracy.png").stat().st_size > 10_000
    text = page.read_text()
    # What is there is not done again; a gradual run is done as a whole.
    gone = [row for row in rows if (row.part, row.method, row.seed) != ("gradual", "ief", 1) or row.sparsity < 0.9]
    report.write(gone, path, Pruned)
    prune.study(SMOKE, tmp_path / "docs", root, told.append)
    assert len(told) == len(rows) + 2
    assert page.read_text() == text
    # What was done with the λ of another search is no part of it.
    stale = [replace(row, damping=0.5) if (row.part, row.method) == ("one-shot", "ef") else row for row in rows]
    report.write(stale, path, Pruned)
    prune.study(SMOKE, tmp_path / "docs", root, told.append)
    assert page.read_text() == text and len(told) == len(rows) + 2 + 4


def test_magnitude_takes_the_smallest_and_goes_on():
    net = MLP([784, 6, 6, 10])
    weights = torch.cat([p.detach().abs().flatten() for p in net.parameters() if p.ndim > 1])
    for sparsity in (0.5, 0.9):
        prune._by_magnitude(net, sparsity)
        kept = torch.cat([mask.flatten() for name, mask in net.named_buffers() if name.endswith("_mask")]).bool()
        assert int((~kept).sum()) == round(sparsity * len(weights))
        assert weights[~kept].max() <= weights[kept].min()


def row(part, method, sparsity, seed, accuracy, damping=0.0):
    return Pruned(part, seed, method, damping, sparsity, accuracy, accuracy)


def test_the_tables():
    size = SMOKE._replace(seeds=(0, 1), dampings=(1e-4, 1e-3, 1e-2))
    rows = [row("search", "ief", 0.9, 100, 0.5 + each, each) for each in size.dampings]
    rows += [row("search", "ef", 0.9, 100, 0.5 - abs(each - 1e-3), each) for each in size.dampings]
    rows += [row("dense", "none", 0.0, seed, 0.9) for seed in (0, 1)]
    for part in ("one-shot", "gradual"):
        for seed in (0, 1):
            rows += [row(part, "ief", s, seed, 0.8 + seed / 100 - s / 10, 1e-2) for s in (0.5, 0.9)]
            rows += [row(part, "ef", s, seed, 0.8 - s / 10 + (s > 0.6) / 50, 1e-3) for s in (0.5, 0.9)]
    best = best_dampings(rows)
    assert best == {"ief": 1e-2, "ef": 1e-3}
    text = prune_page.report(size, METHODS, rows, best)
    values = [100 * (0.8 + seed / 100 - 0.05) for seed in (0, 1)]
    assert f"| WoodFisher-iEF | 0.01* | {statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f} |" in text
    assert "| WoodFisher-EF | 0.001 | 75.00 ± 0.00 | 73.00 ± 0.00 |" in text
    assert "| WoodFisher-iEF over WoodFisher-EF | +0.50 (1) | -1.50 (0) |" in text
    assert text.count("over WoodFisher-EF: better in all seeds at none; worse in all at 90 %.") == 2
    assert "in how many of 2 seeds" in text and "Before pruning it is 90.00 ± 0.00 %" in text
