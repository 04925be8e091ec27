"""The plan of dynamic β by the operators: the oracle, plain DPO, the draw, and the split launch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from preference_inputs import BACKENDS, DEFAULTS, SIDES, cast, random_pairs, results
from torch import Tensor

from fastdpo.formulas import oracle
from fastdpo.loss.dynamic_beta import DynamicBeta
from fastdpo.loss.preference import preference_loss
from fastdpo.ops.preference_loss import operators as ops

pytest.importorskip("triton")


def pairs_of(margins: Tensor) -> dict[str, Tensor]:
    zeros = torch.zeros_like(margins)
    return dict(zip(SIDES, (margins - 10, zeros - 10, zeros - 0.0, zeros), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scope", ["batch", "instance"])
@pytest.mark.parametrize("variant", ["released", "paper"])
def test_plan_follows_the_oracle_over_steps(variant: str, scope: str, backend: str) -> None:
    """Several steps, one of them with a NaN, then evaluation: plan, state and loss as the oracle composes them."""
    g = torch.Generator().manual_seed(4)
    options: dict[str, Any] = {"keep_ratio": 0.6, "scope": scope, "variant": variant, "seed": 2**40 + 7}
    module = DynamicBeta(**options)
    alone = DynamicBeta(**options, backend=backend)
    state = oracle.BetaState(torch.tensor(0.0), torch.tensor(0.0), torch.tensor(0))
    for step, n in enumerate((5, 64, 1, 7, 33, 8)):
        module.train(step < 5), alone.train(step < 5)
        data = pairs_of(3 * torch.randn(n, generator=g))
        if step == 3:
            data["chosen_logps"][2] = math.nan
        margins = data["chosen_logps"] - data["rejected_logps"]
        expected = oracle.dynamic_beta(margins, state, training=step < 5, **options)
        state = expected.state
        truth = oracle.preference_loss(**data, beta=expected.beta, keep=expected.keep, reward_beta=0.1)
        output = preference_loss(**data, beta=module, backend=backend)
        for plan in (output.plan, alone(margins)):
            assert torch.equal(plan.keep, expected.keep)
            for mine, theirs in zip(
                (plan.beta, plan.mean, plan.std), (expected.beta, expected.mean, expected.std), strict=True
            ):
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)
        for owner in (module, alone):
            torch.testing.assert_close(owner.m0, state.m0, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(owner.sigma, state.sigma, rtol=1e-5, atol=1e-6)
            assert owner.step == state.step
        for mine, theirs in zip(output[:5], truth[:5], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert module.step == 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_plan_gradient_is_the_papers(backend: str) -> None:
    """dL/dM_i = −keep_i·β·σ(−β·M_i)/N_kept, and the rejected side's is its negative."""
    data = cast(random_pairs(16, seed=2), torch.float32)
    module = DynamicBeta(keep_ratio=0.5)
    output = preference_loss(**data, beta=module, backend=backend)
    chosen, rejected = torch.autograd.grad(output.loss, [data["chosen_logps"], data["rejected_logps"]])
    beta, keep, margins = output.plan.beta, output.plan.keep, output.margins
    torch.testing.assert_close(chosen, -(keep * beta) * torch.sigmoid(-beta * margins) / 8, rtol=1e-5, atol=1e-8)
    assert torch.equal(chosen, -rejected)
    assert keep.sum() == 8


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scope", ["batch", "instance"])
@pytest.mark.parametrize("variant", ["released", "paper"])
@given(seed=st.integers(0, 2**16), n=st.integers(1, 40))
@settings(max_examples=6, deadline=None)
def test_alpha_0_and_keep_ratio_1_is_plain_dpo_to_the_bit(
    variant: str, scope: str, backend: str, seed: int, n: int
) -> None:
    data = cast(random_pairs(n, seed, spread=30.0), torch.float32)
    module = DynamicBeta(alpha=0.0, keep_ratio=1.0, variant=variant, scope=scope)
    plain = results(preference_loss, data, backend=backend)
    for _ in range(2):
        planned = results(preference_loss, data, beta=module, backend=backend)
        assert all(torch.equal(planned[name], value) for name, value in plain.items())


