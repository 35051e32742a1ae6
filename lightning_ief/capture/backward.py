"""The backward pass: from cotangents of the logits to factors, use by use.

Autograd's own weight gradients are never computed: the pass is asked for the gradients at the outputs of the *earliest*
uses only (those behind which there is no other), and hooks take the gradients at the others as they come by. With one
cotangent a use is turned into factors right then, so that inputs and output gradients can be let go layer by layer.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node

from lightning_ief.capture.factors import Factor
from lightning_ief.capture.recorder import Span, Use
from lightning_ief.capture.rules import factors_of, stacked_factors
from lightning_ief.capture.types import Derived, Source
from lightning_ief.linalg.gram import full_precision
from lightning_ief.linalg.scaling import normalised, sample_scale

__all__ = ["Survey", "pull_back", "survey"]

Key: TypeAlias = tuple[Node, int]
"""An edge of autograd's graph: output number n of a node."""

Edges: TypeAlias = dict[Key, GradientEdge]

# Elements up to which a tensor is copied to spare kernels: 2¹⁶ float32 take about as long as a few kernels to start.
_SMALL = 2**16


def pull_back(
    output: Tensor,
    uses: list[Use],
    earliest: Set[Node],
    cotangents: Sequence[Tensor],
    samples: int,
    retain_graph: bool,
    loss_scale: Tensor | None = None,
    keep_sides: Collection[str] = (),
) -> tuple[dict[Source, list[Factor]], Tensor]:
    """Pull cotangents of the logits back to the uses of parameters.

    Args:
        output: The logits, with their graph.
        uses: The recorded uses; the list is emptied unless the graph is kept, so that each can be let go when its turn
            has come.
        earliest: Nodes of the earliest uses, as `survey` finds them.
        cotangents: c_r for r = 1 … R, each of the shape of the logits.
        samples: N.
        retain_graph: Keep the graph.
        loss_scale: S, by which a GradScaler has the gradient of the mean loss scaled, for the range of fp16.
        keep_sides: Parameters of which outer products are kept as they are.

    Returns:
        Factors by source, of rows over σ; and σ, shape [R, N], float64.

    Raises:
        CaptureError: If an operation can't be captured exactly.

    """
    collector = _Collector(uses, len(cotangents), output.device, keep_sides)
    if not retain_graph:
        uses.clear()
    scales = []
    for r, cotangent in enumerate(cotangents):
        begun, scale = normalised(cotangent, 1, None if loss_scale is None else sample_scale(loss_scale, samples))
        scales.append(scale)
        keep = retain_graph or r + 1 < len(cotangents)
        _backward_to(output, collector.edges, earliest, begun.to(output.dtype), keep, partial(collector.receive, r))
    return collector.finish(), torch.stack(scales)


