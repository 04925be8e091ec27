"""The operators behind `preference_loss` on Triton: loss and dL/dlogp in one launch, at a given β or with β-DPO's plan.

The torch backend needs none: it is the oracle's own formulas (`formulas.oracle`), which torch differentiates, traces
and compiles as they are, at half the time that an operator around them took (0.45 ms for 64 pairs on a CPU).

`preference_loss` takes β and `keep`; `planned_preference_loss` takes the statistics of a `DynamicBeta` and plans first.
Both act pair by pair (losses that sort the batch get their sides permuted before), so the derivative is diagonal: the
forward leaves it behind and the backward is one multiplication. Log-probs are (B,) each, or, with `boundaries`
(2B + 1,) in int64, one (N,) tensor of token log-probs in which B chosen rows precede B rejected ones.
Outputs: loss 0-D; losses (B,); values (3, B) = chosen rewards, rejected rewards, margins; grads (5, B) = dL/d(chosen,
rejected, ref_chosen, ref_rejected, sft_logps); token_grads (N,) or (0,); count 0-D, what the sum was divided by.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdpo.formulas import LOSSES, BetaOptions, BetaPlan, BetaState, LossTerm
from fastdpo.formulas.checks import MAX_TRITON_PAIRS, check_plan_tensors, check_preference_tensors, check_triton
from fastdpo.ops.backends import ENVIRONMENT, resolve_backend
from fastdpo.ops.registry import define

#: Order of the operators' `loss_parameters`, which the kernels know.
LOSS_PARAMETERS = ("discopop_tau", "simpo_gamma", "cpo_alpha", "f_alpha_divergence_coef")
_TRITON = "fastdpo.ops.preference_loss.backend_triton"


class PairTensors(NamedTuple):
    """The operators' first arguments. A (N,) reference per token has no `ref_rejected`."""

    chosen: Tensor
    rejected: Tensor | None
    ref_chosen: Tensor | None
    ref_rejected: Tensor | None
    boundaries: Tensor | None
    chosen_lengths: Tensor | None
    rejected_lengths: Tensor | None
    pair_weights: Tensor | None = None
    sft_logps: Tensor | None = None

    @property
    def num_pairs(self) -> int:
        return self.chosen.shape[0] if self.boundaries is None else (self.boundaries.shape[0] - 1) // 2

    @property
    def has_token_reference(self) -> bool:
        return self.boundaries is not None and self.ref_chosen is not None and self.ref_rejected is None

    def per_sequence(self, sum_rows: Callable[[Tensor, Tensor], Tensor]) -> PairTensors:
        """The same with log-probs summed over rows, differentiably."""
        boundaries = self.boundaries
        if boundaries is None:
            return self
        chosen, rejected = sum_rows(self.chosen, boundaries).chunk(2)
        pairs = self
        if pairs.ref_chosen is not None and pairs.ref_rejected is None:
            ref_chosen, ref_rejected = sum_rows(pairs.ref_chosen, boundaries).chunk(2)
            pairs = pairs._replace(ref_chosen=ref_chosen, ref_rejected=ref_rejected)
        chosen_lengths, rejected_lengths = boundaries.diff().chunk(2)
        return pairs._replace(
            chosen=chosen,
            rejected=rejected,
            boundaries=None,
            chosen_lengths=chosen_lengths if pairs.chosen_lengths is None else pairs.chosen_lengths,
            rejected_lengths=rejected_lengths if pairs.rejected_lengths is None else pairs.rejected_lengths,
        )


