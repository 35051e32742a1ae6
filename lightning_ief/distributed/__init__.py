"""Many ranks: the Jacobian of the global batch, and all that calls collectives.

Read in this order: `exchange` (the collectives), `jacobian` (the operator for the samples of all ranks), `sharded` (the
same where parameters are sharded), `linearization` (what directions and optimizers read), `across` (from one rank to
many).
"""

from lightning_ief.distributed.across import Sync, across
from lightning_ief.distributed.exchange import Exchange, gathered_losses, name_samples
from lightning_ief.distributed.jacobian import GlobalJacobian
from lightning_ief.distributed.linearization import GlobalLinearization, mean_over_groups
from lightning_ief.distributed.sharded import whole_parameters

__all__ = [
    "Exchange",
    "GlobalJacobian",
    "GlobalLinearization",
    "Sync",
    "across",
    "gathered_losses",
    "mean_over_groups",
    "name_samples",
    "whole_parameters",
]
