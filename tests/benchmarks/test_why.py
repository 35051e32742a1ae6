"""What batches have in common, and what a direction is worth on other data, against brute force."""

import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("psutil")

from benchmarks import report, why, why_estimators, why_page
from benchmarks.why_estimators import Along
from benchmarks.why_measure import CONTESTANTS, SMOKE, BatchesBefore, Measured
from lightning_ief import directions, gamma, linearize, objectives
from lightning_ief.capture import CaptureError
from lightning_ief.tasks import vision
from tests.tasks.stand_ins import write_fashion_mnist


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(vision, "_DEBIAN", tmp_path / "no_such_package")
    write_fashion_mnist(tmp_path, 5_000 + SMOKE.train_size)
    return tmp_path


@pytest.fixture
def net(float64):
    return torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))


def vectors(count, common=1.0, generator=None):
    """Directions of two parameters, six numbers: a common part and noise of unit variance in each."""
    drawn = common + torch.randn(count, 6, dtype=torch.float64, generator=generator)
    return [{"a": row[:4].view(2, 2), "b": row[4:]} for row in drawn]


def flat(direction):
    return torch.cat([entry.flatten() for entry in direction.values()])


# --- what batches have in common


def test_gram_is_that_of_flat_directions():
    found = vectors(5)
    rows = torch.stack([flat(direction) for direction in found])
    torch.testing.assert_close(why_estimators.gram_of(found), rows @ rows.T)


def test_known_vectors():
    """(1, 0), (1, 1), (2, −1): pairs 1, 2 and 1, mean square (1 + 2 + 5)/3."""
    gram = why_estimators.gram_of([{"a": torch.tensor(v)} for v in ([1.0, 0.0], [1.0, 1.0], [2.0, -1.0])])
    assert why_estimators.common_square(gram) == pytest.approx(4 / 3)
    assert why_estimators.share_in_common(gram) == pytest.approx(4 / 8)
    cosine = (2**-0.5 + 2 / 5**0.5 + 1 / 10**0.5) / 3
    assert why_estimators.cosine_in_common(gram) == pytest.approx(cosine)


def test_one_direction_of_all_batches_is_all_in_common():
    gram = why_estimators.gram_of(vectors(1) * 4)
    assert why_estimators.share_in_common(gram) == pytest.approx(1.0, abs=1e-15)
    assert why_estimators.cosine_in_common(gram) == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize("common", [0.0, 0.3])
def test_there_is_no_bias(common):
    """Over many draws of three batches the estimate is ‖E d‖² in the mean; the naive one a third of the noise more."""
    generator, draws, count = torch.Generator().manual_seed(0), 4_000, 3
    grams = [why_estimators.gram_of(vectors(count, common, generator)) for _ in range(draws)]
    found = torch.tensor([why_estimators.common_square(gram) for gram in grams], dtype=torch.float64)
    naive = torch.stack([gram.mean() for gram in grams])
    error = 4 * float(found.std()) / draws**0.5
    assert error < 0.2
    assert float(found.mean()) == pytest.approx(6 * common**2, abs=error)
    assert float(naive.mean()) == pytest.approx(6 * common**2 + 6 / count, abs=error)


# --- the local model


def dense(net, x, y):
    """∇L and F of the mean loss, from J_z by autograd."""
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    jz = torch.func.jacrev(lambda theta: torch.func.functional_call(net, theta, (x,)))(parameters)
    jz = torch.cat([j.flatten(2) for j in jz.values()], dim=2)
    p = net(x).detach().softmax(1)
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    fisher = torch.einsum("nap,nab,nbq->pq", jz, hessian, jz) / len(x)
    return torch.einsum("nap,na->p", jz, p - torch.nn.functional.one_hot(y, 3)) / len(x), fisher


