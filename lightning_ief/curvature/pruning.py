"""WoodFisher: weights are removed by a local quadratic model of the loss, which the others make up for.

Singh and Alistarh, arXiv 2004.14340; the optimal brain surgeon of Hassibi and Stork (1993), whose Hessian is a Fisher
matrix by blocks. Improved by the rescaling of arXiv 2406.06420 (response, D.2.3): each ∇l_n over ‖∂l_n/∂z_n‖.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils import _pytree as pytree

from lightning_ief.capture import linearize
from lightning_ief.curvature.blocks import BlockFisher
from lightning_ief.curvature.rescaling import FisherKind, fisher_rows, require_fisher
from lightning_ief.objectives import Objective

__all__ = ["Ranking", "Update", "block_fishers", "removed", "woodfisher"]

Ranking: TypeAlias = Literal["joint", "independent"]
"""Whether saliencies are compared over all weights together, or within each."""

Update: TypeAlias = Literal["summed", "exact", "none"]
"""How the weights that stay make up for those that go, see `woodfisher`."""


def woodfisher(
    model: nn.Module,
    loader: Iterable[Any],
    objective: Objective,
    sparsity: float,
    *,
    fisher: FisherKind = "improved",
    block_size: int = 100,
    damping: float = 1e-3,
    steps: int = 1,
    ranking: Ranking = "joint",
    update: Update = "summed",
    parameters: Iterable[str] | None = None,
    batches: int | None = None,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Prune a trained model: remove the weights that a quadratic model of the loss says are missed the least.

    With F = λI + (1/N) Σ_n g_n g_nᵀ over the N samples of the loader, by blocks of consecutive entries of each weight,
    removing entry q costs ρ_q = w_q² / (2 [F⁻¹]_qq), if all others of its block move by δw = −w_q F⁻¹e_q / [F⁻¹]_qq.
    Those with the smallest ρ_q go, many at once. g_n is ∇l_n with fisher="empirical", ∇l_n / ‖∂l_n/∂z_n‖ with
    "improved", and the gradient with a sampled target with "sampled"; see `fisher_rows`.

    Units: F is a mean over samples, as in the paper, and λ is in its units. "improved" divides rows by small numbers
    where samples are learnt: its F is larger, and λ does not carry over from one to the other.

    How the weights that stay make up for those that go, Q:

    * "summed", the paper's: δw = −Σ_{q∈Q} w_q F⁻¹e_q / [F⁻¹]_qq, the updates of single removals added up, and then
      w_Q = 0. For a single weight of each block it is optimal; for many it is not.
    * "exact": the minimum of δwᵀFδw with w_Q + δw_Q = 0, δw_S = F_SS⁻¹ F_SQ w_Q for the weights S that stay.
    * "none": they stay as they are.

    The masks are those of `torch.nn.utils.prune`: the parameter is called `weight_orig` from now on, its `weight_mask`
    is in the state_dict, what is trained further stays pruned, and `prune.remove(module, "weight")` makes it a plain
    weight with zeros. A model that is pruned already can be pruned further: its zeros count, and stay. For gradual
    pruning, call this with growing sparsities and train in between.

    Memory: min(N, block_size) · P numbers in float64, and the gradients of one weight on one batch. The model is
    differentiated in evaluation mode, in this process alone.

    Args:
        model: The model, as for `linearize`, in evaluation mode.
        loader: Batches (inputs, targets); tensors are taken to the model's device. Read once in each step.
        objective: The objective.
        sparsity: Share of the entries of the weights that are to be 0 at the end, at least 0 and less than 1.
        fisher: Whose gradients F is made of.
        block_size: Entries of a block; weights with fewer are one block.
        damping: λ ≥ 0. With "empirical" a tenth of the default was best where it was measured (docs/pruning.md).
        steps: k: the weights go in k parts, each with an F of its own at the weights of then. The sparsity rises from
            what it is, s₀, by the cubic schedule of the authors' code, s − (s − s₀)(1 − t/k)³.
        ranking: Compare ρ_q over all weights, "joint", or within each, "independent".
        update: What those that stay do.
        parameters: Weights, by the name that they have before they are pruned; all trainable ones of at least two
            dimensions if None: no biases, no norms.
        batches: How many of the loader's batches to read; all if None.
        num_samples: M, targets drawn for each sample, for "sampled".
        generator: Source of random numbers for "sampled".

    Returns:
        The masks, {name: boolean tensor of the weight's shape}, True where a weight stays.

    Raises:
        ValueError: If an argument is out of range, there is no parameter of a name, or one that can't be masked; if the
            loader gives no batches; if a loss or gradient is not finite; if F is singular. The model is then as it was.

    Example:
        >>> from lightning_ief import objectives
        >>> model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
        >>> loader = [(torch.randn(16, 6), torch.arange(16) % 3) for _ in range(4)]
        >>> masks = woodfisher(model, loader, objectives.CrossEntropy(), sparsity=0.5, damping=1e-3)
        >>> sum(int((~mask).sum()) for mask in masks.values()), int((model[0].weight == 0).sum()) > 0
        (36, True)

    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"woodfisher: sparsity={sparsity}: must be at least 0 and less than 1.")
    if steps < 1:
        raise ValueError(f"woodfisher: steps={steps}: must be at least 1.")
    _require_choice("ranking", ranking, get_args(Ranking))
    _require_choice("update", update, get_args(Update))
    weights = _weights(model, parameters)
    start = sum(int((~w.mask).sum()) for w in weights.values()) / sum(w.mask.numel() for w in weights.values())
    if start > sparsity:
        raise ValueError(
            f"woodfisher: sparsity={sparsity}: {100 * start:.4g} % of these weights are pruned already, and stay so."
        )
    before = {name: w.parameter.detach().clone() for name, w in weights.items()}
    masks = {name: w.mask for name, w in weights.items()}
    options = {"block_size": block_size, "batches": batches, "num_samples": num_samples, "generator": generator}
    try:
        for step in range(1, steps + 1):
            found = block_fishers(model, loader, objective, fisher, masks=masks, **options)  # type: ignore[arg-type]
            share = sparsity - (sparsity - start) * (1 - step / steps) ** 3
            values = {name: w.parameter.detach() for name, w in weights.items()}
            values, masks = removed(values, found, share, damping, ranking, update)
            _write(weights, values)
    except BaseException:
        _write(weights, before)
        raise
    with torch.no_grad():  # with a graph the masked weight could not be copied, see copy.deepcopy
        for name, w in weights.items():
            prune.custom_from_mask(w.module, w.attribute, masks[name].to(w.parameter.dtype))
    return masks


def block_fishers(
    model: nn.Module,
    loader: Iterable[Any],
    objective: Objective,
    fisher: FisherKind = "improved",
    *,
    masks: Mapping[str, Tensor] | None = None,
    block_size: int = 100,
    batches: int | None = None,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
) -> dict[str, BlockFisher]:
    """The Fisher matrices of a model's weights over a loader, by blocks, to be solved with at any damping.

    Args:
        model: The model, in evaluation mode.
        loader: Batches (inputs, targets).
        objective: The objective.
        fisher: Whose gradients, see `fisher_rows`.
        masks: {name: boolean tensor}, which weights, and which of their entries take part; if None those that
            `woodfisher` prunes.
        block_size: Entries of a block.
        batches: How many batches to read; all if None.
        num_samples: M, for "sampled".
        generator: Source of random numbers for "sampled".

    Returns:
        {name: matrix}, means over all samples.

    Raises:
        ValueError: If an argument is out of range, the loader gives no batches, or a sample is not finite.

    """
    require_fisher("block_fishers", fisher, num_samples)
    if batches is not None and batches < 1:
        raise ValueError(f"batches={batches}: must be at least 1, or None for all.")
    if model.training:
        raise ValueError(
            f"{type(model).__name__} is in training mode, in which dropout and the like would be a part of its "
            "gradients: call model.eval() before."
        )
    weights = _weights(model, masks)
    kept = {name: w.mask for name, w in weights.items()} if masks is None else masks
    found = {name: BlockFisher(kept[name], block_size) for name in weights}
    reached = set[str]()
    hooks = [w.module.register_forward_pre_hook(_marking(name, reached)) for name, w in weights.items()]
    try:
        for number, (inputs, targets) in enumerate(_batches(loader, batches, next(iter(kept.values())).device)):
            linearised_by = {name: w.parameter for name, w in weights.items()}
            seen = linearize(model, inputs, targets, objective, parameters=linearised_by)
            if missed := weights.keys() - reached:
                raise ValueError(
                    f"The forward pass reads {sorted(missed)} without calling the modules that they are of, if it "
                    "reads them at all, so that no mask would reach it. Leave them out of parameters=."
                )
            if (problem := seen.not_finite) is not None:
                raise ValueError(f"Batch {number} of the loader: {problem}")
            rows = fisher_rows(seen, fisher, num_samples, generator)
            for name, each in found.items():
                each.add(rows.restrict([name]).to_dense(), seen.num_samples)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def removed(
    weights: Mapping[str, Tensor],
    fishers: Mapping[str, BlockFisher],
    sparsity: float,
    damping: float,
    ranking: Ranking = "joint",
    update: Update = "summed",
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights after a pruning step, and what is left of them: a pure function, see `woodfisher`.

    Args:
        weights: {name: w}.
        fishers: {name: F without λ}; entries that take no part in it are pruned already.
        sparsity: Share of the entries that are 0 after it.
        damping: λ.
        ranking: What is compared.
        update: What those that stay do.

    Returns:
        The new weights, float64, with zeros; and masks, True where an entry stays.

    """
    inverse = {name: fishers[name].inverse_diagonal(damping) for name in weights}
    saliencies = {
        # What is pruned already goes first.
        name: torch.where(fishers[name].active, w.flatten().double().square() / (2 * inverse[name]), -1.0)
        for name, w in weights.items()
    }
    values, masks = {}, _masks(saliencies, sparsity, ranking)
    for name, w in weights.items():
        each, old = fishers[name], w.flatten().double()
        kept = masks[name] & each.active
        going = torch.where(each.active & ~kept, old, 0.0)
        if update == "summed":
            change = -each.solve(going / inverse[name], damping)
        elif update == "exact":
            change = each.solve(each.product(going), damping, among=kept)
        else:
            change = torch.zeros_like(old)
        values[name] = torch.where(kept, old + change, 0.0).view(w.shape)
        masks[name] = kept.view(w.shape)
    return values, masks


