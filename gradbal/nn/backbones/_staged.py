"""An encoder that is its stages, one after another, and knows its channels."""

from collections.abc import Sequence
from typing import Any

from torch import nn

__all__ = ["Staged"]


class Staged(nn.Sequential):
    """Stages s_0, …, s_{L−1} as one module: call it whole, or take its stages one by one.

    Args:
        stages: the stages.
        channels: of each stage's output.
        stem: how many stages at the front are no stages of the paper but prepare its input; no
            attention looks at them.
    """

    def __init__(
        self, stages: Sequence[nn.Module], channels: Sequence[int], *, stem: int = 0
    ) -> None:
        super().__init__(*stages)
        self.channels: tuple[int | tuple[int, int], ...] = tuple(channels)
        self.stem = stem

    def __getitem__(self, index: Any) -> Any:
        """A stage, or for a slice some of them as an `nn.Sequential`, which knows no channels."""
        return nn.Sequential(*list(self)[index]) if isinstance(index, slice) else list(self)[index]
