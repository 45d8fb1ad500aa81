"""From a Gramian on any device to the small problem on the host, and back."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from gradbal.jacobian import upload
from gradbal.solvers import ZERO_ROW, Array, Indices, cosine_matrix, positive_part

__all__ = ["as_weights", "relative_cutoff", "solve_active", "symmetric_float64"]


def symmetric_float64(gramian: Tensor) -> Array:
    """The `[T, T]` matrix as a symmetric float64 array on the host, checked.

    Raises:
        ValueError: not a square matrix, or an entry is not finite.
    """
    shape = gramian.shape
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise ValueError(f"a Gramian must have shape [T, T], found {list(shape)}")
    matrix = gramian.detach().to("cpu", torch.float64).numpy()
    # The sum of squares is the quicker look, but may overflow.
    if not (math.isfinite(np.vdot(matrix, matrix)) or np.isfinite(matrix).all()):
        raise ValueError("a Gramian must be finite, found NaN or inf")
    return 0.5 * (matrix + matrix.T)  # type: ignore[no-any-return]


def as_weights(weights: Array, like: Tensor) -> Tensor:
    """`weights [T]` as a tensor of the dtype and on the device of `like`."""
    return upload(torch.from_numpy(np.ascontiguousarray(weights)).to(like.dtype), like.device)


def solve_active(
    gramian: Tensor,
    neutral: float,
    solve: Callable[[Array, Array, Indices], Array],
    zero: float = ZERO_ROW,
    pair: Callable[[float, float, float], tuple[float, float] | None] | None = None,
) -> Tensor:
    """Weights from a problem on the cosine matrix, with one policy for rows that are zero.

    Args:
        gramian: `[T, T]`.
        neutral: weight of every task when all rows are zero.
        solve: takes the cosines `[k, k]`, norms `[k]` and indices `[k]` of the rows that are not
            zero, and returns their weights `[k]`.
        zero: a row whose norm is at most this part of the largest is taken as zero.
        pair: the same in closed form for two rows, from their cosine and norms, in plain floats: a
            hundredth of what arrays of two entries cost. None is left to `solve`.

    Returns:
        `w [T]`, dtype and device of the Gramian; zero for zero rows.
    """
    if pair is not None and gramian.shape == (2, 2):
        found = _of_pair(gramian, zero, pair)
        if found is not None:
            return upload(torch.tensor(found, dtype=gramian.dtype, device="cpu"), gramian.device)
    g = symmetric_float64(gramian)
    c, n, active = cosine_matrix(g, zero)
    if len(active) == 0:
        return as_weights(np.full(len(g), neutral), gramian)
    if gramian.dtype != torch.float64:
        c = positive_part(c)
    if len(active) == len(g):
        return as_weights(solve(c, n, active), gramian)
    w = np.zeros(len(g))
    w[active] = solve(c, n, active)
    return as_weights(w, gramian)


def _of_pair(
    gramian: Tensor,
    zero: float,
    pair: Callable[[float, float, float], tuple[float, float] | None],
) -> tuple[float, float] | None:
    """The weights of two rows; None where one is zero, or rounding has put the cosine outside of
    [-1, 1], or an entry is not finite."""
    (first, upper), (lower, second) = gramian.tolist()
    if not (0.0 < first < math.inf and 0.0 < second < math.inf):
        return None
    n, m = math.sqrt(first), math.sqrt(second)
    if not (n > zero * m and m > zero * n):
        return None
    cosine = 0.5 * (upper + lower) / (n * m)
    return pair(cosine, n, m) if -1.0 <= cosine <= 1.0 else None


def relative_cutoff(gramian: Tensor) -> float:
    """The part of the largest eigenvalue up to which one counts as zero.

    1e-12, and `10·T·eps` for a Gramian whose products are not in float64.
    """
    if gramian.dtype == torch.float64:
        return 1e-12
    return 10 * len(gramian) * torch.finfo(gramian.dtype).eps
