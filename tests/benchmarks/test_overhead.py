"""Counts of operations are exact: those of a step of iEF are held here, and may only fall."""

import pytest
import torch

pytest.importorskip("psutil")

from benchmarks import overhead, workloads
from benchmarks.overhead import Dispatched, count, count_operations
from lightning_ief.objectives import CrossEntropy

# Operations of a step of iEF, at most, where one of SGD has so many.
MOST = {"mlp": (165, 59), "vit-lora": (1140, 1083), "vit": (1359, 1314), "t5-lora": (6063, 6338)}
TENSORS = {"mlp": 6, "vit-lora": 24, "vit": 152, "t5-lora": 144}


@pytest.mark.parametrize("model", MOST)
def test_a_step_of_ief_calls_few_operations(model):
    if model != "mlp":
        pytest.importorskip("peft")
        pytest.importorskip("transformers" if model == "t5-lora" else "timm")
    found = count_operations(model, ["sgd", "ief"])
    most, base = MOST[model]
    assert found["ief"] / found["sgd"] <= most / base, found


def test_counts_are_the_same_again():
    first = count("mlp")
    assert [*first] == [*overhead.WAYS] and first == count("mlp")
    assert first["sgd"].looks == 0 and first["ief"].looks == 1


@pytest.mark.parametrize("model", TENSORS)
def test_trainable_tensors(model):
    for package in ("peft", "timm", "transformers"):
        pytest.importorskip(package)
    net = workloads.OVERHEAD[model].full(torch.device("cpu")).net
    assert sum(p.requires_grad for p in net.parameters()) == TENSORS[model]


def test_operations_of_forward_and_backward_passes_are_counted():
    x, w = torch.ones(2, 3), torch.ones(3, 4, requires_grad=True)
    dispatched = Dispatched()
    with dispatched.watching():
        (x @ w).sum().backward()
    assert dispatched.operations["aten.mm.default"] == 2
    assert dispatched.looks == 0


@pytest.mark.parametrize(
    "look",
    [
        float,
        bool,
        lambda x: x.item(),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x),
        lambda x: torch.linalg.cholesky(x[None]),
    ],
)
def test_looks_are_counted(look):
    x = torch.ones(1)
    dispatched = Dispatched()
    with dispatched.watching():
        look(x)
    assert dispatched.looks >= 1


def test_the_look_at_targets_is_one_of_cpus_alone():
    dispatched = Dispatched()
    with dispatched.watching():
        CrossEntropy().validate(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
    assert dispatched.looks == 0 and dispatched.operations.total() > 0
    with dispatched.watching():
        float(torch.ones(1))
    assert dispatched.looks == 1