def test_the_local_model_is_that_of_the_dense_fisher_matrix(net):
    x, y = torch.randn(7, 5), torch.arange(7) % 3
    found = [{name: torch.randn_like(p) for name, p in net.named_parameters()} for _ in range(6)]
    there = why_estimators.along(net, (x, y), objectives.CrossEntropy(), found)
    gradient, fisher = dense(net, x, y)
    rows = torch.stack([flat(direction) for direction in found])
    torch.testing.assert_close(there.slopes, rows @ gradient)
    torch.testing.assert_close(there.gram, rows @ fisher @ rows.T)
    best = why_estimators.best_decreases(there.slopes, there.curvatures)
    for d, decrease in zip(rows, best.tolist(), strict=True):
        alpha = torch.linspace(0, 4 * float(gradient @ d) / float(d @ fisher @ d), 4_001)
        on_a_grid = (alpha * (gradient @ d) - alpha**2 / 2 * (d @ fisher @ d)).max()
        assert decrease == pytest.approx(float(on_a_grid.clamp(min=0)) if gradient @ d > 0 else 0.0, abs=1e-12)


def test_the_best_decrease_is_that_of_gamma(net):
    x, y = torch.randn(7, 5), torch.arange(7) % 3
    lin = linearize(net, x, y, objectives.CrossEntropy())
    d = dict(directions.ief(lin, relative_damping=0.3))
    there = why_estimators.along(net, (x, y), objectives.CrossEntropy(), [d])
    (best,) = why_estimators.best_decreases(there.slopes, there.curvatures).tolist()
    assert best == pytest.approx(1 / (2 * float(gamma(lin, d)) ** 2) / len(x))  # γ is of sums


def test_least_squares_of_several_outputs(net):
    x, y = torch.randn(7, 5), torch.randn(7, 3)
    found = [{name: torch.randn_like(p) for name, p in net.named_parameters()}]
    there = why_estimators.along(net, (x, y), objectives.LeastSquares(), found)
    lin = linearize(net, x, y, objectives.LeastSquares())
    curvatures, slopes = lin.gamma_terms(found)
    torch.testing.assert_close(there.slopes, slopes / 7)
    torch.testing.assert_close(there.curvatures, curvatures / 7)


def test_with_one_length_the_decrease_is_the_share_of_that_of_the_mean():
    """∇Lᵀd and dᵀFd by hand, with F = I: slopes 1 and 3, squares 2 and 10, in the mean 2 and 6."""
    found = Along(torch.tensor([1.0, 3.0]), torch.tensor([[2.0, 2.0], [2.0, 10.0]]))
    assert why_estimators.decrease_at_one_length(found) == pytest.approx(3 / (2 * 6))  # 1 · 3 for (E ∇Lᵀd)²
    assert why_estimators.decrease_at_one_length(Along(-found.slopes, found.gram)) == 0.0


def test_one_length_is_the_best_of_all_that_are_alike():
    """Of many batches, against a search."""
    slopes, rows = 1 + torch.randn(5_000).double(), torch.randn(5_000, 3).double()
    curvatures = rows.square().sum(1)
    gram = torch.diag(curvatures)  # what is not on its diagonal does not matter
    alpha = torch.linspace(0, 2, 2_001).double()
    best = float((alpha * slopes.mean() - alpha**2 / 2 * curvatures.mean()).max())
    assert why_estimators.decrease_at_one_length(Along(slopes, gram)) == pytest.approx(best, rel=1e-3)


def test_the_loss_itself_falls_by_the_best_of_the_lengths_or_not_at_all(net):
    x, y = torch.randn(7, 5), torch.arange(7) % 3
    objective = objectives.CrossEntropy()
    gradient = dict(directions.sgd(linearize(net, x, y, objective)))
    uphill = {name: -entry for name, entry in gradient.items()}
    before = {name: p.detach().clone() for name, p in net.named_parameters()}

    def loss_after(length):
        moved = {name: p - length * gradient[name] for name, p in before.items()}
        return float(torch.nn.functional.cross_entropy(torch.func.functional_call(net, moved, (x,)), y))

    lengths = torch.tensor([0.1, 0.1, -0.1, 1e6])
    found = why_estimators.actual_decreases(
        net, (x, y), objective, [gradient, uphill, gradient, gradient], lengths, (0.5, 1.0, 1.5)
    )
    assert found[0] == pytest.approx(loss_after(0.0) - min(loss_after(0.1 * f) for f in (0.5, 1.0, 1.5)))
    assert found[0] > 0 and found[1:].tolist() == [0.0, 0.0, 0.0]
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


