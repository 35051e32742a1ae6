"""No N × P matrix anywhere: a large model trains in a process of bounded size."""

import subprocess
import sys

SCRIPT = """
import resource
import torch
from lightning_ief import IEF, linearize, objectives
from torch import nn

widths = [3072, 2048, 2048, 10]
model = nn.Sequential(nn.Linear(3072, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10))
assert sum(p.numel() for p in model.parameters()) == 10_510_346
inputs, targets = torch.randn(1024, 3072), torch.randint(0, 10, (1024,))
optimizer = IEF(model.parameters(), lr=1.0, damping=1e-3)
losses = []
for _ in range(3):
    lin = linearize(model, inputs, targets, objectives.CrossEntropy())
    lin.backward()
    optimizer.step(linearization=lin)
    losses.append(float(lin.losses.mean()))
    del lin
assert losses[2] < losses[1] < losses[0], losses
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_ten_million_parameters_at_batch_1024_within_3_gib():
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert int(result.stdout.split()[-1]) < 3 * 2**20  # KiB
