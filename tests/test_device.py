"""Between host and device: who waits for whom, and what a GPU must not change."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ief import EF, IEF, linearize, objectives

WAITING = {"aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.is_nonzero", "aten.masked_select"}

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Readings(TorchDispatchMode):
    """Counts what would make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func.overloadpacket) in WAITING:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def problem(device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))
    return model.to(device, dtype), torch.randn(5, 6).to(device, dtype), torch.randn(5, 3).to(device, dtype)


@pytest.mark.parametrize("kind", [IEF, EF])
def test_a_step_reads_from_the_device_once(kind, monkeypatch):
    model, x, y = problem()
    optimizer = kind(model.parameters(), lr=0.1, damping=1e-1)
    # The first batch is measured and verified; the first step is looked at for its length.
    optimizer.step(linearization=linearize(model, x, y, objectives.LeastSquares()))
    readings = Readings()
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: readings.found.append("tolist") or tolist(self))
    before = copy.deepcopy(model.state_dict())
    with readings:
        lin = linearize(model, x, y, objectives.LeastSquares())
        lin.backward()
        assert readings.found == []
        optimizer.step(linearization=lin)
    assert readings.found == ["tolist"]
    assert optimizer.skipped is None
    assert not torch.equal(before["0.weight"], model[0].weight)


@gpu
@pytest.mark.parametrize("kind", [IEF, EF])
def test_gpu_agrees_with_cpu(kind):
    results = []
    for device in ("cpu", "cuda"):
        model, x, y = problem(device, torch.float64)
        optimizer = kind(model.parameters(), lr=0.1, damping=1e-3)
        for _ in range(3):
            optimizer.step(linearization=linearize(model, x, y, objectives.LeastSquares()))
        results.append([p.detach().cpu() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@gpu
def test_gpu_waits_once():
    model, x, y = problem("cuda")
    optimizer = IEF(model.parameters(), lr=0.1, damping=1e-1)
    optimizer.step(linearization=linearize(model, x, y, objectives.LeastSquares()))
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step(linearization=linearize(model, x, y, objectives.LeastSquares()))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in caught if "synchroniz" in str(w.message)]) <= 1


@gpu
def test_tf32_stays_out_of_the_gram():
    wide = nn.Linear(4096, 8, device="cuda")
    x = torch.randn(64, 4096, device="cuda")
    y = torch.randn(64, 8, device="cuda")
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        lin = linearize(wide, x, y, objectives.LeastSquares())
        gram, rows = lin.jacobian.gram(), lin.jacobian.to_dense().double()
    finally:
        torch.set_float32_matmul_precision(allowed)
    expected = rows @ rows.T
    norms = expected.diagonal().sqrt()
    assert ((gram - expected).abs() / norms / norms[:, None]).max() < 1e-5
