"""Losses that count each class by its effective number of samples."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "ClassBalancedLoss",
    "class_balanced_focal",
    "class_balanced_sigmoid",
    "class_balanced_softmax",
    "class_balanced_weights",
]

Form = Literal["softmax", "sigmoid", "focal"]
Reduction = Literal["mean", "sum", "none"]


def class_balanced_weights(counts: Sequence[float] | Tensor, beta: float = 0.9999) -> Tensor:
    """Weights of classes by the effective number of samples.

    "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019,
    https://arxiv.org/abs/1901.05555. With n_y samples of class y, each of which covers others with
    probability β, the effective number is E_y = (1 − β^{n_y}) / (1 − β), and

        w_y = C · (1 / E_y) / Σ_c (1 / E_c),        Σ_y w_y = C.

    β = 0 gives weights of one, β → 1 inverse frequencies.

    Args:
        counts: the number of training samples of each of the C classes, at least 1 each.
        beta: β in [0, 1); the paper tries 0.9, 0.99, 0.999 and 0.9999.

    Returns:
        The weights ``[C]``, of the default dtype, computed in float64.

    Raises:
        ValueError: for β outside [0, 1), or counts that are empty, below 1 or not finite.

    >>> class_balanced_weights([1, 9], beta=0.0)
    tensor([1., 1.])
    >>> class_balanced_weights([1, 9], beta=0.999999)
    tensor([1.8000, 0.2000])
    """
    if not 0 <= beta < 1:
        raise ValueError(f"`beta` must be in [0, 1), found {beta}")
    n = torch.as_tensor(counts, dtype=torch.float64, device="cpu")
    if n.ndim != 1 or n.numel() == 0:
        raise ValueError(
            f"`counts` must have one number for each class, found shape {tuple(n.shape)}"
        )
    if not bool(((n >= 1) & n.isfinite()).all()):
        raise ValueError(
            "`counts` must be finite and at least 1, a class without samples has no weight, "
            f"found {n.tolist()}"
        )
    # 1 − β^n by expm1, as the difference cancels for β near one; the factor 1 − β cancels out.
    inverse = 1 / -torch.expm1(n * torch.log(torch.tensor(beta, dtype=torch.float64)))
    return (inverse * (len(n) / inverse.sum())).to(torch.get_default_dtype())


def class_balanced_softmax(
    logits: Tensor,
    target: Tensor,
    weights: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    """Class-balanced softmax cross-entropy: −w_y log softmax(z)_y.

    "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019,
    https://arxiv.org/abs/1901.05555, section 4.1. The mean is over the samples;
    ``F.cross_entropy(weight=...)`` divides by the sum of their weights instead. (The authors' code
    has a binary cross-entropy of each softmax probability here; this is the paper's formula.)

    Args:
        logits: ``[N, C]``, or ``[N, C, *rest]`` for dense prediction.
        target: classes ``[N]`` or ``[N, *rest]``, integers.
        weights: w ``[C]``, from :func:`class_balanced_weights`.
        ignore_index: targets of this value count for nothing.
        reduction: "mean" over the targets that count, "sum" or "none".

    Returns:
        A scalar, or with "none" one loss a target.

    Raises:
        ValueError: for shapes that do not fit, targets that are no integers, another reduction.

    >>> w = class_balanced_weights([90, 10], beta=0.99)
    >>> float(class_balanced_softmax(torch.zeros(1, 2), torch.tensor([1]), w) / w[1])
    0.693147...
    """
    logits, _, weights = _check(logits, target, weights, reduction)
    loss = F.cross_entropy(logits, target, weights, ignore_index=ignore_index, reduction="none")
    return _reduce(loss, target != ignore_index, reduction)


def class_balanced_sigmoid(
    logits: Tensor,
    target: Tensor,
    weights: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    """Class-balanced sigmoid cross-entropy: −w_y Σ_c log σ(±z_c), with + for c = y.

    "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019,
    https://arxiv.org/abs/1901.05555, section 4.2: C one-against-all problems, summed. Arguments,
    shapes and errors are those of :func:`class_balanced_softmax`.

    >>> w = class_balanced_weights([90, 10], beta=0.99)
    >>> float(class_balanced_sigmoid(torch.zeros(1, 2), torch.tensor([1]), w) / w[1])
    1.38629...
    """
    return class_balanced_focal(
        logits, target, weights, gamma=0.0, ignore_index=ignore_index, reduction=reduction
    )


def class_balanced_focal(
    logits: Tensor,
    target: Tensor,
    weights: Tensor,
    *,
    gamma: float = 2.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    """Class-balanced focal loss: −w_y Σ_c (1 − p_c)^γ log p_c, p_c = σ(±z_c) with + for c = y.

    "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019,
    https://arxiv.org/abs/1901.05555, section 4.3, on "Focal Loss for Dense Object Detection", ICCV
    2017, https://arxiv.org/abs/1708.02002. Arguments, shapes and errors are those of
    :func:`class_balanced_softmax`, and

    Args:
        gamma: γ ≥ 0; the paper tries 0.5, 1 and 2.

    Raises:
        ValueError: for a γ that is negative or not finite.

    >>> w = class_balanced_weights([90, 10], beta=0.99)
    >>> float(class_balanced_focal(torch.zeros(1, 2), torch.tensor([1]), w, gamma=1.0) / w[1])
    0.693147...
    """
    _check_gamma(gamma)
    logits, channels, weights = _check(logits, target, weights, reduction)
    counted = target != ignore_index
    target = torch.where(counted, target, 0)
    positive = target.unsqueeze(1) == channels
    signed = torch.where(positive, logits, -logits)
    loss = F.softplus(-signed)
    if gamma:
        loss = loss * torch.exp(gamma * F.logsigmoid(-signed))
    # index_select refuses what is no class; weights[target] would take −1 for the last one.
    weight = weights.index_select(0, target.flatten()).view_as(target)
    return _reduce(loss.sum(1) * weight * counted, counted, reduction)


class ClassBalancedLoss(nn.Module):
    """One of the class-balanced losses with its weights.

    "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019,
    https://arxiv.org/abs/1901.05555: :func:`class_balanced_softmax`, :func:`class_balanced_sigmoid`
    or :func:`class_balanced_focal` with :func:`class_balanced_weights`, which are a buffer.

    Args:
        counts: the number of training samples of each class, at least 1 each.
        beta: β in [0, 1).
        form: "softmax", "sigmoid" or "focal".
        gamma: γ ≥ 0 of the focal form, 2 if not given.
        ignore_index: targets of this value count for nothing.
        reduction: "mean" over the targets that count, "sum" or "none".

    Raises:
        ValueError: for an argument out of its range, or a γ for a form that has none.

    >>> loss = ClassBalancedLoss([90, 10], beta=0.99, form="focal", gamma=1.0)
    >>> loss(torch.zeros(4, 2), torch.tensor([0, 0, 0, 1])).shape
    torch.Size([])
    """

    weights: Tensor

    def __init__(
        self,
        counts: Sequence[float] | Tensor,
        beta: float = 0.9999,
        *,
        form: Form = "softmax",
        gamma: float | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        if form not in get_args(Form):
            raise ValueError(f"`form` must be one of {list(get_args(Form))}, found {form!r}")
        if gamma is not None and form != "focal":
            raise ValueError(f'`gamma` is for form="focal", found {gamma} with form={form!r}')
        self.gamma = 2.0 if gamma is None else gamma
        _check_gamma(self.gamma)
        _check_reduction(reduction)
        self.register_buffer("weights", class_balanced_weights(counts, beta))
        self.beta = beta
        self.form = form
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of logits ``[N, C, *rest]`` and classes ``[N, *rest]``."""
        if self.form == "focal":
            return class_balanced_focal(
                logits,
                target,
                self.weights,
                gamma=self.gamma,
                ignore_index=self.ignore_index,
                reduction=self.reduction,
            )
        loss = class_balanced_softmax if self.form == "softmax" else class_balanced_sigmoid
        return loss(
            logits,
            target,
            self.weights,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        focal = f", gamma={self.gamma}" if self.form == "focal" else ""
        return f"classes={len(self.weights)}, beta={self.beta}, form={self.form!r}{focal}"


def _check_gamma(gamma: float) -> None:
    if not 0 <= gamma < float("inf"):
        raise ValueError(f"`gamma` must be finite and at least 0, found {gamma}")


def _check_reduction(reduction: str) -> None:
    if reduction not in get_args(Reduction):
        raise ValueError(
            f"`reduction` must be one of {list(get_args(Reduction))}, found {reduction!r}"
        )


def _check(
    logits: Tensor, target: Tensor, weights: Tensor, reduction: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits in float32 at least, the classes shaped to compare with targets, weights like logits.

    Shapes are looked at, values are not: on an accelerator this waits for nothing.
    """
    _check_reduction(reduction)
    if weights.ndim != 1:
        raise ValueError(f"`weights` must be [C], found shape {tuple(weights.shape)}")
    classes = len(weights)
    if logits.ndim < 2 or logits.shape[1] != classes:
        raise ValueError(
            f"`logits` must be [N, {classes}, ...] for the {classes} classes of `weights`, "
            f"found shape {tuple(logits.shape)}"
        )
    wanted = (logits.shape[0], *logits.shape[2:])
    if target.shape != wanted:
        raise ValueError(
            f"`target` must be {list(wanted)} for logits of shape {tuple(logits.shape)}, "
            f"found shape {tuple(target.shape)}"
        )
    if target.dtype.is_floating_point or target.dtype.is_complex or target.dtype == torch.bool:
        raise ValueError(f"`target` must be integers, the classes, found {target.dtype}")
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    channels = torch.arange(classes, device=logits.device).view(-1, *[1] * (logits.ndim - 2))
    return logits, channels, weights.to(logits.dtype)


def _reduce(loss: Tensor, counted: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / counted.sum()
