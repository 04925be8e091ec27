"""`fastdpo.linear_logprob`: every backend against float64, in every dtype, with ragged tiles; gradients; laws."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sync_watch import SyncWatch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastdpo
from fastdpo.formulas import oracle
from fastdpo.formulas.head_options import STATS
from fastdpo.ops.linear_logprob.head import Head
from fastdpo.ops.linear_logprob.operators import linear_logprob as operator
from fastdpo.ops.linear_logprob.tiles import MAX_ROWS, WORKSPACE, TilePlan, plan_fused, plan_gpu_tiles, plan_tiles
from fastdpo_kernels.linear_logprob.fold import RowState

BACKENDS = ("torch", "triton")
# Error against float64 beyond that of plain torch in the same dtype, relative to the largest value. Gradients are
# rounded to the input's dtype, after one more rounding of the saved unit gradient: 2 × 2^-9 in bf16, 2 × 2^-12 in fp16.
SLACK = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several row chunks and vocabulary slices, with a ragged last one of each."""
    monkeypatch.setenv("FASTDPO_TILE", "100x400")


def problem(
    rows: int, hidden: int, vocab: int, dtype: torch.dtype, *, ignored: bool = False, scale: float = 1.0
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(rows + hidden + vocab)
    targets = torch.randint(0, vocab, (rows,), generator=g)
    targets[:2] = torch.tensor([0, vocab - 1])[:rows]
    if ignored:
        targets[::3] = -100
    return {
        "hidden": (scale * torch.randn(rows, hidden, generator=g)).to(dtype),
        "weight": torch.randn(vocab, hidden, generator=g).to(dtype),
        "bias": torch.randn(vocab, generator=g).to(dtype),
        "targets": targets,
    }


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


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, **options: Any) -> Any:
    """What everybody writes: logits in the inputs' dtype, softmax in float32."""
    softcap, scale = options.get("softcap"), options.get("logit_scale", 1.0)
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logits = logits.float() / options.get("temperature", 1.0)
    log_probs = logits.log_softmax(-1)
    ignored = targets == -100
    logps = log_probs.gather(1, targets.clamp(min=0)[:, None])[:, 0].masked_fill(ignored, 0.0)
    return logps, {}


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


