"""Products of Jacobians: the Gramian, the combination of rows, and when float32 does not do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from operator import mul

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.amp.autocast_mode import is_autocast_available

__all__ = [
    "BLOCK",
    "CHUNK",
    "SMALL",
    "are_few",
    "combine",
    "combine_by",
    "combine_few",
    "cross_gramian",
    "gramian",
    "gramian_of_few",
    "no_autocast",
    "product_of_rows",
    "upload",
    "wants_exact",
]

BLOCK = 256
"""Columns in one block of the Gramian's sum: float32 within, float64 across. Rows of equal entries,
whose rounding errors do not cancel, leave cosines off by 1e-6 at 256 columns and 2e-5 at 4096."""

SMALL = 1 << 16
"""Up to this many entries a Jacobian is simply computed with in float64."""

_SAFE_SQUARES = (1e-25, 1e35)
_NEARLY_DEPENDENT = 1e-3

FEW = 6
"""Up to this many rows an elimination is done in plain floats."""

_FEW_ENTRIES = 64
"""Up to so many entries a Jacobian is computed with in plain floats."""

CHUNK = 1 << 18
"""Columns converted at a time where a Jacobian's own precision does not do."""

_ROWS_AT_ONCE = 12
"""The products of blocks of so many rows are an eighth of the rows."""

_PRODUCTS_IN_CACHE = 1 << 20
"""Products of blocks that a processor sums while they are hot: they would take a third of the time
otherwise, for forty rows."""

_IN_CACHE = 1 << 20
"""Entries converted at a time where a processor's cache is to hold them."""

_HOST = torch.device("cpu")

Array = NDArray[np.float64]


def gramian(jacobian: Tensor, *, exact: bool = False) -> Tensor:
    """`G = JJᵀ`, formed by column blocks and summed in float64.

    A plain float32 product is off by 1e-3 and more in the cosines at ten million columns; by blocks
    it is right to 1e-6 (1e-9 for random rows), and faster. Half-precision rows are cast to float32
    chunk by chunk.

    Args:
        jacobian: `[T, P]`, any floating dtype and device.
        exact: do every product in float64, whatever the dtype; see `wants_exact`.

    Returns:
        `[T, T]`, float64, on the same device.

    Example:
        >>> gramian(torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
        tensor([[5., 6.],
                [6., 9.]], dtype=torch.float64)
    """
    jacobian = jacobian.detach()
    if are_few(jacobian):
        return gramian_of_few(jacobian)
    with no_autocast(jacobian.device):
        if _in_float64(jacobian):
            wide = jacobian.double()
            return wide @ wide.mT
        # Compiled code cannot ask for the precision of products, and goes the way that is always
        # right.
        unknown = torch.compiler.is_compiling()
        if exact or unknown or torch.get_float32_matmul_precision() != "highest":
            # TF32 and bfloat16 products are global settings of the user's; they stay as they are.
            chunks = (c.double() for c in _chunks(jacobian, _converted(jacobian)))
            return _sum(c @ c.mT for c in chunks)
        if jacobian.dtype == torch.float32:
            return _sum(map(_blocked, _chunks(jacobian, _multiplied(jacobian))))
        return _sum(_blocked(c.float()) for c in _chunks(jacobian, _converted(jacobian)))


def cross_gramian(first: Tensor, second: Tensor) -> Tensor:
    """`A = J₁J₂ᵀ`, every product in float64.

    Args:
        first, second: `[T, P]`, any floating dtype, on the same device.

    Returns:
        `[T, T]`, float64, on that device.

    Example:
        >>> cross_gramian(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 1.0]]))
        tensor([[5.]], dtype=torch.float64)
    """
    with no_autocast(first.device):
        pairs = zip(*(torch.split(j.detach(), CHUNK, 1) for j in (first, second)), strict=True)
        return _sum(a.double() @ b.double().mT for a, b in pairs)


