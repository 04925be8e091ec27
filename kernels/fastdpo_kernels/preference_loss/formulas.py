"""The elementwise losses as device functions: value and derivatives, by hand, in fp32.

Formulas, symbols and sources are `formulas.losses`'s: β is dynamic or fixed, Δ a gap, x = β·Δ, ε label smoothing. With
σ' = σ(x)·σ(−x) and −log σ(x) = log(1 + e^−x), every function returns its value and its derivative by its argument. All
stay finite for |u| ≤ 1e4. A NaN stays a NaN: so clamps are `tl.where`, as the GPU's max and min drop NaN.
Functions that see a whole pair return (loss, ∂loss/∂w, ∂loss/∂l, ∂loss/∂sft) for the two values w and l of the pair
that `PAIR_INPUTS` names: the scores s after the f-divergence, the log-ratios u, or the log-probs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastdpo_kernels.device_math import expm1, log1p

#: As `fastdpo.formulas.losses`: exponents are clamped here, so that a squared score stays in fp32's range.
_MAX_EXPONENT = tl.constexpr(40.0)
_MAX_MEAN_LOGP = tl.constexpr(-1e-6)
_LOG_2 = tl.constexpr(0.6931471805599453)
#: loss_type → what its w and l are.
PAIR_INPUTS: dict[str, str] = {
    **dict.fromkeys(("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm"), "scores"),
    **dict.fromkeys(("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "aot", "aot_unpaired"), "ratios"),
    **dict.fromkeys(("sft", "simpo", "orpo", "cpo", "cpo_simpo"), "logps"),
}

# Elementary functions


@triton.jit
def _softplus(x: tl.tensor) -> tl.tensor:
    """log(1 + e^x) = max(x, 0) + log(1 + e^−|x|); −log σ(x) is _softplus(−x)."""
    return tl.where(x > 0.0, x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _sigmoid(x: tl.tensor) -> tl.tensor:
    """σ(x), with its digits in both tails: numerator 1 or e^−|x|."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, small) / (1.0 + small)


@triton.jit
def _sigmoid_slope(x: tl.tensor) -> tl.tensor:
    """σ'(x) = σ(x)·σ(−x) = e^−|x| / (1 + e^−|x|)²."""
    small = tl.exp(-tl.abs(x))
    return small / ((1.0 + small) * (1.0 + small))


# f-divergence


