"""The registrations: complete, told apart, and enough to compute a direction by its name."""

import pytest
import torch
from torch import nn

from lightning_ief import EF, IEF, KFAC, NaturalGradient, SampledFisher, directions, linearize, objectives
from lightning_ief.directions.registry import REFERENCE, find, names, register
from lightning_ief.linalg.vectors import cosine


def linearization():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    y = torch.arange(6) % 3
    return linearize(model, torch.randn(6, 4), y, objectives.CrossEntropy(), keep_sides=["weight"])


def test_every_public_direction_is_registered():
    assert sorted([*names(), "weighted"]) == sorted(directions.__all__)  # which takes weights besides
    assert REFERENCE in names()
    for name in names():
        assert find(name).name == name and find(name).function is getattr(directions, name)


@pytest.mark.parametrize("name", names())
def test_a_direction_is_computed_by_its_name(name):
    lin = linearization()

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    by_hand = {
        "sgd": lambda: directions.sgd(lin),
        "ef": lambda: directions.ef(lin, 0.1),
        "ief": lambda: directions.ief(lin, 0.1),
        "natural_gradient": lambda: directions.natural_gradient(lin, 0.1),
        "sampled_fisher": lambda: directions.sampled_fisher(lin, 0.1, 2, seeded()),
        "kfac_sampled": lambda: directions.kfac_sampled(lin, 0.1, 2, seeded()),
        "kfac_empirical": lambda: directions.kfac_empirical(lin, 0.1),
        "kfac_improved": lambda: directions.kfac_improved(lin, 0.1),
        "gauss_newton": lambda: directions.gauss_newton(lin, 0.1),
        "layerwise_ef": lambda: directions.layerwise_ef(lin, 0.1),
        "layerwise_ief": lambda: directions.layerwise_ief(lin, 0.1),
        "layerwise_gauss_newton": lambda: directions.layerwise_gauss_newton(lin, 0.1),
    }
    found, expected = find(name).compute(lin, 0.1, 2, seeded()), by_hand[name]()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_random_numbers_are_drawn_where_it_says_so():
    lin = linearization()
    for name in names():
        first, second = (find(name).compute(lin, 0.1, 1, torch.Generator().manual_seed(seed)) for seed in (1, 2))
        assert (float(cosine(first, second)) < 0.9999) == find(name).draws


@pytest.mark.parametrize("name", names())
def test_the_graph_is_taken_once_more_where_it_says_so(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    sides = ["0.weight", "2.weight"] if find(name).needs_sides else []
    lin = linearize(model, torch.randn(6, 4), torch.arange(6) % 3, objectives.CrossEntropy(), keep_sides=sides)
    lin.backward(retain_graph=False)
    if find(name).needs_graph:
        with pytest.raises(RuntimeError, match="graph of this linearization was let go"):
            find(name).compute(lin, 0.1)
    else:
        find(name).compute(lin, 0.1)


@pytest.mark.parametrize("name", names())
def test_sides_are_needed_where_it_says_so(name):
    torch.manual_seed(0)
    lin = linearize(nn.Linear(4, 3), torch.randn(6, 4), torch.arange(6) % 3, objectives.CrossEntropy())
    if find(name).needs_sides:
        with pytest.raises(RuntimeError, match=r"needs both sides of \['weight'\]"):
            find(name).compute(lin, 0.1)
    else:
        find(name).compute(lin, 0.1)


def test_optimizers_agree():
    for optimizer, name in ((EF, "ef"), (IEF, "ief"), (SampledFisher, "sampled_fisher"),
                            (NaturalGradient, "natural_gradient")):  # fmt: skip
        assert optimizer.retains_graph == find(name).needs_graph
        default = optimizer([nn.Parameter(torch.ones(1))]).param_groups[0]["damping"]
        assert default == (find(name).default_damping or 1e-7)
    for fisher in ("empirical", "improved", "sampled"):
        known, kfac = find(f"kfac_{fisher}"), KFAC([nn.Parameter(torch.ones(1))], fisher=fisher)
        assert kfac.retains_graph == known.needs_graph and kfac.param_groups[0]["damping"] == known.default_damping


def test_labels_and_styles_are_told_apart():
    found = [find(name) for name in names()]
    assert len({each.label for each in found}) == len(found)
    for key in ("color", "linestyle", "marker"):
        assert len({each.style[key] for each in found}) == len(found)


@pytest.mark.parametrize("damping", [-1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("name", names())
def test_no_direction_takes_such_a_damping(name, damping):
    with pytest.raises(ValueError, match=f"the damping of '{name}' must be finite and [≥>] 0, got {damping}"):
        find(name).check_damping(damping)


def test_a_damping_of_zero():
    lin = linearization()
    for name in names():
        if find(name).damping == "> 0":
            with pytest.raises(ValueError, match=f"the damping of '{name}' must be finite and > 0, got 0.0"):
                find(name).check_damping(0.0)
            with pytest.raises(ValueError, match="> 0"):
                find(name).compute(lin, 0.0)
        else:
            find(name).check_damping(0.0)
            find(name).compute(lin, 0.0)


def test_an_unknown_name_lists_what_is_known():
    with pytest.raises(ValueError, match="unknown direction 'adam'; there are .*'ief'.*'sgd'"):
        find("adam")


@pytest.mark.parametrize(("given", "meant"), [("eif", "ief"), ("IEF", "ief"), ("sampled_fischer", "sampled_fisher")])
def test_a_misspelt_name_is_suggested(given, meant):
    with pytest.raises(ValueError, match=rf"^unknown direction '{given}'\. Did you mean {meant}\?$"):
        find(given)


def test_a_name_is_registered_once():
    def ief(linearization, damping):
        return {}

    before = find("ief")
    with pytest.raises(ValueError, match="'ief' is registered already, in lightning_ief.directions.empirical"):
        register(label="mine", color="black", linestyle="-", marker="o")(ief)
    assert find("ief") is before
