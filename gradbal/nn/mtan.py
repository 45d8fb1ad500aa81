"""Multi-task attention network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradbal.aggregators._arguments import integer
from gradbal.nn._base import MultiTaskModel
from gradbal.nn._names import module_key
from gradbal.nn._stages import Factory, copies, run, stages_of

__all__ = ["MTAN"]


class MTAN(MultiTaskModel):
    """One backbone, and for each task attention masks on its stages.

    "End-to-End Multi-Task Learning with Attention", CVPR 2019, https://arxiv.org/abs/1803.10704. Of
    stage j the masks of task t look at u_j, from before its last block, and mask p_j, its output:

        a_tj = σ(BN(conv(ReLU(BN(conv([u_j; e_t,j−1]))))),    â_tj = a_tj ⊙ p_j,
        e_tj = f_j(â_tj), brought to the size of u_j+1,       y_t = h_t(â_t,L−1),

    with 1×1 convolutions conv, `;` along the channels, and no e at the first stage. f_j is one
    block for all tasks. Where the next stage is smaller, e is max-pooled, where it is larger, as in
    a decoder, interpolated; sizes that are no multiples come out exactly. The backbone and f_j are
    shared, masks and heads the task's own. (Convolutions before BatchNorm have no bias here.)

    Shapes: images ``[N, C, H, W]``; the heads get ``[N, c, h, w]``, as the last stage gives them.

    Args:
        tasks: names, in the order of the outputs.
        encoder: function that returns the backbone; called once. Either its stages, an
            `nn.ModuleList` or `nn.Sequential` of `nn.Sequential`s of at least two blocks each, or a
            module with a method `taps(x)` that gives u and p of each stage, as
            `gradbal.nn.backbones.SegNet`, which has attention on both sides.
        heads: task → module h_t.
        channels: of each stage's p, or (of u, of p) where they differ; None if the encoder has them
            as its `channels`, as those of `gradbal.nn.backbones`.
        stem: how many stages at the front get no masks; None for the encoder's `stem`, or 0.
        reduction: channels of p over those between the two convolutions of a mask: 1 in the
            paper, 4 in its ports to ResNets.
        transfer: makes f_j from its numbers of channels, in and out; None for the paper's 3×3
            convolution with BatchNorm and ReLU. ResNet ports have a residual block here.
        example: a batch; if given, the model is tried with it (in eval mode, without gradients),
            so that parts that do not fit are found at once.

    Raises:
        TypeError: `encoder` is a module and no function, or something is not of its type.
        ValueError: tasks and heads differ, a stage has no last block to split off, numbers of
            channels are missing or too many, no stage is left behind the stem, or parts do not fit.

    Note:
        In the decoder the authors' code interpolates before f_j and not after it, and has one f_j
        more between encoder and decoder; this is the order of the paper's text.

        In training f_j sees each task's tensors in turn, and its BatchNorm follows all of them.

    Example:
        >>> from gradbal.nn.backbones import SegNet
        >>> model = MTAN(
        ...     tasks=["segmentation", "depth"],
        ...     encoder=lambda: SegNet(widths=(4, 8)),
        ...     heads={"segmentation": nn.Conv2d(4, 7, 1), "depth": nn.Conv2d(4, 1, 1)},
        ... )
        >>> {task: list(y.shape) for task, y in model(torch.zeros(2, 3, 12, 9)).items()}
        {'segmentation': [2, 7, 12, 9], 'depth': [2, 1, 12, 9]}
    """

    def __init__(
        self,
        tasks: Sequence[str],
        encoder: Factory,
        heads: Mapping[str, nn.Module],
        *,
        channels: Sequence[int | tuple[int, int]] | None = None,
        stem: int | None = None,
        reduction: int = 1,
        transfer: Callable[[int, int], nn.Module] | None = None,
        example: Any = None,
    ) -> None:
        super().__init__(tasks, heads)
        integer("reduction", reduction, 1)
        (self.encoder,) = copies(encoder, 1)
        pairs = _pairs(getattr(self.encoder, "channels", None) if channels is None else channels)
        self.stem = getattr(self.encoder, "stem", 0) if stem is None else stem
        integer("stem", self.stem)
        if getattr(self.encoder, "taps", None) is None:
            _check_stages(stages_of(self.encoder), len(pairs), self.stem)
        elif self.stem or not pairs:
            raise ValueError(
                "`stem` must be 0, and `channels` not empty, for an encoder with a method `taps`, "
                f"found {self.stem} and {len(pairs)} entries"
            )
        self.channels = pairs[self.stem :]
        make = _convolution if transfer is None else transfer
        self.transfers = nn.ModuleList(
            make(p, after) for (_, p), (_, after) in pairwise(self.channels)
        )
        self.masks = nn.ModuleDict(
            {
                module_key(task): nn.ModuleList(
                    _mask(u + (p if i else 0), max(1, p // reduction), p)
                    for i, (u, p) in enumerate(self.channels)
                )
                for task in self.tasks
            }
        )
        self._complete(example)

    def _own(self, task: str) -> list[str]:
        return [*super()._own(task), f"masks.{module_key(task)}"]

    def _features(self, x: Any, tasks: Sequence[str]) -> dict[str, Tensor]:
        found = self._backbone(x)
        return {task: self._attended(task, found) for task in tasks}

    def _backbone(self, x: Any) -> Sequence[tuple[Tensor, Tensor]]:
        """u and p of the stages behind the stem."""
        taps = getattr(self.encoder, "taps", None)
        found = self._taps(x) if taps is None else run(taps, x, "the encoder")
        for i, (pair, channels) in enumerate(zip(found, self.channels, strict=True), self.stem):
            for name, z, c in zip("up", pair, channels, strict=True):
                if z.ndim != 4 or z.shape[1] != c:
                    raise ValueError(
                        f"stage {i} of the encoder must have {c} channels, as `channels` says, "
                        f"found {name} of shape {list(z.shape)}"
                    )
            u, p = pair
            if u.shape[2:] != p.shape[2:]:
                raise ValueError(
                    f"the last block of stage {i} of the encoder must keep height and width, so "
                    f"that masks fit, found {list(u.shape[2:])} before, {list(p.shape[2:])} after"
                )
        return found

    def _taps(self, x: Any) -> list[tuple[Tensor, Tensor]]:
        found = []
        for i, stage in enumerate(cast("nn.Sequential", self.encoder)):
            if i < self.stem:
                x = run(stage, x, f"stage {i} of the encoder")
                continue
            *blocks, last = cast("nn.Sequential", stage)
            for k, block in enumerate(blocks):
                x = run(block, x, f"block {k} of stage {i} of the encoder")
            p = run(last, x, f"the last block of stage {i} of the encoder")
            found.append((x, p))
            x = p
        return found

    def _attended(self, task: str, found: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """â of the last stage."""
        masks = self.masks[module_key(task)]
        assert isinstance(masks, nn.ModuleList)
        attended: Tensor | None = None
        for j, (mask, (u, p)) in enumerate(zip(masks, found, strict=True)):
            if attended is not None:
                f = f"the block after the attention of stage {j - 1 + self.stem}"
                e = _resized(run(self.transfers[j - 1], attended, f), u.shape[-2:])
                u = torch.cat([u, e], 1)
            attended = run(mask, u, f"mask {j} of task {task!r}") * p
        assert attended is not None
        return attended


def _check_stages(stages: Sequence[nn.Module], n: int, stem: int) -> None:
    if len(stages) != n:
        raise ValueError(
            f"`channels` must have one entry for each of the encoder's {len(stages)} stages, "
            f"found {n}"
        )
    if stem >= n:
        raise ValueError(
            f"`stem` must leave at least one of the encoder's {n} stages, found {stem}"
        )
    for i, stage in enumerate(stages[stem:], stem):
        if isinstance(stage, nn.Sequential) and len(stage) > 1:
            continue
        found = f"one of {len(stage)}" if isinstance(stage, nn.Sequential) else type(stage).__name__
        raise ValueError(
            f"stage {i} of the encoder must be an nn.Sequential of at least two blocks, as "
            f"attention looks at what comes before the last one, found {found}"
        )


def _pairs(channels: Any) -> list[tuple[int, int]]:
    """The channels of u and p at each stage."""
    if channels is None:
        raise ValueError(
            "`channels` must be given, the number of channels of each stage: the encoder has no "
            "attribute of that name"
        )
    pairs = [c if isinstance(c, tuple) else (c, c) for c in channels]
    for pair in pairs:
        if len(pair) != 2:
            raise ValueError(f"`channels` must be numbers or pairs of them, found {pair}")
        for c in pair:
            integer("channels", c, 1)
    return pairs


def _mask(in_channels: int, middle: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, middle, 1, bias=False),
        nn.BatchNorm2d(middle),
        nn.ReLU(),
        nn.Conv2d(middle, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.Sigmoid(),
    )


def _convolution(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


def _resized(e: Tensor, size: Sequence[int]) -> Tensor:
    """e at this height and width: max-pooled where that is smaller, otherwise interpolated."""
    (h, w), (height, width) = e.shape[-2:], size
    if (h, w) == (height, width):
        return e
    # Pooling by two has a deterministic backward pass on accelerators, other poolings have none.
    if (h // 2, w // 2) == (height, width):
        return F.max_pool2d(e, 2)
    if (-(-h // 2), -(-w // 2)) == (height, width):
        return F.max_pool2d(e, 2, ceil_mode=True)
    if height <= h and width <= w:
        return F.adaptive_max_pool2d(e, (height, width))
    return F.interpolate(e, size=(height, width), mode="bilinear", align_corners=False)
