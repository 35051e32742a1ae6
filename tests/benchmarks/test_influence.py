"""The study of influence runs and is resumed; its scores and its training are what they are said to be."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("psutil")

from benchmarks import influence, influence_measure, influence_page, report
from benchmarks.influence_measure import FULL, SMOKE, Measured
from lightning_ief.tasks import MLP, vision
from tests.tasks.stand_ins import write_fashion_mnist


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(vision, "_DEBIAN", tmp_path / "no_such_package")
    write_fashion_mnist(tmp_path, 5_000 + SMOKE.train_size + SMOKE.queries)
    return tmp_path


def test_the_study_runs_and_is_resumed(root, tmp_path, unrendered):
    told = []
    page = influence.study(SMOKE, tmp_path / "docs", root, told.append)
    assert len(told) == 4
    rows = report.read(tmp_path / "docs" / "influence" / "measured.csv", Measured)
    assert {len(row.values.split()) for row in rows if row.experiment == "lds"} == {SMOKE.queries // 2}
    assert {row.method for row in rows} == influence_page.TITLES.keys()
    assert {(row.seed, row.part) for row in rows if row.experiment == "labels"} == {
        (100, "search"), (0, "result"), (1, "result")
    }  # fmt: skip
    text = page.read_text()
    assert "| training once more | – |" in text and "| influence on held-out images, iEF |" in text
    assert (tmp_path / "docs" / "influence" / "scores.png").exists()
    influence.study(SMOKE, tmp_path / "docs", tmp_path / "nothing", told.append)  # without images
    assert len(told) == 4 and page.read_text() == text
    kept = [row for row in rows if (row.experiment, row.seed) != ("labels", 1)]
    report.write(kept, tmp_path / "docs" / "influence" / "measured.csv", Measured)
    influence.study(SMOKE, tmp_path / "docs", root, told.append)
    assert told[4:] == ["labels, seed 1: done"] and page.read_text() == text


def test_networks_that_are_trained_at_once_are_those_trained_alone():
    """Against torch's own loop, one network after the other, each with images and labels of its own."""
    size = SMOKE._replace(epochs=3)
    x, y = torch.rand(50, 784), torch.randint(10, (2, 50))
    chosen = torch.stack([torch.randperm(50)[:40] for _ in range(2)])
    together = influence_measure.trained(size, x, y, chosen, [3, 4])
    for number, seed in enumerate((3, 4)):
        torch.manual_seed(seed)
        net = MLP([784, size.width, 10])
        optimizer = torch.optim.SGD(net.parameters(), size.lr, momentum=0.9, weight_decay=size.weight_decay)
        generator, steps = torch.Generator().manual_seed(seed), 6
        for step in range(steps):
            if step % 2 == 0:
                order = chosen[number][torch.randperm(40, generator=generator)]
            at = order[20 * (step % 2) :][:20]
            for group in optimizer.param_groups:
                group["lr"] = size.lr * (1 - step / steps)
            optimizer.zero_grad()
            F.cross_entropy(net(x[at]), y[number][at]).backward()
            optimizer.step()
        for p, alone in zip(together[number].parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(p, alone, rtol=1e-4, atol=1e-6)


def test_the_datamodelling_score_of_known_losses():
    """Losses that fall with the influence of the images in a half, and that rise with it."""
    held = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    tau = torch.tensor([[3.0, 1.0, 2.0], [1.0, 2.0, 3.0]])  # sums 3, 1, 2, 4 and 1, 2, 3, 3.1
    tau[1, 0] = 1.1
    losses = torch.tensor([[-3.0, 1.0], [-1.0, 2.0], [-2.0, 3.0], [-10.0, 4.0]])
    assert influence_measure.lds_of(losses, held, tau).tolist() == pytest.approx([1.0, -1.0])


def test_precision_is_that_at_the_number_planted():
    scores, wrong = torch.tensor([0.9, 0.1, 0.8, 0.7, 0.2]), torch.tensor([0, 3])
    assert influence_measure.precision_of(scores, wrong) == 0.5


def test_rho_is_chosen_by_one_part_and_scored_by_the_other():
    rows = []
    for method in influence_page.TITLES:
        experiment = "lds" if method in ("improved", "empirical", "sampled", "products", "repeated") else "labels"
        of_matrix = method.split(", ")[-1] in ("improved", "empirical", "sampled")
        for rho in (1.0, 10.0, 100.0) if of_matrix else (0.0,):
            for part in ("search", "result"):
                # ρ = 10 is the best of the search, and the worst of the results.
                value = 0.5 if rho == 0 else (0.6 if part == "search" else 0.3) if rho == 10 else 0.4
                rows += [Measured(experiment, seed, part, method, rho, f"{value + 0.1 * seed}") for seed in (0, 1)]
    rows = [replace(row, values="0.9") if row.method == "itself, improved" else row for row in rows]
    text = influence_page.report(FULL._replace(rhos=(1.0, 10.0, 100.0)), rows)
    assert "| EF | 10 | 0.350 ± 0.071 | 0.300, 0.400 |" in text
    assert "| influence on itself, EF | 10 | 35.0 ± 7.1 |" in text and "| loss | – | 55.0 ± 7.1 |" in text
    assert "| influence on itself, iEF | 1* | 90.0 ± 0.0 |" in text
    assert "* iEF over EF: +0.000 ± 0.000 in the mean over queries, larger with 0 of 2 seeds." in text
    assert "* iEF over products of gradients: -0.200 ± 0.000 in the mean" in text
    assert "alone is found, in the mean, by: influence on itself, iEF (2 of 2 seeds).\n" in text
