"""The loss operators: three-way accuracy, plan, token and split forms, laws, and behaviour under torch's subsystems."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdpo.formulas import F_DIVERGENCES, LOSSES, PARAMETERS, oracle
from fastdpo.formulas.checks import MAX_TRITON_PAIRS
from fastdpo.loss.dynamic_beta import DynamicBeta
from fastdpo.loss.preference import preference_loss, token_preference_loss
from fastdpo.ops.preference_loss import operators as ops

pytest.importorskip("triton")
BACKENDS = ["torch", "triton"]
SIDES = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
SMOOTHING: dict[str, dict[str, float]] = {
    name: {"label_smoothing": 0.1} if loss.uses_label_smoothing else {} for name, loss in LOSSES.items()
}
COMBINATIONS = [
    (name, f_divergence)
    for name, loss in LOSSES.items()
    for f_divergence in (F_DIVERGENCES if loss.supports_f_divergence else ["reverse_kl"])
]
DEFAULTS = [PARAMETERS[name].default for name in ops.LOSS_PARAMETERS]
LOOSE = {
    # e^u of a log-ratio rounded to fp32
    "forward_kl": 1e-5,
    "alpha_divergence": 1e-5,
}


def random_pairs(n: int, seed: int = 0, spread: float = 3.0, equal: bool = False) -> dict[str, Tensor]:
    """float64; log-ratios of the order of `spread`, or none; lengths 1 … 30."""
    g = torch.Generator().manual_seed(seed)
    ref = -40 + 8 * torch.randn(2, n, generator=g, dtype=torch.float64)
    policy = ref if equal else ref + spread * torch.randn(2, n, generator=g, dtype=torch.float64)
    lengths = torch.randint(1, 30, (2, n), generator=g)
    values = (*policy.clone(), *ref.clone(), *lengths)
    return dict(zip((*SIDES, "chosen_lengths", "rejected_lengths"), values, strict=True))


def cast(data: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Leaves in `dtype`; the values are those of fp32, so that every precision sees the same problem."""
    return {
        key: value.float().to(dtype).requires_grad_() if value.is_floating_point() else value
        for key, value in data.items()
    }


def results(function: Any, data: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """Outputs, and the gradients of loss + Σ i·losses_i, so that both ways into the backward count."""
    output = function(**data, **options)
    leaves = [value for value in data.values() if value.requires_grad]
    objective = output.loss.sum() + (torch.arange(len(output.losses)) * output.losses).sum()
    grads = torch.autograd.grad(objective, leaves, allow_unused=True)
    named = {
        f"grad {i}": torch.zeros_like(leaf) if g is None else g
        for i, (leaf, g) in enumerate(zip(leaves, grads, strict=True))
    }
    return {**dict(zip(output._fields[:5], output[:5], strict=True)), **named}


def assert_three_way(data: dict[str, Any], rtol: float = 2e-6, **options: Any) -> None:
    """The kernel errs by no more than twice torch's error in fp32, plus rtol of the largest value of the output."""
    truth = results(oracle.preference_loss, cast(data, torch.float64), **options)
    plain = results(preference_loss, cast(data, torch.float32), backend="torch", **options)
    kernel = results(preference_loss, cast(data, torch.float32), backend="triton", **options)
    for name, expected in truth.items():
        assert torch.equal(kernel[name].isfinite(), expected.isfinite()), name
        valid = expected.isfinite()
        expected, ours, theirs = (x[valid].double() for x in (expected, kernel[name], plain[name]))
        size = 1.0 + max(expected.abs().tolist(), default=0.0)
        torch_error = max((theirs - expected).abs().tolist(), default=0.0)
        # torch itself, so that the allowance means something
        assert torch_error <= 50 * rtol * size, name
        assert max((ours - expected).abs().tolist(), default=0.0) <= 2 * torch_error + rtol * size, name


# Accuracy


@pytest.mark.parametrize(("name", "f_divergence"), COMBINATIONS)
def test_three_way(name: str, f_divergence: str) -> None:
    options = {"loss_type": name, "f_divergence": f_divergence, **SMOOTHING[name]}
    rtol = LOOSE.get(f_divergence, 2e-6)
    for n in (1, 2, 3, 64):
        assert_three_way(random_pairs(n, seed=n), rtol, **options)
    assert_three_way(random_pairs(3, equal=True), rtol, **options, beta=0.5)
    if not LOSSES[name].sorts_batch:
        assert_three_way(random_pairs(3, seed=7), rtol, **options, beta=torch.tensor([0.05, 0.3, 1.0]))


@pytest.mark.parametrize(("name", "f_divergence"), COMBINATIONS)
def test_three_way_at_extreme_margins(name: str, f_divergence: str) -> None:
    """|u| = 1e4 on either or both sides, positive log-probs included: values and gradients, all finite."""
    signs = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1], [1, 0], [-1, 0], [0, 1], [0, -1], [0, 0]])
    zeros, lengths = torch.zeros(9, dtype=torch.float64), torch.tensor([1, 7, 3] * 3)
    for size in (1e4, 100.0):
        sides = (*(size * signs.T.double()), zeros, zeros.clone(), lengths, lengths)
        data = dict(zip((*SIDES, "chosen_lengths", "rejected_lengths"), sides, strict=True))
        options = {"loss_type": name, "f_divergence": f_divergence, **SMOOTHING[name]}
        assert_three_way(data, LOOSE.get(f_divergence, 2e-6), beta=0.1, **options)


