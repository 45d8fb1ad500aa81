"""A layer of units behind a bag of hashed words."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Bag"]


class Bag(nn.Module):
    """ReLU units of the counts of a text's terms, divided by the root of their number.

    What a linear layer makes of the counts `[B, bins]`, without these ever being written out: the
    sum of the weights of the terms that are there.

    Args:
        bins: how many terms are told apart.
        width: number of units.
    """

    def __init__(self, bins: int, width: int) -> None:
        super().__init__()
        self.bins = bins
        self.weight = nn.EmbeddingBag(bins + 1, width, mode="sum", padding_idx=bins)
        self.bias = nn.Parameter(torch.zeros(width))
        # As in a linear layer of that many inputs.
        nn.init.uniform_(self.weight.weight, -(bins**-0.5), bins**-0.5)

    def forward(self, terms: Tensor) -> Tensor:
        """Map terms `[B, L]`, integers below `bins`, or `bins` for none, to `[B, width]`."""
        count = (terms < self.bins).sum(1, keepdim=True).clamp(min=1)
        total = cast(Tensor, self.weight(terms.int()))
        return F.relu(total / count.sqrt() + self.bias)