def wants_exact(gramian: Tensor, jacobian: Tensor) -> bool:
    """Whether a problem with this Gramian may hang on digits that float32 products do not have.

    That is where a row's square leaves float32's range, and where the rows are nearly dependent:
    elsewhere the cosine matrix is so well conditioned that 1e-6 in its entries does not matter.

    Args:
        gramian: `gramian(jacobian) [T, T]`, on the host.
        jacobian: `[T, P]`; looked at only where a square is out of range.
    """
    if _in_float64(jacobian):
        return False
    g = gramian.numpy()
    low, high = _SAFE_SQUARES
    safe = [low < square < high for square in g.diagonal().tolist()]
    if not all(safe):
        odd = [i for i, is_safe in enumerate(safe) if not is_safe]
        # One look: picking the rows with an index tensor would be an upload.
        if bool(torch.stack([jacobian[i].any() for i in odd]).any()):
            return True
        g = np.delete(np.delete(g, odd, 0), odd, 1)
    # Whether an eigenvalue of the cosines is below the bound. Cholesky's method finds the same
    # whatever the norms of the rows are.
    g = g.copy()
    g.flat[:: len(g) + 1] *= 1.0 - _NEARLY_DEPENDENT
    return not (_is_definite if len(g) <= FEW else _has_factor)(g)


def _is_definite(matrix: Array) -> bool:
    """Elimination in plain floats, which for a few rows costs less than one call of LAPACK."""
    rows: list[list[float]] = matrix.tolist()
    for k, row in enumerate(rows):
        if not row[k] > 0.0:
            return False
        for other in rows[k + 1 :]:
            factor = other[k] / row[k]
            other[:] = [x - factor * y for x, y in zip(other, row, strict=True)]
    return True


def _has_factor(matrix: Array) -> bool:
    try:
        np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return False
    return True


