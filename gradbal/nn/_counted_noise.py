"""Random numbers from a counter, in tensors alone.

A `torch.Generator` is no part of `state_dict`, is not copied by `deepcopy` in all versions, cannot
be compiled, and is not put back with the buffers where a closure is called again. With a seed and a
counter in a buffer all of this works, and processes that have the same buffer draw the same.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["gumbel"]

_MASK = 0xFFFFFFFF


def gumbel(state: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Gumbel noise −log(−log u), a function of the state alone.

    Args:
        state: int64 ``[2]``, a seed and how many draws were made before.
        shape: of the noise.
        dtype: of the noise.

    Returns:
        The noise, on the state's device, between −2.8 and 16.7.
    """
    n = torch.Size(shape).numel()
    index = torch.arange(n, device=state.device)
    bits = _mixed(_mixed(_mixed(state[0]) ^ (state[1] & _MASK)) ^ index)
    # 23 bits: the half between two of them, which keeps u from 0 and 1, is exact in float32.
    u = ((bits >> 9).to(torch.float32) + 0.5) / 2**23
    return -torch.log(-torch.log(u)).to(dtype).reshape(tuple(shape))


def _mixed(x: Tensor) -> Tensor:
    """A one-to-one function of 32 bits whose output bits each depend on all input bits.

    The multipliers are below 2³¹, so that no product overflows int64.
    """
    # Folds what is above 32 bits; the sum keeps zero from staying zero.
    x = ((x ^ (x >> 32)) + 0x9E3779B9) & _MASK
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & _MASK
    return x ^ (x >> 15)
