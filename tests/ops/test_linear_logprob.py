"""`fastdpo.linear_logprob`: every backend against float64, in every dtype, with ragged tiles; gradients; laws."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from head_inputs import BACKENDS, plain, problem
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastdpo
from fastdpo.formulas import oracle
from fastdpo.formulas.head_options import STATS
from fastdpo.ops.linear_logprob.head import Head

# Error against float64 beyond that of plain torch in the same dtype, relative to the largest value. Gradients are
# rounded to the input's dtype, after one more rounding of the saved unit gradient: 2 × 2^-9 in bf16, 2 × 2^-12 in fp16.
SLACK = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several row chunks and vocabulary slices, with a ragged last one of each."""
    monkeypatch.setenv("FASTDPO_TILE", "100x400")


def run(
    function: Any, data: dict[str, Tensor], trained: str, *, upcast: bool = False, bias: bool = True, **options: Any
) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    """Log-probs, stats, and the gradients of a weighted sum of the log-probs with respect to `trained`."""
    names = ["hidden", "weight"] + ["bias"] * bias
    inputs = {name: data[name].double() if upcast else data[name].clone() for name in names}
    for name in names:
        inputs[name].requires_grad_(name in trained)
    logps, stats = function(**inputs, targets=data["targets"], stats=STATS, **options)
    weights = torch.linspace(-1.0, 2.0, len(logps))
    grads = torch.autograd.grad((weights * logps).sum(), [inputs[name] for name in names if name in trained])
    return logps, stats, list(grads)


def assert_three_way(truth: Tensor, found: Tensor, peer: Tensor, slack: float) -> None:
    """found's error is at most the peer's plus `slack`, both relative to the largest true value."""
    size = truth.abs().max().clamp(min=1.0)
    error, peers = ((x.double() - truth).abs().max() / size for x in (found, peer))
    assert error <= peers + slack, f"error {error:.2e}, plain torch {peers:.2e}"


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"bias": False},
    "bias": {},
    "softcap": {"bias": False, "softcap": 5.0},
    "scale, temperature": {"bias": False, "logit_scale": 0.3, "temperature": 0.7},
    "all": {"softcap": 5.0, "logit_scale": 0.3, "temperature": 0.7},
}
# The interpreter takes about 1 ms per program: small shapes there
SHAPES = {"torch": (255, 507, 1003), "triton": (7, 19, 903)}
TRAINED = ("hidden", "weight bias", "hidden weight")


