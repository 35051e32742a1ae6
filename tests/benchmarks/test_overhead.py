"""Counts of operations are exact: those of a step of iEF are held here, and may only fall."""

import pytest
import torch

pytest.importorskip("psutil")

from benchmarks import overhead, workloads
from benchmarks.overhead import Dispatched, count, count_operations
from lightning_ief import IEF, linearize
from lightning_ief.distributed import across
from lightning_ief.objectives import CrossEntropy
from tests.ranks import on_ranks

# Operations of a step of iEF, at most, where one of SGD has so many.
MOST = {"mlp": (165, 59), "vit-lora": (1140, 1083), "vit": (1263, 1314), "t5-lora": (6063, 6338), "lstm": (934, 53)}
TENSORS = {"mlp": 6, "vit-lora": 24, "vit": 152, "t5-lora": 144, "lstm": 6}


@pytest.mark.parametrize("model", MOST)
def test_a_step_of_ief_calls_few_operations(model):
    if model not in ("mlp", "lstm"):
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


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_one_look_at_the_device_for_each_step(accumulate, groups):
    """With several parameter groups and several batches for one update, too."""
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    params = [{"params": net[0].parameters(), "lr": 0.1}, {"params": net[2].parameters()}]
    optimizer = IEF(params if groups == 2 else net.parameters(), damping=1e-3, accumulate=accumulate)

    def step():
        for _ in range(accumulate):
            x, y = torch.randn(6, 8), torch.randint(0, 4, (6,))
            optimizer.step(linearization=linearize(net, x, y, CrossEntropy(), verify=False))

    step()
    dispatched = Dispatched()
    with dispatched.watching():
        step()
    assert dispatched.looks == 1


def test_looks_of_a_step_on_ranks():
    """The step's own, and two by which a rank learns how much the others have to send."""

    def work(rank):
        net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
        optimizer, dispatched = IEF(net.parameters(), damping=1e-3), Dispatched()

        def step():
            x, y = torch.randn(6 - rank, 8), torch.randint(0, 4, (6 - rank,))
            optimizer.step(linearization=across(linearize(net, x, y, CrossEntropy(), verify=False)))

        step()
        with dispatched.watching():
            step()
        return dispatched.looks

    assert on_ranks(2, work) == [3, 3]