class PackedLoss(NamedTuple):
    """`LossOptions` as the operators see them, which take `packed`: torch's cost per call is quadratic in arguments.

    `loss_parameters` are in the order of `LOSS_PARAMETERS`, with the defaults of what a loss does not read.
    """

    loss_types: Sequence[str]
    loss_weights: Sequence[float]
    loss_parameters: Sequence[float]
    label_smoothing: float
    f_divergence: str
    reference_gap: bool  # margins are gaps of log-ratios, else of log-probs
    mean_gap: bool  # per token
    reduction: str
    reward_beta: float | None

    def packed(self) -> tuple[list[str], list[float]]:
        """(words, numbers)."""
        gap = ("log_ratio" if self.reference_gap else "logp", "mean" if self.mean_gap else "sum")
        words = [self.f_divergence, *gap, self.reduction, *self.loss_types]
        reward_beta = math.nan if self.reward_beta is None else self.reward_beta
        return words, [*self.loss_parameters, self.label_smoothing, reward_beta, *self.loss_weights]

    @classmethod
    def unpacked(cls, words: Sequence[str], numbers: Sequence[float]) -> PackedLoss:
        f_divergence, quantity, per, reduction, *loss_types = words
        parameters, (label_smoothing, reward_beta, *weights) = (
            numbers[: len(LOSS_PARAMETERS)],
            numbers[len(LOSS_PARAMETERS) :],
        )
        return cls(
            loss_types,
            weights,
            parameters,
            label_smoothing,
            f_divergence,
            quantity == "log_ratio",
            per == "mean",
            reduction,
            None if math.isnan(reward_beta) else reward_beta,
        )

    def terms(self) -> list[LossTerm]:
        values = dict(zip(LOSS_PARAMETERS, self.loss_parameters, strict=True))
        losses = [LOSSES[name] for name in self.loss_types]
        return [
            LossTerm(loss, weight, {name: values[name] for name in loss.parameters})
            for loss, weight in zip(losses, self.loss_weights, strict=True)
        ]


class PackedPlan(NamedTuple):
    """The settings of a `DynamicBeta` as the operators see them; they travel as `PackedLoss` does."""

    options: BetaOptions
    training: bool

    def flat(self) -> tuple[Any, ...]:
        """One after the other, as the kernels' launchers take them."""
        return (*vars(self.options).values(), self.training)

    def packed(self) -> tuple[list[str], list[float]]:
        """(words, numbers); the seed is a word, as a float could not hold it."""
        o = self.options
        words = [o.scope, o.variant, "train" if self.training else "eval", str(o.seed)]
        return words, [o.beta, o.alpha, o.momentum, o.keep_ratio, o.min_beta]

    @classmethod
    def unpacked(cls, words: Sequence[str], numbers: Sequence[float]) -> PackedPlan:
        scope, variant, mode, seed = words
        beta, alpha, momentum, keep_ratio, min_beta = numbers
        options = BetaOptions(beta, alpha, momentum, keep_ratio, min_beta, scope, variant, int(seed))
        return cls(options, mode == "train")


def packed_together(plan: PackedPlan, loss: PackedLoss) -> tuple[list[str], list[float]]:
    """Both, the plan's first."""
    (plan_words, plan_numbers), (loss_words, loss_numbers) = plan.packed(), loss.packed()
    return [*plan_words, *loss_words], [*plan_numbers, *loss_numbers]


def unpacked_together(words: Sequence[str], numbers: Sequence[float]) -> tuple[PackedPlan, PackedLoss]:
    """The inverse of `packed_together`."""
    return PackedPlan.unpacked(words[:4], numbers[:5]), PackedLoss.unpacked(words[4:], numbers[5:])


_PAIRS = (
    "Tensor chosen, Tensor? rejected, Tensor? ref_chosen, Tensor? ref_rejected, Tensor? boundaries, "
    "Tensor? chosen_lengths, Tensor? rejected_lengths"
)
_WEIGHTS = "Tensor? pair_weights, Tensor? sft_logps"
_OPTIONS = "str[] words, float[] numbers, str backend"
_STATE = "Tensor m0, Tensor sigma, Tensor step"
_OUTPUTS = "Tensor loss, Tensor losses, Tensor values, Tensor grads, Tensor token_grads, Tensor count"

# Schemas, fakes, derivatives


