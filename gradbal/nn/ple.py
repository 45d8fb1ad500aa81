"""Progressive layered extraction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from gradbal.aggregators._arguments import one_of
from gradbal.nn._base import MultiTaskModel
from gradbal.nn._experts import perturbed
from gradbal.nn._extraction import ExtractionLayer, check_shared, counts, dealt
from gradbal.nn._gates import check_gate_encoder
from gradbal.nn._names import module_key
from gradbal.nn._stages import Factory, staged_copies

__all__ = ["PLE"]


class PLE(MultiTaskModel):
    """Layers of shared and task-specific experts, with a stream for each task and a shared one.

    Tang, Liu, Zhao and Gong, "Progressive Layered Extraction (PLE): A Novel Multi-Task Learning
    (MTL) Model for Personalized Recommendations", RecSys 2020,
    https://doi.org/10.1145/3383313.3412236. Layer l has shared experts S^l and each task's E_t^l;
    with `g_t = g_s = x` before the first layer,
    `g_t ← Σ_k softmax(W_t^l γ^l(g_t) + b_t^l)_k [S^l(g_s); E_t^l(g_t)]_k`, and in all layers but
    the last `g_s ← Σ_k softmax(W_s^l γ^l(g_s) + b_s^l)_k [S^l(g_s); E_1^l(g_1); …; E_T^l(g_T)]_k`,
    both from the streams before the layer. `y_t = h_t(g_t)`. With one layer it is `CGC`. Shared is
    all that reaches the shared stream, the tasks' experts below the last layer too; the last
    layer's E_t and whatever else only g_t depends on are the task's own.

    Shapes: in a layer all experts' outputs have one shape, `[B, ...]`; `γ^l(g)` is `[B, d_l]`.

    Args:
        tasks: names, in the order of the outputs.
        encoder: function that returns a new staged encoder, an `nn.ModuleList` or `nn.Sequential`
            of L stages; called once for each expert of a layer. Stage l is an expert of layer l.
        heads: task → module h_t.
        num_shared: the size of S^l, at least 1.
        num_specific: the size of E_t^l: one number for all tasks, or task → number; from 0 on.
        shared_stream: False for the variant of LibMTL, without a shared stream: every task's stream
            passes the shared experts by itself, which then run T times.
        gate_encoders: the modules γ^l, one for each layer, None where gates see the stream itself
            (`[B, d]`) or the average of each channel (`[B, d, H, W]`).
        gate_input_dims: d_l, one for each layer; None takes them from the first batch.
        perturb, batched: as of `MMoE`.
        example: a batch; if given, the model is tried with it.

    Raises:
        TypeError: something is not of its type, or `encoder` is a module and no function.
        ValueError: tasks and heads differ, no expert is shared, experts are not independent or
            have no parameters, a number is out of range, or parts do not fit.

    Note:
        `forward(x, task=...)` runs what the task's output depends on. With a shared stream that is
        every task's experts in all layers but the last, on this batch; without, S^l and E_t^l.

    Example:
        >>> import torch
        >>> model = PLE(
        ...     tasks=["age", "income"],
        ...     encoder=lambda: nn.Sequential(
        ...         nn.Sequential(nn.Linear(4, 8), nn.ReLU()),
        ...         nn.Sequential(nn.Linear(8, 6), nn.ReLU()),
        ...     ),
        ...     heads={"age": nn.Linear(6, 1), "income": nn.Linear(6, 2)},
        ...     num_shared=2,
        ...     num_specific=1,
        ...     gate_input_dims=[4, 8],
        ... )
        >>> {task: list(y.shape) for task, y in model(torch.zeros(5, 4)).items()}
        {'age': [5, 1], 'income': [5, 2]}
    """

    def __init__(
        self,
        tasks: Sequence[str],
        encoder: Factory,
        heads: Mapping[str, nn.Module],
        *,
        num_shared: int,
        num_specific: int | Mapping[str, int],
        shared_stream: bool = True,
        gate_encoders: Sequence[nn.Module | None] | None = None,
        gate_input_dims: Sequence[int | None] | None = None,
        perturb: float = 0.0,
        batched: bool | None = None,
        example: Any = None,
    ) -> None:
        super().__init__(tasks, heads)
        check_shared(num_shared)
        one_of("shared_stream", shared_stream, (False, True))
        self._specific = counts(num_specific, self.tasks)
        self._shared_stream = shared_stream
        made = staged_copies(encoder, num_shared + sum(self._specific.values()))
        n_layers = len(made[0])
        seen = _one_each("gate_encoders", gate_encoders, n_layers)
        widths = _one_each("gate_input_dims", gate_input_dims, n_layers)
        self.layers = nn.ModuleList()
        for l, experts in enumerate(zip(*made, strict=True)):
            shared, own = dealt(perturbed(experts, perturb), num_shared, self._specific)
            self.layers.append(
                ExtractionLayer(
                    shared,
                    own,
                    check_gate_encoder(seen[l], "gate_encoders"),
                    widths[l],
                    shared_stream and l < n_layers - 1,
                    batched,
                    f" in layer {l}",
                )
            )
        self._complete(example)

    def _features(self, x: Any, tasks: Sequence[str]) -> dict[str, Tensor]:
        shared: Any = x if self._shared_stream else None
        # In layers with a shared stream all experts run, and so they need their tasks' streams.
        mixed = [t for t in self.tasks if t in tasks or (self._shared_stream and self._specific[t])]
        streams: dict[str, Any] = dict.fromkeys(mixed, x)
        last = len(self.layers) - 1
        for l, layer in enumerate(self.layers):
            if l == last:
                streams = {task: streams[task] for task in tasks}
            shared, streams = layer(shared, streams, tasks if l >= last - 1 else mixed)
        return streams

    def _own(self, task: str) -> list[str]:
        key, last = module_key(task), len(self.layers) - 1
        experts, gates = range(last + 1), range(last + 1)
        if self._shared_stream:
            experts = range(last, last + 1)
            if self._specific[task]:
                # A gate's mixture goes to the task's experts in the layer above, and what these
                # find to the shared stream, except in the last layer.
                gates = range(max(last - 1, 0), last + 1)
        return [
            *super()._own(task),
            *(f"layers.{l}.task_experts.{key}" for l in experts),
            *(f"layers.{l}.gates.{key}" for l in gates),
        ]


def _one_each(name: str, given: Any, n_layers: int) -> list[Any]:
    if given is None:
        return [None] * n_layers
    if isinstance(given, str) or not isinstance(given, Sequence | nn.ModuleList):
        raise TypeError(f"`{name}` must be a sequence, one for each layer, found {given!r}")
    if len(given) != n_layers:
        raise ValueError(
            f"`{name}` must have one entry for each of {n_layers} layers, found {len(given)}"
        )
    return list(given)
