"""Counter-based noise on the device: Philox-4x32-10 with key = seed and counter = (index, step, 0, 0).

The draws are those of `fastdpo.formulas.rng`: uniforms bit for bit, Gumbel values up to the rounding of two logarithms.
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
_WITHOUT_GPU = "draw with fastdpo.formulas.rng, or set TRITON_INTERPRET=1 before the kernels are imported"


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


def _drawing_device(step: int | Tensor, device: torch.device | str | None) -> torch.device:
    """Of a tensor `step`, else `device`, else the current GPU, or the CPU where kernels are interpreted."""
    interpreted = not isinstance(_noise_kernel, triton.JITFunction)
    if isinstance(step, Tensor):
        if device is not None and torch.device(device).type != step.device.type:
            raise ValueError(f"device={str(device)!r}, but step is on {step.device}; leave device out, or move step.")
        chosen = step.device
    elif device is not None:
        chosen = torch.device(device)
    elif interpreted:
        return torch.device("cpu")
    elif torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    else:
        raise ValueError(f"device is not given, and no GPU is visible to torch to draw on; {_WITHOUT_GPU}.")
    if chosen.type == "cpu" and not interpreted:
        raise ValueError(
            f"device={str(chosen)!r}: compiled kernels draw on a GPU; pass device='cuda', or {_WITHOUT_GPU}."
        )
    return chosen


def _fill(seed: int, step: int | Tensor, n: int, device: torch.device | str | None, *, gumbel_draws: bool) -> Tensor:
    device = _drawing_device(step, device)
    if not isinstance(step, Tensor):
        step = torch.full((), step, dtype=torch.int64, device=device)
    if step.dim() != 0 or step.dtype != torch.int64:
        raise ValueError(f"step must be an int or a 0-D int64 tensor, got shape {tuple(step.shape)}, {step.dtype}.")
    out = torch.empty(n, dtype=torch.float32, device=device)
    _noise_kernel[(triton.cdiv(n, _BLOCK),)](out, step, seed, n, GUMBEL=gumbel_draws, BLOCK=_BLOCK)
    return out


def uniform(seed: int, step: int | Tensor, n: int, device: torch.device | str | None = None) -> Tensor:
    """n ≥ 1 uniforms in (0, 1), float32, for the indices 0 … n−1.

    Args:
        seed: 64-bit key.
        step: counter below 2**32; an int or a 0-D int64 tensor, whose device then is the draws'.
        n: number of draws.
        device: where to draw; default that of a tensor `step`, else the current GPU, or the CPU if interpreted.

    Raises:
        ValueError: `device` and `step` disagree, or name a CPU where the kernels are compiled.
    """
    return _fill(seed, step, n, device, gumbel_draws=False)


def gumbel(seed: int, step: int | Tensor, n: int, device: torch.device | str | None = None) -> Tensor:
    """n ≥ 1 standard Gumbel draws, float32, for the indices 0 … n−1. Arguments as in `uniform`."""
    return _fill(seed, step, n, device, gumbel_draws=True)
