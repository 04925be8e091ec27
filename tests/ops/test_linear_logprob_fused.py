"""The head's fused product in Triton's interpreter, three ways: float64, plain torch in the dtype, and the kernels.

The interpreter truncates float32 → bfloat16 where hardware rounds, so E is off by up to 2⁻⁸ there, and the gradient's
own rounding by as much again. Every buffer is poisoned with NaN before a kernel writes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fused_inputs import MATMUL, SLACK, ours, problem
from torch import Tensor

import fastdpo
from fastdpo.formulas import oracle
from fastdpo.ops.linear_logprob.tiles import WORKSPACE, plan_fused
from fastdpo_kernels.linear_logprob import merge as head_merge
from fastdpo_kernels.linear_logprob.gemm import LIFT_LIMIT
from fastdpo_kernels.linear_logprob.tiles import INTERPRETED


@pytest.fixture(autouse=True)
def poisoned_and_fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Uninitialised memory is NaN, float32 may be rounded to TF32 (exact in the interpreter), no fallback."""
    monkeypatch.setenv("FASTDPO_HEAD", "fused")
    before = MATMUL.fp32_precision
    MATMUL.fp32_precision = "tf32"
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    MATMUL.fp32_precision = before


def exact(data: dict[str, Tensor], *, biased: bool = False, **options: Any) -> tuple[Tensor, Tensor]:
    """The same in float64, by the oracle."""
    hidden = data["hidden"].double().requires_grad_()
    bias = data["bias"].double() if biased else None
    options.pop("workspace", None)
    logps = oracle.linear_logprob(hidden, data["weight"].double(), data["targets"], bias=bias, **options)
    (gradient,) = torch.autograd.grad(logps, hidden, data["grad"].double())
    return logps.detach(), gradient


