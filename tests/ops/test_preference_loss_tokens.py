"""The loss operators on tokens: the sums, their boundaries, and what a dropped pair may hold."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from preference_inputs import BACKENDS, DEFAULTS, SIDES, cast, ragged, results
from torch import Tensor

from fastdpo.formulas import oracle
from fastdpo.loss.dynamic_beta import DynamicBeta
from fastdpo.loss.preference import token_preference_loss
from fastdpo.ops.preference_loss import operators as ops

pytest.importorskip("triton")


def assert_token_form(loss_type: Any, backend: str) -> None:
    """Rows of 0 to 70 tokens, with tokens outside all rows; gradient of a token is its row's, 0 outside."""
    lengths = [3, 0, 70, 1, 9, 33]
    tokens, ref_tokens, boundaries = ragged(lengths, before=2, after=3)
    rows = [slice(a, b) for a, b in itertools.pairwise(boundaries.tolist())]
    sums, ref_sums = (torch.stack([x[row].sum() for row in rows]) for x in (tokens, ref_tokens))
    data = dict(zip(SIDES, (*sums.chunk(2), *ref_sums.chunk(2)), strict=True))
    lengths_of = dict(zip(("chosen_lengths", "rejected_lengths"), torch.tensor(lengths).chunk(2), strict=True))
    truth = results(oracle.preference_loss, cast({**data, **lengths_of}, torch.float64), loss_type=loss_type)
    row_grads = torch.cat([truth["grad 0"], truth["grad 1"]])
    expected = torch.cat(
        [torch.zeros(2), *(g.expand(n) for g, n in zip(row_grads, lengths, strict=True)), torch.zeros(3)]
    )
    references: list[dict[str, Tensor]] = [
        {"ref_token_logps": ref_tokens.float()},
        {"ref_logps": ref_sums.float()},
    ]
    for ref in references:
        leaf = tokens.float().requires_grad_()
        output = token_preference_loss(leaf, boundaries, loss_type=loss_type, backend=backend, **ref)
        for name in output._fields[:5]:
            torch.testing.assert_close(getattr(output, name).double(), truth[name], rtol=1e-5, atol=2e-5)
        (grad,) = torch.autograd.grad(output.loss + (torch.arange(3) * output.losses).sum(), leaf)
        torch.testing.assert_close(grad.double(), expected.double(), rtol=1e-5, atol=1e-6)
        (alone,) = torch.autograd.grad(
            token_preference_loss(leaf, boundaries, loss_type=loss_type, backend=backend, **ref).loss, leaf
        )
        assert alone[:2].tolist() == [0.0, 0.0]
        assert alone[-3:].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "sft", "aot", ["cpo", "aot_unpaired"]])
def test_token_form_is_the_sequence_form_of_the_sums(loss_type: Any, backend: str) -> None:
    assert_token_form(loss_type, backend)


@pytest.fixture
def in_grid(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every batch takes the path of large ones; the tokens of each gradient that was laid out by a grid."""
    from fastdpo_kernels.preference_loss import loss as kernels

    tokens: list[int] = []
    values = kernels.row_values
    monkeypatch.setattr(kernels, "ROWS_IN_GRID_ABOVE", 0)
    monkeypatch.setattr(kernels, "row_values", lambda *args: [tokens.append(args[2]), values(*args)][1])
    return tokens


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "sft"])
def test_token_form_of_a_large_batch(loss_type: str, in_grid: list[int]) -> None:
    assert_token_form(loss_type, "triton")
    assert in_grid == [121] * 4


def test_plan_over_tokens_of_a_large_batch(in_grid: list[int]) -> None:
    """β, kept pairs and gradients over three steps are those of the oracle, from tokens of 40 pairs."""
    ours, truth = (DynamicBeta(alpha=2.0, keep_ratio=0.6, seed=4) for _ in range(2))
    for step in range(3):
        lengths = torch.randint(0, 40, (80,), generator=torch.Generator().manual_seed(step)).tolist()
        tokens, ref_tokens, boundaries = ragged(lengths, seed=step)
        grads = []
        for beta, backend in ((ours, "triton"), (truth, "torch")):
            leaf = tokens.float().requires_grad_()
            output = token_preference_loss(leaf, boundaries, ref_tokens.float(), beta=beta, backend=backend)
            grads.append((*torch.autograd.grad(output.loss, leaf), output.losses.detach()))
        torch.testing.assert_close(*grads, rtol=2e-5, atol=1e-6)
        torch.testing.assert_close(ours.m0, truth.m0, rtol=1e-5, atol=1e-6)
        assert (grads[0][1] == 0.0).sum() == 16
    assert len(in_grid) == 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("boundaries", [[0, 3, 100_000], [0, 4, 2], [-1, 3, 6]])
def test_boundaries_that_leave_the_tokens_are_refused(boundaries: list[int], backend: str) -> None:
    with pytest.raises(ValueError, match=r"boundaries run from .* must not fall, nor leave \[0, 6\]"):
        token_preference_loss(torch.zeros(6), torch.tensor(boundaries), torch.zeros(6), backend=backend)


def test_unchecked_boundaries_read_no_other_memory() -> None:
    """The operator, which checks no values: rows are cut to the tokens that there are."""
    tokens = -torch.ones(6)
    sums = ops.row_sums(tokens, torch.tensor([-5, 3, 100_000]), "triton")
    assert sums.tolist() == [-3.0, -3.0]


def test_operators_refuse_what_their_fakes_refuse() -> None:
    pairs = ops.PairTensors(torch.zeros(4), torch.zeros(2), None, None, None, None, None, None, None)
    options = ops.PackedLoss(["simpo"], [1.0], DEFAULTS, 0.0, "reverse_kl", False, True, "mean", None)
    with pytest.raises(ValueError, match=r"rejected_logps has shape \(2,\)"):
        ops.preference_loss(*pairs, None, 0.1, None, *options.packed(), "triton")


def test_nan_tokens_of_a_dropped_pair_stay_there() -> None:
    tokens, ref_tokens, boundaries = ragged([3, 4, 2, 5])
    tokens[4] = math.nan
    for backend in BACKENDS:
        leaf = tokens.float().requires_grad_()
        keep = torch.tensor([True, False])
        output = token_preference_loss(leaf, boundaries, ref_tokens.float(), keep=keep, backend=backend)
        output.loss.backward()
        assert output.loss.isfinite()
        assert leaf.grad.isfinite().all()
        assert leaf.grad[3:7].tolist() == [0.0] * 4