class _Collector:
    """Gathers the output gradients of each use and turns them into factors.

    Args:
        uses: The recorded uses.
        cotangents: R.
        device: Where the logits are.
        keep_sides: Parameters of which outer products are kept as they are.

    """

    def __init__(self, uses: Sequence[Use], cotangents: int, device: torch.device, keep_sides: Collection[str]) -> None:
        self.device = device
        self.keep_sides = keep_sides
        self.cotangents = cotangents
        self.factors: dict[Source, list[Factor]] = {}
        # For each use its output gradients, one list for every output; dropped when it has become factors.
        self.pending: dict[int, tuple[Use, list[list[Tensor | None]]]] = {
            number: (use, [[None] * cotangents for _ in use.edges]) for number, use in enumerate(uses)
        }
        # Small calls of one kind wait for each other.
        self.expected = Counter(use.call.kind for use in uses)
        self.alike: dict[int, list[Use]] = defaultdict(list)
        self.edges: Edges = {}
        self.places: dict[Key, list[tuple[int, int]]] = defaultdict(list)
        for number, use in enumerate(uses):
            for position, edge in enumerate(use.edges):
                if edge is not None:
                    key = edge.node, edge.output_nr
                    self.edges[key] = edge
                    self.places[key].append((number, position))

    def receive(self, r: int, key: Key, gradient: Tensor) -> None:
        """Take the gradient at an edge.

        Args:
            r: Number of the cotangent.
            key: The edge.
            gradient: The gradient there.

        """
        for number, position in self.places[key]:
            use, gradients = self.pending[number]
            gradients[position][r] = gradient
            if self.cotangents == 1 and all(g[0] is not None for g, e in zip(gradients, use.edges, strict=True) if e):
                self._finish(number)

    def finish(self) -> dict[Source, list[Factor]]:
        """Turn what is left into factors.

        Returns:
            Factors by source.

        """
        for number in list(self.pending):
            self._finish(number)
        for kind in list(self.alike):
            self._finish_alike(kind)
        return self.factors

    def _finish(self, number: int) -> None:
        recorded, parts = self.pending.pop(number)
        use = recorded.with_gradients(list(map(_stack, parts, recorded.shapes)), self.keep_sides)
        kind = use.call.kind
        if kind is None or not _is_small(use) or any(s in self.keep_sides for s in use.call.sources):
            self._add(use)
            return
        self.alike[kind].append(use)
        if len(self.alike[kind]) == self.expected[kind]:
            self._finish_alike(kind)

    def _finish_alike(self, kind: int) -> None:
        uses = self.alike.pop(kind)
        found = None
        if len(uses) > 1 and all(_look_alike(use, uses[0]) for use in uses[1:]):
            with full_precision(self.device):
                found = stacked_factors(uses)
        if found is None:
            for use in uses:
                self._add(use)
            return
        for use, factors in zip(uses, found, strict=False):
            self._note(use, factors)

    def _add(self, use: Use) -> None:
        with full_precision(self.device):
            self._note(use, factors_of(use))

    def _note(self, use: Use, factors: Mapping[int, Factor]) -> None:
        for leaf, factor in factors.items():
            source = use.call.sources[leaf]
            assert source is not None
            self.factors.setdefault(source, []).append(factor)


def _is_small(use: Use) -> bool:
    """Whether copying what a call took and gave is cheaper than kernels of its own."""
    tensors = (x for x in (*use.leaves, *use.gradients) if isinstance(x, Tensor))
    return all(x.numel() <= _SMALL for x in tensors)


def _look_alike(one: Use, other: Use) -> bool:
    """Whether the samples of two calls of one kind can stand one after the other on this batch, too."""
    return (
        one.spec == other.spec
        and one.autocast == other.autocast
        and len(one.leaves) == len(other.leaves)
        and all(map(_is_alike, (*one.leaves, *one.gradients), (*other.leaves, *other.gradients)))
    )


def _is_alike(x: Any, y: Any) -> bool:
    """Whether two tensors differ in their numbers alone; anything else must be the same."""
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device)
    return type(x) is type(y) and not isinstance(x, Tensor) and bool(x == y)


def _backward_to(
    output: Tensor,
    edges: Edges,
    earliest: Set[Node],
    cotangent: Tensor,
    retain_graph: bool,
    receive: Callable[[Key, Tensor], None],
) -> None:
    """Run one backward pass and hand over the gradient at each edge as soon as it is there."""
    wanted = {key: edge for key, edge in edges.items() if key[0] in earliest}
    if not wanted:
        return
    passed: dict[Node, list[int]] = defaultdict(list)
    for node, number in edges:
        if node not in earliest:
            passed[node].append(number)

    def hook(node: Node, numbers: list[int], gradients: tuple[Tensor | None, ...]) -> None:
        for number in numbers:
            gradient = gradients[number]
            if gradient is not None:
                receive((node, number), gradient)

    handles = [node.register_prehook(partial(hook, node, numbers)) for node, numbers in passed.items()]
    try:
        found = torch.autograd.grad(
            output, list(wanted.values()), cotangent, retain_graph=retain_graph, allow_unused=True
        )
    finally:
        for handle in handles:
            handle.remove()
    for key, gradient in zip(wanted, found, strict=True):
        if gradient is not None:
            receive(key, gradient)


