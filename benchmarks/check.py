"""Before the clock is looked at: do those who claim the iEF update make it?"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks import contestants
from benchmarks.timing import fit, reason
from benchmarks.workloads import Instance, Workload
from lightning_ief.objectives import CrossEntropy

__all__ = ["WrongUpdateError", "check"]

TOLERANCE, DAMPING = 1e-8, 1e-4


class WrongUpdateError(Exception):
    """A contestant claims the iEF update, and makes another one."""


def check(workload: Workload, names: Sequence[str], device: torch.device) -> tuple[dict[str, float], dict[str, str]]:
    """Compare one step of each contestant with the truth, on a small instance in float64.

    Args:
        workload: The workload.
        names: The contestants; those who claim something else are passed over.
        device: Where to compute.

    Returns:
        Relative error of each contestant, and why peers failed.

    Raises:
        WrongUpdateError: If an update is wrong, with the contestant's name.
    """
    instance = workload.small(device)
    truth = _ief(instance)
    errors: dict[str, float] = {}
    failures: dict[str, str] = {}
    for name in names:
        contestant = contestants.find(name)
        if not contestant.claims_ief:
            continue
        try:
            step = _step(contestant, instance)
        except Exception as error:
            if not contestant.dense:
                raise
            failures[name] = reason(error)
            continue
        errors[name] = float((step - truth).norm() / truth.norm())
        if not errors[name] <= TOLERANCE:
            raise WrongUpdateError(
                f"'{name}' makes a wrong iEF update on {workload.name}: relative error {errors[name]:.1e} in float64, "
                f"allowed {TOLERANCE:.0e}. Nothing was timed."
            )
    return errors, failures


def _step(contestant: contestants.Contestant, instance: Instance) -> Tensor:
    """θ before − θ after one step with lr = 1, as one vector."""
    net = copy.deepcopy(instance.net)
    parameters = [p for p in net.parameters() if p.requires_grad]
    before = _flat(parameters)
    fit(contestant.make(net, 1.0, DAMPING), instance.batch, steps=1)
    return before - _flat(parameters)


def _ief(instance: Instance) -> Tensor:
    """The truth: one sample at a time, dense, float64."""
    objective, parameters = CrossEntropy(), [p for p in instance.net.parameters() if p.requires_grad]
    rows, rates = [], []
    for n in range(instance.samples):
        logits = instance.net(*(x[n : n + 1] for x in instance.batch.inputs))
        loss = objective.losses(logits, instance.batch.targets[n : n + 1]).sum()
        at_logits, *gradients = torch.autograd.grad(loss, [logits, *parameters])
        rows.append(_flat(gradients))
        rates.append(at_logits.square().sum())
    jacobian, s = torch.stack(rows), torch.stack(rates)
    damped = jacobian @ jacobian.T + DAMPING * torch.eye(len(s), dtype=s.dtype, device=s.device)
    return jacobian.T @ torch.linalg.solve(damped, s)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.detach().flatten() for x in tensors])
