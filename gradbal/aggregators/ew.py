"""Equal weighting, the name of `sum` in most papers."""

from __future__ import annotations

from gradbal.aggregators.sum import Sum
from gradbal.registry import register

__all__ = ["EW"]


@register("ew", title="Equal weighting: `sum` by its other name", venue="folklore")
class EW(Sum):
    """Equal weighting: every weight is 1, as in `sum`.

    Note:
        LibMTL's documentation says that its EW weights by 1/T; its code weights by 1, as gradbal's
        `ew` does. The weights 1/T are `mean`.

    Example:
        >>> import torch
        >>> EW().direction(torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
        tensor([2., 4.])
    """
