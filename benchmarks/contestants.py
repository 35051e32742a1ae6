"""Who trains: LightningModules that differ in how the update is made, and in nothing else.

The peers are given a dense Jacobian [N, P] by their library. Gram, solve and step are the same for all of them, Gram
and solve those of the package, so that the Jacobian alone makes the difference.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.optim import Optimizer

from benchmarks.workloads import Batch
from lightning_ief import EF, IEF, NaturalGradientMixin
from lightning_ief.linalg.gram import dense_gram
from lightning_ief.linalg.solve import damped_solve
from lightning_ief.objectives import CrossEntropy

__all__ = ["CONTESTANTS", "Contestant", "find"]

_LR, _DAMPING = 1e-5, 1e-4  # so small steps that nothing diverges


class WithMixin(NaturalGradientMixin, L.LightningModule):
    """The mixin of the package, with any optimizer.

    Args:
        net: The network.
        make: Makes the optimizer from the trainable parameters.
    """

    def __init__(self, net: nn.Module, make: Callable[[list[nn.Parameter]], Optimizer]) -> None:
        super().__init__()
        self.net = net
        self.make = make
        self.objective = CrossEntropy()

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.net(*inputs)

    def configure_optimizers(self) -> Optimizer:
        return self.make([p for p in self.parameters() if p.requires_grad])


class Dense(L.LightningModule, ABC):
    """iEF from per-sample gradients that are stored: d = Jᵀ(JJᵀ + λI)⁻¹ s, θ ← θ − lr · d.

    Args:
        net: The network.
        lr: η.
        damping: λ.
    """

    def __init__(self, net: nn.Module, lr: float, damping: float) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = net
        self.lr = lr
        self.damping = damping
        self.objective = CrossEntropy()

    @abstractmethod
    def rows(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward and backward pass.

        Returns:
            Logits and, for each trainable parameter by name, its per-sample gradients [N, ...].
        """

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers()
        logits, rows = self.rows(batch)
        samples = len(batch.targets)
        parameters = self.trainable()
        for name in parameters:
            if len(rows[name]) != samples:
                raise RuntimeError(f"{len(rows[name])} rows for {samples} samples in '{name}'")
        logits = logits.detach()
        s = self.objective.gradient(logits, batch.targets).double().flatten(1).square().sum(1)
        gram = torch.stack([dense_gram(rows[name][None])[0, :, 0] for name in parameters]).sum(0)
        v = damped_solve(gram, s, self.damping)
        for name, p in parameters.items():
            p.grad = (v.to(p.dtype) @ rows[name].flatten(1)).view_as(p)
        optimizer.step()
        optimizer.zero_grad()
        loss = self.objective.losses(logits, batch.targets).mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=samples)  # as the mixin does

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trainable parameters of the network."""
        return {name: p for name, p in self.net.named_parameters() if p.requires_grad}

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.SGD(self.trainable().values(), lr=self.lr)


class Vmap(Dense):
    """torch.func alone. Its forward pass is within the backward pass, and is timed there."""

    def rows(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        self.batch = batch
        self.manual_backward(torch.zeros((), device=self.device))  # Lightning's hooks around a backward pass
        return self.found

    def backward(self, *_: Any, **__: Any) -> None:
        def loss(parameters: dict[str, Tensor], inputs: tuple[Tensor, ...], target: Tensor) -> tuple[Tensor, Tensor]:
            logits = functional_call(self.net, parameters, tuple(x[None] for x in inputs))
            return self.objective.losses(logits, target[None]).sum(), logits[0]

        parameters = {name: p.detach() for name, p in self.trainable().items()}
        rows, logits = vmap(grad(loss, has_aux=True), in_dims=(None, 0, 0))(parameters, *self.batch)
        self.found = logits, rows

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        del self.batch, self.found


class Opacus(Dense):
    """Opacus' GradSampleModule."""

    def __init__(self, net: nn.Module, lr: float, damping: float) -> None:
        from opacus import GradSampleModule

        super().__init__(GradSampleModule(net, loss_reduction="sum"), lr, damping)

    def rows(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.net(*batch.inputs)
        self.manual_backward(self.objective.losses(logits, batch.targets).sum())
        rows = {name: p.grad_sample for name, p in self.trainable().items()}
        for p in self.trainable().values():
            p.grad_sample = None
        return logits, rows


class Backpack(Dense):
    """BackPACK's BatchGrad."""

    def __init__(self, net: nn.Module, lr: float, damping: float) -> None:
        from backpack import extend

        super().__init__(extend(net), lr, damping)

    def rows(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        from backpack import backpack
        from backpack.extensions import BatchGrad

        logits = self.net(*batch.inputs)
        with backpack(BatchGrad()):
            self.manual_backward(self.objective.losses(logits, batch.targets).sum())
        rows = {}
        for name, p in self.trainable().items():
            if not hasattr(p, "grad_batch"):
                raise RuntimeError(f"BatchGrad leaves out '{name}'")
            rows[name] = p.grad_batch
            del p.grad_batch
        return logits, rows


@dataclass(frozen=True)
class Contestant:
    """A way to train.

    Attributes:
        title: In the report.
        make: Makes the LightningModule from network, lr and damping.
        claims_ief: Whether its update must be that of iEF.
        dense: Whether it stores J; such a peer may fail, or be left out for want of memory.
    """

    title: str
    make: Callable[[nn.Module, float, float], L.LightningModule]
    claims_ief: bool = False
    dense: bool = False

    def timed(self, net: nn.Module, verify: bool = False) -> L.LightningModule:
        """The module whose steps are timed and weighed: those of a long run, not of its first batches.

        By default the mixin verifies the capture on the first batch (up to ten, where gradients are tiny), which takes
        another backward pass and the room of two gradients. The check of updates is made with that, and before.

        Args:
            net: The network.
            verify: Whether to verify all the same.

        Returns:
            The module.
        """
        module = self.make(net, _LR, _DAMPING)
        if isinstance(module, NaturalGradientMixin):
            module.verify_capture = verify
        return module


def _ours(optimizer: type[Optimizer]) -> Callable[[nn.Module, float, float], L.LightningModule]:
    return lambda net, lr, damping: WithMixin(net, lambda p: optimizer(p, lr=lr, damping=damping))


def _with_lr(optimizer: Callable[..., Optimizer]) -> Callable[[nn.Module, float, float], L.LightningModule]:
    return lambda net, lr, damping: WithMixin(net, lambda p: optimizer(p, lr=lr))


CONTESTANTS: dict[str, Contestant] = {
    "sgd": Contestant("SGD", _with_lr(torch.optim.SGD)),
    "ief": Contestant("iEF (this package)", _ours(IEF), claims_ief=True),
    "damped": Contestant("iEF, damped in its own matrix", _with_lr(partial(IEF, relative_damping=1.0))),
    "spring": Contestant(
        "iEF, damped in its own matrix, with momentum", _with_lr(partial(IEF, relative_damping=1.0, momentum=0.9))
    ),
    "ef": Contestant("EF (this package)", _ours(EF)),
    "adamw": Contestant("AdamW", _with_lr(torch.optim.AdamW)),
    "adafactor": Contestant("Adafactor", _with_lr(torch.optim.Adafactor)),
    "vmap": Contestant("iEF, dense J by torch.func.vmap", Vmap, claims_ief=True, dense=True),
    "opacus": Contestant("iEF, dense J by Opacus", Opacus, claims_ief=True, dense=True),
    "backpack": Contestant("iEF, dense J by BackPACK", Backpack, claims_ief=True, dense=True),
}


def find(name: str) -> Contestant:
    """The contestant of that name; raises SystemExit with the names there are."""
    if name not in CONTESTANTS:
        raise SystemExit(f"There is no contestant '{name}'; there are: {', '.join(CONTESTANTS)}.")
    return CONTESTANTS[name]