@pytest.mark.parametrize("name", LOSSES)
def test_three_way_with_dropped_pairs(name: str) -> None:
    """Two of five pairs dropped, with NaN, infinity and no tokens: zero loss and gradient there, the rest untouched."""
    data, keep = random_pairs(5, seed=3), torch.tensor([True, False, True, True, False])
    data["chosen_logps"][1], data["ref_rejected_logps"][4], data["chosen_lengths"][1] = math.nan, math.inf, 0
    options: dict[str, Any] = {"loss_type": name, "keep": keep, **SMOOTHING[name]}
    if not LOSSES[name].sorts_batch:
        options |= {"pair_weights": torch.tensor([0.5, math.nan, 2.0, 1.0, math.inf])}
        options |= {"beta": torch.tensor([0.1, math.nan, 0.2, 0.3, 0.4])}
    for backend in BACKENDS:
        got = results(preference_loss, cast(data, torch.float32), backend=backend, reward_beta=0.1, **options)
        for key in ("losses", *(key for key in got if key.startswith("grad"))):
            assert got[key][~keep].tolist() == [0.0, 0.0]
            assert got[key].isfinite().all()
    assert_three_way(data, **options, reward_beta=0.1)


def test_three_way_of_mixtures_and_reductions() -> None:
    data = random_pairs(6, seed=5)
    data["sft_logps"] = data["chosen_logps"] - 1.0
    mixes: list[dict[str, Any]] = [
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"loss_type": ["cpo", "sigmoid", "sigmoid"], "loss_weights": [0.5, 1.0, -0.25], "label_smoothing": 0.1},
        {"loss_type": ["aot", "ipo", "aot_unpaired"], "loss_weights": [0.5, 2.0, 1.0], "label_smoothing": 0.2},
        {"loss_type": ["exo_pair", "orpo"], "label_smoothing": 1e-3, "f_divergence": "js_divergence"},
        {"loss_type": "discopop", "discopop_tau": 1.0},
        {"loss_type": "cpo_simpo", "simpo_gamma": 1.5, "cpo_alpha": 0.3},
        {"loss_type": "sigmoid", "f_divergence": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
        {"loss_type": "sigmoid", "f_divergence": "alpha_divergence", "f_alpha_divergence_coef": -0.5},
    ]
    for mix, reduction in itertools.product(mixes, ("mean", "sum", "none")):
        assert_three_way(data, rtol=1e-5, reduction=reduction, **mix)
    no_reference = {key: value for key, value in data.items() if not key.startswith("ref")}
    assert_three_way(no_reference, loss_type=["simpo", "sft"])


