"""What many ranks send, keep and compute in one step of iEF or EF: derived from the sizes of the layers alone."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks.report import markdown_table
from lightning_ief.linalg.gram import Form, Sizes, cheapest_form

__all__ = ["MODELS", "Model", "Rows", "Step", "bytes_per_step", "derive", "derived_table", "layer", "mlp"]


_FLOAT = 4  # bytes of a float32
_BALANCE = 64  # multiplications that are worth a byte: with more of them an update is computed in slices
_PANEL = 64  # rows of K that are sent together, up to the last one's diagonal


class Rows(NamedTuple):
    """The rows of one parameter.

    Attributes:
        elements: P_i.
        height: Its size along dimension 0.
        tensors: What one sample's row is made of: bytes by name; a tensor that several parameters name is sent once.
        positions: T, if it is made of outer products.
        products: Multiplications of one sample's forward pass with this parameter.
    """

    elements: int
    height: int
    tensors: Mapping[str, int]
    positions: int = 1
    products: int = 0

    def slice(self, ranks: int) -> int:
        """Elements of a rank's slice of the update, the last one filled up."""
        return -(-self.height // ranks) * (self.elements // self.height)


def layer(name: str, outputs: int, inputs: int, samples: int, positions: int = 1, itemsize: int = _FLOAT) -> list[Rows]:
    """Weight and bias of a linear layer.

    Args:
        name: Its name.
        outputs: d_out.
        inputs: d_in.
        samples: n, those of one rank.
        positions: T.
        itemsize: Bytes of a number.

    Returns:
        Their rows: those of the weight as output gradients and inputs, or as they are where that is cheaper.
    """
    out = {f"{name}: output gradients": positions * outputs * itemsize}
    size, products = outputs * inputs, positions * outputs * inputs
    if cheapest_form(Sizes(samples, positions, outputs, inputs)) is Form.KEPT:
        weight = Rows(size, outputs, {f"{name}: rows": size * itemsize}, products=products)
    else:
        sides = {**out, f"{name}: inputs": positions * inputs * itemsize}
        weight = Rows(size, outputs, sides, positions, products)
    bias = out if positions == 1 else {f"{name}: rows of the bias": outputs * itemsize}
    return [weight, Rows(outputs, outputs, bias)]


def bytes_per_step(
    parameters: Sequence[Rows], counts: Sequence[int], group: int | None = None, itemsize: int = _FLOAT
) -> list[int]:
    """Bytes that every rank sends in one step of iEF or EF; the formula of docs/ranks.md.

    Args:
        parameters: Rows of all parameters, in the order of the model.
        counts: n of every rank.
        group: The optimizer's `sync` as a number of ranks; all of them if None.
        itemsize: Bytes of a number.

    Returns:
        Bytes by rank.
    """
    ranks, group = len(counts), group or len(counts)
    everywhere = (ranks - 1) * (8 + 16 * max(counts))  # how many samples; losses and s
    if group < ranks:
        everywhere += _summed(itemsize * sum(p.elements for p in parameters), ranks)
    sent = []
    for first in range(0, ranks, group):
        within = counts[first : first + group]
        routes = _routes(parameters, within, itemsize)
        rows, columns = sum(within), sum(p.elements for p in routes.resharded)
        for rank, samples in enumerate(within):
            total = everywhere + (group - 1) * (24 + 8 * max(within))  # header, scales
            total += (group - 1) * max(within) * routes.sample  # gathered factors
            total += (group - 1) * samples * -(-columns // group) * itemsize  # re-sharded rows
            total += _summed(
                8 * sum(min(_PANEL, rows - i) * min(i + _PANEL, rows) for i in range(0, rows, _PANEL)), group
            )
            total += (group - 1) * 8 * (rows + 3) if rank == 0 else 0  # coefficients
            total += (group - 1) * sum(p.slice(group) for p in routes.sliced) * itemsize  # updates
            total += _summed(columns * itemsize, group)
            sent.append(total)
    return sent


def _summed(size: int, ranks: int) -> int:
    return 2 * (ranks - 1) * size // ranks


class _Routes(NamedTuple):
    """Which way each parameter goes.

    Attributes:
        sample: Bytes of a sample that are gathered.
        whole: Parameters whose update every rank computes whole from gathered factors.
        sliced: Those of which each rank computes a slice.
        resharded: Those whose rows are re-sharded.
    """

    sample: int
    whole: list[Rows]
    sliced: list[Rows]
    resharded: list[Rows]


def _routes(parameters: Sequence[Rows], counts: Sequence[int], itemsize: int) -> _Routes:
    ranks, rows, known = len(counts), sum(counts), dict[str, int]()
    whole, sliced, resharded = list[Rows](), list[Rows](), list[Rows]()
    for p in parameters:
        new = {name: size for name, size in p.tensors.items() if name not in known}
        slices = rows * p.positions > _BALANCE * itemsize
        column = -(-p.elements // ranks) * itemsize
        # Bytes of all ranks together, over W − 1.
        gather = ranks * max(counts) * sum(new.values()) + slices * ranks * column
        reshard = rows * column + p.elements * itemsize + ranks * column
        if gather <= reshard:
            known |= new
            (sliced if slices else whole).append(p)
        else:
            resharded.append(p)
    return _Routes(sum(known.values()), whole, sliced, resharded)


class Step(NamedTuple):
    """What one step of iEF takes on a rank, beside one of SGD with DistributedDataParallel.

    Attributes:
        rows: N of the group, rows of K.
        sent: Bytes, mean over the ranks.
        sgd_sent: Bytes of the gradients' all-reduce.
        gram_bytes: K.
        gathered_bytes: Inputs and output gradients of the samples of all ranks of the group.
        gram: Multiplications of the Gram matrix, over those of SGD's forward and backward pass.
        update: Those of applying the update.
        solve: Those of factoring K.
    """

    rows: int
    sent: float
    sgd_sent: float
    gram_bytes: int
    gathered_bytes: int
    gram: float
    update: float
    solve: float


class Model(NamedTuple):
    """What is trained.

    Attributes:
        parameters: Rows of all trainable parameters, in the order of the model; float32.
        samples: n, on every rank.
        frozen: Multiplications of one sample's forward pass with frozen parameters.
    """

    parameters: Sequence[Rows]
    samples: int
    frozen: int = 0


def derive(model: Model, ranks: int, group: int | None = None) -> Step:
    """Derive the cost of a step.

    Args:
        model: The model.
        ranks: W.
        group: The optimizer's `sync` as a number of ranks; all of them if None.

    Returns:
        The cost.
    """
    parameters, samples, group = model.parameters, model.samples, group or ranks
    rows = samples * group
    routes = _routes(parameters, [samples] * group, _FLOAT)

    def pairs(p: Rows) -> int:
        """Of this rank's samples with half of the others: pairs of positions."""
        return samples * rows * p.positions * sum(p.tensors.values()) // _FLOAT // 2

    def dense(p: Rows) -> int:
        """The same, of whole rows."""
        return samples * rows * p.elements // 2

    gram = sum(min(pairs(p), dense(p)) for p in (*routes.whole, *routes.sliced))
    gram += sum(min(pairs(p), dense(p)) if group == 1 else dense(p) for p in routes.resharded)
    update = rows * sum(p.products for p in routes.whole)
    update += samples * sum(p.products for p in (*routes.sliced, *routes.resharded))
    # Forward pass, gradients of activations and, but for frozen parameters, of parameters.
    sgd = samples * (3 * sum(p.products for p in parameters) + 2 * model.frozen)
    return Step(
        rows=rows,
        sent=sum(bytes_per_step(parameters, [samples] * ranks, group)) / ranks,
        sgd_sent=_summed(_FLOAT * sum(p.elements for p in parameters), ranks),
        gram_bytes=8 * rows**2,
        gathered_bytes=routes.sample * rows if group > 1 else 0,
        gram=gram / sgd,
        update=update / sgd,
        solve=rows**3 / 6 / sgd,
    )


# --- on paper


def mlp(samples: int) -> list[Rows]:
    """The paper's MLP 3072-2048-2048-10."""
    widths = [3072, 2048, 2048, 10]
    return [p for i in range(3) for p in layer(str(i), widths[i + 1], widths[i], samples)]


def _added(name: str, elements: int, height: int) -> Rows:
    """What is added or multiplied: a sample's row is as large as the parameter."""
    return Rows(elements, height, {name: _FLOAT * elements})


def vit(samples: int) -> list[Rows]:
    """ViT-B/16 at 224 × 224 with 1,000 classes, all parameters."""
    width, positions = 768, 14 * 14
    found = [_added("class token", width, 1), _added("positions", (positions + 1) * width, 1)]
    found += layer("patches", width, 16 * 16 * 3, samples, positions)
    for block in range(12):
        for name, out, into in (("qkv", 3, 1), ("proj", 1, 1), ("fc1", 4, 1), ("fc2", 1, 4)):
            if name in ("qkv", "fc1"):
                found += [_added(f"{block}, norm of {name}, {side}", width, width) for side in ("weight", "bias")]
            found += layer(f"{block} {name}", out * width, into * width, samples, positions + 1)
    found += [_added(f"norm, {side}", width, width) for side in ("weight", "bias")]
    return found + layer("head", 1000, width, samples)


def vit_lora(samples: int) -> list[Rows]:
    """LoRA with r = 8 on the queries and values of ViT-B/16: what is trained."""
    width, rank, positions = 768, 8, 14 * 14 + 1
    return [
        layer(f"{n} {side}", out, into, samples, positions)[0]
        for n in range(2 * 12)
        for side, out, into in (("A", rank, width), ("B", width, rank))
    ]


MODELS = {
    "MLP 3072-2048-2048-10, n = 64": Model(mlp(64), 64),
    "ViT-B/16, all parameters, n = 32": Model(vit(32), 32),
    "ViT-B/16, LoRA, n = 32": Model(vit_lora(32), 32, frozen=sum(p.products for p in vit(32))),
}
_RANKS, _GROUP = (8, 64, 512), 8
_HEADER = ("W", "`sync`", "rows of K", "sent MB", "SGD sends MB", "K MB", "factors MB", "Gram", "update", "solve")


def derived_table(model: Model) -> str:
    """The table of a model in docs/ranks.md: W = 8, 64, 512, all ways to synchronise.

    Args:
        model: The model.

    Returns:
        Markdown.
    """
    cells = []
    for ranks in _RANKS:
        groups = {'"global"': ranks, str(_GROUP): _GROUP, '"local"': 1}
        for sync, group in groups.items():
            if sync == str(ranks):  # the same as "global"
                continue
            step = derive(model, ranks, group)
            megabytes = [step.sent, step.sgd_sent, step.gram_bytes, step.gathered_bytes]
            numbers = [*(x / 1e6 for x in megabytes), step.gram, step.update, step.solve]
            cells.append([str(ranks), f"`{sync}`", f"{step.rows:,}", *map(_short, numbers)])
    return markdown_table(_HEADER, cells)


def _short(x: float) -> str:
    return "–" if x == 0 else f"{x:,.0f}" if x >= 10 else f"{x:.1f}" if x >= 1 else f"{x:.2f}"