# What PyTorch asks of an operator


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", ["hidden", "hidden weight bias"])
def test_opcheck(backend: str, trained: str) -> None:
    data = problem(3, 4, 20, torch.float32)
    tensors = [data[name].requires_grad_(name in trained) for name in ("hidden", "weight", "bias")]
    options = (data["targets"], -100, 0.5, 1.5, 3.0, torch.float32)
    options = (*options, trained == "hidden", False, ["entropy"], WORKSPACE, backend)
    torch.library.opcheck(operator, (*tensors, *options))
    transposed = tensors[1].detach().t().contiguous().t().requires_grad_("weight" in trained)
    torch.library.opcheck(operator, (tensors[0], transposed, *tensors[2:], *options))
    grad, lse = torch.ones(3), torch.zeros(3)
    plain = [x.detach() for x in tensors]
    backward = torch.ops.fastdpo.linear_logprob_backward.default
    torch.library.opcheck(backward, (grad, lse, lse, *plain, *options[:6], [True, True, True], WORKSPACE, backend))
    torch.library.opcheck(torch.ops.fastdpo.linear_logprob_scale.default, (torch.ones(3, 4), grad, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [True, False])
def test_full_graph_compile(backend: str, frozen: bool) -> None:
    data = problem(6, 4, 20, torch.float32, ignored=True)
    hidden, weight = data["hidden"].requires_grad_(), data["weight"].requires_grad_(not frozen)

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logps, stats = fastdpo.linear_logprob(hidden, weight, targets, backend=backend, stats=("entropy", "is_top1"))
        return (logps * logps).sum() + stats["entropy"].sum()

    leaves = [hidden] if frozen else [hidden, weight]
    expected = torch.autograd.grad(loss(hidden, weight, data["targets"]), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(hidden, weight, data["targets"]), leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fake_tensors(backend: str) -> None:
    with FakeTensorMode():
        hidden = torch.empty(2, 5, 8, dtype=torch.bfloat16, requires_grad=True)
        weight, targets = torch.empty(50, 8, dtype=torch.bfloat16), torch.empty(2, 5, dtype=torch.int64)
        logps, stats = fastdpo.linear_logprob(hidden, weight, targets, backend=backend, stats=("is_top1",))
        assert (logps.shape, logps.dtype, stats["is_top1"].dtype) == ((2, 5), torch.float32, torch.bool)
        logps.sum().backward()
        assert (hidden.grad.shape, hidden.grad.dtype) == ((2, 5, 8), torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_operands_and_nothing_else(backend: str, dtype: torch.dtype) -> None:
    data = problem(6, 16, 40, torch.float32)
    with torch.autocast("cpu", dtype):
        found, stats = fastdpo.linear_logprob(
            data["hidden"], data["weight"], data["targets"], backend=backend, stats=STATS
        )
    rounded = [data[name].to(dtype).double() for name in ("hidden", "weight")]
    truth, expected = oracle.linear_logprob(*rounded, data["targets"], stats=STATS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), truth, rtol=0.0, atol=1e-5)
    for name in STATS:
        torch.testing.assert_close(stats[name].double(), expected[name].double(), rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_layout(backend: str) -> None:
    """hidden[:, :-1] of (B, T, H), a weight with strided rows or columns: as their contiguous copies."""
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 5, 12, generator=g)[:, :-1]
    targets = torch.randint(0, 30, (2, 4), generator=g)
    wide = torch.randn(60, 12, generator=g)
    for weight in (wide[::2], wide[:30], torch.randn(12, 30, generator=g).t()):
        leaf = hidden.clone().requires_grad_()
        expected = fastdpo.linear_logprob(leaf.contiguous(), weight.contiguous(), targets)
        strided = torch.zeros(2, 5, 12)
        strided[:, :-1] = hidden
        strided.requires_grad_()
        found = fastdpo.linear_logprob(strided[:, :-1], weight, targets, backend=backend)
        torch.testing.assert_close(found, expected)
        (grad,) = torch.autograd.grad(expected.sum(), leaf)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), strided)[0][:, :-1], grad)
    bias, targets = torch.randn(30, 2, generator=g)[:, 0].requires_grad_(), targets.t().contiguous().t()
    found, expected = (
        fastdpo.linear_logprob(hidden, weight.contiguous(), y, bias=b, backend=backend)
        for b, y in ((bias, targets), (bias.contiguous(), targets.contiguous()))
    )
    torch.testing.assert_close(found, expected)
    # .sum() sends an expanded gradient back
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), bias)[0] for x in (found, expected)))


