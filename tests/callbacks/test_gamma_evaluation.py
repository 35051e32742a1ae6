"""γ's evaluation: its numbers are those by hand, on batches of the training data, and it leaves no trace in the run."""

import math
import random
import statistics
import warnings
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_ief import GammaIndicators, directions, gamma, linearize, objectives
from lightning_ief.callbacks import OwnDirection
from lightning_ief.linalg.vectors import cosine
from tests.callbacks.gamma_stand_ins import (
    DAMPINGS,
    NAMES,
    Mixed,
    N,
    Plain,
    Samples,
    Unpack,
    fit,
    indicators,
    logged,
    net,
    rows,
    trainer,
)


def by_hand(module: L.LightningModule, batches: list[tuple[torch.Tensor, torch.Tensor]], seed: int) -> dict[str, float]:
    """What the callback is to log: means over the batches, in float64."""
    module.eval()
    each: list[dict[str, float]] = []
    for number, (inputs, targets) in enumerate(batches):
        generator = torch.Generator().manual_seed(seed + number)
        lin = linearize(module, inputs, targets, objectives.CrossEntropy())
        found = {
            "sgd": directions.sgd(lin),
            "ef": directions.ef(lin, DAMPINGS["ef"]),
            "ief": directions.ief(lin, DAMPINGS["ief"]),
            "sampled_fisher": directions.sampled_fisher(lin, DAMPINGS["sampled_fisher"], 2, generator),
            "natural_gradient": directions.natural_gradient(lin, DAMPINGS["natural_gradient"]),
        }
        gammas = {name: float(gamma(lin, d)) for name, d in found.items()}
        norms = lin.jacobian.to_dense().double().norm(dim=1)
        trace = float(lin.hessian_rows()[0].gram().trace())
        best = float(gamma(lin, directions.natural_gradient(lin, 1e-6 * trace)))
        each.append(
            {f"gamma/{name}": value for name, value in gammas.items()}
            | {f"gamma_relative/{name}": value / gammas["sgd"] for name, value in gammas.items()}
            | {f"gamma_share/{name}": best / value for name, value in gammas.items()}
            | {f"cosine/{name}": float(cosine(d, found["sgd"])) for name, d in found.items()}
            | {"gradient_norm_imbalance": float(norms.max() / norms.min())}
        )
    values = {key: [batch[key] for batch in each] for key in each[0]}
    means = {key: statistics.mean(column) for key, column in values.items()}
    if len(each) == 1:
        return means
    return means | {"_std/".join(f"{key}/".split("/", 1)).rstrip("/"): statistics.stdev(c) for key, c in values.items()}


@pytest.mark.parametrize("kind", [Plain, Mixed])
def test_values_are_those_by_hand_at_the_end_of_the_epoch(kind):
    unpack = Unpack()
    callback = GammaIndicators(
        NAMES, dampings=DAMPINGS, num_samples=2, num_batches=3, batch_size=7, seed=5, unpack_batch=unpack,
        at_start=False, objective=objectives.CrossEntropy() if kind is Plain else None,
    )  # fmt: skip
    module = kind(net())
    run = fit(module, callback)
    assert [len(y) for _, y in unpack.seen] == [7, 7, 7]
    expected = by_hand(module, unpack.seen, seed=5)
    assert len(expected) == 42 and len({round(value, 4) for value in expected.values()}) > 35  # they can be told apart
    assert logged(run) == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_the_modules_own_objective_and_unpack_batch_are_used():
    module = Mixed(net())
    data = Samples()
    run = fit(module, GammaIndicators(["ief"], damping=1e-2, batch_size=N), data=data)
    lin = linearize(module.eval(), data.x, data.y, module.objective)  # the order of samples does not matter
    ief, sgd = gamma(lin, directions.ief(lin, 1e-2)), gamma(lin, directions.sgd(lin))
    names = {"gamma/ief", "gamma_relative/ief", "gamma_share/ief", "cosine/ief", "gradient_norm_imbalance"}
    assert set(logged(run)) == names
    assert logged(run)["gamma/ief"] == pytest.approx(float(ief), rel=1e-5)
    assert logged(run)["gamma_relative/ief"] == pytest.approx(float(ief / sgd), rel=1e-5)


