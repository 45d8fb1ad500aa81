"""The architectures of gradbal.nn, built from the parts that a benchmark has.

All of a benchmark's architectures have about as many parameters: what one encoder has in hard
parameter sharing is divided among the tasks' networks or among the experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.benchmark import Architecture, Network
from benchmarks.models.shared import Shared
from gradbal.nn import (
    CGC,
    PLE,
    CrossStitch,
    DSelectK,
    HardParameterSharing,
    MMoE,
    MultiTaskModel,
)

__all__ = ["Kit", "Part", "architectures", "hard_sharing"]


@dataclass(frozen=True)
class Part:
    """One size of encoder, with heads that fit.

    Attributes:
        stages: makes an encoder of stages.
        heads: makes the heads of these tasks.
        size: widths, in words.
    """

    stages: Callable[[], nn.Sequential]
    heads: Callable[[Sequence[str]], dict[str, nn.Module]]
    size: str


@dataclass(frozen=True)
class Kit:
    """What a benchmark's architectures are built from.

    Attributes:
        encode: maps the benchmark's inputs to what encoders take.
        whole: an encoder that all tasks share.
        half: an encoder of a task's own, where there are two tasks.
        expert: one of `experts`.
        experts: how many there are, a multiple of 4: shared ones, or one half shared and the other
            divided between two tasks.
        selected: how many of them a task of DSelect-k uses.
        gates: what gates see before each stage, and its width.
        channels_last: whether networks are stored that way, which is faster for small images.
    """

    encode: Callable[[Tensor], Tensor]
    whole: Part
    half: Part
    expert: Part
    experts: int
    selected: int
    gates: Callable[[], list[tuple[nn.Module | None, int]]]
    channels_last: bool = False

    def finish(self, make: Callable[[Sequence[str]], MultiTaskModel]) -> Callable[..., Network]:
        """Puts a model behind `encode`."""
        return partial(_finished, self, make)


def _finished(
    kit: Kit, make: Callable[[Sequence[str]], MultiTaskModel], tasks: Sequence[str]
) -> Network:
    network = Shared(make(tasks), kit.encode)
    return network.to(memory_format=torch.channels_last) if kit.channels_last else network


def hard_sharing(kit: Kit) -> Architecture:
    """One encoder, a head for each task."""
    part = kit.whole
    return Architecture(
        f"one encoder, {part.size}",
        kit.finish(lambda tasks: HardParameterSharing(tasks, part.stages, part.heads(tasks))),
    )


def architectures(kit: Kit) -> dict[str, Architecture]:
    """Those that fit encoders of any kind, by the name that `--architectures` takes."""
    half, expert, n = kit.half, kit.expert, kit.experts
    own = f"an encoder for each task, {half.size}"
    sizes = f"{expert.size}"
    divided = {"num_shared": n // 2, "num_specific": n // 4}
    return {
        "hps": hard_sharing(kit),
        "cross_stitch": Architecture(
            f"{own}, mixed after each stage",
            kit.finish(lambda tasks: CrossStitch(tasks, half.stages, half.heads(tasks))),
        ),
        "mmoe": Architecture(
            f"{n} experts, {sizes}",
            kit.finish(
                lambda tasks: MMoE(
                    tasks,
                    expert.stages,
                    expert.heads(tasks),
                    num_experts=n,
                    gate_encoder=kit.gates()[0][0],
                    gate_input_dim=kit.gates()[0][1],
                )
            ),
        ),
        "cgc": Architecture(
            f"{n // 2} shared experts and {n // 4} for each task, {sizes}",
            kit.finish(
                lambda tasks: CGC(
                    tasks,
                    expert.stages,
                    expert.heads(tasks),
                    **divided,
                    gate_encoder=kit.gates()[0][0],
                    gate_input_dim=kit.gates()[0][1],
                )
            ),
        ),
        "ple": Architecture(
            f"the same experts, with gates after each stage, {sizes}",
            kit.finish(
                lambda tasks: PLE(
                    tasks,
                    expert.stages,
                    expert.heads(tasks),
                    **divided,
                    gate_encoders=[encoder for encoder, _ in kit.gates()],
                    gate_input_dims=[width for _, width in kit.gates()],
                )
            ),
        ),
        "dselect_k": Architecture(
            f"{n} experts, of which each task selects {kit.selected}, {sizes}",
            kit.finish(
                lambda tasks: DSelectK(
                    tasks, expert.stages, expert.heads(tasks), num_experts=n, k=kit.selected
                )
            ),
        ),
    }
