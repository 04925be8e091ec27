"""Log-probabilities of tokens and completions: values by hand, TRL's head as a peer, laws, and refused options."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdpo.formulas.head_options import STATS
from fastdpo.formulas.oracle import completion_logps, completion_weights, linear_logprob, selective_logprob


def head(n: int = 7, hidden: int = 5, vocab: int = 11, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(n, hidden, generator=g, dtype=dtype),
        "weight": torch.randn(vocab, hidden, generator=g, dtype=dtype),
        "bias": torch.randn(vocab, generator=g, dtype=dtype),
        "targets": torch.randint(0, vocab, (n,), generator=g),
    }


def test_values_by_hand() -> None:
    """Logits log(1, 2, 5): probabilities 1/8, 2/8, 5/8; at temperature ½ they are squared: 1/30, 4/30, 25/30."""
    logits = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64).log().expand(3, 3)
    targets = torch.tensor([1, -100, 2])
    assert selective_logprob(logits, targets).exp().tolist() == pytest.approx([0.25, 1.0, 0.625])
    assert selective_logprob(logits, targets, temperature=0.5).exp().tolist() == pytest.approx([4 / 30, 1.0, 25 / 30])
    assert selective_logprob(logits, torch.tensor([0, 9, 9]), ignore_index=9).exp().tolist() == pytest.approx(
        [1 / 8, 1, 1]
    )


def test_stats_by_hand() -> None:
    """One hidden unit h = 1 and W = log(1, 1, 2), so p = ¼, ¼, ½."""
    weight = torch.tensor([[1.0], [1.0], [2.0]], dtype=torch.float64).log()
    targets = torch.tensor([2, 0, -100])
    logps, stats = linear_logprob(torch.ones(3, 1, dtype=torch.float64), weight, targets, stats=STATS)
    assert logps.exp().tolist() == pytest.approx([0.5, 0.25, 1.0])
    # ¼·log 4 + ¼·log 4 + ½·log 2 = 1.5·log 2
    assert stats["entropy"].tolist() == pytest.approx([1.5 * math.log(2), 1.5 * math.log(2), 0.0])
    assert stats["mean_logits"].tolist() == pytest.approx([math.log(2) / 3, math.log(2) / 3, 0.0])
    assert stats["is_top1"].tolist() == [True, False, False]
    # 1/16 + 1/16 + 1/4 = 3/8
    assert stats["log_sum_sq_probs"].tolist() == pytest.approx([math.log(3 / 8), math.log(3 / 8), 0.0])


def test_head_transforms_by_hand() -> None:
    """(1·w + b)·scale, then the cap, then the temperature: w = (0, 1), b = (0, 2), scale 2 → x = 6.

    Capped at 3: 3·tanh(2) = 2.892083; over a temperature of 2: 1.446041; σ(1.446041) = 0.809388.
    """
    logps = linear_logprob(
        torch.ones(1, 1, dtype=torch.float64),
        torch.tensor([[0.0], [1.0]], dtype=torch.float64),
        torch.tensor([1]),
        bias=torch.tensor([0.0, 2.0], dtype=torch.float64),
        logit_scale=2.0,
        softcap=3.0,
        temperature=2.0,
    )
    assert logps.exp().item() == pytest.approx(0.809388, abs=1e-6)


@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("with_bias", [False, True])
def test_head_agrees_with_trl(with_bias: bool, softcap: float | None) -> None:
    peer = pytest.importorskip("trl.trainer.utils")._ChunkedLogProbFunction
    data = head(dtype=torch.float32)
    bias = data["bias"] if with_bias else None
    hidden, weight, targets = data["hidden"].requires_grad_(), data["weight"].requires_grad_(), data["targets"]
    names = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    theirs, *values = peer.apply(hidden, weight, bias, targets, 0.7, 4, softcap, 0.5, names)
    ours, stats = linear_logprob(
        hidden, weight, targets, bias=bias, temperature=0.7, logit_scale=0.5, softcap=softcap, stats=names
    )
    torch.testing.assert_close(ours, theirs)
    for name, value in zip(names, values, strict=True):
        torch.testing.assert_close(stats[name], value)
    scale = torch.arange(1.0, 8.0)
    for mine, other in zip(
        torch.autograd.grad((scale * ours).sum(), (hidden, weight)),
        torch.autograd.grad((scale * theirs).sum(), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_gradients_by_finite_differences() -> None:
    data = head(n=3, hidden=2, vocab=4)
    targets = torch.tensor([1, -100, 3])

    def logps(hidden: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return linear_logprob(hidden, weight, targets, bias=bias, softcap=2.0, logit_scale=0.5, temperature=0.7)

    assert torch.autograd.gradcheck(logps, [data[key].requires_grad_() for key in ("hidden", "weight", "bias")])


def test_ignored_rows_cannot_poison_gradients() -> None:
    data = head()
    targets = data["targets"].clone()
    targets[2] = -100
    data["hidden"][2] = math.nan
    hidden, weight = data["hidden"].requires_grad_(), data["weight"].requires_grad_()
    logps = linear_logprob(hidden, weight, targets)
    grads = torch.autograd.grad(logps.sum(), (hidden, weight))
    assert logps[2].item() == 0.0
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[0][2].tolist() == [0.0] * 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_is_at_least_float32(dtype: torch.dtype) -> None:
    data = head(dtype=dtype)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    upcast = {key: data[key].to(expected) for key in ("hidden", "weight")}
    logps = linear_logprob(data["hidden"], data["weight"], data["targets"])
    assert logps.dtype == expected
    assert torch.equal(logps, linear_logprob(**upcast, targets=data["targets"]))
    logits = (upcast["hidden"] @ upcast["weight"].T).to(dtype)
    assert torch.equal(
        selective_logprob(logits, data["targets"]), selective_logprob(logits.to(expected), data["targets"])
    )


@given(seed=st.integers(0, 2**16), shift=st.floats(-1e3, 1e3))
@settings(max_examples=25, deadline=None)
def test_shift_of_the_logits_changes_nothing(seed: int, shift: float) -> None:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 3, 6, generator=g, dtype=torch.float64)
    targets = torch.randint(0, 6, (2, 3), generator=g)
    torch.testing.assert_close(
        selective_logprob(logits + shift, targets), selective_logprob(logits, targets), atol=1e-9, rtol=0.0
    )
    total = torch.stack([selective_logprob(logits, torch.full((2, 3), v)).exp() for v in range(6)]).sum(0)
    torch.testing.assert_close(total, torch.ones(2, 3, dtype=torch.float64))


def test_completion_sums_by_hand() -> None:
    """Lengths 3 and 1 (chosen), others' 1 and 3: only the second and third token of the first row are beyond."""
    mask = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 0, 0]])
    logps = torch.tensor([[math.nan, -1.0, -2.0, -4.0, 9.0], [9.0, 9.0, -8.0, math.nan, 9.0]])
    other = torch.tensor([1, 3])
    assert completion_logps(logps, mask).tolist() == [-7.0, -8.0]
    assert completion_logps(logps, mask, other_lengths=other, ld_alpha=0.5).tolist() == [-4.0, -8.0]
    assert completion_logps(logps, mask, other_lengths=other, ld_alpha=0.0).tolist() == [-1.0, -8.0]
    assert completion_logps(logps, mask, other_lengths=other, ld_alpha=1.0).tolist() == [-7.0, -8.0]
    weights = completion_weights(mask, other_lengths=other, ld_alpha=0.5)
    assert weights.tolist() == [[0, 1, 0.5, 0.5, 0], [0, 0, 1, 0, 0]]


