"""The architectures of gradbal.nn, built from the parts that a benchmark has.

All of a benchmark's architectures have about as many parameters: what one encoder has in hard
parameter sharing is divided among the tasks' networks or among the experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.benchmark import Architecture, Network, Settings, Splits, Task
from benchmarks.models.shared import Shared
from benchmarks.training import batches, judge
from gradbal.nn import (
    CGC,
    PLE,
    CrossStitch,
    DSelectK,
    HardParameterSharing,
    LearningToBranch,
    MMoE,
    MultiTaskModel,
    SparseSharing,
    find_masks,
)

__all__ = ["Kit", "Part", "architectures"]


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


def architectures(kit: Kit) -> dict[str, Architecture]:
    """Those that fit encoders of any kind, by the name that `--architectures` takes."""
    whole, half, expert, n = kit.whole, kit.half, kit.expert, kit.experts
    own = f"an encoder for each task, {half.size}"
    return {
        "hps": Architecture(
            f"one encoder, {whole.size}",
            kit.finish(lambda tasks: HardParameterSharing(tasks, whole.stages, whole.heads(tasks))),
        ),
        "cross_stitch": Architecture(
            f"{own}, mixed after each stage",
            kit.finish(lambda tasks: CrossStitch(tasks, half.stages, half.heads(tasks))),
        ),
        "ltb": Architecture(
            f"{own}, whose stages choose their inputs",
            kit.finish(lambda tasks: LearningToBranch(tasks, half.stages, half.heads(tasks))),
        ),
        "mmoe": Architecture(
            f"{n} experts, {expert.size}",
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
            f"{n // 2} shared experts and {n // 4} for each task, {expert.size}",
            kit.finish(
                lambda tasks: CGC(
                    tasks,
                    expert.stages,
                    expert.heads(tasks),
                    num_shared=n // 2,
                    num_specific=n // 4,
                    gate_encoder=kit.gates()[0][0],
                    gate_input_dim=kit.gates()[0][1],
                )
            ),
        ),
        "ple": Architecture(
            f"the same experts, with gates after each stage, {expert.size}",
            kit.finish(
                lambda tasks: PLE(
                    tasks,
                    expert.stages,
                    expert.heads(tasks),
                    num_shared=n // 2,
                    num_specific=n // 4,
                    gate_encoders=[encoder for encoder, _ in kit.gates()],
                    gate_input_dims=[width for _, width in kit.gates()],
                )
            ),
        ),
        "dselect_k": Architecture(
            f"{n} experts, of which each task selects {kit.selected}, {expert.size}",
            kit.finish(
                lambda tasks: DSelectK(
                    tasks, expert.stages, expert.heads(tasks), num_experts=n, k=kit.selected
                )
            ),
        ),
        "sparse_sharing": Architecture(
            f"one encoder, {whole.size}, with the best mask of {_ROUNDS} prunings for each task",
            kit.finish(lambda tasks: SparseSharing(tasks, whole.stages, whole.heads(tasks))),
            _search,
        ),
    }


_ROUNDS, _FRACTION = 3, 0.3
"""Of the search for masks: how often, and what part of the weights is left out each time."""


def _search(
    network: Network, tasks: Sequence[Task], splits: Splits, settings: Settings, seed: int
) -> None:
    """Find the masks of sparse sharing: an epoch for each task and sparsity, judged on validation.

    The first measure of the task decides.
    """
    assert isinstance(network, Shared)
    encode, by_name = network.encode, {task.name: task for task in tasks}

    def train_one_task(model: SparseSharing, name: str) -> None:
        model.train()
        optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr)
        for batch in batches(splits.train, replace(settings, epochs=1), seed):
            output = model(encode(batch.inputs), task=name)
            optimizer.zero_grad()
            by_name[name].loss(output, batch.targets[name]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    def score(model: SparseSharing, name: str) -> float:
        model.eval()
        task, measure = by_name[name], by_name[name].measures[0]
        found = judge(lambda x: {name: model(encode(x), task=name)}, [task], splits.validation)
        return found[name][measure.name] * (1 if measure.higher_is_better else -1)

    model = network.model
    assert isinstance(model, SparseSharing)
    find_masks(model, train_one_task, rounds=_ROUNDS, fraction=_FRACTION, evaluate=score)
