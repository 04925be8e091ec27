"""Kernels that fold head tiles, tile by tile as the head does, against the formulas over whole rows in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo_kernels import device_math
from fastdpo_kernels.linear_logprob.fold import MAX_COLUMNS, RowState, fold_
from fastdpo_kernels.linear_logprob.logit_gradient import logit_gradient_
from fastdpo_kernels.linear_logprob.unit_gradient import finish_unit_gradient_, rescale_rows_

STATS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
HIDDEN = 5
#: Relative step of each dtype that probabilities are written in. The interpreter truncates where hardware rounds.
STEP = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def rows_of(rows: int, vocab: int, *, scale: float = 3.0, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, vocab, (rows,), generator=g)
    targets[0], targets[-1] = 0, vocab - 1
    return {
        "x": scale * torch.randn(rows, vocab, generator=g),
        "bias": torch.randn(vocab, generator=g),
        "weight": torch.randn(vocab, HIDDEN, generator=g),
        "targets": targets,
    }


def truth(
    x: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> dict[str, Tensor]:
    """Everything the kernels compute, in float64, with dlogp/dx by autograd."""
    raw = x.double().requires_grad_()
    z = (raw + (0.0 if bias is None else bias.double())) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    log_probs = z.log_softmax(1)
    logps = log_probs.gather(1, targets[:, None])[:, 0]
    (gradient,) = torch.autograd.grad(logps.sum(), raw, retain_graph=True)
    z, log_probs = z.detach(), log_probs.detach()
    return {
        "z": z,
        "logps": logps.detach(),
        "lse": z.logsumexp(1),
        "logit_gradient": gradient,
        "unit_gradient": gradient @ weight.double(),
        "entropy": -(log_probs.exp() * log_probs).sum(1),
        "mean_logits": z.mean(1),
        "is_top1": z.argmax(1) == targets,
        "log_sum_sq_probs": (2.0 * log_probs).logsumexp(1),
    }


def fold_tiles(
    x: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    width: int,
    stats: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
    in_place: bool = False,
    **options: Any,
) -> dict[str, Tensor]:
    """What the head's driver does, with the raw logits given: fold, rescale, accumulate, finish."""
    rows, vocab = x.shape
    state = RowState.fresh(rows, "cpu", stats)
    accumulator = torch.zeros(rows, HIDDEN)
    buffer = torch.full((rows, width + 3), 7.0)  # rows further apart than a tile is wide
    for first in range(0, vocab, width):
        tile = buffer[:, : min(width, vocab - first)]
        tile.copy_(x[:, first : first + width])
        probs = tile if in_place else torch.empty(tile.shape, dtype=dtype)
        fold_(tile, probs, targets, bias, first, state, **options)
        rescale_rows_(accumulator, state.rescale)
        accumulator += probs.float() @ weight[first : first + width]
    assert (buffer[:, width:] == 7.0).all()
    scales = {name: value for name, value in options.items() if name in ("logit_scale", "temperature")}
    finish_unit_gradient_(accumulator, weight, targets, state, **scales)
    return {"unit_gradient": accumulator, **results(state, targets, vocab)}


def results(state: RowState, targets: Tensor, vocab: int) -> dict[str, Tensor]:
    """The formulas in the docstring of RowState."""
    centred = state.target_logit - state.peak
    at_target = centred.exp()
    total = state.others + at_target
    values = {"lse": state.peak + total.log(), "logps": centred - total.log()}
    if state.weighted_sum is not None:
        values["entropy"] = total.log() - (state.weighted_sum + at_target * centred) / total
    if state.logit_sum is not None:
        values["mean_logits"] = state.logit_sum / vocab
    if state.square_sum is not None:
        values["log_sum_sq_probs"] = (state.square_sum + at_target**2).log() - 2.0 * total.log()
    if state.best_index is not None:
        values["is_top1"] = state.best_index == targets
    return values


