"""`fastdpo.linear_logprob` as an operator: opcheck, graphs, autocast, layouts, waits."""

from __future__ import annotations

import pytest
import torch
from head_inputs import BACKENDS, problem
from sync_watch import SyncWatch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastdpo
from fastdpo.formulas import oracle
from fastdpo.formulas.head_options import STATS
from fastdpo.ops.linear_logprob.head import Head
from fastdpo.ops.linear_logprob.operators import linear_logprob as operator
from fastdpo.ops.linear_logprob.tiles import WORKSPACE
from fastdpo_kernels.linear_logprob.fold import RowState


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several row chunks and vocabulary slices, with a ragged last one of each."""
    monkeypatch.setenv("FASTDPO_TILE", "100x400")


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
