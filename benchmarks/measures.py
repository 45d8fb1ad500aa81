"""Measures that torchmetrics has in another form than the benchmarks need."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torchmetrics import MeanAbsoluteError, PearsonCorrCoef
from torchmetrics.classification import BinaryAUROC

__all__ = ["Auroc", "Correlation", "UnitError"]


class Auroc(BinaryAUROC):
    """The area under the ROC curve, of logits."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """See the base class."""
        # The base class takes what lies in [0, 1], and decides batch by batch whether it does. The
        # area depends on the order alone, which this keeps where a sigmoid would make logits equal.
        logits = preds.double()
        super().update((1 + logits / (1 + logits.abs())) / 2, target.long())


class UnitError(MeanAbsoluteError):
    """The mean absolute error in the unit of the target before it was standardised.

    Args:
        center, spread: a standardised target times `spread`, plus `center`, is the target,
        logarithm: or its natural logarithm.
    """

    def __init__(self, center: float, spread: float, logarithm: bool = False) -> None:
        super().__init__()
        self.center, self.spread, self.logarithm = center, spread, logarithm

    def update(self, preds: Tensor, target: Tensor) -> None:
        """See the base class."""
        super().update(self._in_unit(preds), self._in_unit(target))

    def _in_unit(self, standardised: Tensor) -> Tensor:
        value = standardised.double() * self.spread + self.center
        # A network that diverges may give any logarithm; its error stays a float32.
        return value.clamp(max=80).exp() if self.logarithm else value


class Correlation(PearsonCorrCoef):
    """Pearson's correlation; that with a constant is 0."""

    def compute(self) -> Tensor:
        """See the base class."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The variance of predictions or target")
            return torch.nan_to_num(super().compute())