def serving_backend(backend: str, logps: Tensor, num_pairs: int) -> str:
    """`resolve_backend`, but torch where "auto" would be triton for float64 or more pairs than its kernels hold."""
    if backend == "torch" or (backend == "auto" and logps.device.type == "cpu" and ENVIRONMENT not in os.environ):
        return "torch"
    chosen = resolve_backend(backend, logps.device)
    too_much = logps.dtype == torch.float64 or num_pairs > MAX_TRITON_PAIRS
    if chosen == "triton" and too_much and backend == "auto" and ENVIRONMENT not in os.environ:
        return "torch"
    check_triton("log-probs", logps, num_pairs, chosen)
    return chosen


def as_plan(outputs: Sequence[Tensor]) -> BetaPlan:
    """(beta, keep, stats, step) as the operators return them → BetaPlan."""
    beta, keep, stats, step = outputs
    mean, std, m0, sigma = stats.unbind(0)
    return BetaPlan(beta, keep, mean, std, BetaState(m0, sigma, step))


def _fake_outputs(pairs: PairTensors) -> tuple[Tensor, ...]:
    new = pairs.chosen.new_empty((), dtype=torch.promote_types(pairs.chosen.dtype, torch.float32)).new_empty
    n = pairs.num_pairs
    tokens = 0 if pairs.boundaries is None else pairs.chosen.shape[0]
    return new(()), new(n), new((3, n)), new((5, n)), new(tokens), new(())


def _fake_preference_loss(*arguments: Any) -> tuple[Tensor, ...]:
    pairs, (beta, _, keep) = PairTensors(*arguments[:9]), arguments[9:12]
    check_preference_tensors(pairs._asdict(), beta=beta, keep=keep, backend=arguments[-1])
    return _fake_outputs(pairs)


def _fake_plan(margins: Tensor, n: Any, scope: str) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(margins.dtype, torch.float32)
    return (
        margins.new_empty((n,) if scope == "instance" else (), dtype=dtype),
        margins.new_empty(n, dtype=torch.bool),
        margins.new_empty(4, dtype=dtype),
        margins.new_empty((), dtype=torch.int64),
    )


def _fake_planned_preference_loss(*arguments: Any) -> tuple[Tensor, ...]:
    pairs, plan = PairTensors(*arguments[:9]), unpacked_together(*arguments[14:16])[0]
    all_margins, _, *state = arguments[9:14]
    check_preference_tensors(pairs._asdict(), backend=arguments[-1])
    margins = pairs.chosen.new_empty(pairs.num_pairs) if all_margins is None else all_margins
    check_plan_tensors(margins, *state, backend=arguments[-1])
    return (*_fake_outputs(pairs), *_fake_plan(margins, margins.shape[0], plan.options.scope))


def _fake_dynamic_beta(*arguments: Any) -> tuple[Tensor, ...]:
    margins, m0, sigma, step, *options, backend = arguments
    check_plan_tensors(margins, m0, sigma, step, backend=backend)
    return _fake_plan(margins, margins.shape[0], PackedPlan.unpacked(*options).options.scope)


def _fake_margins(*arguments: Any) -> Tensor:
    pairs = PairTensors(*arguments[:7])
    check_preference_tensors(pairs._asdict(), backend=arguments[-1])
    return _fake_outputs(pairs)[1]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pairs = PairTensors(*inputs[:9])
    grads, token_grads, count = output[3:6]
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grads, token_grads, count, pairs.boundaries)
    ctx.dtypes = [None if x is None else x.dtype for x in pairs]
    ctx.token_reference, ctx.num_inputs, ctx.backend = pairs.has_token_reference, len(inputs), inputs[-1]