@pytest.mark.parametrize("trained", ["hidden", "hidden weight bias"])
def test_a_gpu_s_host_waits_once_and_a_gradient_s_tiles_start_no_sums(
    trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The count of scored rows serves the backward of a trained head too; its tiles need no buffers of a fold."""
    data = problem(9, 4, 700, torch.float32, ignored=True)
    leaves = [data[name].requires_grad_(name in trained) for name in ("hidden", "weight", "bias")]
    made = []
    fresh = RowState.fresh
    monkeypatch.setattr(RowState, "fresh", lambda *args: made.append(1) or fresh(*args))
    with SyncWatch([*leaves, data["targets"]]) as watch:
        logps = fastdpo.linear_logprob(leaves[0], leaves[1], data["targets"], bias=leaves[2], backend="triton")
        folds = len(made)
        logps.sum().backward()
    assert [sync.kind for sync in watch.syncs] == ["nonzero"]
    assert folds == len(made) == 1
    assert all((leaf.grad is not None) == leaf.requires_grad for leaf in leaves)


def test_no_grad_forms_no_unit_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    gemms = []
    monkeypatch.setattr(Head, "matmul_add", lambda *args: gemms.append(args))
    data = problem(6, 4, 1000, torch.float32)
    with torch.no_grad():
        assert not fastdpo.linear_logprob(
            data["hidden"].requires_grad_(), data["weight"], data["targets"]
        ).requires_grad
    assert not gemms


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [True, False])
def test_a_second_derivative_raises(backend: str, frozen: bool) -> None:
    data = problem(3, 4, 20, torch.float32)
    hidden, weight = data["hidden"].requires_grad_(), data["weight"].requires_grad_(not frozen)
    logps = fastdpo.linear_logprob(hidden, weight, data["targets"], backend=backend)
    (grad,) = torch.autograd.grad((logps**2).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="has no derivative: a second derivative"):
        grad.sum().backward()


def test_a_kept_graph_gives_the_same_gradient_again() -> None:
    """The saved rows are scaled in place only where the graph is freed."""
    data = problem(5, 4, 20, torch.float32)
    hidden = data["hidden"].requires_grad_()
    logps = fastdpo.linear_logprob(hidden, data["weight"], data["targets"])
    first, second, last = (
        torch.autograd.grad((k * logps).sum(), hidden, retain_graph=k < 3.0)[0].clone() for k in (1.0, 2.0, 3.0)
    )
    torch.testing.assert_close(second, 2.0 * first)
    torch.testing.assert_close(last, 3.0 * first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(logps.sum(), hidden)


@pytest.mark.parametrize("frozen", [True, False])
def test_the_caller_may_write_into_the_log_probs(frozen: bool) -> None:
    data = problem(4, 3, 20, torch.float32)
    hidden, weight = data["hidden"].requires_grad_(), data["weight"].requires_grad_(not frozen)
    mask = torch.tensor([1.0, 0.0, 2.0, 1.0])
    found, expected = (fastdpo.linear_logprob(hidden, weight, data["targets"]) for _ in range(2))
    found.mul_(mask)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), hidden)[0] for x in (found, expected * mask)))


# Memory


MEMORY = """
import re, torch, fastdpo
torch.set_num_threads(1)
def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
rows, hidden, vocab = {rows}, {hidden}, {vocab}
small = torch.ones(8, hidden, requires_grad=True)
fastdpo.linear_logprob(small, torch.ones(64, hidden), torch.zeros(8, dtype=torch.int64)).sum().backward()
x, weight = torch.randn(rows, hidden).requires_grad_(), torch.randn(vocab, hidden)
targets = torch.randint(0, vocab, (rows,))
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
fastdpo.linear_logprob(x, weight, targets).sum().backward()
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("vocab", [32_000, 256_000])
def test_peak_memory_does_not_depend_on_the_vocabulary(vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTDPO_TILE")
    rows, hidden = 1500, 64
    script = MEMORY.format(rows=rows, hidden=hidden, vocab=vocab)
    grown = int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)
    assert grown <= plan_tiles(rows, vocab, hidden).bytes() + rows * hidden * 4 + 16 * 2**20
    assert grown >= rows * hidden * 4  # the gradient at least, or nothing was measured


# Tile plans, and what is refused


def test_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTDPO_TILE")
    cache = {"rows": 1024, "hidden_size": 576}
    assert plan_tiles(vocab_size=49152, **cache).rows == 1024
    assert plan_tiles(5, 49152, 576).rows == 5
    assert plan_tiles(8192, 49152, 576) == plan_tiles(1024, 49152, 576)
    assert plan_tiles(1025, 49152, 576).rows == 513  # and 512: no part of one row
    for rows in (1023, 1024, 1025, 3000, 100_001):
        size = plan_tiles(rows, 49152, 576).rows
        assert size <= MAX_ROWS
        assert 0 <= -rows % size < -(-rows // MAX_ROWS)  # parts differ by less than their number
    assert plan_tiles(1024, 100, 576).columns == 100
    for rows, hidden in itertools.product((1, 16, 1024, 100_000), (8, 576, 4096, 16384)):
        plan = plan_tiles(rows, 256_000, hidden)
        assert plan.bytes() <= 8 * 2**20
        assert plan.columns % 256 == 0
        assert 256 <= plan.columns <= 2048


def test_plans_of_a_gpu_follow_the_workspace_and_no_cache() -> None:
    """By hand: 256 MiB hold 4,096 × 10,922 elements of 4 + 2 bytes, of which a program takes 8,192 columns; 8,192 rows
    of 16-bit exponentials are 16,384 columns wide, and 128,256 columns in 8 equal chunks of whole steps are 16,128."""
    older = {"vocab_size": 128_256, "newer": False, "itemsize": 2, "workspace": WORKSPACE}
    assert plan_gpu_tiles(4096, **older) == TilePlan(4096, 8192)
    assert plan_gpu_tiles(4097, **older) == TilePlan(2049, 8192)
    assert plan_gpu_tiles(8192, **(older | {"newer": True})) == TilePlan(8192, 5376)
    assert plan_gpu_tiles(300, **(older | {"workspace": 2**16})) == TilePlan(38, 256)
    plan = plan_fused(8192, 128_256, 2, WORKSPACE, unit_gradient=True)
    assert (plan.rows, plan.columns, plan.chunks(128_256)) == (8192, 16_128, 8)
    assert plan_fused(8193, 128_256, 2, WORKSPACE, unit_gradient=True).rows == 4112  # 4,097 in whole steps of 16
    assert plan_fused(4096, 128_256, 2, WORKSPACE, unit_gradient=False).chunks(128_256) == 1
    for rows, workspace in itertools.product((1, 77, 4096, 50_000), (2**16, 2**26, 2**28)):
        plan = plan_fused(rows, 128_256, 2, workspace, unit_gradient=True)
        assert 2 * plan.rows * plan.columns <= workspace
        assert plan.columns % 256 == 0


def test_plan_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDPO_TILE", "64x512")
    assert plan_tiles(1000, 50_000, 576) == TilePlan(64, 512)
    monkeypatch.setenv("FASTDPO_TILE", "64")
    with pytest.raises(ValueError, match=r"FASTDPO_TILE='64' must be rows x columns"):
        plan_tiles(1, 1, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.zeros(20, 5)}, ValueError, r"do not fit: \(3, 4\), \(20, 5\), \(3,\)"),
        ({"targets": torch.zeros(2, dtype=torch.int64)}, ValueError, r"\(2,\)"),
        ({"targets": torch.zeros(3, dtype=torch.int32)}, TypeError, "targets has dtype torch.int32"),
        (
            {"targets": torch.tensor([1, 20, -1])},
            ValueError,
            r"targets has 2 values outside \[0, 20\), the first is 20",
        ),
        ({"targets": torch.tensor([1, -100, 3]), "ignore_index": None}, ValueError, "the first is -100"),
        ({"bias": torch.zeros(19)}, ValueError, r"bias has shape \(19,\)"),
        ({"weight": torch.zeros(20, 4, dtype=torch.uint8)}, TypeError, "weight has dtype torch.uint8"),
        ({"weight": torch.zeros(20, 4, device="meta")}, ValueError, "weight is on meta, hidden on cpu"),
        ({"targets": torch.zeros(3, dtype=torch.int64, device="meta")}, ValueError, "targets is on meta"),
        ({"softcap": -1.0}, ValueError, "softcap=-1.0"),
        ({"temperature": 0.0}, ValueError, "temperature=0.0"),
        ({"logit_scale": math.inf}, ValueError, "logit_scale=inf"),
        ({"stats": ("perplexity",)}, ValueError, "perplexity"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str, backend: str) -> None:
    data: dict[str, Any] = problem(3, 4, 20, torch.float32)
    with pytest.raises(error, match=message):
        fastdpo.linear_logprob(**(data | change), backend=backend)


def test_backends_that_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    data = problem(3, 4, 20, torch.float64)
    with pytest.raises(ValueError, match=r"backend='triton' computes in float32 and cannot serve float64"):
        fastdpo.linear_logprob(**data, backend="triton")
    with pytest.raises(ValueError, match=r"backend='cuda' is unknown; accepted are auto, torch, triton"):
        fastdpo.linear_logprob(**data, backend="cuda")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match=r"backend='triton' cannot"):
        fastdpo.linear_logprob(**problem(3, 4, 20, torch.float32), backend="triton")
    monkeypatch.setenv("FASTDPO_BACKEND", "triton")
    with pytest.raises(ValueError, match=r"FASTDPO_BACKEND='triton' cannot"):
        fastdpo.linear_logprob(**problem(3, 4, 20, torch.float32))