def test_three_way_of_a_large_batch() -> None:
    assert_three_way(random_pairs(1024, seed=9), 1e-5, loss_type=["sigmoid", "ipo"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_16_bit_inputs_are_computed_in_float32(backend: str, dtype: torch.dtype) -> None:
    data = {key: x.to(dtype) if x.is_floating_point() else x for key, x in random_pairs(4).items()}
    low = results(
        preference_loss,
        {k: x.requires_grad_() if x.is_floating_point() else x for k, x in data.items()},
        backend=backend,
    )
    high = results(preference_loss, cast(data, torch.float32), backend=backend)
    assert low["losses"].dtype == torch.float32
    assert low["grad 0"].dtype == dtype
    for name, value in high.items():
        assert torch.equal(low[name].to(dtype), value.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_pair_is_a_zero_loss(backend: str) -> None:
    empty = torch.zeros(0, requires_grad=True)
    output = preference_loss(empty, empty, empty, empty, backend=backend)
    output.loss.backward()
    assert output.loss.item() == 0.0
    assert (output.margins.shape, empty.grad.shape) == ((0,), (0,))
    with pytest.raises(ValueError, match="at least one pair"):
        preference_loss(empty, empty, empty, empty, beta=DynamicBeta(), backend=backend)


# Tokens


def ragged(lengths: list[int], seed: int = 0, before: int = 0, after: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    boundaries = torch.tensor([before, *lengths]).cumsum(0)
    n = before + sum(lengths) + after
    return -torch.rand(n, generator=g).double(), -torch.rand(n, generator=g).double(), boundaries


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


# Dynamic β


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


# Laws


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "exo_pair", "robust", "discopop", "aot", "cpo"])
@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=st.integers(0, 2**16))
@settings(max_examples=4, deadline=None)
def test_margin_losses_pull_chosen_and_rejected_apart_equally(backend: str, name: str, seed: int) -> None:
    data = cast(random_pairs(4, seed), torch.float32)
    alone = {"cpo_alpha": 0.0} if name == "cpo" else {}
    output = preference_loss(**data, loss_type=name, beta=0.05, backend=backend, **SMOOTHING[name], **alone)
    chosen, rejected = torch.autograd.grad(output.loss, [data["chosen_logps"], data["rejected_logps"]])
    assert chosen.abs().max() > 0
    torch.testing.assert_close(chosen, -rejected)


@pytest.mark.parametrize(("name", "f_divergence"), COMBINATIONS)
def test_torch_gradients_by_finite_differences(name: str, f_divergence: str) -> None:
    data = random_pairs(4, seed=1)
    data["sft_logps"] = data["chosen_logps"] - 2.0
    leaves = {key: value.requires_grad_() for key, value in data.items() if value.is_floating_point()}

    def loss(*values: Tensor) -> tuple[Tensor, Tensor]:
        replaced = {**data, **dict(zip(leaves, values, strict=True))}
        keep = torch.tensor([True, True, False, True])
        options = {"loss_type": name, "f_divergence": f_divergence, "keep": keep, "beta": 0.3, **SMOOTHING[name]}
        return preference_loss(**replaced, **options, backend="torch")[:2]

    assert torch.autograd.gradcheck(loss, list(leaves.values()))


# torch's subsystems


def test_opcheck() -> None:
    backend = "triton"
    data = cast(random_pairs(3), torch.float32)
    options = ops.PackedLoss(["sigmoid", "sft"], [1.0, 0.5], DEFAULTS, 0.0, "reverse_kl", True, False, "mean", None)
    tokens, _, boundaries = ragged([2, 3, 1, 2, 4, 2])
    leaf = tokens.float().requires_grad_()
    sequences = ops.PairTensors(*(data[key] for key in SIDES), None, None, None, None, None)
    per_token = ops.PairTensors(leaf, None, torch.zeros(3), torch.zeros(3), boundaries, None, None, None, None)
    module = DynamicBeta(scope="instance", backend=backend)
    for pairs in (sequences, per_token):
        given_beta = (torch.tensor(0.1), 0.0, torch.tensor([True, False, True]))
        torch.library.opcheck(ops.preference_loss, (*pairs, *given_beta, *options.packed(), backend))
        planned = (None, 0, *module.state, *ops.packed_together(module.plan_options(), options))
        torch.library.opcheck(ops.planned_preference_loss, (*pairs, *planned, backend))
        torch.library.opcheck(
            ops.preference_margins, (*ops.PairTensors(*map(_detach, pairs))[:7], True, False, backend)
        )
    torch.library.opcheck(ops.row_sums, (leaf, boundaries, backend))
    torch.library.opcheck(ops.plan_batch, (torch.randn(5), *module.state, *module.plan_options().packed(), backend))


def _detach(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph(backend: str) -> None:
    data = cast(random_pairs(6), torch.float32)
    leaves = [value for value in data.values() if value.requires_grad]
    eager, traced = DynamicBeta(seed=5), DynamicBeta(seed=5)

    def step(module: DynamicBeta, loss_type: str) -> tuple[Tensor, ...]:
        output = preference_loss(**data, beta=module, loss_type=loss_type, backend=backend)
        return output.loss, output.margins, output.plan.keep

    for loss_type in ("sigmoid", "aot"):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            mine, theirs = compiled(traced, loss_type), step(eager, loss_type)
            for a, b in zip(mine, theirs, strict=True):
                assert torch.equal(a, b)
            for a, b in zip(torch.autograd.grad(mine[0], leaves), torch.autograd.grad(theirs[0], leaves), strict=True):
                assert torch.equal(a, b)
    assert traced.step == eager.step == 4
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_derivative_raises(backend: str) -> None:
    data = cast(random_pairs(3), torch.float32)
    for loss_type in ("sigmoid", "aot"):
        loss = preference_loss(**data, loss_type=loss_type, backend=backend).loss
        (grad,) = torch.autograd.grad(loss, data["chosen_logps"], create_graph=True)
        with pytest.raises(RuntimeError):
            torch.autograd.grad(grad.sum(), data["chosen_logps"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_without_gradient_in_inference_and_on_strided_inputs(backend: str) -> None:
    data = {key: value.float() for key, value in random_pairs(4).items()}
    expected = preference_loss(**data, backend=backend)
    strided = {key: torch.stack([value, value], dim=1)[:, 0] for key, value in data.items()}
    assert torch.equal(preference_loss(**strided, backend=backend).losses, expected.losses)
    with torch.inference_mode():
        inside = {key: value.clone() for key, value in data.items()}
        assert torch.equal(preference_loss(**inside, backend=backend).loss, expected.loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(preference_loss(**data, backend=backend).loss, expected.loss)
    with FakeTensorMode() as mode:
        fake = {key: mode.from_tensor(value) for key, value in data.items()}
        output = preference_loss(**fake, backend=backend)
        assert (output.loss.shape, output.losses.shape, output.margins.shape) == ((), (4,), (4,))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"keep": torch.ones(2, dtype=torch.bool), "beta": DynamicBeta()}, ValueError, "keep and a DynamicBeta"),
        ({"chosen_logps": torch.zeros(3)}, ValueError, r"rejected_logps has shape \(2,\)"),
        ({"keep": torch.ones(3, dtype=torch.bool)}, ValueError, r"keep has shape \(3,\)"),
        ({"beta": torch.ones(3)}, ValueError, r"beta has shape \(3,\)"),
        ({"ref_chosen_logps": None}, ValueError, "go together"),
        ({"reduction": "batchmean"}, ValueError, "reduction='batchmean'"),
        ({"process_group": object()}, ValueError, "process_group has no effect"),
        ({"loss_type": "aot", "beta": torch.ones(2)}, ValueError, "aot.*rank"),
        ({"loss_type": "aot", "pair_weights": torch.ones(2)}, ValueError, "pair_weights"),
        ({"loss_type": "ipo"}, ValueError, "needs chosen_lengths"),
        ({"backend": "cuda"}, ValueError, "backend='cuda'"),
        ({"sft_logps": torch.zeros(2, dtype=torch.int64)}, TypeError, "sft_logps has dtype torch.int64"),
        ({"pair_weights": torch.zeros(2, device="meta")}, ValueError, "pair_weights is on meta"),
    ],
)
def test_refused_inputs_are_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    zeros = torch.zeros(2)
    data = {**dict.fromkeys(SIDES, zeros), **changes}
    with pytest.raises(error, match=message):
        preference_loss(**data)


def test_what_triton_cannot_serve_is_named() -> None:
    many, double = torch.zeros(MAX_TRITON_PAIRS + 1), torch.zeros(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"4097 pairs.*4096"):
        preference_loss(many, many, many, many, backend="triton")
    with pytest.raises(TypeError, match="float64"):
        preference_loss(double, double, double, double, backend="triton")
    with pytest.raises(TypeError, match="float64"):
        DynamicBeta(backend="triton")(double)
    from fastdpo_kernels.preference_loss.dynamic_beta import MAX_PAIRS

    assert MAX_PAIRS == MAX_TRITON_PAIRS


def test_refused_tokens_are_named() -> None:
    tokens, boundaries = torch.zeros(6), torch.tensor([0, 2, 6])
    with pytest.raises(ValueError, match=r"boundaries has shape \(2,\)"):
        token_preference_loss(tokens, boundaries[:2], tokens)
    with pytest.raises(TypeError, match=r"boundaries has dtype torch\.int32"):
        token_preference_loss(tokens, boundaries.int(), tokens)
    with pytest.raises(ValueError, match="twice"):
        token_preference_loss(tokens, boundaries, tokens, ref_logps=torch.zeros(2))
    with pytest.raises(ValueError, match=r"ref_logps has shape \(3,\)"):
        token_preference_loss(tokens, boundaries, ref_logps=torch.zeros(3))
    with pytest.raises(ValueError, match=r"ref_token_logps has shape \(5,\)"):
        token_preference_loss(tokens, boundaries, tokens[:5])


def test_gap_of_the_kernel_formulas_covers_the_table() -> None:
    from fastdpo_kernels.preference_loss.formulas import PAIR_INPUTS

    assert set(PAIR_INPUTS) == set(LOSSES)
    assert {name for name, kind in PAIR_INPUTS.items() if kind == "logps"} == {
        name for name, loss in LOSSES.items() if not loss.needs_reference
    }
    assert {name for name, loss in LOSSES.items() if loss.supports_f_divergence} == {
        name for name, kind in PAIR_INPUTS.items() if kind == "scores"
    }
