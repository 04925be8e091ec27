"""Counter-based noise: Philox-4x32-10 in plain int64 arithmetic, the same words as Triton's `tl.philox`.

A draw is a function of (seed, step, index) alone: it needs no generator state, so every rank and every backend draws
the same, a resumed run continues exactly, and a step held in a tensor costs no host sync.
Key = the seed's low and high 32 bits; counter = (index, step, 0, 0); only the first output word is used.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); constants of its Philox-4x32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ROUNDS = 10
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
#: Spacing of the uniforms; 2**31 of them stay below 1 in float32. Also the least value, where log(−log u) is finite.
UNIFORM_SCALE = 4.6566127342e-10


def philox_word(seed: int, c0: Tensor, c1: Tensor) -> Tensor:
    """First 32-bit output word, in int64, for the counters (c0, c1, 0, 0). c0 and c1 are int64 and broadcast.

    A round maps (c0, c1, c2, c3) to (hi(B·c2) ^ c1 ^ k0, lo(B·c2), hi(A·c0) ^ c3 ^ k1, lo(A·c0)). Both products are
    one operation, on the rows c2 and c0. They may wrap around in int64: the high half is read from bits 32 to 63,
    which are right in either sign, and low halves and keys stay unreduced until the mask at the round's end.
    """
    c0, c1 = torch.broadcast_tensors(c0 & _MASK, c1 & _MASK)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    if c0.device.type == "cpu" and type(c0) is Tensor:
        # The same arithmetic by NumPy, whose cost per operation is a third of torch's
        return torch.as_tensor(_philox_rounds(_rows_numpy(c0, c1, k0, k1), lambda x: x[::-1]))
    # 0 in the row of c2, 1 in the row of c0: constants come by arithmetic, as a copy from the host would wait
    is_c0 = torch.arange(2, dtype=torch.int64, device=c0.device).view(-1, *[1] * c0.dim())
    rounds = torch.arange(_ROUNDS, dtype=torch.int64, device=c0.device).view(-1, *[1] * is_c0.dim())
    factors = is_c0 * (_ROUND_A - _ROUND_B) + _ROUND_B
    keys = torch.addcmul(is_c0 * (k0 - k1) + k1, rounds, is_c0 * (_KEY_A - _KEY_B) + _KEY_B)
    return _philox_rounds((is_c0 * c0, (1 - is_c0) * c1, factors, keys), lambda x: x.flip(0))


def _rows_numpy(c0: Tensor, c1: Tensor, k0: int, k1: int) -> tuple[np.ndarray, ...]:
    """Words, lows, factors and keys for the rows (c2, c0)."""
    shape = (2, *[1] * c0.dim())
    words, lows = np.zeros((2, *c0.shape), np.int64), np.zeros((2, *c0.shape), np.int64)
    words[1], lows[0] = c0.numpy(), c1.numpy()
    keys = np.array([[k1 + i * _KEY_B, k0 + i * _KEY_A] for i in range(_ROUNDS)], np.int64)
    return words, lows, np.array([_ROUND_B, _ROUND_A], np.int64).reshape(shape), keys.reshape(_ROUNDS, *shape)


def _philox_rounds(rows: tuple[Any, ...], flip: Callable[[Any], Any]) -> Any:
    """All rounds on arrays of either library: words (c2, c0), lows (c1, c3), factors, keys. Returns c0."""
    words, lows, factors, keys = rows
    for key in keys:
        products = words * factors
        words = products >> 32
        words ^= lows
        words = flip(words)
        words ^= key
        words &= _MASK
        lows = products
    return words[1]


def word_to_uniform(word: Tensor) -> Tensor:
    """32-bit words, in int64, to float32 in (0, 1)."""
    # As int32, folded to [0, 2**31): a negative word w becomes −w − 1, which in 32 unsigned bits is the complement
    folded = torch.minimum(word, _MASK - word)
    return (folded.to(torch.float32) * UNIFORM_SCALE).clamp(min=UNIFORM_SCALE)


def philox_uniform(seed: int, step: int | Tensor, n: int, device: torch.device | str | None = None) -> Tensor:
    """n uniforms in (0, 1), float32, for the indices 0 … n−1.

    Args:
        seed: 64-bit key.
        step: counter below 2**32; an int or a 0-D int64 tensor on `device`.
        n: number of draws.
        device: where to draw; default that of `step`, or the CPU.
    """
    if device is None:
        device = step.device if isinstance(step, Tensor) else "cpu"
    index = torch.arange(n, dtype=torch.int64, device=device)
    step = step if isinstance(step, Tensor) else torch.full((), step, dtype=torch.int64, device=device)
    return word_to_uniform(philox_word(seed, index, step))


def gumbel(seed: int, step: int | Tensor, n: int, device: torch.device | str | None = None) -> Tensor:
    """n standard Gumbel draws −log(−log u), float32, all finite. Arguments as in `philox_uniform`."""
    return -torch.log(-torch.log(philox_uniform(seed, step, n, device)))