# --- the study


def test_the_metric_is_of_the_batches_before(float64):
    """A batch does not change the metric that it is seen in, nor that of the next one."""
    net = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    batches = [(torch.randn(6, 5), torch.arange(6) % 3) for _ in range(4)]
    metric = BatchesBefore(net, batches)

    def seen(x, y):
        return linearize(net, x, y, objectives.CrossEntropy(), keep_sides=metric.sides)

    first, second = batches[0], (10 * torch.randn(6, 5), torch.arange(6) % 3)
    alone = dict(directions.sgd(metric.of(seen(*first))))
    other = dict(directions.sgd(metric.of(seen(*second))))
    again = dict(directions.sgd(metric.of(seen(*first))))
    assert all(torch.equal(alone[name], again[name]) for name in alone)
    # M⁻¹ is one matrix: what it makes of the sum of two gradients is the sum of what it makes of each.
    together = dict(directions.sgd(metric.of(seen(*(torch.cat(pair) for pair in zip(first, second, strict=True))))))
    assert all(torch.allclose(together[name], alone[name] + other[name]) for name in alone)
    plain = dict(directions.sgd(seen(*first)))
    assert not any(torch.allclose(alone[name], plain[name]) for name in alone)
    with pytest.raises(CaptureError):
        metric.of(linearize(net, *first, objectives.CrossEntropy()))


def test_the_study_is_measured_drawn_and_written(root, tmp_path):
    told = []
    page = why.study(SMOKE, tmp_path / "docs", root, told.append)
    table = tmp_path / "docs" / "why" / "measured.csv"
    rows = report.read(table, Measured)
    assert len(told) == len(SMOKE.seeds) * len(SMOKE.stages)
    assert len(rows) == len(told) * len(CONTESTANTS)
    assert all(0 <= row.other_low <= row.other_high and row.share <= 1 for row in rows)
    assert all(row.own > 0 for row in rows)
    assert (tmp_path / "docs" / "why" / "directions.png").stat().st_size > 10_000
    text = page.read_text()
    assert "After 0.3 epochs, L = " in text and "After 1.5 epochs, L = " in text
    assert all(f"| {contestant.title} | " in text for contestant in CONTESTANTS.values())
    # What is there is not done again; a stage that is not complete is.
    why.study(SMOKE, tmp_path / "docs", root, told.append)
    assert len(told) == 4 and page.read_text() == text
    numbers = table.read_text()
    report.write(rows[:-1], table, Measured)
    why.study(SMOKE, tmp_path / "docs", root, told.append)
    assert len(told) == 5
    assert table.read_text() == numbers


def row(seed, name, **numbers):
    made = Measured(seed, 0.5, name, 1.0, 0.5, 0.5, 0.5, 2.0, 1.0, 0.8, 0.9, 0.5, 1.5, 0.0)
    return replace(made, **numbers)


def told(rows):
    return why_page.report(why.FULL._replace(seeds=(0, 1)), rows)