@triton.jit
def divergence_score(u: tl.tensor, alpha_minus_1: tl.tensor, F_DIVERGENCE: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Score s(u) and s'(u) of a log-ratio (2309.16240, table 1), exponents clamped at 40.

    reverse KL u; forward KL 1 − e^−u, slope e^−u; JS log 2 + log σ(u), slope σ(−u);
    α-divergence (e^((α−1)u) − 1)/(α − 1), slope e^((α−1)u). The slope is 0 where the clamp acts.
    """
    if F_DIVERGENCE == "reverse_kl":
        return u, tl.zeros_like(u) + 1.0
    elif F_DIVERGENCE == "js_divergence":
        return -_softplus(-u) + _LOG_2, _sigmoid(-u)
    else:
        if F_DIVERGENCE == "forward_kl":
            rate = -1.0
        else:
            tl.static_assert(F_DIVERGENCE == "alpha_divergence", "unknown f_divergence")
            rate = alpha_minus_1
        exponent = rate * u
        clamped = tl.where(exponent > _MAX_EXPONENT, _MAX_EXPONENT, exponent)
        return expm1(clamped) / rate, tl.where(exponent > _MAX_EXPONENT, 0.0, tl.exp(clamped))


# Losses of one argument x: (value, derivative)


@triton.jit
def _logistic(x: tl.tensor, epsilon: tl.tensor, SMOOTHED: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """−(1 − ε) log σ(x) − ε log σ(−x); derivative ε σ(x) − (1 − ε) σ(−x)."""
    if SMOOTHED:
        value = (1.0 - epsilon) * _softplus(-x) + epsilon * _softplus(x)
        return value, epsilon * _sigmoid(x) - (1.0 - epsilon) * _sigmoid(-x)
    else:
        return _softplus(-x), -_sigmoid(-x)


@triton.jit
def _robust(x: tl.tensor, epsilon: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """(−(1 − ε) log σ(x) + ε log σ(−x)) / (1 − 2ε); derivative −((1 − ε) σ(−x) + ε σ(x)) / (1 − 2ε)."""
    scale = 1.0 - 2.0 * epsilon
    value = (1.0 - epsilon) * _softplus(-x) - epsilon * _softplus(x)
    return value / scale, -((1.0 - epsilon) * _sigmoid(-x) + epsilon * _sigmoid(x)) / scale


@triton.jit
def _hinge(x: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """max(0, 1 − x); derivative −1 below x = 1, else 0."""
    return tl.where(x >= 1.0, 0.0, 1.0 - x), tl.where(x >= 1.0, 0.0, -1.0)


@triton.jit
def _exo(x: tl.tensor, log_right: tl.tensor, log_flipped: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """σ(x)(log σ(x) − log(1 − ε)) + σ(−x)(log σ(−x) − log ε); derivative σ'(x)·(x − log(1 − ε) + log ε).

    The terms ±σ(x)σ(−x) from the inner logarithms cancel, and log σ(x) − log σ(−x) = x.
    """
    right, flipped = -_softplus(-x) - log_right, -_softplus(x) - log_flipped
    value = _sigmoid(x) * right + _sigmoid(-x) * flipped
    return value, _sigmoid_slope(x) * (x - log_right + log_flipped)


@triton.jit
def _discopop(x: tl.tensor, tau: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """−log σ(x)·σ(−x/τ) + E with E = e^(log σ(x/τ) − x), as one exponential or e^−x alone would overflow.

    Derivative −σ(−x)·σ(−x/τ) + log σ(x)·σ'(x/τ)/τ + E·(σ(−x/τ)/τ − 1).
    """
    scaled = x / tau
    gate = _sigmoid(-scaled)
    exponential = tl.exp(-_softplus(-scaled) - x)
    slope = -_sigmoid(-x) * gate - _softplus(-x) * _sigmoid_slope(scaled) / tau
    return _softplus(-x) * gate + exponential, slope + exponential * (gate / tau - 1.0)


@triton.jit
def _log_odds(mean_logps: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """x − log(1 − e^x) for x clamped at −1e-6; derivative 1/(1 − e^x), 0 where the clamp acts.

    log(1 − e^x) is log(−expm1(x)) above −log 2 and log1p(−e^x) below it.
    """
    x = tl.where(mean_logps > _MAX_MEAN_LOGP, _MAX_MEAN_LOGP, mean_logps)
    complement = -expm1(x)
    near_one = x > -_LOG_2
    log_complement = tl.where(near_one, tl.log(complement), log1p(-tl.exp(tl.where(near_one, -1.0, x))))
    return x - log_complement, tl.where(mean_logps > _MAX_MEAN_LOGP, 0.0, 1.0 / complement)


# Losses of a pair


@triton.jit
def _gap_loss(
    x: tl.tensor,
    epsilon: tl.tensor,
    log_right: tl.tensor,
    log_flipped: tl.tensor,
    tau: tl.tensor,
    LOSS: tl.constexpr,
    SMOOTHED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The losses that are a function of x = β·Δ alone."""
    if LOSS == "hinge":
        return _hinge(x)
    elif LOSS == "exo_pair":
        return _exo(x, log_right, log_flipped)
    elif LOSS == "robust":
        return _robust(x, epsilon)
    elif LOSS == "discopop":
        return _discopop(x, tau)
    elif LOSS == "sigmoid_norm" or LOSS == "simpo" or LOSS == "cpo_simpo":
        return _logistic(x, epsilon, False)
    else:
        return _logistic(x, epsilon, SMOOTHED)


@triton.jit
def _split_loss(
    w: tl.tensor, rejected: tl.tensor, beta: tl.tensor, LOSS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The losses in which the log-ratios w = u_w and u_l enter on their own: (loss, ∂/∂u_w, ∂/∂u_l)."""
    x_w, x_l = beta * w, beta * rejected
    if LOSS == "nca_pair":
        # −log σ(x_w) − ½ log σ(−x_w) − ½ log σ(−x_l)
        loss = _softplus(-x_w) + 0.5 * _softplus(x_w) + 0.5 * _softplus(x_l)
        return loss, beta * (0.5 * _sigmoid(x_w) - _sigmoid(-x_w)), beta * 0.5 * _sigmoid(x_l)
    elif LOSS == "bco_pair":
        # −log σ(x_w) − log σ(−x_l)
        return _softplus(-x_w) + _softplus(x_l), -beta * _sigmoid(-x_w), beta * _sigmoid(x_l)
    elif LOSS == "sppo_hard":
        # (u_w − 1/2β)² + (u_l + 1/2β)²
        d_w, d_l = w - 0.5 / beta, rejected + 0.5 / beta
        return d_w * d_w + d_l * d_l, 2.0 * d_w, 2.0 * d_l
    elif LOSS == "apo_zero":
        # 1 − σ(x_w) + σ(x_l)
        return _sigmoid(-x_w) + _sigmoid(x_l), -beta * _sigmoid_slope(x_w), beta * _sigmoid_slope(x_l)
    else:
        tl.static_assert(LOSS == "apo_down", "unknown loss_type")
        # σ(x_w) + 1 − σ(x_w − x_l)
        gap = beta * (w - rejected)
        slope = beta * _sigmoid_slope(gap)
        return _sigmoid(x_w) + _sigmoid(-gap), beta * _sigmoid_slope(x_w) - slope, slope


@triton.jit
def pair_loss(
    w: tl.tensor,
    rejected: tl.tensor,
    chosen_lengths: tl.tensor,
    rejected_lengths: tl.tensor,
    sft_logps: tl.tensor,
    sft_scale: tl.tensor,
    beta: tl.tensor,
    epsilon: tl.tensor,
    log_right: tl.tensor,
    log_flipped: tl.tensor,
    tau: tl.tensor,
    gamma: tl.tensor,
    likelihood: tl.tensor,
    LOSS: tl.constexpr,
    SMOOTHED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """(loss, ∂/∂w, ∂/∂l, ∂/∂sft) of one loss type; w and l (`rejected`) are what `PAIR_INPUTS` names.

    sft_scale: N_kept / Σ|y_w| of the batch; likelihood: weight of cpo's −log π(y_w)/|y_w|; log_right = log(1 − ε),
    log_flipped = log ε.
    """
    none = tl.zeros_like(w)
    if LOSS == "sft":
        # −log π(y_w)·N/Σ|y_w|
        return -sft_logps * sft_scale, none, none, none - sft_scale
    elif LOSS == "ipo":
        # (w/|y_w| − l/|y_l| − 1/2β)²
        residue = w / chosen_lengths - rejected / rejected_lengths - 0.5 / beta
        return residue * residue, 2.0 * residue / chosen_lengths, -2.0 * residue / rejected_lengths, none
    elif LOSS == "orpo":
        # −log π(y_w)/|y_w| − β log σ(log odds of w − log odds of l)
        odds_w, slope_w = _log_odds(w / chosen_lengths)
        odds_l, slope_l = _log_odds(rejected / rejected_lengths)
        loss = beta * _softplus(odds_l - odds_w) - sft_logps / chosen_lengths
        slope = beta * _sigmoid(odds_l - odds_w)
        d_w, d_l = -slope * slope_w / chosen_lengths, slope * slope_l / rejected_lengths
        return loss, d_w, d_l, -1.0 / chosen_lengths
    elif LOSS == "sigmoid_norm" or LOSS == "simpo" or LOSS == "cpo_simpo":
        # x = β·(w/|y_w| − l/|y_l|), less γ for SimPO
        x = beta * (w / chosen_lengths - rejected / rejected_lengths)
        if LOSS != "sigmoid_norm":
            x = x - gamma
        loss, slope = _gap_loss(x, epsilon, log_right, log_flipped, tau, LOSS, SMOOTHED)
        d_w, d_l = beta * slope / chosen_lengths, -beta * slope / rejected_lengths
        if LOSS == "cpo_simpo":
            return loss - likelihood * sft_logps / chosen_lengths, d_w, d_l, -likelihood / chosen_lengths
        else:
            return loss, d_w, d_l, none
    elif LOSS == "nca_pair" or LOSS == "bco_pair" or LOSS == "sppo_hard" or LOSS == "apo_zero" or LOSS == "apo_down":
        loss, d_w, d_l = _split_loss(w, rejected, beta, LOSS)
        return loss, d_w, d_l, none
    else:
        loss, slope = _gap_loss(beta * (w - rejected), epsilon, log_right, log_flipped, tau, LOSS, SMOOTHED)
        if LOSS == "cpo":
            return (
                loss - likelihood * sft_logps / chosen_lengths,
                beta * slope,
                -beta * slope,
                -likelihood / chosen_lengths,
            )
        else:
            return loss, beta * slope, -beta * slope, none
