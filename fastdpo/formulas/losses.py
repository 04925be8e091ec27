"""The family of preference losses, as one table: `LOSSES[name]` holds the formula, its needs and its source.

Symbols, all of shape (B,): u_w and u_l are the log-ratios log π(y|x) − log π_ref(y|x) of the chosen and the rejected
completion, summed over tokens (log π(y|x) where there is no reference); s_w and s_l are the same after the
f-divergence; Δ = s_w − s_l; |y| is a completion's length in tokens; σ is the logistic function.

A loss is added by one entry in `LOSSES` and one test, a parameter of its own by one in `parameters.PARAMETERS`, and for
Triton by its derivative in the kernels' `preference_loss/formulas.py`; CONTRIBUTING.md has the steps. Every
formula is finite, with finite gradients, for |u| ≤ 1e4 in float32 and float64. The trainer, the eager oracle and the
kernels all read needs and parameters from this table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.formulas.parameters import PARAMETERS, taking

#: Largest exponent in the forward KL and the α-divergence: e^40 = 2.4e17, so that even a squared score (ipo) and its
#: gradient stay in float32's range. Beyond it a score is constant and has no gradient. The same in every dtype.
MAX_EXPONENT = 40.0
#: ORPO's odds p/(1 − p) are unbounded as p → 1; the mean log-probability is clamped to at most this.
MAX_MEAN_LOGP = -1e-6
#: An α this close to 1 is the limit case, the reverse KL.
ALPHA_LIMIT = 1e-6


@dataclass(frozen=True)
class PairBatch:
    """What a formula sees. All tensors are (B,) in one floating dtype unless stated; dropped pairs hold zeros."""

    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor  # zeros where there is no reference
    ref_rejected_logps: Tensor
    chosen_scores: Tensor  # s_w: the log-ratio after the f-divergence
    rejected_scores: Tensor
    chosen_lengths: Tensor  # in tokens, at least 1
    rejected_lengths: Tensor
    sft_logps: Tensor  # unweighted log-probs of the chosen completions
    beta: Tensor  # 0-D or (B,), without gradient
    keep: Tensor  # bool
    num_kept: Tensor  # 0-D, at least 1
    label_smoothing: float

    @property
    def chosen_log_ratios(self) -> Tensor:
        """u_w, (B,)."""
        return self.chosen_logps - self.ref_chosen_logps

    @property
    def rejected_log_ratios(self) -> Tensor:
        """u_l, (B,)."""
        return self.rejected_logps - self.ref_rejected_logps

    @property
    def score_gaps(self) -> Tensor:
        """Δ = s_w − s_l, (B,)."""
        return self.chosen_scores - self.rejected_scores

    @property
    def mean_score_gaps(self) -> Tensor:
        """s_w/|y_w| − s_l/|y_l|, (B,)."""
        return self.chosen_scores / self.chosen_lengths - self.rejected_scores / self.rejected_lengths

    @property
    def mean_logp_gaps(self) -> Tensor:
        """log π(y_w)/|y_w| − log π(y_l)/|y_l|, (B,)."""
        return self.chosen_logps / self.chosen_lengths - self.rejected_logps / self.rejected_lengths

    @property
    def chosen_mean_nll(self) -> Tensor:
        """−log π(y_w)/|y_w|, (B,)."""
        return -self.sft_logps / self.chosen_lengths


@dataclass(frozen=True)
class Loss:
    """One entry of the family.

    Attributes:
        name: the `loss_type` that selects it.
        formula: (PairBatch, **parameters) → (B,) losses.
        source: paper and equation.
        needs_reference: reads the reference log-probs.
        needs_lengths: reads the completions' lengths.
        uses_beta: β scales it, so that dynamic β acts on it.
        couples_batch: a pair's derivative depends on the log-probs of other pairs, so all are scored before any is
            trained on.
        mean_over: "pairs", or "tokens" where the mean is over those of the kept pairs' chosen completions.
        matches: what is matched between pairs by rank before the formula, see `rank_matching`; "" for nothing.
        uses_label_smoothing: reads ε, the assumed share of flipped labels.
        supports_f_divergence: acts on the scores s_w, s_l, so that other divergences than the reverse KL fit.
        gap: "sum", or "mean" where the loss acts on length-normalised gaps: the margin that dynamic β follows.
        parameters: names and defaults of its own parameters.
    """

    name: str
    formula: Callable[..., Tensor]
    source: str
    needs_reference: bool = True
    needs_lengths: bool = False
    uses_beta: bool = True
    couples_batch: bool = False
    mean_over: Literal["pairs", "tokens"] = "pairs"
    matches: Literal["", "reference", "rejected"] = ""
    uses_label_smoothing: bool = False
    supports_f_divergence: bool = False
    gap: Literal["sum", "mean"] = "sum"
    parameters: Mapping[str, float] = field(default_factory=taking)

    @property
    def sorts_batch(self) -> bool:
        """The batch is matched by rank; such a loss takes neither pair weights nor one β per pair."""
        return self.matches != ""


class LossTerm(NamedTuple):
    """A loss with its weight in the sum and its parameters filled in."""

    loss: Loss
    weight: float
    parameters: dict[str, float]


def _smoothed_logistic(x: Tensor, epsilon: float) -> Tensor:
    """−(1 − ε) log σ(x) − ε log σ(−x)."""
    if epsilon == 0.0:
        return -F.logsigmoid(x)
    return -(1.0 - epsilon) * F.logsigmoid(x) - epsilon * F.logsigmoid(-x)


def _sigmoid(b: PairBatch) -> Tensor:
    return _smoothed_logistic(b.beta * b.score_gaps, b.label_smoothing)


def _robust(b: PairBatch) -> Tensor:
    x, epsilon = b.beta * b.score_gaps, b.label_smoothing
    return (-(1.0 - epsilon) * F.logsigmoid(x) + epsilon * F.logsigmoid(-x)) / (1.0 - 2.0 * epsilon)


def _hinge(b: PairBatch) -> Tensor:
    return torch.relu(1.0 - b.beta * b.score_gaps)


def _ipo(b: PairBatch) -> Tensor:
    return (b.mean_score_gaps - 0.5 / b.beta) ** 2


def _exo_pair(b: PairBatch) -> Tensor:
    x, epsilon = b.beta * b.score_gaps, b.label_smoothing
    chosen = torch.sigmoid(x) * (F.logsigmoid(x) - math.log1p(-epsilon))
    rejected = torch.sigmoid(-x) * (F.logsigmoid(-x) - math.log(epsilon))
    return chosen + rejected


def _nca_pair(b: PairBatch) -> Tensor:
    x_w, x_l = b.beta * b.chosen_log_ratios, b.beta * b.rejected_log_ratios
    return -F.logsigmoid(x_w) - 0.5 * F.logsigmoid(-x_w) - 0.5 * F.logsigmoid(-x_l)


def _bco_pair(b: PairBatch) -> Tensor:
    return -F.logsigmoid(b.beta * b.chosen_log_ratios) - F.logsigmoid(-b.beta * b.rejected_log_ratios)


def _sppo_hard(b: PairBatch) -> Tensor:
    return (b.chosen_log_ratios - 0.5 / b.beta) ** 2 + (b.rejected_log_ratios + 0.5 / b.beta) ** 2


def _aot(b: PairBatch) -> Tensor:
    gaps = (b.chosen_logps - b.rejected_logps) - (b.ref_chosen_logps - b.ref_rejected_logps)
    return _smoothed_logistic(b.beta * gaps, b.label_smoothing)


def _aot_unpaired(b: PairBatch) -> Tensor:
    return _smoothed_logistic(b.beta * (b.chosen_log_ratios - b.rejected_log_ratios), b.label_smoothing)


def _apo_zero(b: PairBatch) -> Tensor:
    # 1 − σ(x) = σ(−x), which keeps its digits where σ(x) rounds to 1
    return torch.sigmoid(-b.beta * b.chosen_log_ratios) + torch.sigmoid(b.beta * b.rejected_log_ratios)


def _apo_down(b: PairBatch) -> Tensor:
    gaps = b.chosen_log_ratios - b.rejected_log_ratios
    return torch.sigmoid(b.beta * b.chosen_log_ratios) + torch.sigmoid(-b.beta * gaps)


def _discopop(b: PairBatch, *, discopop_tau: float) -> Tensor:
    x = b.beta * b.score_gaps
    logistic = -F.logsigmoid(x) * torch.sigmoid(-x / discopop_tau)
    # e^−x · σ(x/τ) as one exponential: for x → −∞ the first factor alone overflows
    exponential = torch.exp(F.logsigmoid(x / discopop_tau) - x)
    return logistic + exponential


def _sft(b: PairBatch) -> Tensor:
    # Scaled so that the mean over kept pairs is the mean over kept tokens, −Σ log π / Σ |y_w|
    tokens = torch.where(b.keep, b.chosen_lengths, 0.0).sum().clamp(min=1.0)
    return -b.sft_logps * (b.num_kept / tokens)


def _sigmoid_norm(b: PairBatch) -> Tensor:
    return -F.logsigmoid(b.beta * b.mean_score_gaps)


def _simpo(b: PairBatch, *, simpo_gamma: float) -> Tensor:
    return -F.logsigmoid(b.beta * b.mean_logp_gaps - simpo_gamma)


def _log_odds(mean_logps: Tensor) -> Tensor:
    """log(p / (1 − p)) of p = e^mean_logps, with log(1 − p) taken by the branch that keeps its digits."""
    x = mean_logps.clamp(max=MAX_MEAN_LOGP)
    near_one = x > -math.log(2.0)
    log1mexp = torch.where(
        near_one,
        torch.log(-torch.expm1(torch.where(near_one, x, -1.0))),
        torch.log1p(-torch.exp(torch.where(near_one, -1.0, x))),
    )
    return x - log1mexp


def _orpo(b: PairBatch) -> Tensor:
    log_odds_w = _log_odds(b.chosen_logps / b.chosen_lengths)
    log_odds_l = _log_odds(b.rejected_logps / b.rejected_lengths)
    return b.chosen_mean_nll - b.beta * F.logsigmoid(log_odds_w - log_odds_l)


def _cpo(b: PairBatch, *, cpo_alpha: float) -> Tensor:
    gaps = b.chosen_logps - b.rejected_logps
    return _smoothed_logistic(b.beta * gaps, b.label_smoothing) + cpo_alpha * b.chosen_mean_nll


def _cpo_simpo(b: PairBatch, *, simpo_gamma: float, cpo_alpha: float) -> Tensor:
    return _simpo(b, simpo_gamma=simpo_gamma) + cpo_alpha * b.chosen_mean_nll


_TABLE = (
    Loss(
        "sigmoid",
        _sigmoid,
        "DPO, 2305.18290 eq. 7; with ε > 0 conservative DPO, Mitchell 2023",
        uses_label_smoothing=True,
        supports_f_divergence=True,
    ),
    Loss("hinge", _hinge, "SLiC-HF, 2305.10425; RSO, 2309.06657", supports_f_divergence=True),
    Loss("ipo", _ipo, "IPO, 2310.12036 eq. 17, per token", needs_lengths=True, supports_f_divergence=True, gap="mean"),
    Loss("exo_pair", _exo_pair, "EXO, 2402.00856 eq. 16", uses_label_smoothing=True, supports_f_divergence=True),
    Loss("nca_pair", _nca_pair, "NCA, 2402.05369"),
    Loss("robust", _robust, "Robust DPO, 2403.00409", uses_label_smoothing=True, supports_f_divergence=True),
    Loss("bco_pair", _bco_pair, "BCO, 2404.04656, without the running δ"),
    Loss("sppo_hard", _sppo_hard, "SPPO, 2405.00675 eq. 4.7 with P = 1 for the winner and 0 for the loser"),
    Loss(
        "aot",
        _aot,
        "AOT, 2406.05882, paired",
        couples_batch=True,
        matches="reference",
        uses_label_smoothing=True,
    ),
    Loss(
        "aot_unpaired",
        _aot_unpaired,
        "AOT, 2406.05882, unpaired",
        couples_batch=True,
        matches="rejected",
        uses_label_smoothing=True,
    ),
    Loss("apo_zero", _apo_zero, "APO, 2408.06266 eq. 7"),
    Loss("apo_down", _apo_down, "APO, 2408.06266 eq. 8"),
    Loss(
        "discopop",
        _discopop,
        "DiscoPOP, 2406.08414 eq. 5",
        supports_f_divergence=True,
        parameters=taking("discopop_tau"),
    ),
    Loss(
        "sft",
        _sft,
        "negative log-likelihood of the chosen completions, mean over tokens",
        needs_reference=False,
        uses_beta=False,
        needs_lengths=True,
        mean_over="tokens",
    ),
    Loss(
        "sigmoid_norm",
        _sigmoid_norm,
        "length-normalised DPO, 2411.15124 (Tülu 3)",
        needs_lengths=True,
        supports_f_divergence=True,
        gap="mean",
    ),
    Loss(
        "simpo",
        _simpo,
        "SimPO, 2405.14734 eq. 6",
        needs_reference=False,
        needs_lengths=True,
        gap="mean",
        parameters=taking("simpo_gamma"),
    ),
    Loss("orpo", _orpo, "ORPO, 2403.07691 eq. 6–7, λ = β", needs_reference=False, needs_lengths=True, gap="mean"),
    Loss(
        "cpo",
        _cpo,
        "CPO, 2401.08417, likelihood per token",
        needs_reference=False,
        needs_lengths=True,
        uses_label_smoothing=True,
        parameters=taking("cpo_alpha"),
    ),
    Loss(
        "cpo_simpo",
        _cpo_simpo,
        "SimPO with CPO's likelihood term, 2405.14734 and 2401.08417",
        needs_reference=False,
        needs_lengths=True,
        gap="mean",
        parameters=taking("simpo_gamma", "cpo_alpha"),
    ),
)
LOSSES: dict[str, Loss] = {loss.name: loss for loss in _TABLE}


def rank_matching(
    matches: str,
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    keep: Tensor,
) -> Tensor:
    """The pair that each pair takes its partner values from, in a loss that sorts the batch. All (B,) → (B,) int64.

    "reference": the policy's gap meets the reference's gap of equal rank (AOT, paired). "rejected": the chosen
    log-ratio meets the rejected log-ratio of equal rank. Ranks count kept pairs only; dropped ones come last on both
    sides, so they match among themselves. Ties are broken by index. Values stay with the pair that owns them: unlike a
    plain sort, this needs no scatter back.
    """
    if matches == "reference":
        values, others = chosen_logps - rejected_logps, ref_chosen_logps - ref_rejected_logps
    else:
        values, others = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps

    def order(x: Tensor) -> Tensor:
        return torch.argsort(torch.where(keep, x.detach(), math.inf), stable=True)

    ranks = torch.argsort(order(values), stable=True)
    return order(others)[ranks]


def match_by_rank(loss: Loss, b: PairBatch) -> PairBatch:
    """The batch with the sides that `loss` matches permuted, so that its formula acts pair by pair."""
    if not loss.sorts_batch:
        return b
    partner = rank_matching(
        loss.matches, b.chosen_logps, b.rejected_logps, b.ref_chosen_logps, b.ref_rejected_logps, b.keep
    )
    if loss.matches == "reference":
        return replace(
            b, ref_chosen_logps=b.ref_chosen_logps[partner], ref_rejected_logps=b.ref_rejected_logps[partner]
        )
    return replace(b, rejected_logps=b.rejected_logps[partner], ref_rejected_logps=b.ref_rejected_logps[partner])


#: f-divergence → its parameters with defaults.
F_DIVERGENCES: dict[str, Mapping[str, float]] = {
    "reverse_kl": taking(),
    "forward_kl": taking(),
    "js_divergence": taking(),
    "alpha_divergence": taking("f_alpha_divergence_coef"),
}


def divergence_scores(
    log_ratios: Tensor,
    f_divergence: str,
    *,
    f_alpha_divergence_coef: float = PARAMETERS["f_alpha_divergence_coef"].default,
) -> Tensor:
    """f'(t) at t = e^u, up to a constant that cancels in Δ (2309.16240, table 1). (B,) log-ratios u → (B,) scores.

    reverse KL u; forward KL 1 − e^−u; JS log 2 + log σ(u); α-divergence (e^((α−1)u) − 1)/(α − 1). Exponents are
    clamped to at most `MAX_EXPONENT`.
    """
    alpha_minus_1 = f_alpha_divergence_coef - 1.0
    if f_divergence == "reverse_kl" or (f_divergence == "alpha_divergence" and abs(alpha_minus_1) < ALPHA_LIMIT):
        return log_ratios
    if f_divergence == "forward_kl":
        return -torch.expm1((-log_ratios).clamp(max=MAX_EXPONENT))
    if f_divergence == "js_divergence":
        return math.log(2.0) + F.logsigmoid(log_ratios)
    if f_divergence == "alpha_divergence":
        return torch.expm1((alpha_minus_1 * log_ratios).clamp(max=MAX_EXPONENT)) / alpha_minus_1
    raise ValueError(f"f_divergence={f_divergence!r} is unknown; choose one of {', '.join(F_DIVERGENCES)}.")