def test_batches_are_distinct_samples_of_the_data_and_differ_from_epoch_to_epoch():
    data, unpack = Samples(), Unpack()
    fit(Plain(net()), indicators(num_batches=2, unpack_batch=unpack), data=data, max_epochs=3)
    assert [len(rows(x)) for x, _ in unpack.seen] == [8] * 6
    epochs = [rows(torch.cat([unpack.seen[i][0], unpack.seen[i + 1][0]])) for i in (0, 2, 4)]
    assert all(len(epoch) == 16 and epoch <= rows(data.x) for epoch in epochs)  # no sample twice in an epoch
    assert epochs[0] != epochs[1] != epochs[2]
    again, other = Unpack(), Unpack()
    fit(Plain(net()), indicators(num_batches=2, unpack_batch=again), data=data, max_epochs=3)
    fit(Plain(net()), indicators(num_batches=2, unpack_batch=other, seed=100), data=data, max_epochs=3)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(unpack.seen, again.seen, strict=True))
    assert rows(other.seen[0][0]) != rows(unpack.seen[0][0])


@pytest.mark.parametrize(("num_batches", "sizes"), [(1, [20]), (3, [20, 4])])
def test_a_small_data_set_is_taken_once_and_whole(num_batches, sizes):
    data, unpack = Samples(), Unpack()
    run = trainer(indicators(num_batches=num_batches, batch_size=20, unpack_batch=unpack))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(Plain(net()), DataLoader(data, 6))
    about = [str(w.message) for w in caught if "GammaIndicators" in str(w.message)]
    assert [len(y) for _, y in unpack.seen] == sizes
    if num_batches == 1:
        assert about == []
    else:
        assert rows(torch.cat([x for x, _ in unpack.seen])) == rows(data.x)
        assert len(about) == 1
        assert "asks for more than the 24 samples" in about[0] and "in 2 batch(es)" in about[0]


# Neutrality


class Snapshot(Callback):
    """Everything that training depends on, at the end of each epoch."""

    def __init__(self) -> None:
        self.taken: list[list[torch.Tensor]] = []
        self.modes: list[list[bool]] = []
        self.others: list[str] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        generator = trainer.train_dataloader.generator
        states = [torch.get_rng_state(), *([] if generator is None else [generator.get_state()])]
        values = [*pl_module.parameters(), *pl_module.buffers(), *(p.grad for p in pl_module.parameters())]
        self.taken.append([x.detach().clone() for x in (*values, *states)])
        self.modes.append([module.training for module in pl_module.modules()])
        state = np.random.get_state()
        self.others.append(repr((random.getstate(), state[1].tolist(), state[2:])))


