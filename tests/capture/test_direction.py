"""A direction: a mapping that is formed when it is first read, and applied without being formed."""

import copy
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_ief import IEF, directions, linearize, objectives
from lightning_ief.capture import CaptureError, Direction, Jacobian, Linearization, LinearizedBatch
from tests.helpers import Function, flatten, per_sample_jacobian, relative_error

pytestmark = pytest.mark.usefixtures("float64")

N, D, C = 4, 5, 3
NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]
MOVED = "after the parameters had been changed"

KINDS: dict[str, Callable[[Linearization], Direction]] = {
    "sgd": directions.sgd,
    "ef": lambda lin: directions.ef(lin, 1e-3),
    "ief": lambda lin: directions.ief(lin, 1e-3),
    "natural_gradient": lambda lin: directions.natural_gradient(lin, 1e-3),
}


def linearized() -> Linearization:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, C))
    return linearize(model, torch.randn(N, D), torch.arange(N) % C, objectives.CrossEntropy())


def move(lin: Linearization) -> None:
    with torch.no_grad():
        lin.parameters["2.bias"].add_(1.0)


@pytest.fixture
def formed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often a direction was formed."""
    found: list[int] = []
    rmatvec = Jacobian.rmatvec
    monkeypatch.setattr(Jacobian, "rmatvec", lambda self, v: found.append(1) or rmatvec(self, v))
    return found


# --- a mapping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_it_reads_as_a_dictionary(kind: str) -> None:
    lin = linearized()
    d = KINDS[kind](lin)
    assert isinstance(d, Direction)
    plain = dict(d)
    assert list(plain) == list(d) == list(d.keys()) == NAMES
    assert {name: entry.shape for name, entry in plain.items()} == {n: p.shape for n, p in lin.parameters.items()}
    assert all(entry is plain[name] for name, entry in d.items())
    assert all(a is b for a, b in zip(d.values(), plain.values(), strict=True))
    doubled = {name: 2 * entry for name, entry in d.items()}
    assert relative_error(flatten(doubled), 2 * flatten(d)) == 0
    assert {**d, "more": torch.ones(1)}.keys() == {*NAMES, "more"}
    assert d.get("none") is None
    with pytest.raises(KeyError, match="none"):
        d["none"]
    assert not any(entry.requires_grad for entry in plain.values())


def test_names_are_known_without_forming(formed: list[int]) -> None:
    lin = linearized()
    d = directions.ief(lin, 1e-3)
    formed.clear()  # verification does
    assert len(d) == 4
    assert "2.bias" in d and "none" not in d
    assert [*d] == NAMES and d.keys() == lin.parameters.keys()
    with pytest.raises(KeyError):
        d["none"]
    assert repr(d) == "<Direction of 4 parameters, not formed>"
    assert formed == []
    assert d["0.bias"].shape == (7,)
    assert flatten(d).isfinite().all() and d.form() is d
    assert formed == [1]
    assert repr(d) == "<Direction of 4 parameters, formed>"


def test_any_mapping_is_a_direction() -> None:
    lin = linearized()
    plain = {name: torch.ones_like(p) for name, p in lin.parameters.items()}
    d = Direction.of(plain)
    assert Direction.of(d) is d and d.form() is d
    assert dict(d) == plain
    assert d.known_norm is None and d.coefficients is None
    into = {name: torch.full_like(p, 2.0) for name, p in lin.parameters.items()}
    d.add_to(into, dict.fromkeys(plain, -0.5), dict.fromkeys(plain, 3.0))
    assert all((x == 5.5).all() for x in into.values())
    plain.clear()
    assert len(d) == 4


def test_what_is_known_without_forming() -> None:
    lin = linearized()
    d = directions.ief(lin, 0.0)
    coefficients = d.coefficients
    truth = per_sample_jacobian(lin.model, lin.inputs, lin.targets, lin.objective)
    expected = truth.T @ torch.linalg.solve(truth @ truth.T, lin.logit_gradient_norms)
    assert relative_error(coefficients @ truth, expected) < 1e-10
    assert d.known_norm == pytest.approx(float(expected.norm()), rel=1e-10)
    coefficients.zero_()  # a copy
    assert relative_error(flatten(d), expected) < 1e-10
    # Entries may be written to: what was known of them holds no more.
    assert d.known_norm is None and d.coefficients is None


@pytest.mark.parametrize("known", [True, False], ids=["a solve", "coefficients alone"])
def test_it_is_applied_without_being_formed(known: bool, formed: list[int]) -> None:
    lin = linearized()
    d, truth = ((directions.ief(lin, 1e-3), directions.ief(lin, 1e-3)) if known
                else (directions.sgd(lin), directions.sgd(lin)))  # fmt: skip
    truth.form()
    into = {name: torch.randn_like(p) for name, p in lin.parameters.items()}
    expected = {name: 0.9 * x - 0.1 * truth[name] for name, x in into.items()}
    formed.clear()
    d.add_to(into, dict.fromkeys(into, -0.1), dict.fromkeys(into, 0.9))
    assert formed == []
    assert relative_error(flatten(into), flatten(expected)) < 1e-12
    assert repr(d) == "<Direction of 4 parameters, applied>"
    with pytest.raises(CaptureError, match=r"after it had been applied in place. Call form\(\) on it before"):
        d["0.bias"]
    with pytest.raises(CaptureError, match="applied in place"):
        d.add_to(into, dict.fromkeys(into, 1.0), dict.fromkeys(into, 1.0))


def test_a_formed_one_can_be_applied_and_read_again() -> None:
    lin = linearized()
    d = directions.ief(lin, 1e-3).form()
    before, into = dict(d), {name: torch.zeros_like(p) for name, p in lin.parameters.items()}
    for _ in range(2):
        d.add_to(into, dict.fromkeys(into, 1.0), dict.fromkeys(into, 1.0))
    assert relative_error(flatten(into), 2 * flatten(before)) < 1e-14
    assert all(d[name] is entry for name, entry in before.items())


# --- what a lazy mapping could get wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_reading_after_the_parameters_moved_is_refused(kind: str) -> None:
    lin = linearized()
    early, late = KINDS[kind](lin), KINDS[kind](lin)
    read = flatten(early).clone()
    move(lin)
    with pytest.raises(CaptureError, match=rf"{MOVED}.*form\(\) or dict\(direction\)"):
        late["0.weight"]
    with pytest.raises(CaptureError, match=MOVED):
        dict(late)
    with pytest.raises(CaptureError, match=MOVED):
        late.add_to(lin.parameters, dict.fromkeys(NAMES, 1.0), dict.fromkeys(NAMES, 1.0))
    assert list(late) == NAMES
    assert torch.equal(flatten(early), read)


def test_parameters_that_move_before_the_solve_are_noticed() -> None:
    lin = linearized()
    lin.backward()
    move(lin)
    with pytest.raises(CaptureError, match=MOVED):
        directions.sgd(lin)["0.weight"]


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)], ids=["first", "last"])
def test_one_stale_batch_of_several_is_noticed(order: slice) -> None:
    first = linearized()
    first.backward()
    move(first)
    second = linearize(first.model, first.inputs, first.targets, first.objective)
    stacked = LinearizedBatch.of([first, second][order])
    with pytest.raises(CaptureError, match=MOVED):
        directions.sgd(stacked)["0.weight"]


def test_it_can_be_read_while_the_parameters_are_moved() -> None:
    """One reading forms all entries: a loop that moves the parameters as it goes reads no others."""
    lin = linearized()
    expected = {
        n: p.detach() - d for (n, p), d in zip(lin.parameters.items(), directions.sgd(lin).values(), strict=True)
    }
    with torch.no_grad():
        for name, entry in directions.sgd(lin).items():
            lin.parameters[name].sub_(entry)
    assert all(torch.equal(lin.parameters[name], x) for name, x in expected.items())


def watched() -> tuple[Linearization, weakref.ref, list[weakref.ref]]:
    """A linearization, and weak references to its Jacobian and to what the forward pass left in it."""
    activations: list[weakref.ref] = []

    def body(m: nn.Module, x: Tensor) -> Tensor:
        hidden = m.inner[:2](x)
        activations.append(weakref.ref(hidden.untyped_storage()))
        return m.inner[2](hidden)

    model = Function.of(nn.Sequential(nn.Linear(D, 50), nn.Tanh(), nn.Linear(50, 2000)), body)
    x, y = torch.randn(N, D), torch.randn(N, 2000)
    linearize(model, x, y, objectives.LeastSquares())
    activations.clear()
    lin = linearize(model, x, y, objectives.LeastSquares())
    lin.backward()
    return lin, weakref.ref(lin.jacobian), activations


@pytest.mark.parametrize("use", ["read", "applied"])
def test_the_first_use_lets_the_jacobian_go(use: str) -> None:
    lin, jacobian, activations = watched()
    model = lin.model
    d = directions.ief(lin, 1e-3)
    del lin
    assert jacobian() is not None and activations[0]() is not None  # which is all there is to form it from
    if use == "read":
        d["inner.0.bias"]
    else:
        into = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        d.add_to(into, dict.fromkeys(into, 1.0), dict.fromkeys(into, 1.0))
    assert jacobian() is None
    assert activations[0]() is None
    assert len(d) == 4


def test_a_step_leaves_nothing_behind() -> None:
    lin, jacobian, activations = watched()
    optimizer = IEF(lin.model.parameters(), damping=1e-3)
    optimizer.step(linearization=lin)
    del lin
    assert jacobian() is None and activations[0]() is None


@pytest.mark.parametrize("state", ["formed", "not formed"])
@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))], ids=["copy", "deepcopy", "pickle"]
)
def test_copies_are_formed(copied: Callable[[Direction], Direction], state: str) -> None:
    lin = linearized()
    d = directions.ief(lin, 1e-3)
    if state == "formed":
        d.form()
    other = copied(d)
    assert isinstance(other, Direction) and repr(other) == "<Direction of 4 parameters, formed>"
    move(lin)
    assert relative_error(flatten(other), flatten(d)) == 0
    stale = directions.sgd(lin)
    move(lin)
    with pytest.raises(CaptureError, match=MOVED):
        copied(stale)


def test_a_first_reading_in_inference_mode_gives_ordinary_tensors() -> None:
    lin = linearized()
    with torch.inference_mode():
        d = directions.ief(lin, 1e-3)
        assert not d["0.weight"].is_inference()
    d["0.weight"].mul_(2.0)


def test_a_parameter_that_is_used_through_its_sum() -> None:
    """Its gradient is one number, expanded: entries that are handed out are nobody else's memory."""
    model = Function(lambda m, x: x @ m.v.T * m.w.sum(), v=(C, D), w=(2, 3))
    x, y = torch.randn(N, D), torch.randn(N, C)
    lin = linearize(model, x, y, objectives.LeastSquares())
    truth = per_sample_jacobian(model, x, y, objectives.LeastSquares()).sum(0)
    d = directions.sgd(lin)
    assert relative_error(flatten(d), truth) < 1e-12
    d["w"].view(-1)[0] = 0.0
    assert int((d["w"] == 0).sum()) == 1