def test_verdicts_and_units_are_those_of_the_numbers():
    """Two runs, which disagree about ρ = 3; all others have the same share."""
    shares = {"ief-0.03": (0.1, 0.1), "ief-0.3": (0.2, 0.3), "ief-3": (0.3, 0.2), "ief-30": (0.4, 0.4)}
    rows = [
        row(seed, name, share=shares.get(name, (0.5, 0.5))[seed], other=3.0 if name == "metric-1" else 1.0 + seed)
        for name in CONTESTANTS
        for seed in (0, 1)
    ]
    rows = [replace(each, loss_over_model=0.8) if each.direction == "metric-1" else each for each in rows]
    text = told(rows)
    assert "0.03 to 30.\n  * 0.5 epochs: fails (iEF, ρ = 3 above iEF, ρ = 0.3 in 1 of 2 runs)\n" in text
    paper = "SGD, ∇L above EF, the paper's λ in 0, F̂(1), the paper's λ in 0"
    assert f"less in common than SGD, by c.\n  * 0.5 epochs: fails ({paper} of 2 runs)\n" in text
    assert "without it at each ρ.\n  * 0.5 epochs: holds\n" in text
    # Own 2, other 3, one length 0.8 over SGD's other, 1 and 2.
    cells = "1.5 ± 0.7 | 2.25 ± 1.06 | 0.60 ± 0.28 | 0.80 ± 0.00"
    assert f"| iEF, metric, ρ = 1 | 0.500 ± 0.000 | 0.500 ± 0.000 | 0.500 ± 0.000 | {cells} |" in text
    assert "falls by 0.80 (*iEF, metric, ρ = 1, 0.5 epochs*) to 0.90 (*" in text


def test_directions_are_ordered_by_each_measure():
    """The share falls where the decrease grows; all have as much on their own batch."""
    rows = [
        row(seed, name, share=0.9 - 0.05 * at, other=1.0 + at, own=2.0)
        for at, name in enumerate(CONTESTANTS)
        for seed in (0, 1)
    ]
    text = told(rows)
    assert "the largest are *c* of SGD, ∇L (0.90), *c in F* of " in text
    assert "*other* of metric alone, M⁻¹∇L (15.00); the rank correlation with *other* over the directions is" in text
    assert "-1.00 of *c*, +nan of *c in F*, +nan of *own*." in text
    assert why_page._rank_correlation([1.0, 2.0, 2.0], [3.0, 5.0, 5.0]) == pytest.approx(1.0)


def test_the_decrease_at_one_length_is_taken_apart():
    """EF has half the share and thrice the decrease; iEF has a share that is 0 within its error."""
    numbers = {"ef": [{"share_fisher": 0.25, "one_length": 2.4}] * 2, "ief": [{"share_fisher": s} for s in (-0.1, 0.2)]}
    rows = [row(seed, name, **numbers.get(name, [{}, {}])[seed]) for name in CONTESTANTS for seed in (0, 1)]
    text = told(rows)
    assert "| SGD, ∇L | 1.00 | 1.00 |\n" in text
    assert "| EF, the paper's λ | 0.50 | 6.00 |\n" in text
    assert "| iEF, the paper's λ | – | – |\n" in text
    high = {"share_fisher": 0.6, "one_length": 2.0}
    rows = [replace(each, **high) if each.direction == "metric-1" else each for each in rows]
    words = "more in common than SGD, by c in F, and a mean direction that is worth more after 0.5 epochs. The"
    assert f"By these means iEF, metric, ρ = 1, has {words}" in told(rows)
    low = {"share_fisher": 0.4, "one_length": 0.5}
    rows = [replace(each, **low) if each.direction == "metric-1" else each for each in rows]
    assert f"By these means iEF, metric, ρ = 1, has {words.replace('more', 'less')}" in told(rows)
    rows = [replace(each, share_fisher=0.4 + 0.2 * each.seed) if each.direction == "sgd" else each for each in rows]
    assert "of SGD and of iEF, metric, ρ = 1, is 20 and 0 % after 0.5 epochs." in told(rows)


def test_what_is_not_known_is_left_out():
    """A run of EF in which −d leads uphill with all batches that are checked, and all of iEF's."""
    rows = [row(seed, name) for name in CONTESTANTS for seed in (0, 1)]
    missing = {("ef", 0), ("ief", 0), ("ief", 1)}
    rows = [replace(r, loss_over_model=float("nan")) if (r.direction, r.seed) in missing else r for r in rows]
    text = told(rows)
    assert re.search(r"\| EF, the paper's λ \|.* \| 0\.90 \|\n", text)
    assert re.search(r"\| iEF, the paper's λ \|.* \| – \|\n", text)
    assert "nan" not in text.replace("+nan of", "")
