"""One backward pass for several losses, through the part of the graph that they share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.overrides import TorchFunctionMode

from gradbal.jacobian.blocks import Block
from gradbal.jacobian.frontier import Frontier, find_frontier
from gradbal.jacobian.graph import Root

__all__ = ["FAILURES", "VMap"]

FAILURES = 8
"""Graphs that a batched pass fails on before none is tried any more."""

_KNOWN = 64
"""Graphs that are remembered to work."""

_STARTS_FROM_EDGES = hasattr(Node, "_input_metadata")

_DATA = Tensor.data.__get__  # type: ignore[attr-defined]

_Graph = tuple[type, ...]


class VMap:
    """Walks the own part of every loss once, and the shared part with all losses together.

    Losses go together if they enter the shared part at the same edges: no zeros are sent through a
    part that a loss does not reach. Where autograd cannot batch a graph, every loss has its own
    pass, from then on without another try. What says that a graph is the same are the kinds of its
    nodes in their order.

    Args:
        chunk_size: how many losses go together at most; None for all.
        keeps_graph: never free a graph's buffers, so that the loop can still take over where a
            pass fails that has worked on graphs of the same kind.

    Attributes:
        fallback: why the last losses did not go together, or None if they did.
    """

    follows_graph = True

    def __init__(self, chunk_size: int | None = None, keeps_graph: bool = False) -> None:
        self.chunk_size = chunk_size
        self.keeps_graph = keeps_graph
        self.fallback: str | None = None
        self._works: dict[_Graph, None] = {}
        self._fails: dict[_Graph, str] = {}

    @property
    def name(self) -> str:
        """The engine that took the last gradients."""
        return "vmap" if self.fallback is None else "loop"

    def rows(
        self, roots: Sequence[Root], parameters: Sequence[Tensor], retain_graph: bool
    ) -> Iterator[Block]:
        """The gradients of the roots with respect to the parameters, several roots at a time."""
        left = list(range(len(roots)))
        frontier = self._plan(roots, parameters)
        if frontier is not None:
            graph = frontier.kinds
            known = graph in self._works
            for job in self._jobs(frontier):
                keep = retain_graph or self.keeps_graph or len(job) < len(left)
                blocks = self._blocks(frontier, parameters, job, keep, known)
                if blocks is None:
                    break
                yield from blocks
                left = [i for i in left if i not in job]
            else:
                self._works[graph] = None
                if len(self._works) > _KNOWN:
                    del self._works[next(iter(self._works))]
        for i in left:
            yield _alone(roots[i], i, parameters, retain_graph or i != left[-1])

    def _plan(self, roots: Sequence[Root], parameters: Sequence[Tensor]) -> Frontier | None:
        """The frontier, if a batched pass is worth a try; otherwise `fallback` says why not."""
        self.fallback = None
        if not _STARTS_FROM_EDGES:
            self.fallback = f"torch 2.5 or later is needed, found {torch.__version__}"
        elif torch.is_anomaly_enabled():
            self.fallback = "anomaly detection looks at every gradient"
        elif len(roots) == 1:
            self.fallback = "there is one loss alone"
        if self.fallback is not None:
            return None
        frontier = find_frontier(roots, parameters)
        if all(len(job) == 1 for job in self._jobs(frontier)):
            self.fallback = "no two losses enter the shared part at the same edges"
        elif frontier.kinds not in self._works:
            self.fallback = self._known_reason(frontier)
        return frontier if self.fallback is None else None

    def _known_reason(self, frontier: Frontier) -> str | None:
        """Why a graph that is not known to work is not tried, or None if it is."""
        if frontier.kinds not in self._fails:
            if len(self._fails) >= FAILURES:
                return next(reversed(self._fails.values()))
            # Compiled code may reach for the memory of a tensor, which a batched one does not have.
            if any(node.name().startswith("CompiledFunction") for node in frontier.nodes):
                self._fails[frontier.kinds] = "a part of the model is compiled"
        return self._fails.get(frontier.kinds)

    def _jobs(self, frontier: Frontier) -> list[list[int]]:
        """Which losses go together, at most `chunk_size` of them."""
        groups: dict[frozenset[GradientEdge], list[int]] = {}
        for i, edges in enumerate(frontier.edges):
            groups.setdefault(frozenset(edges), []).append(i)
        size = self.chunk_size or len(frontier.edges)
        return [
            group[start : start + size]
            for group in groups.values()
            for start in range(0, len(group), size)
        ]

    def _blocks(
        self,
        frontier: Frontier,
        parameters: Sequence[Tensor],
        job: list[int],
        keep: bool,
        known: bool,
    ) -> list[Block] | None:
        """The gradients of losses that go together; None if they do not.

        A graph's buffers are freed only where it is known that the pass works.
        """
        if len(job) == 1:
            return [_alone(frontier.roots[job[0]], job[0], parameters, keep)]
        try:
            return _together(frontier, job, keep or not known)
        except Exception as error:
            graph = frontier.kinds
            self._works.pop(graph, None)
            self._fails[graph] = self.fallback = _first_line(error)
            if keep or not known:
                return None
            raise RuntimeError(
                "a batched backward pass must work on every graph of a kind that it worked on "
                f'before, found {self.fallback}; use jacobian="loop"'
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        # Classes of nodes cannot be pickled, and it is found out again what works.
        return {"chunk_size": self.chunk_size, "keeps_graph": self.keeps_graph}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _alone(root: Root, i: int, parameters: Sequence[Tensor], keep: bool) -> Block:
    grads = torch.autograd.grad(root[0], parameters, root[1], retain_graph=keep, allow_unused=True)
    return Block([i], {}, [{k: g for k, g in enumerate(grads) if g is not None}])


class _NoData(TorchFunctionMode):
    """Refuses `tensor.data` in backward functions and hooks: of a batched tensor, it crashes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _DATA:
            raise RuntimeError("`.data` of a gradient is not there in a batched pass")
        return func(*args, **(kwargs or {}))


def _together(frontier: Frontier, job: list[int], keep: bool) -> list[Block]:
    """Each loss's own part, then the shared part once for all that have cotangents alike."""
    entered = frontier.walks(job, retain_graph=keep)
    groups: dict[frozenset[GradientEdge], list[int]] = {}
    for place, each in enumerate(entered):
        groups.setdefault(frozenset(each.cotangents), []).append(place)
    blocks = []
    for n, places in enumerate(groups.values()):
        edges = list(entered[places[0]].cotangents)
        stacked = {}
        if edges and frontier.shared:
            rows = [torch.stack([entered[p].cotangents.pop(e) for p in places]) for e in edges]
            with _NoData():
                # Edges alone, with which the call itself does not go through the mode.
                grads = torch.autograd.grad(
                    edges,
                    [*frontier.shared.values()],
                    rows,
                    retain_graph=keep or n < len(groups) - 1,
                    allow_unused=True,
                    is_grads_batched=True,
                )
            found = zip(frontier.shared, grads, strict=True)
            stacked = {k: g for k, g in found if g is not None}
        single = [entered[p].heads for p in places]
        blocks.append(Block([job[p] for p in places], stacked, single))
    return blocks
