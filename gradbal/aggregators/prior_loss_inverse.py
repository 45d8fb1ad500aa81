"""Weights inverse to the losses of constant predictions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradbal.aggregators._arguments import one_of
from gradbal.aggregators._scalar import check_length, of_tasks, positive_numbers, precise
from gradbal.aggregators.base import Scalarizer
from gradbal.registry import Promises, register

__all__ = ["PriorLossInverse", "prior_loss", "prior_loss_inverse"]


@register(
    "prior_loss_inverse",
    title="多任务学习漫谈（一）：以损失之名",
    venue="kexue.fm",
    year=2022,
    url="https://kexue.fm/archives/8870",
    promises=Promises(
        heads="weighted",
        degree=1,
        gain=lambda a, t, n: float(t) if a.prior is None else sum(1.0 / x for x in a.prior),
        linear_row_scaling=True,
    ),
)
class PriorLossInverse(Scalarizer):
    """Every task is weighted by the inverse of the loss that the best constant prediction has.

    Su, "多任务学习漫谈（一）：以损失之名" (Notes on multi-task learning, 1: losses), 2022,
    https://kexue.fm/archives/8870. `w_i = 1/L_i`, with L_i the entropy `−Σ_k p_k log p_k` of the
    class frequencies for a cross-entropy, the variance of the labels for a squared error:
    `prior_loss` computes both. A weighted loss of 1 is then one that has learned nothing.

    Args:
        prior: L, one positive number for each task; None is ones, which is `sum`.

    Raises:
        ValueError: a number is not positive, or there is not one for each task.

    Example:
        >>> import torch
        >>> colours, heights = torch.tensor([0, 1, 2, 3]), torch.tensor([1.0, 1.5, 2.0])
        >>> prior = [prior_loss(colours, "classification"), prior_loss(heights, "regression")]
        >>> PriorLossInverse(prior).loss_weights(torch.tensor([1.0, 1.0]))
        tensor([0.7213, 6.0000])
    """

    linear = True
    per_task_state = True

    def __init__(self, prior: Sequence[float] | None = None) -> None:
        self.prior = None if prior is None else positive_numbers("prior", prior)

    def prepare(self, n_tasks: int, like: Tensor) -> None:
        """Checks that there are T numbers.

        Raises:
            ValueError: there are not.
        """
        check_length("prior", self.prior, n_tasks)

    def scalarize(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """`Σ ℓ_i/L_i` from losses `[T]`.

        Args:
            losses: `[T]`, or `[k]` when `tasks` names the k tasks that take part.
            tasks: indices of the tasks that take part; None for all.

        Raises:
            ValueError: there is not one number for each task.
        """
        if self.prior is None:
            return losses.sum()
        return prior_loss_inverse(
            losses, of_tasks("prior", self.prior, precise(losses.detach()), tasks)
        )


def prior_loss_inverse(losses: Tensor, prior: Tensor) -> Tensor:
    """`Σ ℓ_i/L_i`.

    Args:
        losses: `ℓ [T]`.
        prior: `L [T]`, positive.

    Returns:
        0-dim.
    """
    return (precise(losses) / prior).sum().to(losses.dtype)


def prior_loss(labels: Tensor, kind: str) -> float:
    """The least mean loss of a prediction that does not look at the input.

    Args:
        labels: for "classification" class indices of any shape; for "regression" numbers
            `[N, ...]`, N examples.
        kind: "classification", the mean cross-entropy (in nats) of predicting the frequencies of
            the classes, or "regression", the mean squared error of predicting the mean.

    Raises:
        ValueError: no labels, labels that are not finite, or a class below zero, such as what a
            loss ignores; leave those out.

    Example:
        >>> import torch
        >>> prior_loss(torch.tensor([[0, 1], [1, 0]]), "classification")
        0.6931471805599453
    """
    one_of("kind", kind, ("classification", "regression"))
    if labels.numel() == 0:
        raise ValueError("`labels` must have at least one entry, found none")
    if kind == "regression":
        y = labels.detach().cpu().double()
        if not bool(y.isfinite().all()):
            raise ValueError("`labels` must be finite, found NaN or inf")
        return float((y - y.mean(0)).square().mean())
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"`labels` must be class indices, found {labels.dtype}")
    classes = labels.detach().cpu().flatten().long()
    if int(classes.min()) < 0:
        raise ValueError(
            f"`labels` must be class indices from 0 on, found {int(classes.min())}; leave out what "
            "the loss ignores"
        )
    p = torch.bincount(classes).double() / len(classes)
    return float(-torch.xlogy(p, p).sum())