@given(n=st.integers(1, 40), keep_ratio=st.floats(0.01, 1.0), seed=st.integers(0, 2**40), scale=st.floats(0.0, 1e4))
@settings(max_examples=25, deadline=None)
def test_kernel_keeps_the_same_pairs_as_torch(n: int, keep_ratio: float, seed: int, scale: float) -> None:
    margins = scale * torch.randn(n, generator=torch.Generator().manual_seed(n))
    plans = [DynamicBeta(keep_ratio=keep_ratio, seed=seed, backend=backend).plan(margins) for backend in BACKENDS]
    assert plans[1].keep.sum().item() == max(1, math.floor(keep_ratio * n))
    assert torch.equal(plans[0].keep, plans[1].keep)


def test_kernel_breaks_ties_by_index_and_follows_a_permutation() -> None:
    """The top-k of the kernel by itself, on given keys: equal ones, both zeros, both infinities."""
    from fastdpo_kernels.preference_loss import dynamic_beta as kernels

    keys = torch.tensor([1.0, 2.0, 1.0, -0.0, 0.0, -3.0, 1.0, -math.inf, math.inf, -1e-38])
    for count in range(1, 11):
        kept = kernels.top_k(keys, count)
        expected = torch.zeros(10, dtype=torch.bool)
        expected[torch.argsort(keys, descending=True, stable=True)[:count]] = True
        assert torch.equal(kept, expected)
    g = torch.Generator().manual_seed(0)
    log_weights, noise = torch.randn(2, 50, generator=g)
    order = torch.randperm(50, generator=g)
    kept = kernels.top_k(log_weights + noise, 20)
    assert torch.equal(kernels.top_k((log_weights + noise)[order], 20), kept[order])
    assert torch.equal(kept, oracle.gumbel_top_k(log_weights, noise, 20))


def test_kernel_filter_frequencies_match_the_weights() -> None:
    """One of four pairs kept, M0 = 1 and σ = 3 at momentum ½: probabilities ∝ e^−½z², z = 0, ⅔, −4/3, 2; 4 sd."""
    from fastdpo_kernels.preference_loss import dynamic_beta as kernels

    margins, m0, sigma = torch.tensor([1.0, 3.0, -3.0, 7.0]), torch.tensor(0.0), torch.tensor(6.0 - math.sqrt(52 / 3))
    weights = torch.tensor([math.exp(-0.5 * z * z) for z in (0.0, 2 / 3, -4 / 3, 2.0)])
    draws, kept = 150, torch.zeros(4)
    for seed in range(draws):
        options = (0.1, 0.6, 0.5, 0.25, 1e-3, "batch", "released", seed, True)
        kept += kernels.dynamic_beta(margins, m0, sigma, torch.tensor(5), *options).keep
    p = weights / weights.sum()
    assert ((kept / draws - p).abs() < 4 * (p * (1 - p) / draws).sqrt()).all()


@pytest.mark.parametrize("scope", ["batch", "instance"])
def test_split_launch_is_the_single_one(scope: str) -> None:
    """Two ranks of five pairs, by hand: margins apart, the plan of all ten, each rank's own part of the loss."""
    data = {key: value.float() if value.is_floating_point() else value for key, value in random_pairs(10).items()}
    module = DynamicBeta(keep_ratio=0.5, scope=scope, seed=3)
    plan = module.plan(
        data["chosen_logps"] - data["ref_chosen_logps"] - data["rejected_logps"] + data["ref_rejected_logps"]
    )
    margins, parts = [], []
    options = ops.PackedLoss(["sigmoid"], [1.0], DEFAULTS, 0.0, "reverse_kl", True, False, "sum", 0.1)
    for rank in range(2):
        mine = slice(5 * rank, 5 * rank + 5)
        pairs = ops.PairTensors(*(data[key][mine] for key in SIDES), None, None, None, None, None)
        parts.append(pairs)
        margins.append(ops.preference_margins(*pairs[:7], True, False, "triton"))
    whole = preference_loss(**data, beta=module, reduction="sum", backend="triton")
    fresh = DynamicBeta(keep_ratio=0.5, scope=scope, seed=3)
    losses, grads = [], []
    for rank, pairs in enumerate(parts):
        outputs = ops.planned_preference_loss(
            *pairs,
            torch.cat(margins),
            5 * rank,
            *fresh.state,
            *ops.packed_together(fresh.plan_options(), options),
            "triton",
        )
        losses.append(outputs[1])
        grads.append(outputs[3])
        assert torch.equal(outputs[7], plan.keep)
        torch.testing.assert_close(outputs[8][2], module.m0)
    torch.testing.assert_close(torch.cat(losses), whole.losses)
    assert (torch.cat(losses) != 0).tolist() == plan.keep.tolist()
    assert ((torch.cat(grads, dim=1)[0] != 0) == plan.keep).all()
