"""Compiled parts of a graph, which do not like to be walked more than once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

__all__ = ["gradients", "keep_buffers"]

_COMPILED = "CompiledFunctionBackward"
_COMPLAINT = "donated buffer"


def gradients(
    roots: Tensor | GradientEdge | Sequence[Tensor | GradientEdge],
    parameters: Sequence[Tensor],
    cotangents: Tensor | Sequence[Tensor],
    retain_graph: bool,
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad`, None where a root does not reach, whatever is compiled on the way.

    Raises:
        RuntimeError: a compiled part cannot be walked more than once; it says what to write.
    """

    def attempt() -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(
            roots,  # type: ignore[arg-type]
            parameters,
            cotangents,
            retain_graph=retain_graph,
            allow_unused=True,
        )

    try:
        return attempt()
    except RuntimeError as error:
        if _COMPLAINT not in str(error):
            raise
    # Nothing of the graph is gone, since it was to be kept.
    _keep_all_buffers([roots] if isinstance(roots, Tensor | GradientEdge) else roots)
    try:
        return attempt()
    except RuntimeError as error:
        if _COMPLAINT not in str(error):
            raise
        raise RuntimeError(
            "gradients of several losses need the graph more than once, found a compiled part that "
            "has given its memory away; write torch._functorch.config.donated_buffer = False "
            "before the first forward pass"
        ) from error


def keep_buffers(node: Node) -> None:
    """Lets a node of the graph be walked again, where it is of a compiled part.

    The compiled backward pass may write into what the forward pass has saved ("donated buffers"),
    and refuses to run where the graph is to be kept. It gets copies then. A part that is not
    compiled yet will be compiled without.
    """
    if node.name() != _COMPILED:
        return
    function: Any = getattr(node, "_forward_cls", None)
    metadata = getattr(function, "metadata", None)
    found = getattr(metadata, "bw_donated_idxs", [])
    if found == [] or getattr(function, "compiled_bw", None) is None:
        return
    original = vars(function).get("_backward_impl")
    if not isinstance(original, staticmethod) or isinstance(original, _OnCopies):
        return
    function._backward_impl = _OnCopies(original.__func__, metadata, found or [])


class _OnCopies(staticmethod):  # type: ignore[type-arg]
    """A compiled backward pass that gets copies of what it would overwrite, if it is not the last.

    Should another version of torch not come by here, its own check refuses the pass.
    """

    def __init__(self, original: Any, metadata: Any, donated: Sequence[int]) -> None:
        def run(ctx: Any, arguments: list[Any]) -> Any:
            if not torch._C._autograd._get_current_graph_task_keep_graph():
                return original(ctx, arguments)
            for k in donated:
                if isinstance(arguments[k], Tensor):
                    arguments[k] = arguments[k].clone()
            before, metadata.bw_donated_idxs = metadata.bw_donated_idxs, []
            try:
                return original(ctx, arguments)
            finally:
                metadata.bw_donated_idxs = before

        super().__init__(run)


def _keep_all_buffers(roots: Sequence[Tensor | GradientEdge]) -> None:
    stack: list[Node | None] = [
        (get_gradient_edge(root) if isinstance(root, Tensor) else root).node for root in roots
    ]
    seen: set[Node] = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        keep_buffers(node)
        stack.extend(n for n, _ in node.next_functions)
