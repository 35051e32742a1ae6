"""No N × P matrix anywhere: a large model trains in a process of bounded size. Nor copies of large logits."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_ief import IEF, directions, linearize, objectives
from lightning_ief.capture.batch import gamma_terms_of
from lightning_ief.indicators import gamma
from lightning_ief.linalg import gram, scaling, vectors

ENTROPY = objectives.CrossEntropy()

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


VOCABULARY, SAMPLES, LENGTH = 3000, 4, 16
UNIT = 4 * VOCABULARY * SAMPLES * LENGTH  # bytes of the logits


def peak(run: Callable[[], object]) -> float:
    """Most that is allocated at a time while something runs, over the size of the logits."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events)) / UNIT


@pytest.fixture
def language_model(monkeypatch):
    """All but the logits is small; so are the parts in which what is large is computed."""
    monkeypatch.setattr(vectors, "_TOGETHER", 2**12)
    for module in (gram, scaling):
        monkeypatch.setattr(module, "SMALL", 0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Linear(8, 8), nn.Linear(8, VOCABULARY)).requires_grad_(False)
    model[1].requires_grad_(True)
    tokens = torch.randint(0, VOCABULARY, (SAMPLES, LENGTH))
    return model, tokens, tokens.roll(-1, 1).index_fill(1, torch.tensor([LENGTH - 1]), -100)


def test_logits_of_a_large_vocabulary_and_their_gradient_are_all_that_is_kept(language_model):
    model, tokens, targets = language_model
    adamw, ief = torch.optim.AdamW(model[1].parameters()), IEF(model[1].parameters(), lr=1e-3, damping=1e-3)

    def plain() -> None:
        F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="sum").backward()
        adamw.step()

    def natural(verify: bool) -> None:
        found = linearize(model, tokens, targets, ENTROPY, verify=verify)
        _ = found.losses
        found.backward()
        ief.step(linearization=found)

    for run in (plain, partial(natural, True)):  # what is set up once
        run()
    assert 3 <= peak(plain) < 3.2
    assert peak(partial(natural, False)) < 2.3
    assert peak(partial(natural, True)) < 3.3


def test_sampling_and_gamma_need_little_more(language_model):
    model, tokens, targets = language_model
    found = linearize(model, tokens, targets, ENTROPY, verify=False)
    d = directions.sgd(found).form()
    gamma(found, d)  # verified once
    assert peak(lambda: found.sampled_rows(1, torch.Generator().manual_seed(0))) < 1.3  # beside logits and gradient
    tangents = torch.randn(1, *found.logits.shape)
    # A sample at a time, in float64.
    assert peak(lambda: gamma_terms_of(ENTROPY, found.logits, targets, tangents)) < 7 / SAMPLES


def test_parts_of_the_logits_give_what_all_of_them_do(language_model, monkeypatch):
    model, tokens, targets = language_model
    model.double()

    def numbers() -> list[torch.Tensor]:
        found = linearize(model, tokens, targets, ENTROPY, verify=True)
        drawn = found.sample(torch.Generator().manual_seed(0))
        tangents = torch.randn(2, *found.logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        terms = gamma_terms_of(ENTROPY, found.logits, targets, tangents)
        return [found.logit_gradient_norms, found.jacobian.to_dense(), drawn, *terms]

    parts = numbers()
    monkeypatch.setattr(vectors, "_TOGETHER", 2**30)
    for part, whole in zip(parts, numbers(), strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-12, atol=1e-12)
