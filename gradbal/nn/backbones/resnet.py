"""torchvision's ResNets, cut into stem and four stages."""

from collections.abc import Callable
from typing import Any

from torch import nn

from gradbal.nn.backbones._extras import needed
from gradbal.nn.backbones._staged import Staged

__all__ = ["resnet"]


def resnet(
    model: str | Callable[..., nn.Module] = "resnet50", *, dilated: bool = False, **options: Any
) -> Callable[[], Staged]:
    """A factory of torchvision's ResNets without their classifier, in five stages.

    "Deep Residual Learning for Image Recognition", CVPR 2016, https://arxiv.org/abs/1512.03385.
    The stages are the stem (convolution, BatchNorm, ReLU, pooling) and `layer1` to `layer4`, each
    an `nn.Sequential` of its blocks. `dilated` keeps an eighth of the resolution, with dilation 2
    and 4 in place of the strides of the last two stages, as in "Rethinking Atrous Convolution for
    Semantic Image Segmentation", 2017, https://arxiv.org/abs/1706.05587 (DeepLab v3).

    Shapes: images ``[N, 3, H, W]`` to ``[N, C, H/32, W/32]``, or ``[N, C, H/8, W/8]`` if dilated,
    rounded up; C is 512 for ResNet-18 and -34 and 2048 for the larger ones.

    Args:
        model: name of a ResNet in `torchvision.models`, or a function that makes one.
        dilated: no strides in the last two stages; torchvision has this for bottleneck blocks only.
        options: keywords of torchvision's function, e.g. ``weights="DEFAULT"``, ``norm_layer=...``.

    Raises:
        ModuleNotFoundError: torchvision is not installed.
        ValueError: no such model, it is no ResNet, or a dilated ResNet-18 or -34.

    Example:
        >>> import torch
        >>> make = resnet("resnet18")
        >>> encoder = make()
        >>> len(encoder), encoder.channels
        (5, (64, 64, 128, 256, 512))
        >>> encoder(torch.zeros(2, 3, 33, 64)).shape
        torch.Size([2, 512, 2, 2])
    """
    models = needed("torchvision.models", "vision", "resnet")
    if isinstance(model, str):
        known = [name for name in models.list_models(module=models) if "resne" in name]
        if model not in known:
            raise ValueError(f"`model` must be one of {', '.join(known)}, found {model!r}")
        build = models.get_model_builder(model)
    else:
        build = model
    if dilated:
        options["replace_stride_with_dilation"] = [False, True, True]

    def make() -> Staged:
        try:
            made = build(**options)
        except NotImplementedError as error:
            raise ValueError(
                "`dilated` must be False for a ResNet of basic blocks, such as ResNet-18 and -34: "
                f"torchvision has no dilation there, found {model!r}; take resnet50 or larger"
            ) from error
        if not isinstance(made, models.ResNet):
            raise ValueError(f"`model` must make a torchvision ResNet, found {type(made).__name__}")
        stem = nn.Sequential(made.conv1, made.bn1, made.relu, made.maxpool)
        layers = [made.layer1, made.layer2, made.layer3, made.layer4]
        return Staged([stem, *layers], [made.conv1.out_channels, *map(_channels, layers)], stem=1)

    return make


def _channels(layer: nn.Sequential) -> int:
    # The last convolution of the last block; a projection of the shortcut comes after it in
    # modules() but not in blocks that keep their shape, and gives as many channels where it does.
    return [m for m in layer[-1].modules() if isinstance(m, nn.Conv2d)][-1].out_channels
