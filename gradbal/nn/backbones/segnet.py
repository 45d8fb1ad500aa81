"""The SegNet of the MTAN papers."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from gradbal.aggregators._arguments import integer
from gradbal.nn.backbones._staged import Staged

__all__ = ["SegNet"]


class SegNet(Staged):
    """SegNet: encoder and decoder of 3×3 convolutions, unpooled at the maxima's own places.

    "SegNet: A Deep Convolutional Encoder-Decoder Architecture for Image Segmentation", TPAMI 2017,
    https://arxiv.org/abs/1511.00561, as in "End-to-End Multi-Task Learning with Attention", CVPR
    2019, https://arxiv.org/abs/1803.10704, and the papers that compare on it: 2, 2, 3, 3, 3
    convolutions in the stages down, as many in those up, each with BatchNorm (and so no bias) and
    ReLU; Xavier initialisation. The stages are those down, then those up in reverse.

    Shapes: ``[N, in_channels, H, W]`` to ``[N, widths[0], H, W]``, for H, W ≥ ``2 ** len(widths)``;
    odd sizes come back exactly.

    Args:
        widths: channels of the stages down, at least one.
        in_channels: of the images.

    Raises:
        TypeError: widths or channels that are no integers.
        ValueError: no width, or one below 1.

    Note:
        Called one by one, a stage down remembers where its maxima were, for the stage up of the
        same network: call the stages of one network in order, and not from several threads.
        Called whole, the network remembers nothing.

    Example:
        >>> import torch
        >>> net = SegNet(widths=(4, 8))
        >>> net(torch.zeros(1, 3, 9, 6)).shape
        torch.Size([1, 4, 9, 6])
        >>> [type(stage).__name__ for stage in net]
        ['Down', 'Down', 'Up', 'Up']
    """

    def __init__(
        self, widths: Sequence[int] = (64, 128, 256, 512, 512), in_channels: int = 3
    ) -> None:
        if not widths:
            raise ValueError("`widths` must have at least one stage, found none")
        for width in widths:
            integer("widths", width, 1)
        integer("in_channels", in_channels, 1)
        depths = [2 if i < 2 else 3 for i in range(len(widths))]
        downs = [
            Down(c, width, depth)
            for c, width, depth in zip([in_channels, *widths], widths, depths, strict=False)
        ]
        outs = [widths[0], *widths[:-1]]
        ups = [
            Up(width, out, depth, down)
            for width, out, depth, down in zip(widths, outs, depths, downs, strict=True)
        ][::-1]
        super().__init__([*downs, *ups], [*widths, *outs[::-1]])
        self.channels = (*widths, *zip(widths[::-1], outs[::-1], strict=True))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_normal_(module.weight)

    def taps(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For each stage what attention looks at, and what it masks.

        The former are the first convolution's output and the unpooled input, the latter the last
        convolution's outputs.
        """
        places: list[tuple[Tensor, Sequence[int]]] = []
        found: list[tuple[Tensor, Tensor]] = []
        for stage in self:
            if isinstance(stage, Down):
                u, p = stage.convolved(x)
                x, indices = _pooled(p)
                places.append((indices, p.shape[-2:]))
            else:
                assert isinstance(stage, Up)
                u = _unpooled(x, *places.pop())
                x = p = stage.convolutions(u)
            found.append((u, p))
        return found

    def forward(self, x: Tensor) -> Tensor:
        """The last stage's output."""
        return self.taps(x)[-1][1]


class Down(nn.Module):
    """A stage of the encoder: convolutions, then max pooling by two.

    Args:
        in_channels, out_channels: of its input and all its convolutions.
        depth: number of convolutions.
    """

    def __init__(self, in_channels: int, out_channels: int, depth: int) -> None:
        super().__init__()
        self.first = _convolution(in_channels, out_channels)
        self.rest = nn.Sequential(
            *(_convolution(out_channels, out_channels) for _ in range(depth - 1))
        )
        self.places: tuple[Tensor, Sequence[int]] | None = None

    def convolved(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs of the first and of the last convolution."""
        u = self.first(x)
        return u, self.rest(u)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[N, C', H // 2, W // 2]``."""
        _, p = self.convolved(x)
        pooled, indices = _pooled(p)
        self.places = (indices, p.shape[-2:])
        return pooled


class Up(nn.Module):
    """A stage of the decoder: unpooling to where the maxima were, then convolutions.

    Args:
        in_channels, out_channels: of its input and all its convolutions.
        depth: number of convolutions.
        down: the stage whose pooling is undone.
    """

    def __init__(self, in_channels: int, out_channels: int, depth: int, down: Down) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            _convolution(in_channels, out_channels),
            *(_convolution(out_channels, out_channels) for _ in range(depth - 1)),
        )
        # In a tuple it is no submodule: its parameters are not this stage's.
        self.partner = (down,)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H // 2, W // 2]`` to ``[N, C', H, W]``."""
        places = self.partner[0].places
        if places is None:
            raise RuntimeError(
                "a stage up must run after its stage down, which knows where the maxima were"
            )
        p: Tensor = self.convolutions(_unpooled(x, *places))
        return p


def _convolution(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


def _pooled(p: Tensor) -> tuple[Tensor, Tensor]:
    pooled, indices = F.max_pool2d(p, 2, return_indices=True)
    return pooled, indices


def _unpooled(x: Tensor, indices: Tensor, size: Sequence[int]) -> Tensor:
    return F.max_unpool2d(x, indices, (2, 2), output_size=(size[0], size[1]))