class Stateful(nn.Module):
    """Counts its calls in a buffer, and draws random numbers in eval mode as well."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x + 1e-3 * torch.rand(len(x), 1)


def norm_net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), Stateful(), nn.Dropout(0.4), nn.Linear(6, 3))


def run_for_neutrality(module: L.LightningModule, *callbacks: Callback) -> L.Trainer:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    run = trainer(*callbacks, max_epochs=3)
    run.fit(module, DataLoader(Samples(noise=True), 6, shuffle=True, generator=torch.Generator().manual_seed(3)))
    return run


def test_nothing_changes_within_the_callback():
    before, after = Snapshot(), Snapshot()
    module = Plain(norm_net())
    module.net[1].eval()  # a part that the user keeps in eval mode
    run_for_neutrality(module, before, indicators(num_batches=2, directions=NAMES), after)
    assert len(before.taken) == len(after.taken) == 3
    for old, new in zip(before.taken, after.taken, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
    assert before.others == after.others
    assert before.modes == after.modes
    assert True in before.modes[0] and False in before.modes[0]


@pytest.mark.parametrize("kind", [Plain, Mixed])
def test_a_run_ends_the_same_with_and_without_the_callback(kind):
    runs = []
    for with_callback in (False, True):
        torch.manual_seed(0)
        module = kind(norm_net() if kind is Plain else net())
        everywhere = {"at_start": True, "fractions": [0.1, 0.4]}
        run = run_for_neutrality(module, *[indicators(num_batches=2, directions=NAMES, **everywhere)] * with_callback)
        runs.append((module.state_dict(), run.optimizers[0].state_dict()["state"]))
    (weights, state), (same_weights, same_state) = runs
    assert all(torch.equal(weights[name], same_weights[name]) for name in weights)
    assert all(torch.equal(state[p]["momentum_buffer"], same_state[p]["momentum_buffer"]) for p in state)


def test_dropout_is_inactive_in_the_evaluation():
    data = Samples()
    run = fit(Plain(net(), lr=0.0), indicators(directions=["ief"], batch_size=N), data=data, max_epochs=2)
    first = logged(run)
    run = fit(run.lightning_module, indicators(directions=["ief"], batch_size=N, seed=9), data=data)
    assert logged(run) == pytest.approx(first, rel=1e-4)


def test_gradients_of_the_last_batch_stay():
    module = Plain(net())
    fit(module, indicators())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    frozen = Plain(net())
    frozen.net[0].requires_grad_(False)
    fit(frozen, indicators())
    assert frozen.net[0].weight.grad is None


# Precision and transfer


def test_double_precision_and_mixed_precision():
    data, results = Samples(), {}
    for precision in ("32-true", "64-true", "bf16-mixed"):
        torch.manual_seed(3)
        module = Plain(net(), lr=0.0)
        results[precision] = logged(
            fit(module, indicators(batch_size=N, directions=["ief"]), data=data, precision=precision)
        )
    # Mixed precision is about training; the indicators are computed in that of the parameters.
    assert results["bf16-mixed"] == results["32-true"]
    assert results["64-true"] == pytest.approx(results["32-true"], rel=1e-4)
    assert results["64-true"] != results["32-true"]


def test_batches_pass_through_the_transfer_hooks():
    class Transfers(Plain):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return {**batch, "x": batch["x"] + 1}

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return {**batch, "x": batch["x"] * 2}

    data, unpack = Samples(), Unpack()
    fit(Transfers(net()), indicators(unpack_batch=unpack), data=data)
    assert rows(unpack.seen[0][0]) <= rows((data.x + 1) * 2)


def test_the_collate_function_of_the_loader_is_used():
    unpack = Unpack()
    pairs = TensorDataset(torch.randn(N, 4), torch.randint(3, (N,)))

    def collate(samples):
        return {"x": torch.stack([x for x, _ in samples]), "y": torch.stack([y for _, y in samples])}

    trainer(indicators(unpack_batch=unpack)).fit(Plain(net()), DataLoader(pairs, 6, collate_fn=collate))
    assert len(unpack.seen[0][1]) == 8


# Values that are not finite


def spoilt(x: float | None = None, ignored: int = 0) -> Samples:
    data = Samples()
    if x is not None:
        data.x[0] = x
    data.y[:ignored] = -100
    return data


class Idle(Plain):
    """Trains on nothing, so that a spoilt sample does not spoil the parameters."""

    def training_step(self, batch, batch_idx):
        return 0.0 * self.net[0].weight.sum()


@pytest.mark.parametrize("x", [math.nan, math.inf], ids=str)
def test_a_sample_that_is_not_finite_gives_nan_and_training_goes_on(x):
    run = fit(Idle(net()), indicators(directions=NAMES, batch_size=N), data=spoilt(x), max_epochs=2)
    assert run.current_epoch == 2
    assert len(logged(run)) == 21 and all(math.isnan(value) for value in logged(run).values())


def test_finite_losses_with_an_infinite_gradient_give_nan():
    class Root(Idle):
        def forward(self, x):
            return (self.net[0](x) * torch.tensor([1.0, 1.0, -1.0, -1.0])).sum(1, keepdim=True).sqrt().expand(-1, 3)

    module = Root(nn.Sequential(nn.Linear(4, 4, bias=False)))
    nn.init.eye_(module.net[0].weight)
    data = Samples()
    data.x[:] = torch.tensor([2.0, 1.0, 1.0, 1.0])
    data.x[0] = 1.0  # √0, whose slope is infinite
    run = fit(module, indicators(directions=NAMES, batch_size=N), data=data, max_epochs=2)
    assert run.current_epoch == 2
    assert len(logged(run)) == 21 and all(math.isnan(value) for value in logged(run).values())


def test_a_run_that_has_diverged_goes_on():
    class Diverged(Idle):
        def on_train_start(self):
            with torch.no_grad():
                self.net[0].weight.fill_(math.nan)

    run = fit(Diverged(net()), indicators(directions=NAMES), max_epochs=2)
    assert run.current_epoch == 2
    assert all(math.isnan(value) for value in logged(run).values())


def test_a_sample_without_gradient_makes_the_imbalance_infinite():
    run = fit(Idle(net()), indicators(batch_size=N), data=spoilt(ignored=1))
    values = logged(run)
    assert values.pop("gradient_norm_imbalance") == math.inf
    assert all(math.isfinite(value) for value in values.values())


@pytest.mark.parametrize("damping", [0.0, 1e-7])
def test_a_batch_without_gradients(damping):
    dampings = dict.fromkeys(NAMES, damping) | {"sampled_fisher": 1e-7}
    run = fit(Idle(net()), indicators(batch_size=N, directions=NAMES, dampings=dampings), data=spoilt(ignored=N))
    values = logged(run)
    assert all(values[f"gamma/{name}"] == math.inf for name in NAMES)
    assert all(math.isnan(values[f"gamma_relative/{name}"]) for name in NAMES)
    assert math.isnan(values["gradient_norm_imbalance"])


def test_gamma_of_zero_does_not_divide():
    class Saturated(Idle):
        def forward(self, x):
            return 1e5 + self.net[0](x)

    callback = GammaIndicators(
        ["sgd", "ief"],
        batch_size=8,
        damping=1e-3,
        objective=objectives.BinaryCrossEntropy(),
        unpack_batch=lambda batch: (batch["x"], torch.zeros(len(batch["x"]), 6)),
    )
    values = logged(fit(Saturated(net()[:1]), callback))
    assert values["gamma/sgd"] == 0.0
    assert math.isnan(values["gamma_relative/sgd"])


def test_a_share_of_the_last_batch_alone_is_none(monkeypatch):
    monkeypatch.setattr("lightning_ief.callbacks.gamma_evaluation._MAX_ROWS", 3 * 4)
    values = logged(fit(Plain(net()), indicators(directions=["ief"], num_batches=2, batch_size=20)))  # 20 and 4
    assert "gamma_share/ief" not in values and "gamma_std/ief" in values


def test_shares_of_the_achievable_decrease(tmp_path):
    run = fit(Plain(net()), indicators(directions=[*NAMES], dampings=DAMPINGS, batch_size=N))
    shares = {name: logged(run)[f"gamma_share/{name}"] for name in NAMES}
    assert all(0 < share < 1.001 for share in shares.values())
    assert shares["natural_gradient"] == max(shares.values()) > 0.95 > 2 * shares["sgd"]


def test_with_many_logits_the_natural_gradient_takes_conjugate_gradients(monkeypatch):
    data = Samples()
    weights = net().state_dict()

    def values(**options: Any) -> dict[str, float]:
        module = Plain(net(), lr=0.0)
        module.net.load_state_dict(weights)
        return logged(fit(module, indicators(directions=["ief"], batch_size=N, **options), data=data))

    exact = values()["gamma_share/ief"]
    monkeypatch.setattr("lightning_ief.callbacks.gamma_evaluation._MAX_ROWS", 10)
    assert "gamma_share/ief" not in values()
    few, many = (values(natural_iterations=n)["gamma_share/ief"] for n in (2, 40))
    assert few > 1.1 * many  # γ of the natural gradient falls on the way
    assert exact * (1 - 1e-3) < many < 1.1 * exact


def test_directions_of_ones_own():
    def half(lin, damping):
        return {name: entry / 2 for name, entry in directions.ef(lin, damping).items()}

    own = [
        OwnDirection("half", half, 1e-2),
        OwnDirection("ef-damped", directions.ef, 10.0),
        OwnDirection("ef-default", half),
    ]
    values = logged(fit(Plain(net()), indicators(directions=["ef", *own], dampings={"ef": 1e-2})))
    assert values["gamma/half"] == pytest.approx(values["gamma/ef"], rel=1e-6)  # γ does not depend on the length
    assert values["cosine/ef-damped"] > 0.99 > values["cosine/ef"]
    assert values["gamma/ef-default"] not in (values["gamma/ef"], values["gamma/ef-damped"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"unpack_batch": lambda batch: (batch["x"], batch["x"])},
            r"needs objective: Plain has none, .*GammaIndicators\(objective=\.\.\.\).*targets are torch.float32",
        ),
        (
            {"unpack_batch": lambda batch: (batch["x"], batch["y"] + 3)},
            r"needs objective: .*got class [345] for logits",
        ),
        ({"unpack_batch": None}, r"needs unpack_batch: Plain has none.*a dict with keys \['x', 'y'\]"),
    ],
)
@pytest.mark.parametrize("at_start", [True, False])
def test_a_module_that_does_not_say_enough_is_refused(options, message, at_start):
    run = trainer(indicators(**options, objective=None, at_start=at_start))
    with pytest.raises(MisconfigurationException, match=message):
        run.fit(Plain(net()), DataLoader(Samples(), 6))
    assert run.global_step == 0


class Pairs(Plain):
    """As templates have it: batches are pairs, and the loss, if it has a name, is one of torch."""

    def __init__(self, net: nn.Module, loss: nn.Module | None = None) -> None:
        super().__init__(net)
        if loss is not None:
            self.criterion = loss

    def training_step(self, batch, batch_idx):
        x, y = batch
        return getattr(self, "criterion", nn.functional.cross_entropy)(self(x), y)


@pytest.mark.parametrize(
    ("loss", "objective"),
    [
        (None, objectives.CrossEntropy()),
        (nn.CrossEntropyLoss(label_smoothing=0.3, reduction="sum"), objectives.CrossEntropy(label_smoothing=0.3)),
    ],
    ids=["function", "module"],
)
def test_pairs_with_classes_are_taken_for_cross_entropy(loss, objective, monkeypatch):
    told = []  # not by the log, of which other runs in this process may have changed what is kept
    monkeypatch.setattr("lightning_ief.callbacks.beside_the_run.rank_zero_info", told.append)
    torch.manual_seed(2)
    pairs, found = TensorDataset(torch.randn(N, 4), torch.randint(3, (N,))), []
    for options in ({}, {"objective": objective, "unpack_batch": tuple}):
        torch.manual_seed(0)
        run = fit(Pairs(net(), loss), GammaIndicators(batch_size=N, **options), data=pairs)
        found.append(logged(run))
    assert found[0] == found[1] and len(found[0]) == 17
    assert told == [
        "GammaIndicators: Pairs has no objective, and its targets are classes: taken for cross-entropy. Say "
        "GammaIndicators(objective=...) for another loss."
    ]


def test_a_share_that_is_left_out_is_told_once(monkeypatch):
    said = []
    monkeypatch.setattr("lightning_ief.callbacks.gamma_indicators.rank_zero_info", said.append)
    monkeypatch.setattr("lightning_ief.callbacks.gamma_evaluation._MAX_ROWS", 23)
    told = []
    for options in ({}, {"natural_iterations": 3}):
        said.clear()
        run = fit(Plain(net()), indicators(at_start=True, **options), max_epochs=2)
        told.append([each for each in said if "gamma_share is left out" in each])
        assert any("share" in key for key in logged(run)) == bool(options)
    assert [len(each) for each in told] == [1, 0]
    assert "batch_size=8 have more than 23 logits" in told[0][0] and "natural_iterations=50" in told[0][0]


def test_an_objective_of_another_kind_is_refused():
    module = Plain(net())
    module.objective = nn.CosineEmbeddingLoss()
    with pytest.raises(MisconfigurationException, match=r"Plain\.objective, .* is a CosineEmbeddingLoss"):
        fit(module, indicators(objective=None))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(DataLoader(Samples(), None))


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (lambda: DataLoader(Stream(), 6), "one over a Stream, which has no length or no order"),
        (lambda: DataLoader([{"x": torch.ones(2, 4), "y": torch.ones(2).long()}], None), "one with batch_size=None"),
        (lambda: {"a": DataLoader(Samples(), 6)}, "got a dict"),
        (lambda: [{"x": torch.ones(2, 4), "y": torch.ones(2).long()}], "got a list"),
    ],
    ids=["iterable", "no-collation", "several-loaders", "no-loader"],
)
def test_data_to_draw_no_batches_from_are_refused_before_the_first_step(loader, message):
    module = Plain(net())
    run = trainer(indicators())
    with pytest.raises(MisconfigurationException, match=message):
        run.fit(module, loader())
    assert run.global_step == 0


class OfTheHead(Plain):
    """Its optimizer moves the last layer only; the others stay trainable."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.net[-1].parameters(), lr=0.0)


