"""`selective_logprob` on both backends against float64, and what its in-place backward may and may not overwrite."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastdpo
from fastdpo.formulas import oracle
from fastdpo.loss.logprobs import selective_logprob
from fastdpo.ops.selective_logprob import backend_torch as selective_logprob_torch
from fastdpo.ops.selective_logprob import row_views

BACKENDS = ("torch", "triton")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: Relative step of the gradient's dtype, in which it is rounded once; the interpreter truncates to bfloat16.
STEP = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def rows_of(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits (..., V) and targets with the first and the last column among them, and every fifth one ignored."""
    g = torch.Generator().manual_seed(0)
    logits = (scale * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype)
    targets = torch.randint(0, shape[-1], shape[:-1], generator=g)
    flat = targets.view(-1)
    flat[:1], flat[-1:], flat[1::5] = 0, shape[-1] - 1, -100
    return logits, targets


def truth(logits: Tensor, targets: Tensor, grad: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Log-probs and dL/dlogits in float64, by autograd."""
    exact = logits.detach().double().requires_grad_()
    logps = oracle.selective_logprob(exact, targets, **options)
    return logps.detach(), torch.autograd.grad(logps, exact, grad.double())[0]


def scored(logits: Tensor, targets: Tensor, grad: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    logps = selective_logprob(logits, targets, **options)
    return logps.detach(), torch.autograd.grad(logps, logits, grad.to(logps.dtype))[0]


def weights(targets: Tensor) -> Tensor:
    return torch.linspace(-1.0, 2.0, targets.numel()).view(targets.shape)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(5,), (1, 1), (7, 33), (3, 4, 100), (3, 4097), (2, 1, 3, 2, 19)], ids=str)
def test_errors_do_not_exceed_those_of_torch(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Three-way: truth in float64, plain torch in the dtype, the operator. And its gradient is rounded once."""
    logits, targets = rows_of(*shape, dtype=dtype)
    grad = weights(targets)
    expected, expected_gradient = truth(logits, targets, grad, temperature=0.7)
    logps, gradient = scored(logits, targets, grad, temperature=0.7, backend=backend)
    plain = (logits / 0.7).log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    error_of_torch = (plain.double() - expected).masked_fill(targets == -100, 0.0).abs().max()
    assert logps.dtype == torch.promote_types(dtype, torch.float32)
    assert (logps - expected).abs().max() <= error_of_torch + 4 * STEP[logps.dtype]
    assert (logps[targets == -100] == 0.0).all()
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=2 * STEP[dtype], atol=STEP[logps.dtype])


