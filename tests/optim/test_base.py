"""The step that all optimizers share: what it refuses, and what it takes a direction from."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ief import EF, IEF, SampledFisher, directions, linearize, objectives
from lightning_ief.capture import CaptureError, Direction, Linearization, LinearizedBatch
from lightning_ief.optim import KFAC, DirectionOptimizer
from tests.helpers import flatten, relative_error, small_network, weights

pytestmark = pytest.mark.usefixtures("float64")

OBJECTIVE = objectives.CrossEntropy()
X, Y = torch.randn(8, 5, dtype=torch.float64), torch.arange(8) % 3


def batch(model: nn.Module, part: slice = slice(0, 4), **options: Any) -> Linearization:
    return linearize(model, X[part], Y[part], OBJECTIVE, **options)


# --- the parameters are those of the batch, test_parts.py ------------------------------------------------------


def test_frozen_parameters_of_the_optimizer_do_no_harm() -> None:
    model = small_network()
    model[0].requires_grad_(False)
    before = weights(model)
    IEF(model.parameters(), damping=1e-3).step(linearization=batch(model))
    assert not torch.equal(weights(model), before)


def test_parameters_of_another_model_are_refused() -> None:
    model, other = small_network(), small_network()
    optimizer = IEF(model.parameters(), accumulate=2)
    optimizer.step(linearization=batch(model))
    with pytest.raises(RuntimeError, match=r"shapes \[\(7, 5\).*does not know"):
        optimizer.step(linearization=batch(other))


# --- the parameters are where they were -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [IEF, EF, lambda p: SampledFisher(p)])
def test_the_same_linearization_twice_is_refused(make: Callable[..., DirectionOptimizer]) -> None:
    model = small_network()
    optimizer, lin = make(model.parameters()), batch(model)
    optimizer.step(linearization=lin)
    before = weights(model)
    with pytest.raises(CaptureError, match=r"changed after they had been linearised. Linearize the batch again"):
        optimizer.step(linearization=lin)
    assert torch.equal(weights(model), before)
    optimizer.step(linearization=batch(model))
    assert not torch.equal(weights(model), before)


def test_a_window_in_which_the_parameters_were_changed_is_refused() -> None:
    model = small_network()
    optimizer = IEF(model.parameters(), accumulate=2)
    optimizer.step(linearization=batch(model))
    with torch.no_grad():
        model[0].bias.mul_(0.5)
    with pytest.raises(CaptureError, match="changed after they had been linearised"):
        optimizer.step(linearization=batch(model, slice(4, 8)))
    assert optimizer.pending == 0  # what comes next is a window of its own
    for _ in range(2):
        optimizer.step(linearization=batch(model))


def test_a_change_between_collecting_and_the_step_is_noticed() -> None:
    model = small_network()
    optimizer = IEF(model.parameters())
    optimizer.collect(batch(model))

    def closure() -> None:
        with torch.no_grad():
            model[2].bias.add_(1.0)

    with pytest.raises(CaptureError, match="changed after they had been linearised"):
        optimizer.step(closure)


def test_windows_at_the_same_parameters_are_taken() -> None:
    model, other = small_network(), small_network()
    optimizer, whole = IEF(model.parameters(), damping=1e-3, accumulate=2), IEF(other.parameters(), damping=1e-3)
    for _ in range(3):
        optimizer.step(linearization=batch(model, slice(0, 4)))
        optimizer.step(linearization=batch(model, slice(4, 8)))
        whole.step(linearization=batch(other, slice(0, 8)))
    assert relative_error(weights(model), weights(other)) < 1e-9


class Undefined(objectives.LeastSquares):
    """A loss that is no number, of which the gradient is one."""

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        return super().losses(logits, targets).index_fill(0, torch.tensor([1]), torch.nan)


@pytest.mark.parametrize(("make", "direction"), [(IEF, directions.ief), (EF, directions.ef)])
def test_a_loss_that_is_not_finite_leaves_no_direction(
    make: type[DirectionOptimizer], direction: Callable[[LinearizedBatch, float], Direction]
) -> None:
    model = small_network()
    before = weights(model)
    lin = linearize(model, X[:4], torch.zeros(4, 3), Undefined())
    assert lin.jacobian.gram().isfinite().all()
    assert flatten(direction(lin, 1e-3)).isnan().all()
    optimizer = make(model.parameters())
    with pytest.warns(RuntimeWarning, match=r"skipped a step: losses or logit gradients are not finite, samples \[1\]"):
        optimizer.step(linearization=lin)
    assert not optimizer.overflowed
    assert torch.equal(weights(model), before)


# --- directions of one's own ------------------------------------------------------------------------------------------


class Own(DirectionOptimizer):
    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, 0.1, 1e-3, 0.0, False, **options)


def own(direction: Callable[[LinearizedBatch, float], Any]) -> type[Own]:
    return type("Own", (Own,), {"direction": lambda self, lin: direction(lin, self.shared("damping"))})


OWN = {
    "a function": type("Own", (Own,), {"function": staticmethod(directions.ief)}),
    "a direction": own(directions.ief),
    "a dictionary": own(lambda lin, damping: dict(directions.ief(lin, damping))),
    "one that was read": own(lambda lin, damping: directions.ief(lin, damping).form()),
}


@pytest.mark.parametrize("make", OWN.values(), ids=OWN)
@pytest.mark.parametrize("normalize", [True, False])
def test_any_mapping_is_stepped_along(make: type[Own], normalize: bool) -> None:
    model = small_network()
    d = flatten(directions.ief(batch(model), 1e-3))
    expected = weights(model) - 0.1 * (d / d.norm() if normalize else d)
    optimizer = make(model.parameters())
    optimizer.param_groups[0]["normalize"] = normalize
    optimizer.step(linearization=batch(model))
    assert relative_error(weights(model), expected) < 1e-12


def test_the_length_is_that_of_what_is_stepped_along() -> None:
    """Entries that were read may have been changed: what the solve knew of their length holds no more."""

    def halved(lin: LinearizedBatch, damping: float) -> Any:
        d = directions.ief(lin, damping)
        d["0.weight"].zero_()
        return d

    model = small_network()
    before = weights(model)
    optimizer = own(halved)(model.parameters())
    optimizer.param_groups[0]["normalize"] = True
    optimizer.step(linearization=batch(model))
    assert float((weights(model) - before).norm()) == pytest.approx(0.1, rel=1e-12)


def test_a_lazy_direction_without_a_known_length() -> None:
    model = small_network()
    d = flatten(directions.sgd(batch(model)))
    before = weights(model)
    own(lambda lin, _: directions.sgd(lin))(model.parameters()).step(linearization=batch(model))
    assert relative_error(weights(model), before - 0.1 * d) < 1e-12


def test_a_direction_of_other_parameters_is_refused() -> None:
    model = small_network()
    optimizer = own(lambda lin, _: {"0.weight": torch.ones(7, 5)})(model.parameters())
    with pytest.raises(ValueError, match=r"only in the second: \['0.bias', '2.bias', '2.weight'\]"):
        optimizer.step(linearization=batch(model))


def test_an_optimizer_without_a_direction_says_what_is_missing() -> None:
    model = small_network()
    with pytest.raises(NotImplementedError, match=r"Own has no direction: set function = staticmethod"):
        Own(model.parameters()).step(linearization=batch(model))


# --- options, and what is skipped ------------------------------------------------------------------------------------


def test_weight_decay_groups_and_normalize():
    model = nn.Linear(3, 2).double()
    lin = linearize(
        model, torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0]), objectives.CrossEntropy()
    )
    d = directions.ief(lin, 1e-3)
    length = flatten(d).norm()
    expected = model.weight * (1 - 0.1 * 0.5) - 0.1 * d["weight"] / length, model.bias - 0.2 * d["bias"] / length
    groups = [{"params": [model.weight], "weight_decay": 0.5}, {"params": [model.bias], "lr": 0.2}]
    optimizer = IEF(groups, lr=0.1, damping=1e-3, normalize=True)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step(linearization=lin)
    assert relative_error(model.weight, expected[0]) < 1e-10
    assert relative_error(model.bias, expected[1]) < 1e-10


def test_groups_must_share_the_damping():
    model = nn.Linear(3, 2)
    lin = linearize(model, torch.randn(4, 3), torch.tensor([0, 1, 1, 0]), objectives.CrossEntropy())
    optimizer = IEF([{"params": [model.weight], "damping": 1.0}, {"params": [model.bias]}], damping=2.0)
    with pytest.raises(ValueError, match="'damping' must be the same"):
        optimizer.step(linearization=lin)


def test_step_without_linearization_says_what_to_do():
    with pytest.raises(RuntimeError, match="NaturalGradientMixin"):
        IEF(nn.Linear(2, 2).parameters()).step()


@pytest.mark.parametrize("option", [{"lr": -1.0}, {"damping": float("nan")}, {"weight_decay": -0.1}])
def test_optimizer_refuses_options(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        IEF(nn.Linear(2, 2).parameters(), **option)


def test_zero_gradients_skip_the_step():
    model = nn.Linear(3, 1, bias=False).double()
    lin = linearize(model, torch.zeros(2, 3, dtype=torch.float64), torch.ones(2, 1).double(), objectives.LeastSquares())
    before = model.weight.detach().clone()
    with pytest.warns(RuntimeWarning, match="all 2 samples"):
        IEF(model.parameters()).step(linearization=lin)
    assert torch.equal(model.weight, before)


def test_a_loaded_state_begins_a_new_window() -> None:
    model = small_network()
    optimizer = IEF(model.parameters(), damping=1e-3, accumulate=2)
    optimizer.step(linearization=batch(model))
    assert optimizer.pending == 1
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.pending == 0


class Weighted(objectives.LeastSquares):
    def __init__(self, weight: float) -> None:
        self.weight = weight


@pytest.mark.parametrize(
    ("first", "second", "alike"),
    [
        (objectives.LeastSquares(), objectives.LeastSquares(), True),
        (Weighted(1.0), Weighted(1.0), True),
        (Weighted(1.0), Weighted(2.0), False),
        (objectives.LeastSquares(), Weighted(1.0), False),
    ],
)
def test_batches_of_other_objectives_are_not_one_window(first, second, alike) -> None:
    model, y = small_network(), torch.randn(8, 3)
    optimizer = SampledFisher(model.parameters(), accumulate=2)
    optimizer.step(linearization=linearize(model, X[:4], y[:4], first))
    lin = linearize(model, X[4:], y[4:], second)
    if alike:
        optimizer.step(linearization=lin)
        return
    with pytest.raises(ValueError, match="other objectives"):
        optimizer.step(linearization=lin)


def test_a_direction_may_be_the_parameters_themselves() -> None:
    """θ ← (1 − ηw) θ − ηd with d = θ, and with d of one parameter a view of another one."""
    model = small_network()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = own(lambda lin, _: dict(lin.parameters))(model.parameters())
    optimizer.param_groups[0].update(lr=0.5, weight_decay=0.5)
    optimizer.step(linearization=batch(model))
    for name, p in model.named_parameters():
        assert torch.allclose(p, 0.75 * before[name] - 0.5 * before[name])
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 3))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    crossed = own(lambda lin, _: {**lin.parameters, "0.bias": lin.parameters["0.weight"][0]})
    crossed(model.parameters()).step(linearization=batch(model))
    assert torch.allclose(model[0].bias, before["0.bias"] - 0.1 * before["0.weight"][0])


def test_parameters_that_have_changed_their_names_are_not_one_window() -> None:
    model = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Tanh(), nn.Linear(5, 5, bias=False))
    first, second = model[0].weight, model[2].weight
    optimizer = IEF(model.parameters(), accumulate=2)
    optimizer.step(linearization=batch(model, parameters={"a": first, "b": second}))
    with pytest.raises(ValueError, match=r"\['a', 'b'\] are not the same parameters"):
        optimizer.step(linearization=batch(model, parameters={"a": second, "b": first}))


def test_models_of_the_same_names_are_not_one_batch() -> None:
    with pytest.raises(ValueError, match="are not the same parameters"):
        LinearizedBatch.of([batch(small_network()), batch(small_network())])


def test_objectives_that_cannot_be_compared_are_refused() -> None:
    first, second = Weighted(1.0), Weighted(1.0)
    first.weight, second.weight = {"w": torch.ones(2)}, {"w": torch.ones(2)}
    model, y = small_network(), torch.randn(8, 3)
    optimizer = SampledFisher(model.parameters(), accumulate=2)
    optimizer.step(linearization=linearize(model, X[:4], y[:4], first))
    with pytest.raises(ValueError, match="other objectives.*give all the same"):
        optimizer.step(linearization=linearize(model, X[4:], y[4:], second))


@pytest.mark.parametrize(
    ("make", "option", "remedy"),
    [
        (EF, "relative_dampng", "'relative_damping' may be meant"),
        (IEF, "absolut_damping", "'absolute_damping' may be meant"),
        (IEF, "max_nrom", "'max_norm' may be meant"),
        (IEF, "betas", "'momentum' stands for"),
        (SampledFisher, "fused", "remove it"),
        (SampledFisher, "steps", "There are: accumulate, .*seed, sync, weight_decay"),
        (EF, "absolute_damping", "There are: .*relative_damping"),
        (KFAC, "foo", "There are: accumulate, .*positions"),
        (Own, "foo", "There are: accumulate, "),
    ],
)
def test_options_that_there_are_not(make, option, remedy):
    p = [torch.nn.Parameter(torch.ones(2))]
    with pytest.raises(TypeError, match=rf"{make.__name__}\({option}=...\): there is no such option. .*{remedy}"):
        make(p, **{option: 1.0})


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("relative_dampning", "'relative_damping' may be meant"),
        ("betas", "'momentum' stands for"),
        ("accumulate", "'accumulate' in a parameter group: it holds for all"),
        ("layerwise", "'layerwise' in a parameter group: it holds for all"),
    ],
)
def test_parameter_groups_with_options_that_do_nothing(option, said):
    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    with pytest.raises(TypeError, match=said):
        IEF([{"params": [p], option: 2}], relative_damping=0.3)
    optimizer = IEF([{"params": [p], "lr": 0.5, "name": "body", "lr_scale": 0.1}], relative_damping=0.3)
    assert optimizer.param_groups[0]["name"] == "body"
    with pytest.raises(TypeError, match=said):
        optimizer.add_param_group({"params": [q], option: 2})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(("decay", "told"), [(0.01, "3.00%"), (1e-3, "0.30%"), (3e-4, None), (0.0, None)])
def test_a_weight_decay_of_another_optimizer(decay, told, recwarn):
    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    IEF([{"params": [p], "weight_decay": decay}, {"params": [q]}], lr=3.0)
    (message,) = [str(each.message) for each in recwarn] or [None]
    assert message is told or (f"weight_decay={decay:g}" in message and told in message and "3e-06 is as" in message)


@pytest.mark.parametrize(("lr", "told"), [(1e-4, True), (1e-3, True), (3e-3, True), (0.01, False), (1.0, False)])
def test_a_learning_rate_of_another_optimizer(lr, told, recwarn):
    IEF([torch.nn.Parameter(torch.ones(2))], lr=lr)
    assert [f"IEF(lr={lr:g})" in str(each.message) for each in recwarn] == [True] * told
