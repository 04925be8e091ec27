"""Dynamic β: traces by hand, the filter's draw, extreme batches, frozen evaluation, resume, and two ranks."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastdpo
from fastdpo.formulas import BetaPlan, BetaState
from fastdpo.formulas.oracle import dynamic_beta, gumbel_top_k, preference_loss
from fastdpo.formulas.rng import gumbel
from fastdpo.loss.dynamic_beta import DynamicBeta

# Three batches of two pairs, β0 = 0.1, α = 0.6, m = 0.9. std is |a − b|/√2.
#   M            mean  std      M0                        σ
#   (1, 3)         2   √2       2                         √2                                  = 1.414214
#   (4, 8)         6   2√2      0.9·2 + 0.6 = 2.4         0.9·1.414214 + 0.1·2.828427         = 1.555635
#   (−6, 0)       −3   3√2      0.9·2.4 − 0.3 = 1.86      0.9·1.555635 + 0.1·4.242641         = 1.824335
BATCHES = [[1.0, 3.0], [4.0, 8.0], [-6.0, 0.0]]
M0 = [2.0, 2.4, 1.86]
SIGMA = [1.414214, 1.555635, 1.824335]
# released, all kept, β = 0.1·(1 + 0.6·(mean − M0)): 0.1; 0.1·(1 + 0.6·3.6); 0.1·(1 − 0.6·4.86) < 0, so the least β
# paper, M scaled by 0.1:                            0.1; 0.1·(1 + 0.6·0.36); 0.1·(1 − 0.6·0.486)
BATCH_BETA = {"released": [0.1, 0.316, 0.001], "paper": [0.1, 0.1216, 0.07084]}
# β_i = 0.1·(1 + 0.6·(M_i − M0)): M_i − M0 = ∓1; 1.6, 5.6; −7.86, −1.86 (a tenth of these in the variant paper)
INSTANCE_BETA = {
    "released": [[0.04, 0.16], [0.196, 0.436], [0.001, 0.001]],
    "paper": [[0.094, 0.106], [0.1096, 0.1336], [0.05284, 0.08884]],
}
FRESH = BetaState(torch.tensor(0.0), torch.tensor(0.0), torch.tensor(0))


def tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_same_plan(one: BetaPlan, other: BetaPlan) -> None:
    for mine, theirs in zip((*one[:4], *one.state), (*other[:4], *other.state), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("scope", ["batch", "instance"])
@pytest.mark.parametrize("variant", ["released", "paper"])
def test_trace_by_hand(variant: str, scope: str) -> None:
    state, unit = FRESH, 0.1 if variant == "paper" else 1.0
    expected = (BATCH_BETA if scope == "batch" else INSTANCE_BETA)[variant]
    for step, (margins, beta) in enumerate(zip(BATCHES, expected, strict=True)):
        plan = dynamic_beta(tensor(margins), state, scope=scope, variant=variant, keep_ratio=1.0)
        assert plan.beta.tolist() == pytest.approx(beta, abs=1e-12)
        assert plan.mean.item() == pytest.approx(unit * M0[step])
        assert plan.std.item() == pytest.approx(unit * SIGMA[step], rel=1e-6)
        assert plan.keep.tolist() == [True, True]
        assert (plan.state.m0, plan.state.sigma, plan.state.step.item()) == (plan.mean, plan.std, step + 1)
        state = plan.state


@pytest.mark.parametrize("seed", range(4))
def test_beta_follows_the_kept_pairs_in_the_release_and_all_in_the_paper(seed: int) -> None:
    """Second batch (4, 8), one pair kept: β = 0.1·(1 + 0.6·1.6) or 0.1·(1 + 0.6·5.6); in the paper 0.1216."""
    state = dynamic_beta(tensor(BATCHES[0]), FRESH, keep_ratio=0.5, seed=seed).state
    plan = dynamic_beta(tensor(BATCHES[1]), state, keep_ratio=0.5, seed=seed)
    assert plan.keep.sum().item() == 1
    assert plan.beta.item() == pytest.approx(0.196 if plan.keep[0] else 0.436)
    assert plan.mean.item() == pytest.approx(2.4)  # of the whole batch, whatever was kept
    state = dynamic_beta(tensor(BATCHES[0]), FRESH, keep_ratio=0.5, seed=seed, variant="paper").state
    plan = dynamic_beta(tensor(BATCHES[1]), state, keep_ratio=0.5, seed=seed, variant="paper")
    assert plan.beta.item() == pytest.approx(0.1216)


@pytest.mark.parametrize("count", [1, 2])
def test_filter_frequencies_match_the_weights(count: int) -> None:
    """Four pairs against M0 = 1 and σ = 3, so that z = 0, 2/3, −4/3, 2 and the weights are e^−½z²."""
    margins = tensor([1.0, 3.0, -3.0, 7.0])
    # At momentum ½ this batch, of mean 2 and std √(52/3) = 4.163332, takes M0 from 0 to 1 and σ to 3
    state = BetaState(torch.tensor(0.0), torch.tensor(6.0 - math.sqrt(52 / 3)), torch.tensor(5))
    weights = [math.exp(-0.5 * z * z) for z in (0.0, 2 / 3, -4 / 3, 2.0)]
    inclusion = [0.0] * 4
    for draw in itertools.permutations(range(4), count):
        probability, rest = 1.0, sum(weights)
        for i in draw:
            probability, rest = probability * weights[i] / rest, rest - weights[i]
        for i in draw:
            inclusion[i] += probability
    draws = 3000
    kept = torch.zeros(4)
    for seed in range(draws):
        plan = dynamic_beta(margins, state, seed=seed, momentum=0.5, keep_ratio=count / 4)
        kept += plan.keep
    assert plan.mean.item() == pytest.approx(1.0)
    assert plan.std.item() == pytest.approx(3.0, abs=1e-6)
    for frequency, p in zip((kept / draws).tolist(), inclusion, strict=True):
        assert abs(frequency - p) < 4 * math.sqrt(p * (1 - p) / draws)


def test_draws_change_with_step_and_seed_only() -> None:
    margins = torch.linspace(-1, 1, 64)
    keeps = {}
    for seed, step in itertools.product(range(3), range(3)):
        state = BetaState(torch.tensor(0.0), torch.tensor(1.0), torch.tensor(step))
        keeps[seed, step] = dynamic_beta(margins, state, keep_ratio=0.5, seed=seed).keep
        assert torch.equal(keeps[seed, step], dynamic_beta(margins, state, keep_ratio=0.5, seed=seed).keep)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(keeps.values(), 2))


@given(n=st.integers(1, 40), keep_ratio=st.floats(0.01, 1.0), seed=st.integers(0, 2**40), scale=st.floats(0.0, 1e4))
@settings(max_examples=60, deadline=None)
def test_keeps_exactly_the_floor_and_at_least_one(n: int, keep_ratio: float, seed: int, scale: float) -> None:
    margins = scale * torch.randn(n, generator=torch.Generator().manual_seed(n))
    plan = dynamic_beta(margins, FRESH, keep_ratio=keep_ratio, seed=seed)
    assert plan.keep.sum().item() == max(1, int(keep_ratio * n // 1))
    assert plan.beta.isfinite()


@given(order=st.permutations(range(7)), count=st.integers(1, 7), seed=st.integers(0, 2**16))
@settings(max_examples=30, deadline=None)
def test_filter_follows_a_permutation_of_pairs_and_noise(order: list[int], count: int, seed: int) -> None:
    log_weights = torch.randn(7, generator=torch.Generator().manual_seed(seed))
    noise = gumbel(seed, 0, 7)
    keep = gumbel_top_k(log_weights, noise, count)
    assert torch.equal(gumbel_top_k(log_weights[order], noise[order], count), keep[order])


def test_filter_breaks_ties_by_index() -> None:
    assert gumbel_top_k(torch.zeros(5), torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0]), 3).tolist() == [1, 1, 1, 0, 0]


@pytest.mark.parametrize("scope", ["batch", "instance"])
@pytest.mark.parametrize("variant", ["released", "paper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alpha_0_and_keep_ratio_1_is_plain_dpo_to_the_bit(variant: str, scope: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    chosen, rejected, ref_chosen, ref_rejected = 50 * torch.randn(4, 9, generator=g, dtype=dtype)
    module = DynamicBeta(beta=0.1, alpha=0.0, keep_ratio=1.0, variant=variant, scope=scope)
    plain = preference_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1)
    for _ in range(3):
        plan = module(plain.margins)
        out = preference_loss(
            chosen, rejected, ref_chosen, ref_rejected, beta=plan.beta, keep=plan.keep, reward_beta=module.beta
        )
        for mine, theirs in zip(out[:5], plain[:5], strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("scope", ["batch", "instance"])
def test_one_pair(scope: str) -> None:
    """M = 5: M0 = 5, std 0 → the floor 1e-6, β0. Then M = 8: M0 = 5.3, β = 0.1·(1 + 0.6·2.7)."""
    plan = dynamic_beta(tensor([5.0]), FRESH, scope=scope)
    assert (plan.mean.item(), plan.std.item(), plan.keep.tolist()) == (5.0, 1e-6, [True])
    assert plan.beta.flatten().tolist() == [0.1]
    plan = dynamic_beta(tensor([8.0]), plan.state, scope=scope)
    assert plan.beta.flatten().tolist() == pytest.approx([0.262])
    assert plan.keep.tolist() == [True]


def test_equal_models_keep_beta_and_draw_evenly() -> None:
    kept = torch.zeros(5)
    for seed in range(500):
        plan = dynamic_beta(torch.zeros(5), FRESH, seed=seed)
        kept += plan.keep
        assert plan.beta.item() == torch.tensor(0.1).item()
        assert plan.std.item() == torch.tensor(1e-6).item()
    # four of five each time: 400 expected, four standard deviations are 36
    assert (kept - 400).abs().max() < 36


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variant", ["released", "paper"])
def test_huge_margins_stay_finite(variant: str, dtype: torch.dtype) -> None:
    state = FRESH
    for margins in ([0.0, 0.0], [1e4, -1e4, 1e4], [-1e4] * 4, [1e4]):
        plan = dynamic_beta(torch.tensor(margins, dtype=dtype), state, variant=variant)
        state = plan.state
        assert all(value.isfinite() for value in (plan.beta, plan.mean, plan.std, *state))
        assert plan.beta >= 0.001
        assert plan.keep.sum().item() == max(1, math.floor(0.8 * len(margins)))


@pytest.mark.parametrize("scope", ["batch", "instance"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_margin_shows_in_the_loss_and_not_in_the_state(bad: float, training: bool, scope: str) -> None:
    module = DynamicBeta(scope=scope)
    module(torch.tensor([1.0, 3.0]))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    plan = module.train(training)(torch.tensor([0.0, bad, 1.0]))
    assert plan.beta.isnan().all()
    assert plan.beta.shape == (() if scope == "batch" else (3,))
    assert plan.keep.tolist() == [True] * 3
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert (plan.mean, plan.std) == (module.m0, module.sigma)
    zeros = torch.zeros(3)
    assert preference_loss(torch.ones(3), zeros, zeros, zeros, beta=plan.beta, keep=plan.keep).loss.isnan()


def test_a_non_finite_first_batch_does_not_count_as_the_first() -> None:
    module = DynamicBeta(keep_ratio=1.0)
    module(torch.tensor([math.nan, 1.0]))
    plan = module(torch.tensor([1.0, 3.0]))
    assert (plan.mean.item(), plan.state.step.item()) == (2.0, 1)


def test_evaluation_is_frozen() -> None:
    """M0 = 2 from (1, 3); then (4, 8) in eval: β = 0.1·(1 + 0.6·(6 − 2)) = 0.34, and nothing moves."""
    module = DynamicBeta(keep_ratio=0.5)
    module(torch.tensor(BATCHES[0]))
    module.eval()
    for _ in range(2):
        plan = module(torch.tensor(BATCHES[1]))
        assert plan.beta.item() == pytest.approx(0.34)
        assert plan.keep.tolist() == [True, True]
        assert [value.item() for value in module.state] == pytest.approx([2.0, math.sqrt(2.0), 1])


def test_evaluation_before_training_uses_the_batchs_own_mean() -> None:
    module = DynamicBeta().eval()
    plan = module(torch.tensor([1.0, 3.0]))
    assert (plan.beta.item(), plan.mean.item()) == (pytest.approx(0.1), 2.0)
    assert [value.item() for value in module.state] == [0.0, 0.0, 0]
    instance = DynamicBeta(scope="instance").eval()(torch.tensor([1.0, 3.0]))
    assert instance.beta.tolist() == pytest.approx([0.04, 0.16])


def test_plan_is_pure_and_commit_writes_in_place() -> None:
    module = DynamicBeta()
    buffers = list(module.buffers())
    margins = torch.tensor([1.0, 3.0, 4.0], requires_grad=True)
    plan = module.plan(margins)
    assert not plan.beta.requires_grad
    assert module.step.item() == 0
    assert_same_plan(module.plan(margins), plan)
    module.commit(plan)
    assert module.step.item() == 1
    assert all(mine is theirs for mine, theirs in zip(buffers, module.buffers(), strict=True))
    assert module.m0.item() == plan.mean.item()


def test_resume_is_exact(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(1)
    batches = [10 * torch.randn(6, generator=g) for _ in range(6)]
    straight, first = DynamicBeta(seed=3), DynamicBeta(seed=3)
    expected = [straight(batch) for batch in batches]
    for batch in batches[:3]:
        first(batch)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    resumed = DynamicBeta(seed=3)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt"))
    for batch, plan in zip(batches[3:], expected[3:], strict=True):
        assert_same_plan(resumed(batch), plan)


def test_a_cast_of_the_module_leaves_its_statistics() -> None:
    module = DynamicBeta()
    module(torch.tensor([1.0, 2e5]))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.bfloat16().half()
    for name, value in module.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


def test_a_plan_in_evaluation_keeps_its_state() -> None:
    module = DynamicBeta()
    module(torch.tensor([1.0, 2.0]))
    plan = module.eval().plan(torch.tensor([5.0, 7.0]))
    m0 = plan.state.m0.item()
    module.train()(torch.tensor([50.0, 70.0]))
    assert plan.state.m0.item() == m0 != module.m0.item()


def test_one_backend_for_a_call() -> None:
    with pytest.raises(ValueError, match="backend='bogus' is unknown; accepted are auto, torch, triton"):
        DynamicBeta(backend="bogus")
    pairs = torch.zeros(4, 3).unbind()
    with pytest.raises(ValueError, match="backend='torch', but the DynamicBeta has backend='triton'"):
        fastdpo.preference_loss(*pairs, beta=DynamicBeta(backend="triton"), backend="torch")


def _rank(rank: int, path: str, scope: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    try:
        module = DynamicBeta(scope=scope, seed=11)
        plans = [module(batch.chunk(2)[rank], process_group=dist.group.WORLD) for batch in _global_batches()]
        torch.save((plans, module.state_dict()), f"{path}/{rank}.pt")
        for backend in ("torch", "triton"):
            fused, losses = DynamicBeta(scope=scope, seed=11), []
            for batch in _global_batches():
                zeros = torch.zeros(4)
                output = fastdpo.preference_loss(
                    batch.chunk(2)[rank], zeros, zeros, zeros,
                    beta=fused, process_group=dist.group.WORLD, reduction="sum", backend=backend,
                )  # fmt: skip
                losses.append(output.losses)
            torch.save(losses, f"{path}/{backend}-{rank}.pt")
    finally:
        dist.destroy_process_group()


def _global_batches() -> list[Tensor]:
    g = torch.Generator().manual_seed(2)
    return [3 * torch.randn(8, generator=g) for _ in range(3)]


@pytest.mark.parametrize("scope", ["batch", "instance"])
def test_two_ranks_draw_as_one(scope: str, tmp_path: Path) -> None:
    alone = DynamicBeta(scope=scope, seed=11)
    expected = [alone(batch) for batch in _global_batches()]
    mp.spawn(_rank, args=(str(tmp_path), scope), nprocs=2)
    for rank in range(2):
        plans, state = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert all(torch.equal(value, alone.state_dict()[name]) for name, value in state.items())
        for plan, whole in zip(plans, expected, strict=True):
            beta = whole.beta.chunk(2)[rank] if scope == "instance" else whole.beta
            assert_same_plan(plan, whole._replace(keep=whole.keep.chunk(2)[rank], beta=beta))
    for backend in ("torch", "triton"):
        ranks = [torch.load(tmp_path / f"{backend}-{rank}.pt") for rank in range(2)]
        for batch, plan, losses in zip(_global_batches(), expected, zip(*ranks, strict=True), strict=True):
            # −log σ(β·M) of the kept pairs, by the plan of the global batch
            truth = torch.where(plan.keep, torch.nn.functional.softplus(-plan.beta * batch), 0.0)
            torch.testing.assert_close(torch.cat(losses), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta=0.0"),
        ({"beta": math.inf}, "beta=inf"),
        ({"alpha": -0.1}, "alpha=-0.1"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"momentum": -0.1}, "momentum=-0.1"),
        ({"keep_ratio": 0.0}, "keep_ratio=0.0"),
        ({"keep_ratio": 1.1}, "keep_ratio=1.1"),
        ({"min_beta": 0.0}, "min_beta=0.0"),
        ({"min_beta": 0.2}, "min_beta=0.2.*beta=0.1"),
        ({"scope": "token"}, "scope='token'.*batch, instance"),
        ({"variant": "v2"}, "variant='v2'.*released, paper"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_refused_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DynamicBeta(**options)


@pytest.mark.parametrize("shape", [(0,), (2, 2), ()])
def test_refused_margins_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="margins have shape"):
        DynamicBeta()(torch.zeros(shape))


def test_repr_states_every_setting() -> None:
    assert repr(DynamicBeta(beta=0.2)) == (
        "DynamicBeta(beta=0.2, alpha=0.6, momentum=0.9, keep_ratio=0.8, min_beta=0.001, scope='batch', "
        "variant='released', seed=0)"
    )


def test_nothing_depends_on_data_on_the_host() -> None:
    """Under FakeTensor a value read on the host, or a shape made from data, raises."""
    with torch._subclasses.FakeTensorMode():
        module = DynamicBeta()
        plan = module(torch.empty(6))
        assert (plan.beta.shape, plan.keep.shape) == ((), (6,))
        out = preference_loss(*torch.empty(4, 6), beta=plan.beta, keep=plan.keep, loss_type="aot")
        assert out.losses.shape == (6,)