def _masks(saliencies: Mapping[str, Tensor], sparsity: float, ranking: Ranking) -> dict[str, Tensor]:
    """True but for the smallest; of equal ones the first go."""
    if ranking == "independent":
        return {name: _without_smallest(x, sparsity) for name, x in saliencies.items()}
    device = next(iter(saliencies.values())).device
    kept = _without_smallest(torch.cat([x.to(device) for x in saliencies.values()]), sparsity)
    parts = kept.split([x.numel() for x in saliencies.values()])
    return {name: part.to(x.device) for (name, x), part in zip(saliencies.items(), parts, strict=True)}


def _without_smallest(x: Tensor, share: float) -> Tensor:
    kept = torch.ones_like(x, dtype=torch.bool)
    kept[x.argsort(stable=True)[: round(share * len(x))]] = False
    return kept


class _Weight(NamedTuple):
    """A weight as a module holds it.

    Attributes:
        module: The module.
        attribute: Its attribute, as it is called without a mask.
        parameter: What is trained.
        mask: Which entries are not pruned yet, boolean.
    """

    module: nn.Module
    attribute: str
    parameter: nn.Parameter
    mask: Tensor


def _weights(model: nn.Module, names: Iterable[str] | None) -> dict[str, _Weight]:
    """Weights by the names that they have without masks."""
    found, places = dict[str, _Weight](), dict[int, list[str]]()
    for path, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            attribute = key.removesuffix("_orig") if hasattr(module, f"{key.removesuffix('_orig')}_mask") else key
            mask = getattr(module, f"{attribute}_mask") if attribute != key else torch.ones_like(parameter)
            name = f"{path}.{attribute}" if path else attribute
            found[name] = _Weight(module, attribute, parameter, mask.detach().bool())
            places.setdefault(id(parameter), []).append(name)
    if names is None:
        chosen = [name for name, w in found.items() if w.parameter.ndim > 1 and w.parameter.requires_grad]
    else:
        chosen = [names] if isinstance(names, str) else [*dict.fromkeys(names)]
    if not chosen:
        raise ValueError(f"{type(model).__name__} has no trainable weight of at least two dimensions to prune.")
    if unknown := [name for name in chosen if name not in found]:
        raise ValueError(f"{type(model).__name__} has no parameters {unknown}; there are: {', '.join(found)}.")
    for name in chosen:
        if len(same := places[id(found[name].parameter)]) > 1:
            raise ValueError(f"{same} are one parameter, whose mask would reach the first alone. Leave it out.")
        if isinstance(found[name].module, ParametrizationList):
            raise ValueError(f"'{name}' is not a weight, but what one is computed from. Leave it out of parameters=.")
    return {name: found[name] for name in chosen}


