"""Compiled parts of a graph, which hide what is inside and may be walked only once."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

__all__ = ["edges_onward", "gradients", "has_compiled_parts", "is_compiled", "keep_buffers"]

Edge = tuple[Node | None, int]

_COMPILED = "CompiledFunctionBackward"
_COMPLAINT = "donated buffer"


def gradients(
    roots: Tensor | GradientEdge | Sequence[Tensor | GradientEdge],
    parameters: Sequence[Tensor],
    cotangents: Tensor | Sequence[Tensor] | None,
    retain_graph: bool,
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad`, None where a root does not reach, whatever is compiled on the way.

    Cotangents of 0-dim roots may be left out for ones.

    Raises:
        RuntimeError: a compiled part cannot be walked more than once; it says what to write.
    """
    grad = torch.autograd.grad
    try:
        return grad(roots, parameters, cotangents, retain_graph, allow_unused=True)  # type: ignore[arg-type]
    except RuntimeError as error:
        if _COMPLAINT not in str(error):
            raise
    # Nothing of the graph is gone, since it was to be kept.
    for node in _nodes([roots] if isinstance(roots, Tensor | GradientEdge) else roots):
        if is_compiled(node):
            keep_buffers(node)
    try:
        return grad(roots, parameters, cotangents, retain_graph, allow_unused=True)  # type: ignore[arg-type]
    except RuntimeError as error:
        if _COMPLAINT not in str(error):
            raise
        raise RuntimeError(
            "gradients of several losses need the graph more than once, found a compiled part that "
            "has given its memory away; write torch._functorch.config.donated_buffer = False "
            "before the first forward pass"
        ) from error


def is_compiled(node: Node) -> bool:
    """Whether a node of the graph stands for a compiled part of it."""
    return node.name() == _COMPILED


def has_compiled_parts(root: Tensor | GradientEdge) -> bool:
    """Whether a backward pass from here meets any."""
    return any(map(is_compiled, _nodes([root])))


def edges_onward(node: Node, output: int) -> Sequence[Edge]:
    """Where a pass goes on that comes from one output of a compiled part.

    All of them, where torch does not tell what is inside. The gradients of the others are zeros.
    """
    # Inputs that have no gradient have no edge, or one that leads nowhere: sizes, data, statistics.
    edges = [edge for edge in node.next_functions if edge[0] is not None]
    depends = _inputs_of(getattr(node, "_forward_cls", None)).get(output)
    if depends is None or len(depends) != len(edges):
        return edges
    return [edge for edge, is_used in zip(edges, depends, strict=True) if is_used]


_known: weakref.WeakKeyDictionary[Any, dict[int, list[bool]]] = weakref.WeakKeyDictionary()


def _inputs_of(function: Any) -> dict[int, list[bool]]:
    """For each output of a compiled part, whether it depends on each input that has a gradient."""
    if function is None:
        return {}
    if function not in _known:
        try:
            _known[function] = _read_graph(function)
        except (AttributeError, KeyError, TypeError):
            # Another version of torch keeps it elsewhere.
            _known[function] = {}
    return _known[function]


def _read_graph(function: Any) -> dict[int, list[bool]]:
    metadata, info = function.metadata, function._lazy_backward_info
    module = info.bw_module if hasattr(info, "bw_module") else info.bw_module_fn()
    first = metadata.num_mutated_inp_runtime_indices
    outputs = [first + i for i, o in enumerate(metadata.output_info) if o.requires_grad]
    tangents = [n for n in module.graph.nodes if n.op == "placeholder" and "tangents" in n.name]
    if (
        metadata.num_intermediate_bases
        or metadata.num_outputs_aliased
        or any(i.mutates_data and i.requires_grad for i in metadata.input_info)
        or function.maybe_subclass_metadata is not None
        or len(outputs) != len(tangents)
    ):
        return {}
    # Which of the outputs' gradients each node of the backward graph is computed from.
    sources: dict[Any, set[int]] = {n: {k} for n, k in zip(tangents, outputs, strict=True)}
    for n in module.graph.nodes:
        if n.op == "output":
            grads = [g for g in n.args[0] if g is not None]
            return {k: [k in sources[g] for g in grads] for k in outputs}
        if n not in sources:
            sources[n] = set().union(*(sources[m] for m in n.all_input_nodes))
    return {}


def keep_buffers(node: Node) -> None:
    """Lets a compiled part of the graph be walked again.

    The compiled backward pass may write into what the forward pass has saved ("donated buffers"),
    and refuses to run where the graph is to be kept. It gets copies then. A part that is not
    compiled yet will be compiled without.
    """
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


def _nodes(roots: Sequence[Tensor | GradientEdge]) -> Iterator[Node]:
    """All that backward passes from these roots meet."""
    stack: list[Node | None] = [
        (get_gradient_edge(root) if isinstance(root, Tensor) else root).node for root in roots
    ]
    seen: set[Node] = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(n for n, _ in node.next_functions)