def plain(
    data: dict[str, Tensor],
    *,
    biased: bool = False,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """What torch gives whose logits are in the dtype, log-softmax in float32."""
    hidden = data["hidden"].clone().requires_grad_()
    z = torch.nn.functional.linear(hidden, data["weight"], data["bias"] if biased else None) * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    logps = (z.float() / temperature).log_softmax(1).gather(1, data["targets"].clamp(min=0)[:, None])[:, 0]
    (gradient,) = torch.autograd.grad(logps, hidden, data["grad"])
    return logps.detach(), gradient


def assert_three_way(data: dict[str, Tensor], dtype: torch.dtype, **options: Any) -> None:
    logps, gradient, scored = ours(data, **options)
    true_logps, true_gradient = exact(data, **options)
    torch_logps, torch_gradient = plain(data, **options)
    for name, slack, found, truth, theirs in (
        ("logps", SLACK[dtype][0], logps, true_logps, torch_logps),
        ("reference", SLACK[dtype][0], scored, true_logps, torch_logps),
        ("gradient", SLACK[dtype][1], gradient, true_gradient, torch_gradient),
    ):
        error, allowed = (found - truth).abs().max(), (theirs - truth).abs().max()
        assert error <= allowed + slack * truth.abs().max(), (name, float(error), float(allowed))


OPTIONS = [
    {},
    {"biased": True, "logit_scale": 0.25, "temperature": 0.7},
    {"softcap": 4.0},
    {"softcap": 4.0, "biased": True, "logit_scale": -0.5, "temperature": 1.3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ragged_shapes_with_every_option(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """No block divides 37, 41 or 203."""
    assert_three_way(problem(37, 48, 203, dtype), dtype, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_references_in_float16(options: dict[str, Any]) -> None:
    """Fused where no exponentials are written; plain torch rounds its logits to 16 bits, and is far off."""
    data = problem(37, 48, 203, torch.float16)
    bias = data["bias"] if options.get("biased") else None
    scales = {name: value for name, value in options.items() if name != "biased"}
    with torch.no_grad():
        found = fastdpo.linear_logprob(
            data["hidden"], data["weight"], data["targets"], bias=bias, backend="triton", **scales
        )
    truth = exact(data, **options)[0]
    error = (found - truth).abs().max()
    assert error <= 1e-6 * truth.abs().max()
    assert (plain(data, **options)[0] - truth).abs().max() > 20 * error


@pytest.mark.parametrize(
    ("rows", "hidden", "vocab", "dtype"),
    [(1, 8, 1, torch.bfloat16), (1, 8, 33, torch.float32), (16, 16, 32, torch.bfloat16), (33, 8, 97, torch.float32)],
)
def test_shapes_at_the_edge_of_a_tile(rows: int, hidden: int, vocab: int, dtype: torch.dtype) -> None:
    assert_three_way(problem(rows, hidden, vocab, dtype), dtype)


def test_targets_in_every_corner_of_a_tile() -> None:
    """Rows × columns of the first, a middle and the last, ragged tile."""
    rows, columns = INTERPRETED.rows, INTERPRETED.columns
    vocab = 2 * columns + 5
    corners = torch.tensor([0, columns - 1, columns, 2 * columns - 1, 2 * columns, vocab - 1])
    data = problem(2 * rows + 3, 24, vocab, torch.float32)
    for edge in (0, rows - 1, rows, 2 * rows - 1, 2 * rows, 2 * rows + 2):
        data["targets"][edge] = corners[edge % len(corners)]
    for shift in range(len(corners)):
        data["targets"][torch.tensor([0, rows - 1, rows, 2 * rows - 1, 2 * rows, 2 * rows + 2])] = corners.roll(shift)
        logps, gradient, _ = ours(data)
        truth = exact(data)
        torch.testing.assert_close(logps.double(), truth[0], rtol=0.0, atol=3e-6)
        torch.testing.assert_close(gradient.double(), truth[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"biased": True, "temperature": 0.5}], ids=str)
def test_flagged_rows_are_computed_anew(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Logits so far apart that most targets lie further below the maximum than E can hold."""
    data = problem(20, 40, 150, dtype, spread=60.0)
    data["targets"][::4] = (data["hidden"].float() @ data["weight"].float().t()).argmax(1)[::4]
    z = data["hidden"].double() @ data["weight"].double().t()
    z = (z + (data["bias"].double() if options else 0.0)) / options.get("temperature", 1.0)
    lift = (z.amax(1) - z.gather(1, data["targets"][:, None])[:, 0]) / math.log(2.0)
    flagged = lift > LIFT_LIMIT
    assert 5 <= int(flagged.sum()) <= 16
    _, gradient, _ = ours(data, **options)
    _, truth = exact(data, **options)
    for rows in (flagged, ~flagged):
        worst = (gradient - truth)[rows].norm(dim=1) / truth[rows].norm(dim=1).clamp(min=1e-3)
        assert worst.max() < (2e-4 if dtype == torch.float32 else 2**-6)


def test_flagged_rows_with_a_cap() -> None:
    """A cap of 60 lets logits be 120 apart, 173 in units of log 2; saturated ones have no gradient but the target's."""
    data = problem(12, 24, 100, torch.float32, spread=80.0)
    assert_three_way(data, torch.float32, softcap=60.0, biased=True)
    z = 60.0 * torch.tanh((data["hidden"].double() @ data["weight"].double().t() + data["bias"].double()) / 60.0)
    lift = (z.amax(1) - z.gather(1, data["targets"][:, None])[:, 0]) / math.log(2.0)
    assert 0 < int((lift > LIFT_LIMIT).sum()) < 12


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_logits_of_ten_thousand(softcap: float | None) -> None:
    """±1e4 exactly, in every position relative to the target; log-probs are differences of 1e4, rounded at 1e-3."""
    vocab = 70
    hidden = torch.zeros(4, 8)
    hidden[:, 0] = 1.0
    hidden[3, 0] = -1.0
    weight = torch.zeros(vocab, 8)
    weight[:, 0] = torch.linspace(-1e4, 1e4, vocab)
    weight[:, 1:] = torch.randn(vocab, 7, generator=torch.Generator().manual_seed(0))
    data = {
        "hidden": hidden,
        "weight": weight,
        "targets": torch.tensor([0, vocab - 1, vocab - 2, 3]),
        "bias": torch.zeros(vocab),
        "grad": torch.ones(4),
    }
    logps, gradient, scored = ours(data, softcap=softcap)
    true_logps, true_gradient = exact(data, softcap=softcap)
    assert logps.isfinite().all()
    assert gradient.isfinite().all()
    torch.testing.assert_close(logps.double(), true_logps, rtol=1e-6, atol=2e-3)
    assert torch.equal(logps, scored)
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=1e-4, atol=1e-3)


def test_confident_rows_keep_the_digits_of_their_gradient() -> None:
    """Logits (z, 0, 0), W = (1, 0, 0), target 0: dlogp/dh = 1 − p = 2/(eᶻ + 2), down to 1e-12, from bfloat16."""
    z = torch.tensor([9.0, 14.0, 28.0])
    weight = torch.zeros(3, 8)
    weight[0, 0] = 1.0
    hidden = torch.nn.functional.pad(z[:, None], (0, 7))
    data = {
        "hidden": hidden.bfloat16(),
        "weight": weight.bfloat16(),
        "targets": torch.zeros(3, dtype=torch.int64),
        "grad": torch.ones(3),
    }
    _, gradient, _ = ours(data)
    expected = 2.0 / (z.double().exp() + 2.0)
    torch.testing.assert_close(gradient[:, 0].double(), expected, rtol=2**-8, atol=0.0)
    assert (gradient[:, 1:] == 0.0).all()


def test_masked_tokens_have_no_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias of −∞ over more than a tile, which is merged first: what is left is a softmax of its own."""
    monkeypatch.setattr(head_merge, "_TILES", 1)
    masked = INTERPRETED.columns + 9
    data = problem(6, 16, masked + 70, torch.float32)
    data["bias"][:masked] = -math.inf
    data["targets"] = data["targets"] % 70 + masked
    logps, gradient, _ = ours(data, biased=True)
    rest = data | {
        "weight": data["weight"][masked:],
        "bias": data["bias"][masked:],
        "targets": data["targets"] - masked,
    }
    truth = exact(rest, biased=True)
    torch.testing.assert_close(logps.double(), truth[0], rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(gradient.double(), truth[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ignored_rows_reach_no_product(dtype: torch.dtype) -> None:
    """NaN hidden states there would show; all rows ignored, and some."""
    data = problem(21, 24, 90, dtype)
    data["hidden"][::3] = math.nan
    data["targets"][::3] = -100
    logps, gradient, scored = ours(data)
    kept = torch.arange(21) % 3 != 0
    truth = exact({**data, **{name: data[name][kept] for name in ("hidden", "targets", "grad")}})
    torch.testing.assert_close(logps[kept].double(), truth[0], rtol=0.0, atol=1e-5)
    torch.testing.assert_close(scored[kept].double(), truth[0], rtol=0.0, atol=1e-5)
    close = (gradient[kept] - truth[1]).abs().max() / truth[1].abs().max()
    assert close <= SLACK[dtype][1] + (2**-8 if dtype == torch.bfloat16 else 0.0)
    data["targets"][:] = -100
    for values in (logps[~kept], gradient[~kept], scored[~kept], *ours(data)):
        assert (values == 0.0).all()


def test_targets_outside_the_vocabulary_become_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where nothing checks them: at 2**40 rows away any read would end the process."""
    for module in ("fastdpo.loss.logprobs", "fastdpo.ops.linear_logprob.backends"):
        monkeypatch.setattr(f"{module}.check_targets", lambda *_: None)
    data = problem(6, 16, 50, torch.float32)
    truth = exact(data)
    bad = torch.tensor([True, False, True, True, False, True])
    data["targets"][bad] = torch.tensor([-1, 50, 2**40, -(2**40)])
    logps, gradient, scored = ours(data)
    for found, expected in ((logps, truth[0]), (scored, truth[0]), (gradient, truth[1])):
        assert found[bad].isnan().all()
        torch.testing.assert_close(found[~bad].double(), expected[~bad], rtol=1e-5, atol=3e-6)


def test_nan_hidden_states_give_nan_in_their_row_only() -> None:
    data = problem(18, 16, 70, torch.bfloat16)
    data["hidden"][5, 3] = math.nan
    logps, gradient, scored = ours(data)
    rest = torch.arange(18) != 5
    for found in (logps, scored, gradient):
        assert found[5].isnan().all()
        assert found[rest].isfinite().all()


def test_chunks_change_nothing_but_the_order_of_the_gradient_s_sum() -> None:
    """Four chunks in one buffer of 64 KiB: log-probs are bitwise those of one chunk."""
    data = problem(100, 16, 1003, torch.bfloat16)
    assert plan_fused(100, 1003, 2, 2**16, unit_gradient=True).chunks(1003) == 4
    one, four = (ours(data, workspace=workspace) for workspace in (WORKSPACE, 2**16))
    assert torch.equal(one[0], four[0])
    torch.testing.assert_close(one[1].float(), four[1].float(), rtol=2**-7, atol=1e-5)


def test_parts_of_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """35 rows at most 32 at a time are 32 + 3, as parts begin at multiples of 16. Tiles hold other rows then, so it is
    not bitwise."""
    data = problem(35, 16, 90, torch.float32)
    whole = ours(data)
    monkeypatch.setattr("fastdpo.ops.linear_logprob.tiles.FUSED_ROWS", 32)
    monkeypatch.setattr("fastdpo.ops.linear_logprob.tiles.FUSED_ROWS_WITHOUT_GRADIENT", 32)
    assert plan_fused(35, 90, 4, WORKSPACE, unit_gradient=True).rows == 32
    for found, expected in zip(ours(data), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_every_run_gives_the_same_bits() -> None:
    """Whatever lay in memory before. That no order of programs changes them, only a card can show."""
    data = problem(40, 24, 300, torch.bfloat16, spread=20.0)
    first, second = ours(data), ours(data)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_trained_heads_take_the_log_normalizers() -> None:
    """Forward fused, backward by recomputed tiles, which need them."""
    data = problem(9, 16, 70, torch.bfloat16)
    leaves = [data[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    logps = fastdpo.linear_logprob(leaves[0], leaves[1], data["targets"], bias=leaves[2], backend="triton")
    found = torch.autograd.grad(logps, leaves, data["grad"])
    exact_leaves = [data[name].double().requires_grad_() for name in ("hidden", "weight", "bias")]
    truth = oracle.linear_logprob(exact_leaves[0], exact_leaves[1], data["targets"], bias=exact_leaves[2])
    for one, other in zip(found, torch.autograd.grad(truth, exact_leaves, data["grad"].double()), strict=True):
        assert (one - other).abs().max() <= 2**-6 * other.abs().max()
