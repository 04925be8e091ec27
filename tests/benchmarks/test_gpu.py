"""Kernels against float64, on a card with FASTDPO_TEST_DEVICE=cuda and, at toy size and interpreted, everywhere.

The comparisons are `benchmarks.gpu.checks`, which the correctness stage of `python -m benchmarks.gpu` runs too.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace

import pytest
import torch

import fastdpo
from benchmarks.gpu import checks
from benchmarks.gpu.checks import Error
from benchmarks.gpu.preference_loss import Step, captured
from benchmarks.gpu.sizes import REAL, TOY, HeadCheck, Sizes
from fastdpo.formulas import LOSSES
from fastdpo.ops.linear_logprob.tiles import plan_fused
from fastdpo_kernels.linear_logprob import gemm as head_gemm
from fastdpo_kernels.linear_logprob import tiles as head_tiles

DEVICES = [pytest.param(TOY, id="cpu"), pytest.param(REAL, id="cuda", marks=pytest.mark.gpu)]
HEADS = [pytest.param(s, check, id=f"{s.device}-{check.name}", marks=[pytest.mark.gpu] * s.on_gpu)
         for s in (TOY, REAL) for check in s.checks]  # fmt: skip
on_every_device = pytest.mark.parametrize("sizes", DEVICES)
SEED = 20261128


def assert_ok(errors: list[Error]) -> None:
    assert errors
    assert not [str(error) for error in errors if not error.ok]


@pytest.mark.parametrize(("sizes", "check"), HEADS)
def test_head(sizes: Sizes, check: HeadCheck) -> None:
    assert_ok(checks.check_head(check, sizes.device, sizes.backend, SEED, sizes.poison))


def marks(sizes: Sizes, loss_type: str) -> list[pytest.MarkDecorator]:
    """On a card each loss compiles for seconds: those that the stage does not check are slow there."""
    return [pytest.mark.gpu] * sizes.on_gpu + [pytest.mark.slow] * (sizes.on_gpu and loss_type not in sizes.losses)


LOSS_CASES = [
    pytest.param(sizes, name, id=f"{sizes.device}-{name}", marks=marks(sizes, name))
    for sizes in (TOY, REAL)
    for name in LOSSES
]


@pytest.mark.parametrize(("sizes", "loss_type"), LOSS_CASES)
def test_loss(sizes: Sizes, loss_type: str) -> None:
    assert_ok(checks.check_loss(loss_type, 33, sizes.device, sizes.backend, SEED))


@on_every_device
@pytest.mark.parametrize("scope", ["batch", "instance"])
@pytest.mark.parametrize("variant", ["released", "paper"])
def test_dynamic_beta(sizes: Sizes, scope: str, variant: str) -> None:
    assert_ok(checks.check_dynamic_beta(33, sizes.device, sizes.backend, SEED, scope=scope, variant=variant))


@on_every_device
def test_loss_per_token(sizes: Sizes) -> None:
    assert_ok(checks.check_token_loss(33, sizes.device, sizes.backend, SEED))


@on_every_device
def test_selective_logprob(sizes: Sizes) -> None:
    assert_ok(checks.check_selective(sizes.logits, sizes.device, sizes.backend, SEED))


@on_every_device
@pytest.mark.parametrize("seed", [SEED, 2**40 + 7])
def test_draws(sizes: Sizes, seed: int) -> None:
    assert_ok(checks.check_draws(sizes.draws, sizes.device, seed))


@on_every_device
def test_attention_with_shared_prefixes(sizes: Sizes) -> None:
    assert_ok(checks.check_attention(sizes.device, torch.bfloat16 if sizes.on_gpu else torch.float32, SEED))


@on_every_device
@pytest.mark.parametrize("per_token", [False, True])
def test_loss_in_a_graph(sizes: Sizes, per_token: bool) -> None:
    """Two replays are the first two steps of a fresh `DynamicBeta`: nothing in them waits for the host."""
    step = Step(8, sizes.device, per_token=per_token)
    expected = [[x.clone() for x in step()] for _ in range(2)]
    step = Step(8, sizes.device, per_token=per_token)
    replay, held = captured(step, sizes.device)
    step.reset()
    for loss, gradient in expected:
        replay()
        assert torch.equal(held[0], loss)
        assert torch.equal(held[1], gradient)


# What the comparisons themselves are worth, by hand


@pytest.mark.parametrize("sizes", [TOY, REAL], ids=["toy", "real"])
def test_checks_are_what_they_are_called(sizes: Sizes) -> None:
    """Chunks of E, and whether a tile's depth divides H, by the plans and tiles that a device would take."""
    found = {check.name: check for check in sizes.checks}
    assert len(found) == len(sizes.checks)

    def chunks(check: HeadCheck) -> int:
        plan = plan_fused(check.rows, check.vocab, check.dtype.itemsize, check.workspace, unit_gradient=True)
        return plan.chunks(check.vocab)

    several = {"several chunks, bf16", "one row in several chunks, bf16"}
    assert {name for name, check in found.items() if check.fused and chunks(check) > 1} == several
    depths = {tile.depth for tile in head_tiles.TILES.values()} if sizes is REAL else {head_tiles.INTERPRETED.depth}
    for check in found.values():
        assert check.hidden % 8 == 0 or not check.fused
        divided = {check.hidden % depth == 0 for depth in depths}
        assert divided == {check.name not in ("H that no depth divides, bf16", "odd H, bf16")}, check.name
    assert head_gemm.LIFT_LIMIT * math.log(2.0) < checks.FLAGGED_BELOW