@pytest.mark.parametrize("dtype", SLACK)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_three_way(backend: str, options: str, dtype: torch.dtype) -> None:
    settings = OPTIONS[options]
    for trained, ignored in zip(TRAINED, (True, False, True), strict=True):
        if "bias" in trained and not settings.get("bias", True):
            trained = "weight"
        data = problem(*SHAPES[backend], dtype, ignored=ignored, scale=0.2)
        logps, stats, grads = run(fastdpo.linear_logprob, data, trained, backend=backend, **settings)
        true_logps, true_stats, true_grads = run(oracle.linear_logprob, data, trained, upcast=True, **settings)
        peer_logps, _, peer_grads = run(plain, data, trained, **settings)
        # 16-bit logits are the peers' largest error: the tile is fp32, so fp32's slack holds for every dtype
        assert_three_way(true_logps, logps, true_logps.float(), SLACK[torch.float32])
        assert (logps.double() - true_logps).abs().max() <= (peer_logps.double() - true_logps).abs().max() + 1e-5
        for name, truth in true_stats.items():
            torch.testing.assert_close(stats[name].double(), truth.double(), rtol=1e-5, atol=1e-4)
        for grad, truth, peer in zip(grads, true_grads, peer_grads, strict=True):
            assert grad.dtype == dtype
            assert_three_way(truth, grad, peer, SLACK[dtype])


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias", "hidden weight bias"])
def test_gradcheck(trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDPO_TILE", "2x3")
    data = problem(5, 3, 7, torch.float64)
    data["targets"][1] = -100
    names = ("hidden", "weight", "bias")

    def logps(*tensors: Tensor) -> Any:
        named = dict(zip(names, tensors, strict=True))
        return fastdpo.linear_logprob(**named, targets=data["targets"], softcap=2.0, logit_scale=0.5, temperature=0.7)

    assert torch.autograd.gradcheck(logps, [data[name].requires_grad_(name in trained) for name in names])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rising", [True, False])
def test_huge_logits(backend: str, rising: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits up to ±1e4, rising or falling along the vocabulary, so that peaks move in every slice or never again."""
    monkeypatch.setenv("FASTDPO_TILE", "3x16")
    vocab = 90
    ramp = torch.linspace(-1e4, 1e4, vocab, dtype=torch.float64)
    weight = (ramp if rising else ramp.flip(0)).float()[:, None]
    hidden = torch.tensor([[1.0], [0.5], [-1.0], [0.0], [1e-3]], requires_grad=True)
    targets = torch.tensor([vocab - 1, 3, vocab // 2, 0, 1])
    logps = fastdpo.linear_logprob(hidden, weight, targets, backend=backend)
    truth = oracle.linear_logprob(hidden.detach().double(), weight.double(), targets)
    torch.testing.assert_close(logps.double(), truth, rtol=1e-6, atol=2e-3)  # 1e4 has an ulp of 1e-3
    (grad,) = torch.autograd.grad(logps.sum(), hidden)
    leaf = hidden.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(oracle.linear_logprob(leaf, weight.double(), targets).sum(), leaf)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vocabulary_padded_with_minus_infinity(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDPO_TILE", "4x8")
    data = problem(6, 4, 24, torch.float32)
    data["targets"] %= 14
    for masked in (slice(14, 24), slice(0, 8)):  # behind the vocabulary, and the whole first slice
        bias = data["bias"].clone()
        bias[masked] = -math.inf
        targets = torch.full_like(data["targets"], 10)
        hidden = data["hidden"].requires_grad_()
        logps = fastdpo.linear_logprob(hidden, data["weight"], targets, bias=bias, backend=backend)
        open_columns = bias.isfinite()
        chosen = int(open_columns[:10].sum())
        truth = (hidden @ data["weight"].T + bias)[:, open_columns].log_softmax(-1)[:, chosen]
        torch.testing.assert_close(logps, truth)
        torch.testing.assert_close(
            *(torch.autograd.grad(x.sum(), hidden, retain_graph=True)[0] for x in (logps, truth))
        )


def test_a_confident_row_keeps_its_gradient() -> None:
    """1 − p_y = 6.1e-6: the gradient is (1 − p_y)·(W_y − W_other), which p_y rounded to 16 or 32 bits would lose."""
    odds = math.exp(-12.0)
    for dtype, rtol in ((torch.float32, 1e-5), (torch.bfloat16, 2**-7)):
        for backend, frozen in itertools.product(BACKENDS, (True, False)):
            hidden = torch.ones(1, 1, dtype=dtype, requires_grad=True)
            weight = torch.tensor([[12.0], [0.0]], dtype=dtype, requires_grad=not frozen)
            logps = fastdpo.linear_logprob(hidden, weight, torch.tensor([0]), backend=backend)
            (grad,) = torch.autograd.grad(logps.sum(), hidden)
            assert logps.item() == pytest.approx(-math.log1p(odds), rel=1e-5)
            assert grad.item() == pytest.approx(12.0 * odds / (1.0 + odds), rel=rtol)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ignore_index", [-100, 7])
def test_ignored_rows_reach_no_gemm(backend: str, ignore_index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    matmul = Head.matmul
    monkeypatch.setattr(Head, "matmul", lambda self, a, b, out: (rows.append(len(a)), matmul(self, a, b, out)))
    data = problem(9, 4, 50, torch.float32)
    data["targets"][data["targets"] == ignore_index] = 8
    data["targets"][2:7] = ignore_index
    data["hidden"][2:7] = math.nan
    hidden = data["hidden"].requires_grad_()
    logps, stats = fastdpo.linear_logprob(
        hidden, data["weight"], data["targets"], ignore_index=ignore_index, backend=backend, stats=STATS
    )
    assert rows
    assert set(rows) == {4}
    assert logps[2:7].tolist() == [0.0] * 5
    assert all(values[2:7].tolist() == [0] * 5 for values in stats.values())
    # NaN that arrives for ignored rows stays there too
    upstream = torch.where(data["targets"] == ignore_index, math.nan, 1.0)
    (grad,) = torch.autograd.grad(logps, hidden, upstream)
    assert grad.isfinite().all()
    assert grad[2:7].eq(0.0).all()
    assert grad[:2].ne(0.0).all()
    expected = oracle.linear_logprob(hidden[7:].detach(), data["weight"], data["targets"][7:])
    torch.testing.assert_close(logps[7:], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_score(backend: str) -> None:
    data = problem(3, 4, 50, torch.float32)
    for hidden, targets in ((data["hidden"][:0], data["targets"][:0]), (data["hidden"], torch.full((3,), -100))):
        leaf, weight = hidden.clone().requires_grad_(), data["weight"].clone().requires_grad_()
        for trained in ((leaf, data["weight"]), (leaf, weight)):
            logps, stats = fastdpo.linear_logprob(*trained, targets, backend=backend, stats=STATS)
            assert logps.tolist() == [0.0] * len(targets)
            assert all(len(values) == len(targets) for values in stats.values())
            grads = torch.autograd.grad(logps.sum(), [x for x in trained if x.requires_grad])
            assert all(grad.eq(0.0).all() for grad in grads)
        assert grads[0].shape == leaf.shape


@given(seed=st.integers(0, 2**16), shift=st.floats(-1e3, 1e3))
@settings(max_examples=20, deadline=None)
def test_a_shift_of_all_logits_changes_nothing(seed: int, shift: float) -> None:
    data = problem(4, 3, 31, torch.float64)
    data["hidden"] *= 1 + seed % 5
    found = [
        fastdpo.linear_logprob(
            data["hidden"], data["weight"], data["targets"], bias=data["bias"] + s, stats=("entropy",)
        )
        for s in (0.0, shift)
    ]
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0.0, atol=1e-9)
    torch.testing.assert_close(found[0][1]["entropy"], found[1][1]["entropy"], rtol=0.0, atol=1e-9)


def test_bf16_completion_is_closer_than_bf16_logits() -> None:
    """A completion of 512 tokens: at least 50 times closer to float64 than the softmax of bf16 logits."""
    g = torch.Generator().manual_seed(0)
    errors = []
    for _ in range(5):
        hidden = torch.randn(512, 64, generator=g).bfloat16()
        weight = (0.4 * torch.randn(2000, 64, generator=g)).bfloat16()
        targets = torch.randint(0, 2000, (512,), generator=g)
        truth = oracle.linear_logprob(hidden.double(), weight.double(), targets).sum()
        ours = fastdpo.linear_logprob(hidden, weight, targets).sum()
        peer = (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None]).sum()
        errors.append([abs(float(x - truth)) for x in (ours, peer)])
    ours, theirs = torch.tensor(errors).median(0).values.tolist()
    assert 50 * ours < theirs
