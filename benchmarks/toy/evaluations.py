"""The toy's losses around a point, in closed form, for the methods that ask for them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.toy.problem import Array, Toy

__all__ = ["ToyEvaluations"]


class ToyEvaluations:
    """What `gradbal._closures.Evaluations` gives a method, without a graph to walk.

    The toy is deterministic: the training and the validation closure are the same.

    Args:
        toy: the problem.
        point: `[2]`, where the trajectory is.
        losses, jacobian: `[2]` and `[2, 2]` there.
        learning_rate: of the optimizer.
        direction: `[2]`, what is in `.grad`, or None.
    """

    def __init__(
        self,
        toy: Toy,
        point: Array,
        losses: Tensor,
        jacobian: Tensor,
        learning_rate: float,
        direction: Tensor | None = None,
    ) -> None:
        self._toy = toy
        self._point = point
        self._here = losses, jacobian
        self._at = losses, jacobian
        self._learning_rate = learning_rate
        self._direction = direction

    def losses(self, source: str = "train") -> Tensor:
        """`[2]`."""
        return self._at[0]

    def jacobian(self, source: str = "train") -> Tensor:
        """`[2, 2]`."""
        return self._at[1]

    def gradient(self, weights: Tensor, source: str = "train") -> Tensor:
        """`∇ Σ w_i ℓ_i [2]`."""
        return weights.to(self._at[1]) @ self._at[1]

    def losses_and_gradient(self, weights: Tensor, source: str = "train") -> tuple[Tensor, Tensor]:
        """Both."""
        return self._at[0], self.gradient(weights)

    def virtual_step(self, gradient: Tensor) -> Tensor:
        """`−η g [2]`."""
        return -self._learning_rate * gradient

    def learning_rates(self) -> Tensor:
        """`η [2]`."""
        return torch.full((2,), self._learning_rate, dtype=torch.float64)

    def lengths(self) -> tuple[float, float]:
        """`|θ|` and `|d|`."""
        assert self._direction is not None
        point = torch.linalg.vector_norm(torch.from_numpy(self._point))
        return float(point), float(torch.linalg.vector_norm(self._direction))

    @contextlib.contextmanager
    def moved(self, shift: Tensor) -> Iterator[None]:
        """Within it the point is displaced by `shift [2]`."""
        losses, jacobian = self._toy.evaluate_one(*(self._point + shift.numpy()).tolist())
        self._at = (
            torch.tensor(losses, dtype=torch.float64),
            torch.tensor(jacobian, dtype=torch.float64),
        )
        yield
        self._at = self._here

    def moved_along_gradient(self, factor: float) -> contextlib.AbstractContextManager[None]:
        """The same for `factor` times the direction."""
        assert self._direction is not None
        return self.moved(factor * self._direction)