def combine(weights: Tensor, jacobian: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`d = Jᵀw`.

    Args:
        weights: `[T]`, any floating dtype and device.
        jacobian: `[T, P]`.
        dtype: of the result; the Jacobian's where None.

    Returns:
        `[P]`, on the device of the Jacobian. Half-precision rows are combined in float32.

    Example:
        >>> combine(torch.tensor([0.5, 0.5]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor([0.5000, 0.5000])
    """
    (direction,) = combine_by(weights, jacobian, [jacobian.shape[1]], [dtype or jacobian.dtype])
    return direction


def combine_by(
    weights: Tensor, jacobian: Tensor, sizes: Sequence[int], dtypes: Sequence[torch.dtype]
) -> list[Tensor]:
    """`d = Jᵀw` as n tensors with memory of their own, for n groups of columns.

    Args:
        weights: `[T]`, any floating dtype and device.
        jacobian: `[T, P]`.
        sizes: n widths, which make up P.
        dtypes: n dtypes of the results.
    """
    jacobian, weights = jacobian.detach(), upload(weights.detach(), jacobian.device)
    if are_few(jacobian):
        return combine_few(weights, jacobian.tolist(), sizes, dtypes)
    with no_autocast(jacobian.device):
        if jacobian.numel() <= SMALL:
            # Few entries in many groups: one product for all of them.
            flat = torch.split(weights.double() @ jacobian.double(), list(sizes))
            return [d.to(dtype, copy=True) for d, dtype in zip(flat, dtypes, strict=True)]
        w = weights.to(torch.promote_types(jacobian.dtype, torch.float32))
        columns = torch.split(jacobian, list(sizes), 1)
        at_once = _converted(jacobian)
        pairs = zip(columns, dtypes, strict=True)
        return [_combined(w, part, dtype, at_once) for part, dtype in pairs]


def _combined(weights: Tensor, jacobian: Tensor, dtype: torch.dtype, at_once: int) -> Tensor:
    if weights.dtype == jacobian.dtype:
        return (weights @ jacobian).to(dtype)
    chunks = _chunks(jacobian, at_once)
    result = jacobian.new_empty(jacobian.shape[1], dtype=dtype)
    for part, c in zip(torch.split(result, chunks[0].shape[1]), chunks, strict=True):
        part.copy_(weights @ c.to(weights.dtype))
    return result


def upload(values: Tensor, device: torch.device) -> Tensor:
    """A few numbers on the device where they are needed.

    A plain copy from the host to a GPU waits until all the work before it is done; one from pinned
    memory, which PyTorch keeps until it has arrived, does not.
    """
    if values.device == device:
        return values
    if device.type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def are_few(jacobian: Tensor) -> bool:
    """Whether there are so few entries, on the host, that plain floats are faster than operators.

    An operator takes a microsecond, and several where it is not in the processor's cache.
    """
    return (
        jacobian.numel() <= _FEW_ENTRIES
        and jacobian.device.type == "cpu"
        and type(jacobian) is Tensor
        and not torch.compiler.is_compiling()
    )


def gramian_of_few(jacobian: Tensor) -> Tensor:
    """`JJᵀ [T, T]` in float64 of a `[T, P]` of few entries."""
    return torch.tensor(product_of_rows(jacobian.tolist()), dtype=torch.float64, device=_HOST)


def product_of_rows(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    """`JJᵀ`, T rows of T floats, from T rows of P floats."""
    products: list[list[float]] = []
    for i, row in enumerate(rows):
        left = [above[i] for above in products]
        products.append(left + [sum(map(mul, row, other)) for other in rows[i:]])
    return products


def combine_few(
    weights: Tensor,
    rows: Sequence[Sequence[float]],
    sizes: Sequence[int],
    dtypes: Sequence[torch.dtype],
) -> list[Tensor]:
    """`combine_by` of T rows of P floats, in float64; `weights [T]` are on the host."""
    w, found, start = weights.tolist(), [], 0
    direction = [sum(map(mul, w, column)) for column in zip(*rows, strict=True)]
    for size, dtype in zip(sizes, dtypes, strict=True):
        part = direction[start : start + size]
        found.append(torch.tensor(part, dtype=dtype, device=_HOST))
        start += size
    return found


def _in_float64(jacobian: Tensor) -> bool:
    return jacobian.dtype == torch.float64 or jacobian.numel() <= SMALL


def _converted(jacobian: Tensor) -> int:
    """How many entries are converted at a time: few beside all of them, in few launches."""
    sixteenth = jacobian.numel() // 16
    return min(sixteenth, _IN_CACHE) if jacobian.device.type == "cpu" else sixteenth


def _multiplied(jacobian: Tensor) -> int:
    """Of how many entries the blocks' products are there at a time."""
    n_tasks = len(jacobian)
    entries = jacobian.numel() // -(-n_tasks // _ROWS_AT_ONCE)
    if jacobian.device.type == "cpu":
        return min(entries, _PRODUCTS_IN_CACHE * BLOCK // n_tasks)
    return entries


def _chunks(jacobian: Tensor, entries: int) -> tuple[Tensor, ...]:
    """Whole blocks of columns, of about so many entries."""
    n_blocks = -(-entries // (len(jacobian) * BLOCK))
    return torch.split(jacobian, max(1, n_blocks) * BLOCK, dim=1)


def _blocked(jacobian: Tensor) -> Tensor:
    n_blocks = jacobian.shape[1] // BLOCK
    whole = jacobian[:, : n_blocks * BLOCK].view(len(jacobian), n_blocks, BLOCK).transpose(0, 1)
    total = torch.bmm(whole, whole.mT).sum(0, dtype=torch.float64)
    rest = jacobian[:, n_blocks * BLOCK :]
    return total + (rest @ rest.mT).double() if rest.shape[1] else total


def _sum(parts: Iterable[Tensor]) -> Tensor:
    iterator = iter(parts)
    total = next(iterator)
    for part in iterator:
        total = total + part
    return total


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Autocast would take the products to half precision."""
    if is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
