"""ConFIG on momenta, for one backward pass a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradbal.aggregators._arguments import in_range, integer
from gradbal.aggregators._row_state import RowStateMixin
from gradbal.aggregators.base import JacobianAggregator
from gradbal.aggregators.config import ConFIG
from gradbal.jacobian import combine
from gradbal.registry import Promises, register

__all__ = ["MConFIG", "m_config"]


@register(
    "m_config",
    title="ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks",
    venue="ICLR",
    year=2025,
    url="https://arxiv.org/abs/2408.11104",
    cost="1 backward",
    promises=Promises(
        heads="own", continuous=False, permutation_invariant=False, zero_rows_inactive=False
    ),
)
class MConFIG(RowStateMixin, JacobianAggregator):
    """M-ConFIG: one task's gradient a step, and ConFIG on the momenta of all of them.

    Liu, Chu and Thuerey, "ConFIG: Towards Conflict-free Training of Physics Informed Neural
    Networks", ICLR 2025, https://arxiv.org/abs/2408.11104. The tasks take turns. With c_i the
    number of turns of task i so far, those whose turn it is update their momentum,

        m_i ← β₁ m_i + (1 − β₁) g_i,   m̂_i = m_i/(1 − β₁^c_i),   d₀ = ConFIG(m̂)

    and d₀ is scaled as Adam would, by the second moment of a pseudo-gradient h, the gradient whose
    momentum d₀ would be. At step t since every task had its first turn, with f_0 = 0,

        f_t = d₀ (1 − β₁ᵗ),   h = (f_t − β₁ f_{t−1})/(1 − β₁)
        s ← β₂ s + (1 − β₂) h²,   d = d₀/(√(s/(1 − β₂ᵗ)) + ε)

    Until then d is zero. A step costs one backward pass, whatever T. As d is already scaled, the
    wrapped optimizer should be SGD, not Adam. Task-specific parameters get their own gradient when
    it is their task's turn, and none when it is not.

    Args:
        beta1: β₁, in [0, 1). 0.9.
        beta2: β₂, in [0, 1). 0.999.
        per_step: how many tasks have their turn at each step, 1 or more. Then a step costs as many
            backward passes.
        eps: ε, 0 or more; 1e-8, as in Adam. In units of the gradients' entries: d does not depend
            on the scale of the losses as far as d₀ is large against it.
        a: what the projections of d₀ on the unit momenta are proportional to; see `ConFIG`.
        length: of d₀; see `ConFIG`.

    Raises:
        TypeError, ValueError: an argument out of range; other numbers of tasks or of shared scalars
            than at the first step.

    Note:
        √s is what is kept, so that squares neither overflow nor vanish in float32; with `eps=0`,
        0/0 is 0. The official "separate momentum" variant cannot run, and is left out. A task that
        sits its turn out, as it is not finite, is the first in turn when it comes back, and its
        momentum goes on counting; one that was never there keeps d at zero. `direction` of all T
        rows uses only those whose turn it is.

    Example:
        >>> import torch
        >>> method = MConFIG()
        >>> method.direction(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        tensor([0., 0.])
        >>> method.direction(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        tensor([1., 1.])
    """

    per_parameter_state = True
    takes_turns = True
    state_names = ("rows", "turns", "queue", "pseudo_momentum", "root", "step")

    def __init__(
        self,
        beta1: float = 0.9,
        beta2: float = 0.999,
        per_step: int = 1,
        eps: float = 1e-8,
        a: Sequence[float] | None = None,
        length: str | float = "projection",
    ) -> None:
        in_range("beta1", beta1, 0, 1, bounds="[)")
        in_range("beta2", beta2, 0, 1, bounds="[)")
        integer("per_step", per_step, 1)
        in_range("eps", eps, 0)
        inner = ConFIG(a, length)
        self.beta1 = beta1
        self.beta2 = beta2
        self.per_step = per_step
        self.eps = eps
        self.a = inner.a
        self.length = inner.length
        # How many turns each task had, and the tasks in the order of their next turns.
        self.turns: list[int] | None = None
        self.queue: list[int] | None = None
        # f_{t−1} and √s, [P].
        self.pseudo_momentum: Tensor | None = None
        self.root: Tensor | None = None
        self.step = 0

    def prepare(self, n_tasks: int, like: Tensor) -> None:
        """Checks that there is state for T tasks, or none yet, and that `a` has T entries.

        Raises:
            ValueError: T differs.
        """
        super().prepare(n_tasks, like)
        ConFIG(self.a, self.length).prepare(n_tasks, like)

    def reset(self) -> None:
        """All momenta go back to zero, and the first task is in turn."""
        super().reset()
        self.turns = self.queue = self.pseudo_momentum = self.root = None
        self.step = 0

    def tasks_in_turn(self, n_tasks: int, absent: frozenset[int] = frozenset()) -> list[int]:
        """The first `per_step` tasks of the queue, without those that sit the step out."""
        queue = range(n_tasks) if self.queue is None else self.queue
        return sorted([i for i in queue if i not in absent][: self.per_step])

    def lose_turn(self, tasks: Sequence[int]) -> None:
        """The tasks go to the end of the queue."""
        queue = range(self._n_tasks or 0) if self.queue is None else self.queue
        # Those that go keep their order, so that turns are cyclic when T is no multiple of them.
        self.queue = sorted(queue, key=tasks.__contains__)

    def direction(
        self,
        jacobian: Tensor,
        losses: Tensor | None = None,
        tasks: Sequence[int] | None = None,
    ) -> Tensor:
        """`d [P]`, from all momenta after the update of some.

        Args:
            jacobian: `[T, P]`, of which the rows in turn are used; or `[k, P]` when `tasks` names
                the tasks that these are of.
            losses: not used.
            tasks: indices of the tasks that take part; None for those in turn.

        Raises:
            ValueError: another T or P than before.
        """
        indices = self._indices(jacobian, tasks)
        given = jacobian.detach()
        if tasks is None:
            indices = self.tasks_in_turn(len(jacobian))
            given = jacobian.detach()[indices]
        before, rows = self._next_rows(jacobian, indices)
        turns = [0] * len(rows) if self.turns is None else [*self.turns]
        for i, row in zip(indices, given, strict=True):
            torch.lerp(before[i], row.to(rows.dtype), 1.0 - self.beta1, out=rows[i])
            turns[i] += 1
        self.turns = turns
        self.lose_turn(indices)
        if 0 in turns:
            return torch.zeros_like(given[0])
        share = 1.0 - self.beta1 ** torch.tensor(turns, dtype=torch.float64)
        g = self.product(rows)
        w = ConFIG(self.a, self.length).weights(g / share / share[:, None])
        unscaled = combine(w / share, rows)
        if self.pseudo_momentum is None or self.root is None:
            self.pseudo_momentum, self.root = torch.zeros_like(unscaled), torch.zeros_like(unscaled)
        self.pseudo_momentum = self.pseudo_momentum.to(unscaled.device)
        self.root = self.root.to(unscaled.device)
        self.step += 1
        scaled, self.pseudo_momentum, self.root = m_config(
            unscaled,
            self.pseudo_momentum,
            self.root,
            self.step,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
        )
        return scaled.to(jacobian.dtype)


def m_config(
    unscaled: Tensor,
    pseudo_momentum: Tensor,
    root: Tensor,
    step: int,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
) -> tuple[Tensor, Tensor, Tensor]:
    """`d₀/(√(s/(1 − β₂ᵗ)) + ε)`, with `s ← β₂ s + (1 − β₂) h²`; see `MConFIG`.

    Args:
        unscaled: d₀ `[P]`.
        pseudo_momentum: `f_{t−1} [P]`.
        root: `√s [P]`.
        step: t, from 1 on.
        beta1, beta2, eps: β₁, β₂ and ε.

    Returns:
        `d`, f_t and the new √s, `[P]` each.
    """
    momentum = unscaled * (1.0 - beta1**step)
    h = (momentum - beta1 * pseudo_momentum) / (1.0 - beta1)
    root = (root * beta2**0.5).hypot_(h * (1.0 - beta2) ** 0.5)
    size = root / (1.0 - beta2**step) ** 0.5 + eps
    return torch.where(size > 0, unscaled / size, 0.0), momentum, root