def _stack(parts: Sequence[Tensor | None], shape: torch.Size) -> Tensor | None:
    """Stack the cotangents that reached one edge, [R, *shape]; where some did not, they are zero."""
    given = next((part for part in parts if part is not None), None)
    if given is None:
        return None
    if len(parts) == 1:
        return given.reshape(1, *shape)
    return torch.stack([torch.zeros_like(given) if part is None else part for part in parts]).reshape(-1, *shape)


class Survey(NamedTuple):
    """What one walk over the graph of a forward pass finds.

    Attributes:
        earliest: Nodes of uses behind which, away from the logits, there is no other; uses that the logits do not
            depend on are among them.
        unannounced: Parameters, and tensors derived from them, with an edge into the graph that belongs to no
            recorded operation.
        kinds: The classes of the nodes.
        custom: Whether a backward pass written by hand takes part.
        structure: A number that tells graphs of different nodes apart.

    """

    earliest: Set[Node]
    unannounced: list[Source]
    kinds: Set[type]
    custom: bool
    structure: int


def survey(
    output: Tensor,
    uses: Iterable[Use],
    spans: Iterable[Span],
    parameters: Mapping[str, Tensor],
    derived: Mapping[Derived, Tensor],
) -> Survey:
    """Walk over the graph of a forward pass, once.

    Args:
        output: The logits, with their graph.
        uses: The recorded uses.
        spans: What each recorded operation added to the graph.
        parameters: The parameters by name.
        derived: The tensors derived from parameters.

    Returns:
        What was found.

    """
    names = {id(p): name for name, p in parameters.items()}
    nodes = {edge.node for use in uses for edge in use.edges if edge is not None}
    recorded = _within(spans)
    sources: dict[Node, Source] = {x.grad_fn: source for source, x in derived.items() if x.grad_fn is not None}
    above: set[Node] = set()  # what lies between the logits and one of the nodes
    unannounced: dict[Source, None] = {}
    kinds: list[type] = []
    for node, behind in _graph(output.grad_fn):
        kinds.append(type(node))
        if not behind:
            if (name := names.get(id(getattr(node, "variable", None)))) is not None:
                sources[node] = name
            continue
        is_above = False
        for parent, _ in behind:
            if parent in nodes or parent in above:
                is_above = True
            elif parent in sources and node not in recorded:
                unannounced[sources[parent]] = None
        if is_above:
            above.add(node)
    custom = any(issubclass(kind, BackwardCFunction) for kind in {*kinds})
    return Survey(nodes - above, [*unannounced], {*kinds}, custom, hash(tuple(kinds)))


def _within(spans: Iterable[Span]) -> set[Node]:
    """The nodes that recorded operations have added to the graph."""
    found: set[Node] = set()
    for outputs, inputs in spans:
        stack = [node for node in outputs if node is not None]
        while stack:
            node = stack.pop()
            if node not in found and node not in inputs:
                found.add(node)
                stack.extend(parent for parent, _ in node.next_functions if parent is not None)
    return found


def _graph(root: Node | None) -> Iterator[tuple[Node, Sequence[tuple[Node | None, int]]]]:
    """Walk a graph of autograd: each node once, after all nodes behind it, with its edges to these."""
    behind: dict[Node, Sequence[tuple[Node | None, int]]] = {}
    finished: set[Node] = set()
    stack = [] if root is None else [root]
    while stack:
        node = stack[-1]
        if node not in behind:
            behind[node] = edges = node.next_functions
            stack.extend(parent for parent, _ in edges if parent is not None and parent not in behind)
            continue
        stack.pop()
        if node not in finished:
            finished.add(node)
            yield node, behind[node]