def _write(weights: Mapping[str, _Weight], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, w in weights.items():
            w.parameter.copy_(values[name])


def _batches(loader: Iterable[Any], most: int | None, device: torch.device) -> Iterable[tuple[Any, Tensor]]:
    """Batches on the device; ValueError if there are none, or one is no pair."""
    number = 0
    for batch in loader:
        if number == most:
            return
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ValueError(
                f"Batch {number} of the loader is no pair (inputs, targets), but {type(batch).__name__}"
                f"{f' of {len(batch)}' if isinstance(batch, (tuple, list)) else ''}."
            )
        inputs, targets = pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, tuple(batch))
        yield inputs, targets
        number += 1
    if not number:
        raise ValueError(
            "The loader gives no batches. With several steps it is read once in each: give a DataLoader or a list, no "
            "iterator that is used up."
        )


def _marking(name: str, reached: set[str]) -> Callable[[nn.Module, Any], None]:
    """A hook that says that a module has been called."""

    def mark(module: nn.Module, inputs: Any) -> None:
        reached.add(name)

    return mark


def _require_choice(argument: str, given: str, choices: Iterable[str]) -> None:
    if given not in choices:
        raise ValueError(f"woodfisher: {argument}={given!r}: must be one of {', '.join(map(repr, choices))}.")
