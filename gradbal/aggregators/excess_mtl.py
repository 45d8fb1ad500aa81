"""Weights that grow with the tasks' excess risks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradbal.aggregators._arguments import in_range, integer, one_of
from gradbal.aggregators._row_state import RowStateMixin
from gradbal.aggregators.base import JacobianAggregator
from gradbal.jacobian import combine
from gradbal.registry import Promises, register

__all__ = ["ExcessMTL", "excess_mtl"]

_LARGEST_STEP = 20.0


def _gain(aggregator: ExcessMTL, n_tasks: int, norm: float) -> float:
    return 1.0 if aggregator.normalize == "sum_to_one" else float(n_tasks)


@register(
    "excess_mtl",
    title="Robust Multi-Task Learning with Excess Risks",
    venue="ICML",
    year=2024,
    url="https://arxiv.org/abs/2402.02009",
    promises=Promises(
        heads="weighted", degree=1, gain=_gain, simplex=True, zero_rows_inactive=False
    ),
)
class ExcessMTL(RowStateMixin, JacobianAggregator):
    """Weights that grow with each task's excess risk, its distance from its own optimum.

    He, Zhou, Zhang, Yun, Xu, Zeng, Chilimbi and Zhao, "Robust Multi-Task Learning with Excess
    Risks", ICML 2024, https://arxiv.org/abs/2402.02009. A task whose labels are noisy has a large
    loss for ever, but its excess risk goes to zero as for any other. It is estimated with a
    diagonal Hessian from the squares of the gradients so far, coordinate by coordinate:

        S_i ← S_i + g_i²,   E_i = Σ g_i²/√S_i
        w_i ← w_i exp(η E_i/E⁰_i),   w ← w/Σw,   d = Jᵀw

    with w = 1/T at first, and the baseline E⁰_i the first E_i. At the steps that the baseline comes
    from, w stays as it is.

    Args:
        step_size: η, 0 or more. LibMTL's and the official 1e-2.
        warmup: the baseline is the mean of E_i over this many steps; 0 and 1 are the first alone.
            The paper takes those of three epochs.
        normalize: the weights "sum_to_one" (the paper) or "sum_to_T" (LibMTL).

    Raises:
        TypeError, ValueError: an argument out of range; other numbers of tasks or of shared
            scalars than at the first step.

    Note:
        The official code and LibMTL have `√(S + 1e-7)`, which makes small gradients smaller still.
        Here 0/0 is 0 and nothing is added: E_i is `‖g_i‖₁` at the first step, and scaling a loss
        scales E_i and E⁰_i alike. √S is what is kept, so that squares neither overflow nor vanish
        in float32. The official code updates w at the first step too, with an E_i that no baseline
        divides; TorchJD does the same without warm-up. A step at which `E_i = 0` says nothing of
        the baseline: until a task has one, its weight stays. w is updated by its logarithm and
        `η E_i/E⁰_i` is at most 20. Weights multiply from step to step: with a large η one task soon
        has all. When tasks sit a step out, the others share what weight they had together.

    Example:
        >>> import torch
        >>> method = ExcessMTL(step_size=1.0)
        >>> jacobian = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> method.direction(jacobian)
        tensor([1.0000, 0.5000])
        >>> method.direction(torch.tensor([[2.0, 0.0], [0.0, 0.1]])), method.last_weights
        (tensor([1.3351, 0.0332]), tensor([0.6676, 0.3324], dtype=torch.float64))
    """

    weighted = True
    combines = True
    per_parameter_state = True
    state_names = ("rows", "log_weights", "baseline", "baseline_steps")

    def __init__(
        self, step_size: float = 1e-2, warmup: int = 0, normalize: str = "sum_to_one"
    ) -> None:
        in_range("step_size", step_size, 0)
        integer("warmup", warmup)
        one_of("normalize", normalize, ("sum_to_one", "sum_to_T"))
        self.step_size = step_size
        self.warmup = warmup
        self.normalize = normalize
        self.log_weights: list[float] | None = None
        # For each task the sum of the E_i that its baseline is the mean of, and how many they are.
        self.baseline: list[float] | None = None
        self.baseline_steps: list[int] | None = None

    def reset(self) -> None:
        """Squares, weights and baselines go back to where they began."""
        super().reset()
        self.log_weights = self.baseline = self.baseline_steps = None

    def direction(
        self,
        jacobian: Tensor,
        losses: Tensor | None = None,
        tasks: Sequence[int] | None = None,
    ) -> Tensor:
        """`d = Jᵀw [P]` with w after its update.

        Args:
            jacobian: `[T, P]`, or `[k, P]` when `tasks` names the k tasks that take part.
            losses: not used.
            tasks: indices of the tasks that take part; None for all.

        Raises:
            ValueError: another T or P than before.
        """
        indices = self._indices(jacobian, tasks)
        before, rows = self._next_rows(jacobian, indices)
        n_tasks = len(rows)
        if self.log_weights is None:
            self.log_weights = torch.zeros(n_tasks, dtype=torch.float64).log_softmax(0).tolist()
        sums, counts = self.baseline or [0.0] * n_tasks, self.baseline_steps or [0] * n_tasks
        sums, counts = [*sums], [*counts]
        given = zip(indices, jacobian.detach(), strict=True)
        found = [_excess(before[i], g, rows[i]) for i, g in given]
        moving, ratios = [], []
        for i, excess in zip(indices, self.summed(torch.stack(found)).tolist(), strict=True):
            if counts[i] >= max(self.warmup, 1):
                moving.append(i)
                ratios.append(excess * counts[i] / sums[i])
            elif excess > 0.0:
                sums[i] += excess
                counts[i] += 1
        self.baseline, self.baseline_steps = sums, counts
        log_w = torch.tensor(self.log_weights, dtype=torch.float64)
        if moving:
            log_w[moving] = excess_mtl(
                log_w[moving], torch.tensor(ratios, dtype=torch.float64), self.step_size
            )
            self.log_weights = log_w.tolist()
        w = log_w[indices].softmax(0)
        if self.normalize == "sum_to_T":
            w = w * len(w)
        self.last_weights = self.last_head_weights = w
        return combine(w, jacobian)


def _excess(before: Tensor, row: Tensor, root: Tensor) -> Tensor:
    """`E = Σ g²/√S`, 0-dim in float64, after `S ← S + g²`; √S goes from `before` into `root`."""
    g = row.to(root.dtype).abs()
    torch.hypot(before, g, out=root)
    return torch.where(root > 0, g * (g / root), 0.0).sum(dtype=torch.float64)


def excess_mtl(log_weights: Tensor, ratios: Tensor, step_size: float) -> Tensor:
    """`log w_i ← log w_i + η E_i/E⁰_i`, normalised to the sum that the weights had.

    Args:
        log_weights: `log w [T]`.
        ratios: `E_i/E⁰_i [T]`, 0 or more.
        step_size: η, 0 or more.

    Returns:
        `log w [T]` after the step.
    """
    moved = log_weights + (step_size * ratios).clamp(max=_LARGEST_STEP)
    return moved + (log_weights.logsumexp(0) - moved.logsumexp(0))