def test_completion_gradient_is_the_weights() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    logps = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    options = {"other_lengths": torch.tensor([2, 1]), "ld_alpha": 0.25}
    completion_logps(logps, mask, **options).sum().backward()
    assert torch.equal(logps.grad, completion_weights(mask, **options, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stats": ("entropy", "perplexity")}, "perplexity"),
        ({"softcap": 0.0}, "softcap=0.0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"weight": torch.zeros(11, 4)}, r"do not fit: \(7, 5\), \(11, 4\), \(7,\)"),
        ({"targets": torch.zeros(6, dtype=torch.int64)}, r"\(6,\)"),
    ],
)
def test_refused_heads_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_logprob(**{**head(), **options})


def test_refused_sums_are_named() -> None:
    mask, logits = torch.ones(1, 2), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="go together"):
        completion_weights(mask, ld_alpha=0.5)
    with pytest.raises(ValueError, match="go together"):
        completion_weights(mask, other_lengths=torch.ones(1))
    with pytest.raises(ValueError, match=r"ld_alpha=1\.5"):
        completion_weights(mask, ld_alpha=1.5, other_lengths=torch.ones(1))
    with pytest.raises(ValueError, match="temperature"):
        selective_logprob(logits, torch.zeros(2, dtype=torch.int64), temperature=-1.0)
    with pytest.raises(ValueError, match=r"\(3,\)"):
        selective_logprob(logits, torch.zeros(3, dtype=torch.int64))