def test_a_check_of_the_fused_product_takes_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    (check,) = (check for check in TOY.checks if check.name == "TF32")
    before = torch.backends.cuda.matmul.fp32_precision
    with pytest.raises(ValueError, match="FASTDPO_HEAD=fused cannot serve this head: float32 products are not to be"):
        checks.check_head(replace(check, tf32=False), "cpu", "triton", SEED)
    assert torch.backends.cuda.matmul.fp32_precision == before
    assert "FASTDPO_HEAD" not in os.environ


@pytest.mark.parametrize(
    ("target", "name", "wrong"),
    [
        ("fastdpo.ops.linear_logprob.head.Head.matmul_add", "several chunks, bf16", {"gradient of hidden"}),
        ("fastdpo_kernels.linear_logprob.merge.rescue_", "flagged rows, bf16",
         {"gradient of hidden", "gradient of hidden, flagged rows", "values that differ in a second run"}),
    ],
)  # fmt: skip
def test_a_launch_left_out_is_seen(target: str, name: str, wrong: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A += E W of all chunks but the first; flagged rows anew, without which they are NaN."""
    monkeypatch.setattr(target, lambda *_, **__: None)
    (check,) = (check for check in TOY.checks if check.name == name)
    errors = checks.check_head(check, "cpu", "triton", SEED)
    assert {error.name for error in errors if not error.ok} == wrong


@pytest.mark.parametrize("name", ["selective_logprob", "token_preference_loss"])
def test_another_scale_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs a twentieth larger: every output follows them."""
    right = getattr(fastdpo, name)
    monkeypatch.setattr(fastdpo, name, lambda x, *args, **kwargs: right(1.05 * x, *args, **kwargs))
    check = {
        "selective_logprob": lambda: checks.check_selective(TOY.logits, "cpu", "torch", SEED),
        "token_preference_loss": lambda: checks.check_token_loss(33, "cpu", "torch", SEED),
    }[name]
    assert not [error.name for error in check() if error.ok]


def test_errors_by_hand() -> None:
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert checks.in_norm(torch.tensor([3.0, 4.5]), truth) == pytest.approx(0.1)
    assert checks.in_norm(torch.tensor([3.0]), torch.zeros(1)) == 3.0
    assert checks.largest(torch.tensor([3.0, 5.0]), truth) == pytest.approx(0.25)
    assert checks.largest(torch.tensor([0.5]), torch.tensor([0.25])) == pytest.approx(0.25)  # relative to 1 at least
    assert math.isnan(checks.largest(torch.tensor([math.nan, 4.0]), truth))
    assert not Error("", math.nan, 1.0).ok
    assert Error("", 1.0, 1.0).ok


@pytest.mark.parametrize("wrong", ["a gradient half as large", "rows left unwritten", "another draw each time"])
def test_a_wrong_head_is_seen(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = fastdpo.linear_logprob

    def broken(hidden: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        if wrong == "a gradient half as large":
            hidden = 0.5 * hidden + 0.5 * hidden.detach()
        logps = right(hidden, *args, **kwargs)  # type: ignore[arg-type]
        if wrong == "rows left unwritten":
            logps = logps + torch.tensor([0.0] * 4 + [math.nan])
        return logps + 1e-6 * torch.rand(()) * (wrong == "another draw each time")

    monkeypatch.setattr(fastdpo, "linear_logprob", broken)
    (check,) = (check for check in TOY.checks if check.name == "fp32")
    errors = checks.check_head(check, "cpu", "torch", SEED)
    assert {error.name for error in errors if not error.ok} == {
        "a gradient half as large": {"gradient of hidden"},
        "rows left unwritten": {"log-probs", "values that differ in a second run"},
        "another draw each time": {"values that differ in a second run"},
    }[wrong]
