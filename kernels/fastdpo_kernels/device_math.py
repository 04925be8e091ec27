"""Functions that kernels share, where Triton's own lose digits or do not run in its interpreter. All float32."""

from __future__ import annotations

import triton
import triton.language as tl

#: tanh(u) = u·P(u²) for |u| < 0.6, coefficients of P from u⁰ up: a minimax fit, relative error below 3e-9.
_TANH_SPLIT = tl.constexpr(0.6)
_P0 = tl.constexpr(0.999999997510992)
_P1 = tl.constexpr(-0.3333328325734912)
_P2 = tl.constexpr(0.13331688959571064)
_P3 = tl.constexpr(-0.053768704658539876)
_P4 = tl.constexpr(0.020753628745107385)
_P5 = tl.constexpr(-0.005852168499396639)


@triton.jit
def tanh(u: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """tanh u and its derivative 1 − tanh² u, to a few ulp each, for any u."""
    # e = exp(−2|u|) ≤ 1: tanh|u| = (1 − e)/(1 + e), but near 0 that difference has no digits left
    e = tl.exp(-2.0 * tl.abs(u))
    far = (1.0 - e) / (1.0 + e)
    w = u * u
    near = u * (((((_P5 * w + _P4) * w + _P3) * w + _P2) * w + _P1) * w + _P0)
    # 1 − tanh² = 4e/(1 + e)²
    slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
    return tl.where(tl.abs(u) < _TANH_SPLIT, near, tl.where(u < 0.0, -far, far)), slope


@triton.jit
def expm1(u: tl.tensor) -> tl.tensor:
    """exp(u) − 1 to a few ulp."""
    # With t = tanh(u/2): eᵘ − 1 = 2t/(1 − t)
    t, _ = tanh(0.5 * u)
    return tl.where(tl.abs(u) < _TANH_SPLIT, 2.0 * t / (1.0 - t), tl.exp(u) - 1.0)


@triton.jit
def log1p(y: tl.tensor) -> tl.tensor:
    """log(1 + y) for −½ ≤ y ≤ 1, relative error below 1e-6: 2·artanh(z) at z = y/(2 + y), |z| ≤ ⅓, as a series."""
    z = y / (2.0 + y)
    w = z * z
    # 1 + w/3 + w²/5 + … + w⁷/15; the rest is below 2e-9
    series = 1.0 / 13.0 + w * (1.0 / 15.0)
    series = 1.0 / 11.0 + w * series
    series = 1.0 / 9.0 + w * series
    series = 1.0 / 7.0 + w * series
    series = 1.0 / 5.0 + w * series
    series = 1.0 / 3.0 + w * series
    return 2.0 * z * (1.0 + w * series)


@triton.jit
def final_logit(
    x: tl.tensor, in_scale: tl.tensor, out_scale: tl.tensor, CAPPED: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """z of raw logits that hold their bias, and their damping (1 − tanh²): dz/dx = logit_scale/temperature·damping.

    z = out_scale·tanh(in_scale·x), in_scale = logit_scale/cap and out_scale = cap/temperature; or without a cap
    z = in_scale·x, in_scale = logit_scale/temperature.
    """
    if CAPPED:
        capped, damping = tanh(x * in_scale)
        z = out_scale * capped
    else:
        z, damping = x * in_scale, 1.0
    return z, damping