def test_blocks_of_rows_join(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows per block, and runs of ignored rows of every length; then as on a GPU, where blocks are mixed."""
    logits, targets = rows_of(23, 50)
    targets[[4, 5, 6, 9, 12, 13, 22]] = -100
    grad = weights(targets)
    expected, expected_gradient = truth(logits, targets, grad)
    monkeypatch.setattr(selective_logprob_torch, "CPU_BLOCK_BYTES", 2 * 50 * 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert selective_logprob_torch._work(logits, torch.float32).shape == (2, 50)
    sizes = [len(x) for _, x, _ in row_views.blocks(logits, targets != -100, 2)]
    assert max(sizes) == 2
    assert sum(sizes) == 23
    for _ in range(2):
        logps, gradient = scored(logits, targets, grad, backend="torch")
        torch.testing.assert_close(logps, expected.float())
        torch.testing.assert_close(gradient, expected_gradient.float())
        monkeypatch.setattr(row_views, "_runs", lambda flags, count: [(0, count, None)])


CUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "shifted": ((3, 5, 20), lambda x: x[:, :-1]),
    "last": ((4, 40), lambda x: x[:, ::2]),
    "transposed": ((20, 6), lambda x: x.t()),
    "four": ((2, 3, 4, 20), lambda x: x[:, 1:, ::2]),
    "rows": ((12, 20), lambda x: x[::3]),
}


@pytest.mark.parametrize("kind", CUTS)
@pytest.mark.parametrize("inplace", [False, True])
def test_strided_logits(backend: str, kind: str, inplace: bool) -> None:
    shape, cut = CUTS[kind]
    base = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).requires_grad_() * 1.0
    untouched = base.detach().clone()
    logits = cut(base)
    _, targets = rows_of(*logits.shape)
    expected, expected_gradient = truth(logits, targets, weights(targets))
    logps = selective_logprob(logits, targets, backend=backend, inplace_backward=inplace)
    torch.testing.assert_close(logps, expected.float())
    (gradient,) = torch.autograd.grad(logps, logits, weights(targets))
    torch.testing.assert_close(gradient, expected_gradient.float())
    assert (gradient.data_ptr() == logits.data_ptr()) is inplace
    if inplace:  # the view's elements, and no others
        cut(untouched).copy_(gradient)
    assert torch.equal(base, untouched)


def test_views_cover_every_row_once_without_a_copy() -> None:
    base = torch.arange(2 * 3 * 4 * 5 * 6.0).view(2, 3, 4, 5, 6)
    for logits in (base, base[:, 1:], base[:, :, ::2, 1:], base.transpose(0, 2), base[:, :1], base[0, 0, 0, 0]):
        for leading in (1, 2):
            parts = list(row_views.views(logits, leading))
            assert torch.equal(torch.cat([x.reshape(-1, 6) for _, x in parts]), logits.reshape(-1, 6))
            assert all(x.dim() == leading + 1 and x.data_ptr() >= base.data_ptr() for _, x in parts)
            assert all(x.untyped_storage().data_ptr() == base.untyped_storage().data_ptr() for _, x in parts)
            assert [r.start for r, _ in parts] == [
                sum(x.shape[:-1].numel() for _, x in parts[:i]) for i in range(len(parts))
            ]
    assert len(list(row_views.views(base[:, 1:], 2))) == 1  # (B, T, V) with two strides: one launch


@pytest.mark.parametrize("inplace", [False, True])
def test_rows_beyond_two_to_the_31_elements(backend: str, inplace: bool) -> None:
    """Three rows of 8 columns, 2**30 + 64 elements apart, in memory that is mapped but never touched in between."""
    stride = 2**30 + 64
    storage = torch.empty(2 * stride + 8, dtype=torch.float16)
    values, _ = rows_of(3, 8, dtype=torch.float16)
    targets = torch.tensor([3, -100, 7])
    rows = storage.as_strided((3, 8), (stride, 1))
    rows.copy_(values)
    expected, expected_gradient = truth(values, targets, torch.ones(3))
    peak = values.float().amax(1)
    normalizers = torch.stack([peak, (values.float() - peak[:, None]).logsumexp(1)])
    operators = torch.ops.fastdpo
    logps, _ = operators.selective_logprob(rows, targets, -100, 1.0, backend)
    torch.testing.assert_close(logps, expected.float())
    if inplace:
        operators.selective_logprob_backward_(torch.ones(3), rows, targets, normalizers, -100, 1.0, backend)
        gradient = rows
    else:
        gradient = operators.selective_logprob_backward(torch.ones(3), rows, targets, normalizers, -100, 1.0, backend)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=2**-9, atol=1e-6)


def test_huge_logits_and_masked_columns(backend: str) -> None:
    """±1e4, and −∞ in whole blocks before the first finite logit."""
    logits, targets = rows_of(4, 4100, scale=1e4)
    targets[:] = torch.tensor([4099, 0, 4098, 4097])
    logits[0, :4098] = -math.inf
    logits[1] = -1e4
    grad = weights(targets)
    expected, expected_gradient = truth(logits, targets, grad)
    logps, gradient = scored(logits, targets, grad, backend=backend)
    torch.testing.assert_close(logps, expected.float(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient.float(), rtol=1e-5, atol=1e-8)
    assert gradient.isfinite().all()


def test_peaks_that_rise_from_block_to_block(backend: str) -> None:
    """Three blocks of columns, each with larger logits than those before it, and all of them of weight."""
    logits = torch.linspace(0.0, 2.0, 3 * 4096 - 5).repeat(2, 1)
    targets = torch.tensor([0, 5000])
    expected, expected_gradient = truth(logits, targets, torch.ones(2))
    logps, gradient = scored(logits, targets, torch.ones(2), backend=backend)
    torch.testing.assert_close(logps, expected.float(), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(gradient, expected_gradient.float(), rtol=1e-5, atol=0.0)


@given(seed=st.integers(0, 2**16), shift=st.floats(-1e3, 1e3), name=st.sampled_from(BACKENDS))
@settings(max_examples=20, deadline=None)
def test_shift_of_the_logits_changes_nothing(seed: int, shift: float, name: str) -> None:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 6, generator=g, dtype=torch.float64)
    targets = torch.randint(0, 6, (3,), generator=g)
    torch.testing.assert_close(
        selective_logprob(logits + shift, targets, backend=name),
        selective_logprob(logits, targets, backend=name),
        atol=1e-10,
        rtol=0.0,
    )


@pytest.mark.parametrize("inplace", [False, True])
def test_ignored_rows_are_zero_and_poison_nothing(backend: str, inplace: bool) -> None:
    """NaN in ignored logits and in their incoming gradient; another ignore_index; none; all rows ignored; no rows."""
    logits, targets = rows_of(6, 9)
    targets[:] = torch.tensor([1, -100, 2, 0, -100, 8])
    logits[[1, 4]] = math.nan
    grad = torch.ones(6)
    grad[1] = math.nan
    leaf = logits.requires_grad_()
    logps = selective_logprob(leaf * 1.0, targets, backend=backend, inplace_backward=inplace)
    (gradient,) = torch.autograd.grad(logps, leaf, grad)
    assert logps[[1, 4]].tolist() == [0.0, 0.0]
    assert gradient[[1, 4]].tolist() == [[0.0] * 9] * 2
    rest = [0, 2, 3, 5]
    expected, expected_gradient = truth(logits[rest], targets[rest], torch.ones(4))
    torch.testing.assert_close(logps[rest], expected.float())
    torch.testing.assert_close(gradient[rest], expected_gradient.float())
    assert selective_logprob(leaf, torch.full((6,), -100), backend=backend).tolist() == [0.0] * 6
    assert selective_logprob(leaf[:0], targets[:0], backend=backend).shape == (0,)
    whole = logits.detach()[rest]
    zeros = torch.zeros(4, dtype=torch.int64)
    assert selective_logprob(whole, zeros, ignore_index=0, backend=backend).tolist() == [0.0] * 4
    none = selective_logprob(whole, zeros, ignore_index=None, backend=backend)
    torch.testing.assert_close(none, whole.log_softmax(1)[:, 0])


def test_empty_batches_have_empty_gradients(backend: str) -> None:
    for shape in ((0, 5), (2, 0, 5)):
        logits = torch.zeros(*shape, requires_grad=True)
        logps = selective_logprob(logits, torch.zeros(shape[:-1], dtype=torch.int64), backend=backend)
        assert torch.autograd.grad(logps.sum(), logits)[0].shape == shape


def test_gradcheck(backend: str) -> None:
    logits, targets = rows_of(4, 6, dtype=torch.float64)

    def logps(x: Tensor) -> Any:
        return selective_logprob(x, targets, temperature=0.7, backend=backend)

    assert torch.autograd.gradcheck(logps, logits.requires_grad_())


# The in-place backward


def head(targets: Tensor) -> tuple[Tensor, Tensor]:
    """A leaf and the logits that it gives."""
    hidden = torch.randn(len(targets), 3, generator=torch.Generator().manual_seed(2)).requires_grad_()
    return hidden, hidden @ torch.linspace(-1.0, 1.0, 3 * 11).view(3, 11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_overwrites_the_logits(backend: str, dtype: torch.dtype) -> None:
    targets = torch.tensor([0, 10, -100, 4])
    gradients = []
    for inplace in (False, True):
        hidden, logits = head(targets)
        logits = logits.to(dtype) * 1.0
        seen: list[Tensor] = []
        logits.register_hook(seen.append)
        before, version = logits.detach().clone(), logits._version
        selective_logprob(logits, targets, backend=backend, inplace_backward=inplace).sum().backward()
        gradients.append((hidden.grad, seen[0]))
        assert torch.equal(logits, seen[0] if inplace else before)
        assert (logits._version > version) is inplace
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert torch.equal(gradients[0][1], gradients[1][1])


def test_what_an_overwritten_graph_cannot_do_raises(backend: str) -> None:
    targets = torch.tensor([0, 10, -100, 4])

    def overwriting(logits: Tensor) -> Tensor:
        return selective_logprob(logits, targets, backend=backend, inplace_backward=True).sum()

    for options in ({"retain_graph": True}, {"create_graph": True}):
        hidden, logits = head(targets)
        before = logits.detach().clone()
        with pytest.raises(RuntimeError, match="inplace_backward=True overwrites"):
            torch.autograd.grad(overwriting(logits), hidden, **options)
        assert torch.equal(logits, before)
    # Two readers of the same logits, and a node that saved them: autograd sees the new version
    for other in (overwriting, lambda logits: logits.square().sum()):
        hidden, logits = head(targets)
        total = other(logits) + overwriting(logits)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()
    leaf = torch.zeros(4, 11, requires_grad=True)
    for logits in (leaf, leaf.view(2, 2, 11).view(4, 11), leaf[:, :]):
        with pytest.raises(ValueError, match="inplace_backward=True would overwrite a leaf"):
            overwriting(logits)
    with pytest.raises(ValueError, match=r"expanded \(strides \(0, 1\)\)"):
        overwriting((leaf[:1] * 1.0).expand(4, 11))
    with pytest.raises(ValueError, match=r"expanded \(strides \(2, 1\)\)"):
        overwriting((leaf * 1.0).as_strided((4, 11), (2, 1)))
    with torch.no_grad():
        overwriting(leaf)
    assert torch.equal(leaf, torch.zeros(4, 11))


# As an operator


def test_opcheck(backend: str) -> None:
    logits, targets = rows_of(2, 3, 7)
    normalizers = torch.stack([logits.amax(-1), logits.logsumexp(-1)])
    operators = torch.ops.fastdpo
    torch.library.opcheck(operators.selective_logprob, (logits.clone().requires_grad_(), targets, -100, 0.7, backend))
    view = logits.clone().requires_grad_()[:, 1:]
    torch.library.opcheck(operators.selective_logprob, (view, targets[:, 1:].clamp(min=0), None, 1.0, backend))
    rest = (logits.bfloat16(), targets, normalizers, -100, 0.7, backend)
    torch.library.opcheck(operators.selective_logprob_backward, (weights(targets), *rest))
    torch.library.opcheck(operators.selective_logprob_backward_, (weights(targets), *rest))


@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_without_a_graph_break(backend: str, inplace: bool) -> None:
    """Also where the logits are an input: then as a leaf, which must survive."""
    targets = torch.tensor([0, 10, -100, 4])

    def loss(logits: Tensor) -> Tensor:
        return selective_logprob(logits, targets, backend=backend, inplace_backward=inplace).square().sum()

    compiled = torch.compile(
        lambda hidden: loss(hidden @ torch.linspace(-1.0, 1.0, 33).view(3, 11)), fullgraph=True, backend="aot_eager"
    )
    hidden, logits = head(targets)
    (gradient,) = torch.autograd.grad(compiled(hidden), hidden)
    torch.testing.assert_close(gradient, torch.autograd.grad(loss(logits), hidden)[0])
    alone = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for logits in (head(targets)[1], head(targets)[1].detach().requires_grad_()):
        before = logits.detach().clone()
        (gradient,) = torch.autograd.grad(alone(logits), logits)
        _, expected = truth(before, targets, torch.ones(4))
        torch.testing.assert_close(
            gradient, (2.0 * truth(before, targets, torch.ones(4))[0][:, None] * expected).float()
        )
        assert torch.equal(logits, before)


def test_fake_tensors_and_autocast(backend: str) -> None:
    with FakeTensorMode():
        logits = torch.empty(2, 5, 9, dtype=torch.bfloat16, requires_grad=True)
        targets = torch.empty(2, 5, dtype=torch.int64)
        logps = selective_logprob(logits, targets, backend=backend)
        assert (logps.shape, logps.dtype) == ((2, 5), torch.float32)
        assert torch.autograd.grad(logps.sum(), logits)[0].dtype == torch.bfloat16
        with pytest.raises(ValueError, match=r"logits \(2, 5, 9\) need targets \(2, 5\)"):
            torch.ops.fastdpo.selective_logprob(logits, targets[0], -100, 1.0, backend)
    logits, targets = rows_of(4, 9)
    with torch.autocast("cpu", torch.bfloat16):
        inside, gradient = scored(logits, targets, torch.ones(4), backend=backend)
    outside, expected = scored(logits, targets, torch.ones(4), backend=backend)
    assert torch.equal(inside, outside)
    assert torch.equal(gradient, expected)
    lse = torch.ops.fastdpo.selective_logprob(logits.detach().requires_grad_(), targets, -100, 1.0, backend)[1]
    assert not lse.requires_grad
    with torch.no_grad():
        assert not selective_logprob(logits.requires_grad_(), targets, backend=backend).requires_grad


# Refused arguments


def test_targets_out_of_range_are_counted(backend: str) -> None:
    logits = torch.zeros(5, 9)
    with pytest.raises(ValueError, match=r"2 values outside \[0, 9\), the first is 9.*ignore_index=-100"):
        selective_logprob(logits, torch.tensor([0, 9, -100, -1, 8]), backend=backend)
    with pytest.raises(ValueError, match=r"1 values outside \[0, 9\), the first is -100.*ignore_index=None"):
        selective_logprob(logits, torch.tensor([0, 1, -100, 2, 8]), ignore_index=None, backend=backend)


def test_unchecked_targets_read_nothing_and_are_nan(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the check would wait. At 2**60 columns away, any read would end the process."""
    for name in BACKENDS:
        monkeypatch.setattr(f"fastdpo.ops.selective_logprob.backend_{name}.check_targets", lambda *_: None)
    logits, targets = rows_of(5, 9)
    targets[:] = torch.tensor([0, 2**60, -1, 9, 8])
    bad = torch.tensor([False, True, True, True, False])
    logps, gradient = scored(logits, targets, torch.ones(5), backend=backend)
    expected, expected_gradient = truth(logits[~bad], targets[~bad], torch.ones(2))
    assert logps[bad].isnan().all()
    assert gradient[bad].isnan().all()
    torch.testing.assert_close(logps[~bad], expected.float())
    torch.testing.assert_close(gradient[~bad], expected_gradient.float())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"targets": torch.zeros(3, dtype=torch.int64)}, ValueError, r"logits \(2, 4\) need targets \(2,\): \(3,\)"),
        ({"logits": torch.tensor(1.0)}, ValueError, r"logits \(\)"),
        ({"logits": torch.zeros(2, 4, dtype=torch.int64)}, TypeError, "logits has dtype torch.int64"),
        ({"targets": torch.zeros(2, dtype=torch.int32)}, TypeError, "targets has dtype torch.int32"),
        ({"targets": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, "targets is on meta"),
        ({"temperature": 0.0}, ValueError, r"temperature=0\.0"),
        ({"temperature": math.inf}, ValueError, "temperature=inf"),
        ({"backend": "cuda"}, ValueError, "backend='cuda'"),
    ],
    ids=str,
)
def test_refused_arguments_are_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs: dict[str, Any] = {"logits": torch.zeros(2, 4), "targets": torch.zeros(2, dtype=torch.int64), **changes}
    with pytest.raises(error, match=message):
        fastdpo.selective_logprob(inputs.pop("logits"), inputs.pop("targets"), **inputs)
