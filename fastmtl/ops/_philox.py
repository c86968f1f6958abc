"""Philox4x32-10 in torch's integers: the numbers the kernels draw, on any device and without reading one on the host.

Number i of the stream (seed, offset) is word i % 4 of the block whose counter is i / 4 in its low and the offset in its
high 64 bits, and whose key is the seed. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["uniform"]

_ROUNDS = 10
_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_INCREMENTS = (0x9E3779B9, 0xBB67AE85)


def _high(factor: int, word: Tensor) -> Tensor:
    """Return the upper 32 bits of a product of two 32-bit numbers, in halves that int64 holds."""
    return (factor * (word >> 16) + (factor * (word & 0xFFFF) >> 16)) >> 16


def uniform(random: Tensor, first: int, count: int) -> Tensor:
    """Return the numbers ``first`` .. ``first + count - 1`` of a stream in float32, multiples of 2^-24 in [0, 1).

    ``random`` is (2,) int64, seed and offset; ``first`` is a multiple of 4.
    """
    blocks = torch.arange(first // 4, first // 4 + (count + 3) // 4, device=random.device)
    seed, offset = random.unbind()
    words = [blocks & _LOW, blocks >> 32, (offset & _LOW).expand_as(blocks), (offset >> 32 & _LOW).expand_as(blocks)]
    keys = [seed & _LOW, seed >> 32 & _LOW]
    for _ in range(_ROUNDS):
        high = [_high(factor, word) for factor, word in zip(_MULTIPLIERS, words[::2], strict=True)]
        # The product itself overflows int64; its lower 32 bits are right all the same.
        low = [factor * word & _LOW for factor, word in zip(_MULTIPLIERS, words[::2], strict=True)]
        words = [high[1] ^ words[1] ^ keys[0], low[1], high[0] ^ words[3] ^ keys[1], low[0]]
        keys = [key + increment & _LOW for key, increment in zip(keys, _INCREMENTS, strict=True)]
    return ((torch.stack(words, dim=1).flatten()[:count] >> 8).float()) * 2.0**-24
