"""`linear_preference_loss`: from hidden states to a preference loss, for training loops of one's own.

log π(y|x) = Σ_t w_t·log softmax(head(h_t))[y_t] of policy and reference, then `fastdpo.preference_loss`. Only rows with
a target reach the head: with N of them, 2·N·H·V FLOPs for the reference and, of a frozen head, twice that for the
policy, forward and backward together (`fastdpo.linear_logprob`). What follows is on (2B, T) and (B,) tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastdpo.formulas import BetaPlan, LossOptions, LossTerm
from fastdpo.formulas.head_options import check_head_options
from fastdpo.formulas.options import LossKeywords, takes_loss_options
from fastdpo.formulas.oracle import completion_weights
from fastdpo.loss.logprobs import linear_logprob, scored_rows, spread_rows
from fastdpo.loss.preference import preference_loss
from fastdpo.ops.linear_logprob.operators import check_head_tensors

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LinearPreferenceOutput(NamedTuple):
    """What `linear_preference_loss` returns: `PreferenceOutput`'s fields, then the log-probs that the loss took.

    Only loss and losses carry a gradient. Rewards, margins and log-probs cover dropped pairs too.
    """

    loss: Tensor  # 0-D, or (B,) with reduction="none"
    losses: Tensor  # (B,), 0 for dropped pairs
    chosen_rewards: Tensor  # (B,)
    rejected_rewards: Tensor  # (B,)
    margins: Tensor  # (B,), see `fastdpo.formulas.oracle.preference_gap`
    plan: BetaPlan | None  # where `beta` was a `DynamicBeta`
    chosen_logps: Tensor  # (B,), sums over tokens; weighted and averaged where asked for
    rejected_logps: Tensor  # (B,)


class _HeadOptions(NamedTuple):
    """What policy and reference share."""

    temperature: float
    logit_scale: float
    softcap: float | None
    ignore_index: int | None
    backend: str

    def token_logps(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor | None
    ) -> Tensor:
        """(2B, T), 0 where ignored. rows: flat positions of the others where they are known, else None."""
        if rows is None:
            logps = linear_logprob(hidden, weight, targets, bias=bias, **self._asdict())
            assert isinstance(logps, Tensor)  # no statistics were asked for
            return logps
        options = self._asdict() | {"ignore_index": None}
        states, own = hidden.flatten(0, 1).index_select(0, rows), targets.flatten().index_select(0, rows)
        logps = linear_logprob(states, weight, own, bias=bias, **options)
        assert isinstance(logps, Tensor)
        return spread_rows(logps, rows, targets.numel()).view(targets.shape)


class _Reference(NamedTuple):
    """The arguments ref_hidden, ref_weight, ref_bias and ref_logps."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    logps: Tensor | None

    def check_presence(self, terms: Sequence[LossTerm]) -> None:
        if self.hidden is not None and self.logps is not None:
            raise ValueError("ref_hidden and ref_logps are two references; pass one of them.")
        needing = [term.loss.name for term in terms if term.loss.needs_reference]
        if needing and self.hidden is None and self.logps is None:
            raise ValueError(f"loss_type={needing} needs a reference; pass ref_hidden, or ref_logps computed before.")
        for name, tensor in (("ref_weight", self.weight), ("ref_bias", self.bias)):
            if tensor is not None and self.hidden is None:
                raise ValueError(f"{name} has no effect without ref_hidden; pass both or neither.")

    def with_head_of(self, weight: Tensor, bias: Tensor | None) -> _Reference:
        """With the policy's head, where the reference has hidden states and no head of its own."""
        if self.hidden is None or self.weight is not None:
            return self
        bias = bias if self.bias is None else self.bias
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        if trained and not torch.compiler.is_compiling():
            warnings.warn(
                "The head is trained and ref_weight is not given, so the reference is scored with the policy's head "
                "and changes with it; pass a frozen copy as ref_weight.",
                stacklevel=3,
            )
        return self._replace(weight=weight, bias=bias)

    def check_tensors(self, targets: Tensor) -> None:
        for name, tensor in self._asdict().items():
            if tensor is not None and not tensor.is_floating_point():
                raise TypeError(f"ref_{name} has dtype {tensor.dtype}; it must be floating point.")
            if tensor is not None and tensor.device != targets.device:
                raise ValueError(f"ref_{name} is on {tensor.device}, targets on {targets.device}; move one of them.")
        shape = tuple(targets.shape)
        if self.logps is not None and tuple(self.logps.shape) not in (shape, shape[:1]):
            raise ValueError(f"ref_logps has shape {tuple(self.logps.shape)}; pass {shape} per token, or {shape[:1]}.")
        if self.hidden is None or self.weight is None:
            return
        head = tuple(self.weight.shape)
        if len(head) != 2 or tuple(self.hidden.shape) != (*shape, head[1]):
            raise ValueError(
                f"ref_hidden (2B, T, H), targets (2B, T) and the reference's weight (V, H) do not fit: "
                f"{tuple(self.hidden.shape)}, {shape}, {head}."
            )
        if self.bias is not None and tuple(self.bias.shape) != head[:1]:
            raise ValueError(f"ref_bias has shape {tuple(self.bias.shape)}; a weight of {head} needs {head[:1]}.")

    def sequence_logps(
        self, head: _HeadOptions, targets: Tensor, scored: Tensor, rows: Tensor | None, weights: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Of the chosen and of the rejected completions, each (B,); nothing if there is no reference."""
        logps = None if self.logps is None else self.logps.detach()
        if self.hidden is not None and self.weight is not None:
            # Detached: no_grad leaves forward mode on, which is to see constants too
            bias = None if self.bias is None else self.bias.detach()
            logps = head.token_logps(self.hidden.detach(), self.weight.detach(), bias, targets, rows)
        if logps is not None and logps.dim() == 2:
            logps = _sequence_logps(logps.masked_fill(~scored, 0.0), weights)
        return () if logps is None else logps.chunk(2)


@takes_loss_options()
def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    keep: Tensor | None = None,
    pair_weights: Tensor | None = None,
    ld_alpha: float | None = None,
    average_log_prob: bool = False,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    process_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    options: LossOptions | None = None,
    **named: Unpack[LossKeywords],
) -> LinearPreferenceOutput:
    """The preference loss of B pairs from their hidden states; no logits are kept.

    Args:
        hidden: (2B, T, H), floating point: B chosen completions, then their rejected ones in the same order.
        weight: (V, H), of the head.
        targets: (2B, T) int64, what each position predicts, so already shifted; `ignore_index` on prompt and padding,
            whose hidden states are not read. A completion without targets has log-prob 0, and its length counts as 1.
        bias: (V,).
        ref_hidden: (2B, T, H'), hidden states of the reference, scored without gradient.
        ref_weight, ref_bias: (V, H') and (V,), the reference's head. Default: the policy's, and then its bias too
            unless `ref_bias` is given; a head that is trained needs its frozen copy here, or the reference follows it.
        ref_logps: instead of `ref_hidden`, log-probs computed before: (2B, T) per token, not read where ignored, or
            (2B,) as the loss takes them, which is summed, and weighted or averaged where the policy's are.
        ld_alpha: LD-DPO (2409.06411 eq. 11): tokens beyond the length of the pair's other completion weigh this much.
        average_log_prob: means over tokens in the place of sums. Not for losses that divide by the length themselves.
        temperature, logit_scale, softcap, ignore_index: of the head, policy's and reference's, as in `linear_logprob`.
        keep, pair_weights, process_group: as in `preference_loss`. Likelihood terms (sft, orpo, cpo, cpo_simpo) take
            unweighted sums.
        backend: "auto", "torch" or "triton", for head and loss.

    Returns:
        Loss, losses, rewards, margins, plan, policy's log-probs. Differentiable once, by backward, in
        hidden, weight and bias; other derivatives raise, as in `linear_logprob`.

    Raises:
        ValueError, TypeError: an option, shape, dtype or device that does not fit, named with its value, before any
            work where it can be known; no reference for a loss that needs one, or two.
    """
    options = LossOptions.of(options, named)
    terms = options.terms
    check_sequence_options(terms, average_log_prob=average_log_prob, ld_alpha=ld_alpha)
    check_head_options((), temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    if hidden.dim() != 3 or hidden.shape[0] % 2:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}; pass (2B, T, H), chosen first, then rejected.")
    check_head_tensors(hidden, weight, bias, targets)
    reference = _Reference(ref_hidden, ref_weight, ref_bias, ref_logps)
    reference.check_presence(terms)
    reference = reference.with_head_of(weight, bias)
    reference.check_tensors(targets)
    head = _HeadOptions(temperature, logit_scale, softcap, ignore_index, backend)
    scored = torch.ones_like(targets, dtype=torch.bool) if ignore_index is None else targets != ignore_index
    # Once for policy and reference, as a GPU's host waits for their count
    rows = scored_rows(targets.flatten(), len(weight), ignore_index)
    lengths = scored.sum(1)  # (2B,)
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    weights = _token_weights(scored, lengths, ld_alpha, average_log_prob, dtype)
    # The reference first, while no gradient of the policy's is in memory
    references = reference.sequence_logps(head, targets, scored, rows, weights)
    token_logps = head.token_logps(hidden, weight, bias, targets, rows)
    logps = _sequence_logps(token_logps, weights)
    chosen, rejected = logps.chunk(2)
    chosen_lengths, rejected_lengths = lengths.chunk(2)
    output = preference_loss(
        chosen,
        rejected,
        *references,
        keep=keep,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        pair_weights=pair_weights,
        sft_logps=None if weights is None else token_logps.chunk(2)[0].sum(1),
        process_group=process_group,
        backend=backend,
        options=options,
    )
    return LinearPreferenceOutput(*output, chosen.detach(), rejected.detach())


def _token_weights(
    scored: Tensor, lengths: Tensor, ld_alpha: float | None, average: bool, dtype: torch.dtype
) -> Tensor | None:
    """(2B, T) weights of the tokens in their sequence's log-prob; None where all are 1."""
    if ld_alpha is None and not average:
        return None
    other_lengths = None if ld_alpha is None else lengths.roll(len(lengths) // 2)
    weights = completion_weights(scored, other_lengths=other_lengths, ld_alpha=ld_alpha, dtype=dtype)
    return weights / lengths.clamp(min=1).unsqueeze(1) if average else weights


def _sequence_logps(token_logps: Tensor, weights: Tensor | None) -> Tensor:
    """(2B, T) log-probs, 0 where ignored → (2B,), in float32 at least."""
    token_logps = token_logps.to(torch.promote_types(token_logps.dtype, torch.float32))
    return (token_logps if weights is None else weights * token_logps).sum(1)


def check_sequence_options(
    terms: Sequence[LossTerm], *, average_log_prob: bool = False, ld_alpha: float | None = None
) -> None:
    """Raise ValueError for a weighting of tokens that is out of range or does not fit the losses."""
    divided = [term.loss.name for term in terms if term.loss.gap == "mean"]
    if average_log_prob and divided:
        raise ValueError(f"average_log_prob=True would divide twice: {divided} divide by the length themselves.")
    if ld_alpha is not None and not 0.0 <= ld_alpha <= 1.0:
        raise ValueError(f"ld_alpha={ld_alpha} must be in [0, 1]; 1 is plain DPO.")