def assert_all_close(values: dict[str, Tensor], expected: dict[str, Tensor], *, rtol: float, atol: float) -> None:
    for name, value in values.items():
        other = expected[name]
        other = other if value.dtype == torch.bool else other.to(value.dtype)
        torch.testing.assert_close(value, other, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


HEADS = [
    {"softcap": softcap, "logit_scale": scale, "temperature": temperature}
    for softcap, (scale, temperature) in itertools.product((None, 4.0), ((1.0, 1.0), (0.25, 0.7)))
]


@pytest.mark.parametrize("options", HEADS, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("rows", "vocab", "width"), [(7, 33, 33), (7, 33, 10), (5, 1003, 256), (3, 40, 1)])
def test_tiles_give_the_whole_rows(rows: int, vocab: int, width: int, with_bias: bool, options: dict[str, Any]) -> None:
    data = rows_of(rows, vocab)
    bias = data.pop("bias")
    data["bias"] = bias if with_bias else None
    values = fold_tiles(**data, width=width, stats=STATS, in_place=width == 10, **options)
    assert set(values) == {"unit_gradient", "lse", "logps", *STATS}
    assert_all_close(values, truth(**data, **options), rtol=3e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_place", [False, True])
def test_probabilities_are_written_and_the_reference_writes_nothing(dtype: torch.dtype, in_place: bool) -> None:
    """One tile, so that the peak is the row's maximum. A 16-bit buffer may not be the tile."""
    if in_place and dtype != torch.float32:
        dtype = torch.float32
    data = rows_of(4, 50)
    expected = truth(data["x"], data["targets"], data["weight"], softcap=5.0, temperature=0.5)
    tile, state = data["x"].clone(), RowState.fresh(4, "cpu")
    probs = tile if in_place else torch.full((4, 50), math.nan, dtype=dtype)
    fold_(tile, probs, data["targets"], None, 0, state, softcap=5.0, temperature=0.5)
    damping = 1.0 - torch.tanh(data["x"].double() / 5.0) ** 2
    exact = (expected["z"] - expected["z"].amax(1, keepdim=True)).exp() * damping
    exact.scatter_(1, data["targets"][:, None], 0.0)
    torch.testing.assert_close(probs.double(), exact, rtol=STEP[dtype], atol=1e-7)
    at_targets = damping.gather(1, data["targets"][:, None])[:, 0]
    torch.testing.assert_close(state.target_damping.double(), at_targets, rtol=2e-6, atol=0.0)
    assert in_place or torch.equal(tile, data["x"])
    reference = RowState.fresh(4, "cpu")
    tile = data["x"].clone()
    fold_(tile, None, data["targets"], None, 0, reference, softcap=5.0, temperature=0.5)
    assert torch.equal(tile, data["x"])
    assert all(torch.equal(a, b) for a, b in zip(state, reference, strict=True) if a is not None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_probabilities_give_the_unit_gradient(dtype: torch.dtype) -> None:
    data = rows_of(5, 123)
    data["weight"] = data["weight"].to(dtype).float()
    bias = data.pop("bias").to(dtype)
    values = fold_tiles(**data, bias=bias, width=50, dtype=dtype)
    assert_all_close(values, truth(**data, bias=bias), rtol=1e-5, atol=4 * STEP[dtype])
    exact = {key: values[key] for key in ("lse", "logps")}  # nothing of these passes through 16 bits but the bias
    assert_all_close(exact, truth(**data, bias=bias), rtol=3e-6, atol=1e-5)


def test_confident_rows_keep_the_digits_of_their_gradient() -> None:
    """Logits (z, 0, 0), W = (1, 0, 0), target 0: dlogp/dh = 1 − p = 2/(eᶻ + 2), down to 1e-13, from 16-bit operands."""
    z = torch.tensor([9.0, 14.0, 30.0])
    x, targets = torch.nn.functional.pad(z[:, None], (0, 2)), torch.zeros(3, dtype=torch.int64)
    weight = torch.zeros(3, HIDDEN)
    weight[0, 0] = 1.0
    exact = (2.0 / (z.double().exp() + 2.0)).float()
    values = fold_tiles(x, targets, weight, width=3, dtype=torch.bfloat16)
    torch.testing.assert_close(values["unit_gradient"][:, 0], exact, rtol=2e-6, atol=0.0)
    out = torch.empty(3, 3)
    logps = (-exact.double()).log1p().float()
    logit_gradient_(x, out, targets, None, 0, x.logsumexp(1), logps, torch.ones(3), vocab_size=3)
    torch.testing.assert_close(out[:, 0], exact, rtol=2e-6, atol=0.0)


def test_weight_rows_of_16_bit_heads_are_gathered() -> None:
    """Rows further apart than H; with equal logits 1 − p = 8/9, and A = 0 as nothing was accumulated."""
    weight = torch.randn(9, 8).bfloat16()[:, :HIDDEN]
    targets = torch.tensor([3, 0, 8, 3])
    state = RowState.fresh(4, "cpu")
    fold_(torch.ones(4, 9), None, targets, None, 0, state, logit_scale=0.5)
    accumulator = torch.zeros(4, HIDDEN)
    finish_unit_gradient_(accumulator, weight, targets, state, logit_scale=0.5)
    torch.testing.assert_close(accumulator, 0.5 * 8 / 9 * weight[targets].float(), rtol=1e-6, atol=0.0)


def test_peaks_are_raised_only_beyond_the_threshold() -> None:
    """Maxima of four tiles: 1, 6 (5 above the peak: kept), 10 (9 above: raised), 3. Threshold 8, by hand."""
    maxima = torch.tensor([1.0, 6.0, 10.0, 3.0])
    x = torch.cat([torch.cat([m.view(1, 1), m - torch.rand(1, 6)], 1) for m in maxima], 1)  # (1, 28)
    state = RowState.fresh(1, "cpu", STATS)
    seen = []
    for first in range(0, 28, 7):
        fold_(x[:, first : first + 7].contiguous(), None, torch.tensor([7]), None, first, state)
        seen.append((state.peak.item(), state.rescale.item()))
    assert [peak for peak, _ in seen] == [1.0, 1.0, 10.0, 10.0]
    assert [factor for _, factor in seen] == pytest.approx([1.0, 1.0, math.exp(-9.0), 1.0])
    at_target = (x.double() - 10.0)[0, 7].exp().item()
    total = (x.double() - 10.0).exp().sum().item()
    assert state.others.item() == pytest.approx(total - at_target, rel=1e-6)
    weight = torch.randn(28, HIDDEN)
    expected = truth(x, torch.tensor([7]), weight)
    for threshold in (0.0, 8.0, 30.0):
        values = fold_tiles(x, torch.tensor([7]), weight, width=7, stats=STATS, threshold=threshold)
        assert_all_close(values, expected, rtol=3e-6, atol=2e-6)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_huge_logits_stay_finite(softcap: float | None) -> None:
    """±1e4 in the raw logits, rising over the tiles: log-probs are differences of 1e4, rounded at 1e-3."""
    data = rows_of(4, 60, scale=30.0)
    data.pop("bias")
    data["x"][:, ::7] = 1e4
    data["x"][:, 1::7] = -1e4
    data["x"][1] = torch.linspace(-1e4, 1e4, 60)
    data["x"][2] = -1e4
    data["targets"][:] = torch.tensor([0, 59, 8, 1])
    values = fold_tiles(**data, width=16, stats=STATS, softcap=softcap)
    assert all(value.isfinite().all() for value in values.values())
    expected = truth(**data, softcap=softcap)
    assert_all_close({"logps": values["logps"], "lse": values["lse"]}, expected, rtol=1e-6, atol=1e-3)
    rest = {name: values[name] for name in ("unit_gradient", "entropy", "is_top1", "log_sum_sq_probs")}
    assert_all_close(rest, expected, rtol=1e-5, atol=1e-5)


def test_targets_out_of_range_read_nothing_and_become_nan() -> None:
    """At 2**60 rows away, any read would end the process. Ranges are per tile and per vocabulary: 33 is beyond it."""
    data = rows_of(6, 33)
    data.pop("bias")
    good = data["targets"].clone()
    bad = torch.tensor([True, False, True, True, False, True])
    data["targets"][bad] = torch.tensor([-(2**58), 33, 2**60, -(2**63)])
    values = fold_tiles(**data, width=10)
    expected = truth(data["x"], good, data["weight"])
    for name in ("logps", "unit_gradient"):
        assert values[name][bad].isnan().all()
        torch.testing.assert_close(values[name][~bad], expected[name][~bad].float(), rtol=3e-6, atol=1e-5)
    out = torch.empty(6, 33)
    lse, logps, ones = expected["lse"].float(), expected["logps"].float(), torch.ones(6)
    logit_gradient_(data["x"].clone(), out, data["targets"], None, 0, lse, logps, ones, vocab_size=33)
    assert out[bad].isnan().all()
    assert out[~bad].isfinite().all()


def test_the_first_of_equal_logits_is_top1() -> None:
    """Equal maxima in one tile and in two; row 2 has its maximum in the second tile only."""
    x = torch.zeros(3, 8)
    x[0, [2, 3]] = 5.0
    x[1, [1, 6]] = 5.0
    x[2, 5] = 5.0
    state = RowState.fresh(3, "cpu", ("is_top1",))
    for first in (0, 4):
        fold_(x[:, first : first + 4].contiguous(), None, torch.zeros(3, dtype=torch.int64), None, first, state)
    assert state.best_index is not None
    assert state.best_index.tolist() == [2, 1, 5]
    assert state.weighted_sum is None
    assert state.logit_sum is None


def test_masked_vocabulary_entries_have_no_probability() -> None:
    """A bias of −∞ over the whole first tile and a part of the second: what is left is a softmax of its own."""
    data = rows_of(3, 24)
    bias = torch.zeros(24)
    bias[:10] = -math.inf
    data["targets"][:] = torch.tensor([10, 15, 23])
    stats = ("entropy", "is_top1", "log_sum_sq_probs")
    values = fold_tiles(data["x"], data["targets"], data["weight"], bias, width=8, stats=stats)
    assert_all_close(values, truth(data["x"][:, 10:], data["targets"] - 10, data["weight"][10:]), rtol=3e-6, atol=1e-5)


@pytest.mark.parametrize("options", HEADS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logit_gradients(dtype: torch.dtype, options: dict[str, Any]) -> None:
    data = rows_of(4, 1100)  # more than one block of columns
    expected = truth(**data, **options)
    grad = torch.tensor([1.0, -2.0, 0.0, 0.5])
    lse, logps = expected["lse"].float(), expected["logps"].float()
    for first, last in ((0, 1060), (1060, 1100)):
        tile = torch.empty(4, 1103)[:, : last - first].copy_(data["x"][:, first:last])
        out = tile if dtype == torch.float32 and first == 0 else torch.empty_like(tile, dtype=dtype)
        logit_gradient_(tile, out, data["targets"], data["bias"], first, lse, logps, grad, vocab_size=1100, **options)
        exact = grad[:, None] * expected["logit_gradient"][:, first:last]
        torch.testing.assert_close(out.double(), exact, rtol=2 * STEP[dtype] + 1e-5, atol=1e-6)


def test_rescaling_leaves_other_rows_alone() -> None:
    accumulator = torch.randn(3, 1030)
    before = accumulator.clone()
    rescale_rows_(accumulator, torch.tensor([1.0, 0.25, 0.0]))
    assert torch.equal(accumulator, torch.stack([before[0], 0.25 * before[1], 0.0 * before[2]]))


@triton.jit
def _math_kernel(
    u_ptr: tl.tensor, tanh_ptr: tl.tensor, slope_ptr: tl.tensor, expm1_ptr: tl.tensor, BLOCK: tl.constexpr
) -> None:
    index = tl.arange(0, BLOCK)
    u = tl.load(u_ptr + index)
    value, slope = device_math.tanh(u)
    tl.store(tanh_ptr + index, value)
    tl.store(slope_ptr + index, slope)
    tl.store(expm1_ptr + index, device_math.expm1(-tl.abs(u)))


def test_tanh_keeps_its_digits() -> None:
    """From 1e-30 to 1e30 and both signs; near 0 it is u to the last digit, which a difference of exps would miss."""
    u = torch.cat([torch.logspace(-30, 30, 2000), torch.linspace(0.01, 12.0, 2096)])
    u[::2] *= -1.0
    tanh, slope, expm1 = torch.empty(4096), torch.empty(4096), torch.empty(4096)
    _math_kernel[(1,)](u, tanh, slope, expm1, BLOCK=4096)
    exact = u.double()
    torch.testing.assert_close(tanh.double(), exact.tanh(), rtol=4e-7, atol=0.0)
    torch.testing.assert_close(slope.double(), 1.0 / exact.cosh() ** 2, rtol=2e-6, atol=1e-37)
    torch.testing.assert_close(expm1.double(), torch.expm1(-exact.abs()), rtol=4e-7, atol=0.0)


def test_no_rows_and_no_columns() -> None:
    nothing = torch.empty(0, dtype=torch.int64)
    state = RowState.fresh(0, "cpu", STATS)
    fold_(torch.empty(0, 8), torch.empty(0, 8), nothing, None, 0, state)
    rescale_rows_(torch.empty(0, 4), state.rescale)
    finish_unit_gradient_(torch.empty(0, 4), torch.empty(8, 4), nothing, state)
    empty = torch.empty(0)
    logit_gradient_(torch.empty(0, 8), torch.empty(0, 8), nothing, None, 0, empty, empty, empty, vocab_size=8)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tile": torch.zeros(2, 4, dtype=torch.bfloat16)}, TypeError, "tile is torch.bfloat16"),
        ({"tile": torch.zeros(4, 2).T}, ValueError, r"tile has strides \(1, 2\)"),
        ({"tile": torch.zeros(2, MAX_COLUMNS + 1)}, ValueError, "8193 columns"),
        ({"probs_out": torch.zeros(2, 3)}, ValueError, r"probs_out has shape \(2, 3\); \(2, 4\)"),
        ({"probs_out": torch.zeros(2, 4, dtype=torch.float64)}, TypeError, "probs_out is torch.float64"),
        ({"targets": torch.zeros(2, dtype=torch.int32)}, TypeError, "targets is torch.int32"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, ValueError, r"targets has shape \(3,\)"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias has shape \(5,\).* V ≥ 6"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_tiles_that_do_not_fit_are_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs: dict[str, Any] = {
        "tile": torch.zeros(2, 4),
        "probs_out": None,
        "targets": torch.zeros(2, dtype=torch.int64),
        "bias": None,
        "first_column": 2,
    }
    inputs.update(changes)
    with pytest.raises(error, match=message):
        fold_(**inputs, state=RowState.fresh(2, "cpu"))
    with pytest.raises(ValueError, match=r"weight has shape \(8, 3\)"):
        finish_unit_gradient_(torch.zeros(2, 4), torch.zeros(8, 3), inputs["targets"], RowState.fresh(2, "cpu"))