def _backward(ctx: Any, grad_loss: Tensor | None, grad_losses: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    grads, token_grads, count, boundaries = ctx.saved_tensors
    by_input: list[Tensor | None] = [None] * ctx.num_inputs
    if grad_loss is None and grad_losses is None:
        return tuple(by_input)
    wanted, upstream = ctx.needs_input_grad, (count, grad_loss, grad_losses)
    if boundaries is not None and wanted[0]:
        by_input[0] = preference_loss_backward(token_grads, boundaries, *upstream, ctx.backend)
    if wanted[2] and ctx.token_reference:
        raise NotImplementedError("ref_token_logps take no gradient; pass ref_logps per sequence, or detach them.")
    rows = [(0, 0), (1, 1), (2, 2), (3, 3), (8, 4)]
    rows = [(i, row) for i, row in rows if wanted[i] and by_input[i] is None]
    if rows:
        by_row = preference_loss_backward(grads, None, *upstream, ctx.backend).unbind(0)
        for i, row in rows:
            by_input[i] = by_row[row].to(ctx.dtypes[i])
    if by_input[0] is not None:
        by_input[0] = by_input[0].to(ctx.dtypes[0])
    return tuple(by_input)


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    token_logps, boundaries, ctx.backend = inputs
    ctx.save_for_backward(boundaries)
    ctx.num_tokens, ctx.dtype = token_logps.shape[0], token_logps.dtype


def _rows_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (boundaries,) = ctx.saved_tensors
    return expand_rows(grad, boundaries, ctx.num_tokens, ctx.backend).to(ctx.dtype), None, None


preference_loss = define(
    "preference_loss",
    f"({_PAIRS}, {_WEIGHTS}, Tensor? beta, float fixed_beta, Tensor? keep, {_OPTIONS}) -> ({_OUTPUTS})",
    _fake_preference_loss,
    {"triton": f"{_TRITON}:preference_loss"},
    backward=_backward,
    setup_context=_save,
)
planned_preference_loss = define(
    "planned_preference_loss",
    f"({_PAIRS}, {_WEIGHTS}, Tensor? all_margins, int first_pair, {_STATE}, {_OPTIONS}) "
    f"-> ({_OUTPUTS}, Tensor beta, Tensor keep, Tensor stats, Tensor new_step)",
    _fake_planned_preference_loss,
    {"triton": f"{_TRITON}:planned_preference_loss"},
    backward=_backward,
    setup_context=_save,
    oracle="preference_loss",
)
preference_loss_backward = define(
    "preference_loss_backward",
    "(Tensor diagonal, Tensor? boundaries, Tensor count, Tensor? grad_loss, Tensor? grad_losses, str backend) "
    "-> Tensor",
    lambda diagonal, *_: torch.empty_like(diagonal),
    {"triton": f"{_TRITON}:scale_diagonal"},
)
preference_margins = define(
    "preference_margins",
    f"({_PAIRS}, bool reference_gap, bool mean_gap, str backend) -> Tensor",
    _fake_margins,
    {"triton": f"{_TRITON}:preference_margins"},
)
plan_batch = define(
    "dynamic_beta",
    f"(Tensor margins, Tensor m0, Tensor sigma, Tensor step, {_OPTIONS}) "
    "-> (Tensor beta, Tensor keep, Tensor stats, Tensor new_step)",
    _fake_dynamic_beta,
    {"triton": f"{_TRITON}:plan_batch"},
)
expand_rows = define(
    "expand_rows",
    "(Tensor values, Tensor boundaries, int num_tokens, str backend) -> Tensor",
    lambda values, boundaries, num_tokens, backend: values.new_empty(num_tokens),
    {"triton": "fastdpo.ops.preference_loss.rows:expand_rows"},
)
row_sums = define(
    "row_sums",
    "(Tensor token_logps, Tensor boundaries, str backend) -> Tensor",
    lambda token_logps, boundaries, backend: token_logps.new_empty(
        boundaries.shape[0] - 1, dtype=torch.promote_types(token_logps.dtype, torch.float32)
    ),
    {"triton": f"{_TRITON}:row_sums"},
    backward=_rows_backward,
    setup_context=_save_rows,
)