def test_gamma_is_that_of_the_parameters_that_move():
    module = OfTheHead(net())
    unpack = Unpack()
    callback = indicators(directions=["ief"], unpack_batch=unpack)
    run = fit(module, callback)
    inputs, targets = unpack.seen[-1]
    module.eval()
    names = {id(p): name for name, p in module.named_parameters()}
    head = {names[id(p)]: p for p in module.net[-1].parameters()}
    objective = objectives.CrossEntropy()
    lin = linearize(module, inputs, targets, objective, parameters=head)
    expected = float(gamma(lin, directions.ief(lin, 1e-3)))
    of_all = linearize(module, inputs, targets, objective)
    other = float(gamma(of_all, directions.ief(of_all, 1e-3)))
    assert logged(run)["gamma/ief"] == pytest.approx(expected, rel=1e-4)
    assert expected != pytest.approx(other, rel=1e-2)


class Merging(nn.Linear):
    """A layer with LoRA as loralib has it: train(False) adds the product to the weight, train() takes it away again."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.weight.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, self.in_features)), nn.Parameter(torch.randn(self.out_features, 2))
        self.merged = False

    def train(self, mode: bool = True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.b.data @ self.a.data
            self.merged = not mode
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = super().forward(x)
        return output if self.merged else output + x @ self.a.T @ self.b.T


@pytest.mark.parametrize("frozen_part_in_eval", [False, True])
def test_layers_that_do_more_in_train_go_on_as_before(frozen_part_in_eval):
    def run(*callbacks: Callback) -> nn.Module:
        torch.manual_seed(0)
        module = Plain(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.4), Merging(6, 3)))
        module.net[2].train(not frozen_part_in_eval)
        fit(module, *callbacks, max_epochs=2)
        return module

    callback = indicators(directions=["sgd"], at_start=True, print_table=False)
    with_callback, without = run(callback), run()
    assert not with_callback.net[-1].merged
    for a, b in zip(with_callback.parameters(), without.parameters(), strict=True):
        assert torch.equal(a, b)


class Apart(Merging):
    """The same without merging."""

    train = nn.Module.train


class Inner(Merging):
    """Its dropout stands within, as loralib has it."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.dropout = nn.Dropout(0.9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.dropout(x))


