"""The loss family: values by hand, gradients by finite differences, laws, extreme margins, and refused options."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdpo.formulas import LOSSES, LossOptions
from fastdpo.formulas.oracle import preference_gap, preference_loss

# Two pairs, β = 0.5.          log π_w  ref   u_w | log π_l  ref   u_l |  Δ   βΔ | |y_w| |y_l|
# pair 1:                        −10    −12    2  |  −15     −13   −2  |  4    2 |   5    10
# pair 2:                        −20    −19   −1  |  −18     −19    1  | −2   −1 |  10     5
# log-ratio gaps per token: 2/5 + 2/10 = 0.6 and −1/10 − 1/5 = −0.3
# log-prob gaps per token: −2 + 1.5 = −0.5 and −2 + 3.6 = 1.6
PAIRS = {
    "chosen_logps": [-10.0, -20.0],
    "rejected_logps": [-15.0, -18.0],
    "ref_chosen_logps": [-12.0, -19.0],
    "ref_rejected_logps": [-13.0, -19.0],
    "chosen_lengths": [5.0, 10.0],
    "rejected_lengths": [10.0, 5.0],
}

# With L(x) = log(1 + e^−x) = −log σ(x):
#   x      −2       −1       −0.75    −0.5     −0.15    0.3      0.5      1        2        2.5
#   L(x)   2.126928 1.313262 1.136871 0.974077 0.770957 0.554355 0.474077 0.313262 0.126928 0.078890
#   σ(x)   0.119203 0.268941          0.377541                   0.622459 0.731059 0.880797
BY_HAND: list[tuple[str, dict[str, Any], list[float]]] = [
    ("sigmoid", {}, [0.126928, 1.313262]),
    # 0.9·L(2) + 0.1·L(−2); 0.9·L(−1) + 0.1·L(1)
    ("sigmoid", {"label_smoothing": 0.1}, [0.326928, 1.213262]),
    # forward KL: e^−u at u = ±2, ±1: Δ = e^2 − e^−2 = 7.253721 and e^−1 − e = −2.350402; L(3.626860), L(−1.175201)
    ("sigmoid", {"f_divergence": "forward_kl"}, [0.026252, 1.444279]),
    # Jensen–Shannon: log σ(u) − log σ(−u) = u, so Δ = 2 and −1; L(1), L(−0.5)
    ("sigmoid", {"f_divergence": "js_divergence"}, [0.313262, 0.974077]),
    # α = 0.5: −2·e^(−u/2), so Δ = 2(e − 1/e) = 4.700805 and −2(e^½ − e^−½) = −2.084381; L(2.350402), L(−1.042191)
    ("sigmoid", {"f_divergence": "alpha_divergence", "f_alpha_divergence_coef": 0.5}, [0.091056, 1.344279]),
    ("hinge", {}, [0.0, 2.0]),
    # (0.6 − 1)², (−0.3 − 1)²
    ("ipo", {}, [0.16, 1.69]),
    # σ(2)(−L(2) − log 0.9) + σ(−2)(−L(−2) − log 0.1), then at −1
    ("exo_pair", {"label_smoothing": 0.1}, [0.001942, 1.129457]),
    # βu = (1, −1): L(1) + ½L(−1) + ½L(1); βu = (−½, ½): L(−½) + ½L(½) + ½L(−½)
    ("nca_pair", {}, [1.126523, 1.698154]),
    # (0.9·L(2) − 0.1·L(−2))/0.8, (0.9·L(−1) − 0.1·L(1))/0.8
    ("robust", {"label_smoothing": 0.1}, [-0.123072, 1.438262]),
    # 2·L(1), 2·L(−½)
    ("bco_pair", {}, [0.626523, 1.948154]),
    # (2 − 1)² + (−2 + 1)², (−1 − 1)² + (1 + 1)²
    ("sppo_hard", {}, [2.0, 8.0]),
    # policy gaps 5, −2 and reference gaps 1, 0 have the same order: Δ = 4, −2
    ("aot", {}, [0.126928, 1.313262]),
    # u_w sorted −1, 2 against u_l sorted −2, 1: Δ = 1 for both; L(½)
    ("aot_unpaired", {}, [0.474077, 0.474077]),
    # σ(−1) + σ(−1), σ(½) + σ(½)
    ("apo_zero", {}, [0.537883, 1.244919]),
    # σ(1) + σ(−2), σ(−½) + σ(1)
    ("apo_down", {}, [0.850262, 1.108600]),
    # τ = 1: L(2)·σ(−2) + e^−2·σ(2), L(−1)·σ(1) + e·σ(−1)
    ("discopop", {"discopop_tau": 1.0}, [0.134333, 1.691130]),
    # 10·2/15, 20·2/15: their mean is 30 nats over 15 tokens
    ("sft", {}, [1.333333, 2.666667]),
    # L(0.3), L(−0.15)
    ("sigmoid_norm", {}, [0.554355, 0.770957]),
    # L(−0.25 − 0.5), L(0.8 − 0.5)
    ("simpo", {"simpo_gamma": 0.5}, [1.136871, 0.554355]),
    # log odds of e^−2, e^−1.5, e^−3.6: −1.854587, −1.247518, −3.572296; 2 + ½L(−0.607069), 2 + ½L(1.717710)
    ("orpo", {}, [2.521029, 2.082535]),
    # L(2.5) + 2·2, L(−1) + 2·2
    ("cpo", {"cpo_alpha": 2.0}, [4.078890, 5.313262]),
    ("cpo_simpo", {}, [3.136871, 2.554355]),
]
DIVERGENCES = ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
#: Every loss with every divergence that it supports.
COMBINATIONS = [
    (name, f) for name in LOSSES for f in DIVERGENCES if f == "reverse_kl" or LOSSES[name].supports_f_divergence
]
SMOOTHING = {name: {"label_smoothing": 0.1} if loss.uses_label_smoothing else {} for name, loss in LOSSES.items()}


def pairs(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {name: torch.tensor(values, dtype=dtype) for name, values in PAIRS.items()}


def random_pairs(n: int, seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    chosen, rejected = (-5.0 - 10.0 * torch.rand(n, generator=g, dtype=dtype) for _ in range(2))
    return {
        "chosen_logps": chosen,
        "rejected_logps": rejected,
        "ref_chosen_logps": chosen + torch.randn(n, generator=g, dtype=dtype),
        "ref_rejected_logps": rejected + torch.randn(n, generator=g, dtype=dtype),
        "chosen_lengths": torch.randint(1, 9, (n,), generator=g).to(dtype),
        "rejected_lengths": torch.randint(1, 9, (n,), generator=g).to(dtype),
    }


@pytest.mark.parametrize(("name", "options", "expected"), BY_HAND, ids=[name for name, _, _ in BY_HAND])
def test_values_by_hand(name: str, options: dict[str, Any], expected: list[float]) -> None:
    out = preference_loss(**pairs(), loss_type=name, beta=0.5, **options)
    torch.testing.assert_close(out.losses, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0.0)
    assert out.loss.item() == pytest.approx(sum(expected) / 2, abs=1e-6)


def test_every_loss_is_derived_by_hand() -> None:
    assert {name for name, _, _ in BY_HAND} == set(LOSSES)


@pytest.mark.parametrize(
    ("name", "margins", "rewards"),
    [
        ("sigmoid", [4.0, -2.0], [1.0, -0.5]),
        ("ipo", [0.6, -0.3], [1.0, -0.5]),
        # reference-free: gaps of log-probs
        ("cpo", [5.0, -2.0], [1.0, -0.5]),
        ("simpo", [-0.5, 1.6], [1.0, -0.5]),
    ],
)
def test_margins_and_rewards_by_hand(name: str, margins: list[float], rewards: list[float]) -> None:
    out = preference_loss(**pairs(), loss_type=name, beta=0.5)
    assert out.margins.tolist() == pytest.approx(margins)
    # β·u_w = 0.5·(2, −1); the rejected u_l is its negative in both pairs
    assert out.chosen_rewards.tolist() == pytest.approx(rewards)
    assert out.rejected_rewards.tolist() == pytest.approx([-r for r in rewards])
    with_base = preference_loss(**pairs(), loss_type=name, beta=torch.tensor(0.2), reward_beta=0.5)
    assert with_base.chosen_rewards.tolist() == pytest.approx(rewards)


def test_rewards_without_a_reference_are_scaled_log_probs() -> None:
    data = {name: value for name, value in pairs().items() if not name.startswith("ref")}
    out = preference_loss(**data, loss_type="simpo", beta=0.5)
    assert out.chosen_rewards.tolist() == [-5.0, -10.0]
    assert out.rejected_rewards.tolist() == [-7.5, -9.0]


def test_aot_matches_kept_pairs_by_rank() -> None:
    """Policy gaps 3, 1, (9), 2 and reference gaps −1, 4, (0), 0, the third pair dropped.

    Kept and sorted: 1, 2, 3 against −1, 0, 4. So pair 2 gets Δ = 1 + 1, pair 4 Δ = 2 − 0, pair 1 Δ = 3 − 4.
    """
    zeros = torch.zeros(4, dtype=torch.float64)
    policy = torch.tensor([3.0, 1.0, 9.0, 2.0], dtype=torch.float64)
    reference = torch.tensor([-1.0, 4.0, 0.0, 0.0], dtype=torch.float64)
    keep = torch.tensor([True, True, False, True])
    out = preference_loss(policy, zeros, reference, zeros, loss_type="aot", beta=1.0, keep=keep)
    # L(−1), L(2), dropped, L(2)
    assert out.losses.tolist() == pytest.approx([1.313262, 0.126928, 0.0, 0.126928], abs=1e-6)
    assert out.loss.item() == pytest.approx((1.313262 + 2 * 0.126928) / 3, abs=1e-6)
    # unpaired: u_w kept 4, −3, 2 → −3, 2, 4; u_l = 0: L(4) = 0.018150, L(−3) = 3.048587, L(2)
    out = preference_loss(policy, zeros, reference, zeros, loss_type="aot_unpaired", beta=1.0, keep=keep)
    assert out.losses.tolist() == pytest.approx([0.018150, 3.048587, 0.0, 0.126928], abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_dropped_pairs_take_no_part(name: str) -> None:
    """Five pairs of which two are dropped, one of them with NaN, equal the three alone: loss, losses and gradients."""
    data = random_pairs(5, seed=3)
    keep = torch.tensor([True, False, True, True, False])
    data["chosen_logps"][1] = math.nan
    data["ref_rejected_logps"][4] = math.inf
    data["chosen_lengths"][1] = 0
    kept = {key: value[keep] for key, value in data.items()}
    full_leaf, kept_leaf = data["chosen_logps"].requires_grad_(), kept["chosen_logps"].detach().requires_grad_()
    full = preference_loss(**data, loss_type=name, keep=keep, **SMOOTHING[name])
    alone = preference_loss(**{**kept, "chosen_logps": kept_leaf}, loss_type=name, **SMOOTHING[name])
    torch.testing.assert_close(full.loss, alone.loss)
    torch.testing.assert_close(full.losses[keep], alone.losses)
    assert full.losses[~keep].tolist() == [0.0, 0.0]
    (full_grad,) = torch.autograd.grad(full.loss, full_leaf)
    (alone_grad,) = torch.autograd.grad(alone.loss, kept_leaf)
    torch.testing.assert_close(full_grad[keep], alone_grad)
    assert full_grad[~keep].tolist() == [0.0, 0.0]


def test_nothing_kept_is_a_zero_loss() -> None:
    out = preference_loss(**pairs(), keep=torch.zeros(2, dtype=torch.bool))
    assert out.loss.item() == 0.0


@pytest.mark.parametrize(("name", "f_divergence"), COMBINATIONS)
def test_gradients_by_finite_differences(name: str, f_divergence: str) -> None:
    data = random_pairs(4, seed=1)
    constants = {key: data[key] for key in ("chosen_lengths", "rejected_lengths")}
    keep = torch.tensor([True, True, False, True])
    beta = torch.tensor(0.3) if LOSSES[name].sorts_batch else torch.tensor([0.3, 0.1, 0.5, 0.2])

    def loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
        return preference_loss(
            chosen,
            rejected,
            ref_chosen,
            ref_rejected,
            loss_type=name,
            beta=beta,
            keep=keep,
            f_divergence=f_divergence,
            **constants,
            **SMOOTHING[name],
        ).loss

    leaves = [
        data[key].requires_grad_()
        for key in ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    ]
    assert torch.autograd.gradcheck(loss, leaves)


def test_gradient_of_dpo_is_the_papers() -> None:
    """dL/dM_i = −keep_i·β_i·σ(−β_i·M_i)/N_kept (2407.08639), at M = 4, −2 and β = 0.5, 1; both kept, then one."""
    data = pairs()
    chosen = data["chosen_logps"].requires_grad_()
    beta = torch.tensor([0.5, 1.0], dtype=torch.float64)
    # −0.5·σ(−2)/2 and −1·σ(2)/2
    (grad,) = torch.autograd.grad(preference_loss(**data, beta=beta).loss, chosen)
    assert grad.tolist() == pytest.approx([-0.029801, -0.440399], abs=1e-6)
    (grad,) = torch.autograd.grad(preference_loss(**data, beta=beta, keep=torch.tensor([False, True])).loss, chosen)
    assert grad.tolist() == pytest.approx([0.0, -0.880797], abs=1e-6)


def test_beta_keep_and_weights_carry_no_gradient() -> None:
    beta, weights = torch.tensor(0.1, requires_grad=True), torch.ones(2, requires_grad=True)
    data = pairs()
    data["chosen_logps"].requires_grad_()
    preference_loss(**data, beta=beta, pair_weights=weights).loss.backward()
    assert beta.grad is None
    assert weights.grad is None
    assert data["chosen_logps"].grad is not None


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "exo_pair", "robust", "discopop", "aot", "cpo"])
@given(seed=st.integers(0, 2**16))
@settings(max_examples=10, deadline=None)
def test_margin_losses_pull_chosen_and_rejected_apart_equally(name: str, seed: int) -> None:
    data = random_pairs(4, seed)
    chosen, rejected = data["chosen_logps"].requires_grad_(), data["rejected_logps"].requires_grad_()
    alone = {"cpo_alpha": 0.0} if name == "cpo" else {}
    loss = preference_loss(**data, loss_type=name, beta=0.05, **SMOOTHING[name], **alone).loss
    grad_chosen, grad_rejected = torch.autograd.grad(loss, (chosen, rejected))
    assert grad_chosen.abs().max() > 0
    torch.testing.assert_close(grad_chosen, -grad_rejected)


@pytest.mark.parametrize("name", LOSSES)
@given(seed=st.integers(0, 2**16), order=st.permutations(range(6)))
@settings(max_examples=10, deadline=None)
def test_losses_follow_a_permutation_of_the_pairs(name: str, seed: int, order: list[int]) -> None:
    data = random_pairs(6, seed)
    keep = torch.tensor([True, False, True, True, False, True])
    out = preference_loss(**data, loss_type=name, keep=keep, **SMOOTHING[name])
    shuffled = {key: value[order] for key, value in data.items()}
    moved = preference_loss(**shuffled, loss_type=name, keep=keep[order], **SMOOTHING[name])
    torch.testing.assert_close(moved.losses, out.losses[order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "f_divergence"), COMBINATIONS)
def test_extreme_margins_stay_finite(name: str, f_divergence: str, dtype: torch.dtype) -> None:
    """|u| = 1e4 on either or both sides, positive log-probs included."""
    signs = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1], [1, 0], [-1, 0], [0, 1], [0, -1], [0, 0]], dtype=dtype)
    chosen, rejected = (1e4 * signs[:, i] for i in range(2))
    chosen.requires_grad_(), rejected.requires_grad_()
    zeros, lengths = torch.zeros(9, dtype=dtype), torch.tensor([1, 7, 3] * 3)
    for beta in (0.1, 1.0):
        out = preference_loss(
            chosen,
            rejected,
            zeros,
            zeros,
            loss_type=name,
            beta=beta,
            f_divergence=f_divergence,
            chosen_lengths=lengths,
            rejected_lengths=lengths,
            **SMOOTHING[name],
        )
        grads = torch.autograd.grad(out.loss, (chosen, rejected), allow_unused=True)
        assert out.losses.isfinite().all()
        assert out.losses.dtype == dtype
        assert all(grad.isfinite().all() for grad in grads if grad is not None)


@pytest.mark.parametrize("name", LOSSES)
def test_16_bit_inputs_are_computed_in_float32(name: str) -> None:
    data = {key: value.bfloat16() for key, value in random_pairs(4, seed=5).items()}
    upcast = {key: value.float() for key, value in data.items()}
    low = preference_loss(**data, loss_type=name, **SMOOTHING[name])
    assert low.losses.dtype == torch.float32
    assert torch.equal(low.losses, preference_loss(**upcast, loss_type=name, **SMOOTHING[name]).losses)


@pytest.mark.parametrize("mean_logp", [-1e-5, -1e-3, -0.5, -0.8, -30.0])
def test_odds_keep_their_digits_in_float32(mean_logp: float) -> None:
    """ORPO at p_l = ½, whose log odds are 0: −log σ(log odds of p) = −log p = −m, so the loss is −m·(1 + β)."""
    chosen, rejected, length = torch.tensor([mean_logp]), torch.tensor([math.log(0.5)]), torch.ones(1)
    out = preference_loss(
        chosen, rejected, loss_type="orpo", beta=1000.0, chosen_lengths=length, rejected_lengths=length
    )
    assert out.loss.item() == pytest.approx(-1001.0 * mean_logp, rel=1e-5)


def test_several_losses_are_a_weighted_sum() -> None:
    out = preference_loss(
        **pairs(), loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0], beta=0.5, reduction="sum"
    )
    # from the table above: 0.8·sigmoid + 0.2·bco_pair + sft
    expected = [0.8 * 0.126928 + 0.2 * 0.626523 + 1.333333, 0.8 * 1.313262 + 0.2 * 1.948154 + 2.666667]
    assert out.losses.tolist() == pytest.approx(expected, abs=2e-6)
    assert out.loss.item() == pytest.approx(sum(expected), abs=4e-6)
    unweighted = preference_loss(**pairs(), loss_type=["sigmoid", "sft"], beta=0.5, reduction="none").loss
    assert unweighted.tolist() == pytest.approx([0.126928 + 1.333333, 1.313262 + 2.666667], abs=2e-6)


def test_sft_logps_and_pair_weights_by_hand() -> None:
    sft = torch.tensor([-5.0, -40.0], dtype=torch.float64)
    out = preference_loss(**pairs(), loss_type="sft", sft_logps=sft)
    assert out.loss.item() == pytest.approx(45 / 15)
    # cpo: L(2.5) + 5/5, L(−1) + 40/10
    out = preference_loss(**pairs(), loss_type="cpo", sft_logps=sft, beta=0.5)
    assert out.losses.tolist() == pytest.approx([1.078890, 5.313262], abs=1e-6)
    out = preference_loss(**pairs(), beta=0.5, pair_weights=torch.tensor([3.0, 0.5]))
    assert out.losses.tolist() == pytest.approx([3 * 0.126928, 0.5 * 1.313262], abs=2e-6)


def test_alpha_one_is_the_reverse_kl() -> None:
    plain = preference_loss(**pairs()).losses
    limit = preference_loss(**pairs(), f_divergence="alpha_divergence", f_alpha_divergence_coef=1.0).losses
    near = preference_loss(**pairs(), f_divergence="alpha_divergence", f_alpha_divergence_coef=1.0 + 1e-5).losses
    assert torch.equal(limit, plain)
    torch.testing.assert_close(near, plain, rtol=1e-4, atol=0.0)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"loss_type": "dpo"}, r"loss_type=\['dpo'\] is unknown.*sigmoid.*cpo_simpo"),
    ({"loss_type": []}, "loss_type"),
    ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "loss_weights has 1 entries for 2"),
    ({"loss_type": "sigmoid", "loss_weights": [math.nan]}, "loss_weights"),
    ({"loss_type": "sigmoid", "beta": 0.0}, "beta=0.0"),
    ({"loss_type": "sigmoid", "beta": math.nan}, "beta=nan"),
    ({"loss_type": "sigmoid", "label_smoothing": 0.5}, "label_smoothing=0.5"),
    ({"loss_type": "sigmoid", "label_smoothing": -0.1}, "label_smoothing=-0.1"),
    ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing=0.1 has no effect"),
    ({"loss_type": "exo_pair"}, "1e-3"),
    ({"loss_type": "sigmoid", "f_divergence": "kl"}, "f_divergence='kl' is unknown"),
    ({"loss_type": ["sigmoid", "bco_pair"], "f_divergence": "forward_kl"}, "bco_pair"),
    ({"loss_type": "sft", "f_divergence": "forward_kl"}, "sft"),
    ({"loss_type": "sigmoid", "simpo_gamma": 0.5}, "simpo_gamma"),
    ({"loss_type": "sigmoid", "f_alpha_divergence_coef": 0.5}, "f_alpha_divergence_coef"),
    ({"loss_type": "simpo", "simpo_gamma": -1.0}, "simpo_gamma=-1.0"),
    ({"loss_type": "cpo", "cpo_alpha": math.inf}, "cpo_alpha=inf"),
    ({"loss_type": "discopop", "discopop_tau": 0.0}, "discopop_tau=0.0"),
    ({"loss_type": "discopop", "discopop_tau": 1.5}, "discopop_tau=1.5"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_refused_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossOptions.of(None, options)


def test_options_of_a_mix_need_one_user() -> None:
    """Label smoothing for exo_pair beside sft, and an f-divergence beside a loss without reference, are meant."""
    LossOptions(["exo_pair", "sft"], label_smoothing=1e-3)
    LossOptions(["sigmoid", "sft"], f_divergence="js_divergence")
    (term,) = LossOptions("cpo_simpo", parameters={"cpo_alpha": 0.3}).terms
    assert term.parameters == {"simpo_gamma": 0.5, "cpo_alpha": 0.3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ref_chosen_logps": None}, "go together"),
        ({"ref_chosen_logps": None, "ref_rejected_logps": None}, "needs ref_chosen_logps"),
        ({"loss_type": "ipo", "chosen_lengths": None}, "needs chosen_lengths"),
        ({"rejected_logps": torch.zeros(3)}, r"rejected_logps has shape \(3,\)"),
        ({"keep": torch.ones(1, dtype=torch.bool)}, r"keep has shape \(1,\)"),
        ({"beta": torch.ones(3)}, r"beta has shape \(3,\)"),
        ({"reduction": "batchmean"}, "reduction='batchmean'"),
        ({"loss_type": "aot", "beta": torch.ones(2)}, "aot.*rank"),
        ({"loss_type": ["sigmoid", "aot_unpaired"], "pair_weights": torch.ones(2)}, "pair_weights"),
    ],
)
def test_refused_inputs_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preference_loss(**{**pairs(), **changes})


def test_gap_of_a_list_is_the_first_losses() -> None:
    data = pairs()
    assert preference_gap(**data, loss_type=["ipo", "sigmoid"]).tolist() == pytest.approx([0.6, -0.3])
    assert preference_gap(**data, loss_type=["sigmoid", "ipo"]).tolist() == [4.0, -2.0]
    with pytest.raises(ValueError, match="chosen_lengths"):
        preference_gap(data["chosen_logps"], data["rejected_logps"], loss_type="simpo")
    with pytest.raises(ValueError, match="ref_chosen_logps"):
        preference_gap(data["chosen_logps"], data["rejected_logps"])
