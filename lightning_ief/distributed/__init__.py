"""Many ranks: the Jacobian of the global batch, and all that calls collectives.

Read in this order: `exchange` (the collectives), `routes` (which parameters' rows are gathered, which are re-sharded),
`gram` (K by these ways), `update` (Jᵀv), `jacobian` (the operator for the samples of all ranks), `ranks` (what a batch
asks of the others), `sharded` (Jᵀv where parameters are sharded), `across` (from one rank to many).
"""

from lightning_ief.distributed.across import Sync, across
from lightning_ief.distributed.exchange import Exchange, gathered_losses
from lightning_ief.distributed.jacobian import GlobalJacobian
from lightning_ief.distributed.ranks import Ranks, mean_over_groups
from lightning_ief.distributed.sharded import whole_parameters

__all__ = [
    "Exchange",
    "GlobalJacobian",
    "Ranks",
    "Sync",
    "across",
    "gathered_losses",
    "mean_over_groups",
    "whole_parameters",
]