@pytest.mark.parametrize("merging", [Merging, Inner])
def test_gamma_is_that_of_what_would_be_merged(merging):
    """Merged into the weight, the adapters would have no gradients, and γ would be that of the bias alone."""

    def values(layer: type[Merging]) -> dict[str, float]:
        torch.manual_seed(0)
        module = Plain(nn.Sequential(nn.Linear(4, 6).requires_grad_(False), nn.Tanh(), layer(6, 3)), lr=0.0)
        return logged(fit(module, indicators(directions=["sgd", "ief"], print_table=False), data=data))

    data = Samples()
    assert values(merging) == values(Apart)


def test_an_evaluation_that_fails_leaves_layers_that_merge_as_they_were():
    module = Plain(nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.4), Merging(6, 3)))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}

    def fail(lin, damping):
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fit(module, indicators(directions=[OwnDirection("mine", fail)], at_start=True))
    assert all(each.training for each in module.modules()) and not module.net[-1].merged
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


class Noting(nn.Linear):
    """A layer that notes in train() which way to take, where no snapshot of its attributes sees it."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.notes = {"short way": False}

    def train(self, mode: bool = True):
        self.notes["short way"] = not mode
        return super().train(mode)


def test_what_layers_note_in_train_is_as_before():
    module = Plain(nn.Sequential(Noting(4, 6), nn.Tanh(), nn.Linear(6, 3)))
    ways = []

    def direction(lin, damping):
        ways.append(module.net[0].notes["short way"])
        return directions.sgd(lin)

    class After(Callback):
        """Comes behind the evaluation, before the Trainer switches modes itself."""

        def on_train_epoch_end(self, trainer, pl_module):
            ways.append(module.net[0].notes["short way"])

    fit(module, indicators(directions=[OwnDirection("mine", direction)], print_table=False), After())
    assert ways == [True, False]
