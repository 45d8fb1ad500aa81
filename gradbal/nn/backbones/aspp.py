"""DeepLab's head."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from gradbal.aggregators._arguments import integer
from gradbal.nn.backbones._extras import needed

__all__ = ["ASPPHead"]


class ASPPHead(nn.Module):
    """Atrous spatial pyramid pooling, and one output a pixel.

    "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017,
    https://arxiv.org/abs/1706.05587: torchvision's ASPP, a 3×3 convolution with BatchNorm and ReLU,
    a 1×1 convolution, and bilinear interpolation to `size`.

    Shapes: ``[N, in_channels, h, w]`` to ``[N, out_channels, *size]``.

    Args:
        in_channels: of the features, 2048 for ResNet-50.
        out_channels: of the output: classes, 1 for depth, 3 for normals.
        size: height and width of the output; None leaves that of the features.
        rates: dilations of the pyramid.
        width: channels inside.

    Raises:
        ModuleNotFoundError: torchvision is not installed.
        TypeError, ValueError: channels, a width or rates that are no integers from 1 on.

    Note:
        The pyramid has BatchNorm behind global pooling, so that training takes batches of two or
        more.

    Example:
        >>> import torch
        >>> head = ASPPHead(16, 3, size=(9, 12), rates=(1, 2), width=8)
        >>> head(torch.zeros(2, 16, 3, 4)).shape
        torch.Size([2, 3, 9, 12])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        size: tuple[int, int] | None = None,
        rates: Sequence[int] = (12, 24, 36),
        width: int = 256,
    ) -> None:
        super().__init__()
        for name, value in (
            ("in_channels", in_channels),
            ("out_channels", out_channels),
            ("width", width),
            *(("rates", rate) for rate in rates),
            *(("size", side) for side in size or ()),
        ):
            integer(name, value, 1)
        deeplab = needed("torchvision.models.segmentation.deeplabv3", "vision", "ASPPHead")
        self.size = size
        self.layers = nn.Sequential(
            deeplab.ASPP(in_channels, list(rates), width),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, out_channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The output ``[N, out_channels, *size]``."""
        y: Tensor = self.layers(x)
        if self.size is None:
            return y
        return F.interpolate(y, size=self.size, mode="bilinear", align_corners=False)
