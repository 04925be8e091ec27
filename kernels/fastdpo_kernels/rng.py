"""Counter-based noise on the device: Philox-4x32-10 with key = seed and counter = (index, step, 0, 0).

The draws are those of `fastdpo.rng`: uniforms bit for bit, Gumbel values up to the rounding of two logarithms.
Loss kernels call `gumbel_noise` for the Gumbel-top-k filter; the launchers fill a tensor, at 4 bytes per draw.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.random import uint_to_uniform_float

_BLOCK = 256
#: Least uniform: one step of `uint_to_uniform_float`, so that log(−log u) is finite.
_UNIFORM_SCALE = tl.constexpr(4.6566127342e-10)


@triton.jit
def philox_uniform(seed: tl.tensor, step: tl.tensor, index: tl.tensor) -> tl.tensor:
    """Uniforms in (0, 1), float32. seed and step: integer scalars; index: a block of int32 or int64."""
    c0 = tl.cast(index, tl.uint32)
    zero = c0 * 0
    c1 = zero + tl.cast(step, tl.uint32)
    word, _, _, _ = tl.philox(seed, c0, c1, zero, zero)
    return tl.maximum(uint_to_uniform_float(word), _UNIFORM_SCALE)


@triton.jit
def gumbel_noise(seed: tl.tensor, step: tl.tensor, index: tl.tensor) -> tl.tensor:
    """Standard Gumbel draws −log(−log u), float32, all finite. Arguments as in `philox_uniform`."""
    return -tl.log(-tl.log(philox_uniform(seed, step, index)))


@triton.jit(do_not_specialize=["seed", "n"])
def _noise_kernel(
    out_ptr: tl.tensor,
    step_ptr: tl.tensor,
    seed: tl.tensor,
    n: tl.tensor,
    GUMBEL: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    step = tl.load(step_ptr)
    draws = gumbel_noise(seed, step, index) if GUMBEL else philox_uniform(seed, step, index)
    tl.store(out_ptr + index, draws, mask=index < n)


def _fill(seed: int, step: int | Tensor, n: int, device: torch.device | str | None, *, gumbel_draws: bool) -> Tensor:
    if not isinstance(step, Tensor):
        step = torch.full((), step, dtype=torch.int64, device=device)
    if step.dim() != 0 or step.dtype != torch.int64:
        raise ValueError(f"step must be an int or a 0-D int64 tensor, got shape {tuple(step.shape)}, {step.dtype}.")
    out = torch.empty(n, dtype=torch.float32, device=step.device)
    _noise_kernel[(triton.cdiv(n, _BLOCK),)](out, step, seed, n, GUMBEL=gumbel_draws, BLOCK=_BLOCK)
    return out


def uniform(seed: int, step: int | Tensor, n: int, device: torch.device | str | None = None) -> Tensor:
    """n ≥ 1 uniforms in (0, 1), float32, for the indices 0 … n−1. A tensor `step` also decides the device."""
    return _fill(seed, step, n, device, gumbel_draws=False)


def gumbel(seed: int, step: int | Tensor, n: int, device: torch.device | str | None = None) -> Tensor:
    """n ≥ 1 standard Gumbel draws, float32, for the indices 0 … n−1. A tensor `step` also decides the device."""
    return _fill(seed, step, n, device, gumbel_draws=True)
