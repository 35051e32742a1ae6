"""The backward pass: from cotangents of the logits to factors, use by use.

Autograd's own weight gradients are never computed: the pass is asked for the gradients at the outputs of the *earliest*
uses only (those behind which there is no other), and hooks take the gradients at the others as they come by. With one
cotangent a use is turned into factors right then, so that inputs and output gradients can be let go layer by layer.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_ief.capture.factors import Factor
from lightning_ief.capture.rules import Operation, factors_of
from lightning_ief.capture.types import Source, Use
from lightning_ief.linalg.gram import full_precision
from lightning_ief.linalg.vectors import power_of_two

__all__ = ["Edges", "Key", "backward_to", "graph_nodes", "per_sample", "pull_back"]

Key: TypeAlias = tuple[Node, int]
"""An edge of autograd's graph: output number n of a node."""

Edges: TypeAlias = dict[Key, GradientEdge]


def pull_back(
    output: Tensor,
    uses: list[Use],
    cotangents: Sequence[Tensor],
    samples: int,
    retain_graph: bool,
    loss_scale: Tensor | None = None,
) -> tuple[dict[Source, list[Factor]], Tensor]:
    """Pull cotangents of the logits back to the uses of parameters.

    Args:
        output: The logits, with their graph.
        uses: The recorded uses; the list is emptied unless the graph is kept, so that each can be let go when its turn
            has come.
        cotangents: c_r for r = 1 … R, each of the shape of the logits.
        samples: N.
        retain_graph: Keep the graph.
        loss_scale: S, by which a GradScaler has the gradient of the mean loss scaled, for the range of fp16.

    Returns:
        Factors by source, of rows over σ; and σ, shape [R, N], float64.

    Raises:
        CaptureError: If an operation can't be captured exactly.

    """
    collector = _Collector(uses, samples, len(cotangents), output.device)
    if not retain_graph:
        uses.clear()
    scales = []
    for r, cotangent in enumerate(cotangents):
        normalised, scale = _normalised(cotangent)
        if loss_scale is not None:
            factor = per_sample(loss_scale, samples)
            normalised, scale = normalised * factor, scale / factor
        scales.append(scale)
        keep = retain_graph or r + 1 < len(cotangents)
        backward_to(output, collector.edges, normalised.to(output.dtype), keep, partial(collector.receive, r))
    return collector.finish(), torch.stack(scales)


def per_sample(loss_scale: Tensor, samples: int) -> Tensor:
    """The scale of a sample's gradient.

    Args:
        loss_scale: S, that of the mean loss.
        samples: N.

    Returns:
        S over N; N rounded up to a power of two, so that no digit of what is scaled changes if S is one.

    """
    return loss_scale / 2 ** (samples - 1).bit_length()


class _Collector:
    """Gathers the output gradients of each use and turns them into factors.

    Args:
        uses: The recorded uses.
        samples: N.
        cotangents: R.
        device: Where the logits are.

    """

    def __init__(self, uses: Sequence[Use], samples: int, cotangents: int, device: torch.device) -> None:
        self.device = device
        self.samples = samples
        self.cotangents = cotangents
        self.factors: dict[Source, list[Factor]] = {}
        # For each use its output gradients, one list for every output; dropped when it has become factors.
        self.pending: dict[int, tuple[Use, list[list[Tensor | None]]]] = {
            number: (use, [[None] * cotangents for _ in use.edges]) for number, use in enumerate(uses)
        }
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
        return self.factors

    def _finish(self, number: int) -> None:
        use, gradients = self.pending.pop(number)
        with full_precision(self.device):
            operation = Operation(use, [_stack(parts) for parts in gradients], self.samples)
            for leaf, factor in factors_of(operation):
                source = use.plan.sources[leaf]
                assert source is not None
                self.factors.setdefault(source, []).append(factor)


def backward_to(
    output: Tensor,
    edges: Edges,
    cotangent: Tensor,
    retain_graph: bool,
    receive: Callable[[Key, Tensor], None],
    create_graph: bool = False,
) -> None:
    """Run one backward pass and hand over the gradient at each edge as soon as it is there.

    Args:
        output: Where to begin.
        edges: Where gradients are wanted.
        cotangent: The gradient to begin with, of the shape of the output.
        retain_graph: Keep the graph.
        receive: Gets each edge that is reached, and the gradient there.
        create_graph: Make the gradients functions of the cotangent.

    """
    earliest = _earliest(output.grad_fn, {node for node, _ in edges})
    wanted = {key: edge for key, edge in edges.items() if key[0] in earliest}
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
            output, list(wanted.values()), cotangent,
            retain_graph=retain_graph, create_graph=create_graph, allow_unused=True,
        )  # fmt: skip
    finally:
        for handle in handles:
            handle.remove()
    for key, gradient in zip(wanted, found, strict=True):
        if gradient is not None:
            receive(key, gradient)


def _earliest(root: Node | None, nodes: Iterable[Node]) -> set[Node]:
    """Those of the nodes behind which, away from the root, there is no other of them.

    Returns:
        The nodes; nodes that the root does not depend on are among them, too.

    """
    nodes = set(nodes)
    above: set[Node | None] = set()  # what lies between the root and one of the nodes
    for node in graph_nodes(root):
        if any(parent in nodes or parent in above for parent, _ in node.next_functions):
            above.add(node)
    return nodes - above


def graph_nodes(root: Node | None) -> Iterator[Node]:
    """Walk a graph of autograd.

    Args:
        root: Where to begin.

    Yields:
        Each node once, after all nodes behind it.

    """
    expanded: set[Node] = set()
    finished: set[Node] = set()
    stack = [] if root is None else [root]
    while stack:
        node = stack[-1]
        if node not in expanded:
            expanded.add(node)
            stack.extend(parent for parent, _ in node.next_functions if parent is not None and parent not in expanded)
            continue
        stack.pop()
        if node not in finished:
            finished.add(node)
            yield node


def _normalised(cotangent: Tensor) -> tuple[Tensor, Tensor]:
    """Bring the cotangent of each sample to a size of about 1, by a power of two, which changes no digit of it.

    Gradients of nearly fitted samples would else leave the range of float32 on their way back, their squares soon
    after.

    Returns:
        The cotangent over σ, and σ, shape [N], float64.

    """
    largest = cotangent.detach().abs().reshape(len(cotangent), -1).amax(1)
    scales = power_of_two(largest.double())
    scales = torch.where(torch.isfinite(largest), scales, 1.0)
    per_sample = scales.view(-1, *(1,) * (cotangent.ndim - 1))
    return (cotangent.double() / per_sample).to(cotangent.dtype), scales


def _stack(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Stack the cotangents that reached one edge; where some did not, they are zero."""
    given = next((part for part in parts if part is not None), None)
    if given is None:
        return None
    if len(parts) == 1:
        return given.unsqueeze(0)
    return torch.stack([torch.zeros_like(given) if part is None else part for part in parts])
