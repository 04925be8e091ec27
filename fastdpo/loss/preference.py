"""`preference_loss` and `token_preference_loss`: arguments checked, backend chosen.

In: log-probs per completion or per token, and the options. Out: a `PreferenceOutput`. The torch backend is the oracle
itself (`by_oracle`), Triton's kernels are behind operators (`by_operators`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from fastdpo.formulas import LossOptions, LossTerm, PreferenceOutput
from fastdpo.formulas.checks import (
    check_boundaries,
    check_loss_inputs,
    check_pair_tensors,
    check_preference_tensors,
    check_sorted_losses,
)
from fastdpo.formulas.options import LossKeywords, takes_loss_options
from fastdpo.loss.by_operators import loss_by_operators
from fastdpo.loss.by_oracle import loss_by_oracle
from fastdpo.loss.dynamic_beta import DynamicBeta
from fastdpo.ops.preference_loss.operators import PairTensors, serving_backend

if TYPE_CHECKING:
    from typing_extensions import Unpack


@takes_loss_options()
def preference_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    keep: Tensor | None = None,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    pair_weights: Tensor | None = None,
    sft_logps: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    options: LossOptions | None = None,
    **named: Unpack[LossKeywords],
) -> PreferenceOutput:
    """A preference loss, or a weighted sum of several, over B pairs. Formulas and sources are in `formulas.losses`.

    Args:
        chosen_logps, rejected_logps: (B,), log-probs of the completions under the policy, summed over tokens.
        ref_chosen_logps, ref_rejected_logps: (B,), the same under the reference. Losses without a reference use them
            for the rewards only.
        keep: (B,) bool; dropped pairs take no part in the loss or in its mean, whatever their values. Not with a
            `DynamicBeta`, which decides it.
        chosen_lengths, rejected_lengths: (B,), in tokens; a length of 0 counts as 1.
        pair_weights: (B,), factors of the pairs' losses (WPO, 2406.11827 eq. 2); carry no gradient.
        sft_logps: (B,), log-probs of the chosen completions in the likelihood terms of sft, orpo, cpo and cpo_simpo,
            where `chosen_logps` are weighted by token; default `chosen_logps`.
        process_group: ranks that share the batch of a `DynamicBeta`, each with B pairs.
        backend: "auto", "torch" or "triton", which takes up to 4096 pairs and computes in float32. "auto" takes torch
            where triton cannot serve.

    Returns:
        Loss, losses, rewards, margins; with a `DynamicBeta` also its plan, for this rank's pairs. Loss and losses are
        differentiable: with triton once, by backward (`ops.first_order`), with torch in every way.

    Raises:
        ValueError: an option unknown, out of range or without effect; missing reference or lengths; shapes other than
            (B,); pair weights or one β per pair with a loss that sorts the batch; a backend that cannot serve.
        TypeError: a dtype that does not fit.
    """
    check_pair_tensors(chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    if (ref_chosen_logps is None) != (ref_rejected_logps is None):
        raise ValueError("ref_chosen_logps and ref_rejected_logps go together; pass both or neither.")
    pairs = PairTensors(
        chosen_logps,
        rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        None,
        chosen_lengths,
        rejected_lengths,
        None if pair_weights is None else pair_weights.detach(),
        sft_logps,
    )
    return _loss_of(pairs, LossOptions.of(options, named), keep, process_group, backend)


@takes_loss_options()
def token_preference_loss(
    token_logps: Tensor,
    boundaries: Tensor,
    ref_token_logps: Tensor | None = None,
    *,
    ref_logps: Tensor | None = None,
    keep: Tensor | None = None,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    pair_weights: Tensor | None = None,
    sft_logps: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    options: LossOptions | None = None,
    **named: Unpack[LossKeywords],
) -> PreferenceOutput:
    """`preference_loss` of log-probs per token, summed over rows in the same call; options as there.

    Args:
        token_logps: (N,), of the completions' tokens, row after row.
        boundaries: (2B + 1,) int64, not falling, in [0, N] (checked on a CPU): row i is
            token_logps[boundaries[i] : boundaries[i + 1]]; B chosen rows, then their B rejected ones. Tokens before the
            first and after the last take no part.
        ref_token_logps: (N,), the same under the reference, without gradient.
        ref_logps: (2B,), the reference's log-probs summed over rows, instead.
        chosen_lengths, rejected_lengths: (B,); default the rows' lengths.

    Raises:
        As `preference_loss`; ValueError also for both references at once.
    """
    if ref_token_logps is not None and ref_logps is not None:
        raise ValueError("ref_token_logps and ref_logps are the same thing twice; pass one of them.")
    if token_logps.dim() != 1:
        raise ValueError(f"token_logps has shape {tuple(token_logps.shape)}; pass (N,), row after row.")
    if ref_logps is not None and ref_logps.shape != (boundaries.numel() - 1,):
        raise ValueError(f"ref_logps has shape {tuple(ref_logps.shape)}; boundaries say ({boundaries.numel() - 1},).")
    if not torch.compiler.is_compiling():
        check_boundaries(boundaries, token_logps)
    ref_chosen, ref_rejected = (None, None) if ref_logps is None else ref_logps.chunk(2)
    pairs = PairTensors(
        token_logps,
        None,
        ref_chosen if ref_token_logps is None else ref_token_logps.detach(),
        ref_rejected,
        boundaries,
        chosen_lengths,
        rejected_lengths,
        None if pair_weights is None else pair_weights.detach(),
        sft_logps,
    )
    return _loss_of(pairs, LossOptions.of(options, named), keep, process_group, backend)


def _loss_of(
    pairs: PairTensors,
    options: LossOptions,
    keep: Tensor | None,
    process_group: dist.ProcessGroup | None,
    backend: str,
) -> PreferenceOutput:
    module = options.beta if isinstance(options.beta, DynamicBeta) else None
    if module is not None and keep is not None:
        raise ValueError("keep and a DynamicBeta exclude each other, as it decides which pairs are kept; pass one.")
    if module is None and process_group is not None:
        raise ValueError("process_group has no effect without a DynamicBeta as beta; leave it out.")
    _check_tensors(pairs, options.terms, options.beta if isinstance(options.beta, Tensor) else None, keep)
    if module is not None:
        backend = module.backend_for(backend)
    backend = serving_backend(backend, pairs.chosen, pairs.num_pairs)
    if backend == "torch":
        return loss_by_oracle(pairs, options, keep, process_group)
    return loss_by_operators(pairs, options, keep, process_group, backend)


def _check_tensors(pairs: PairTensors, terms: Sequence[LossTerm], beta: Tensor | None, keep: Tensor | None) -> None:
    has_lengths = pairs.chosen_lengths is not None and pairs.rejected_lengths is not None
    check_loss_inputs(
        terms, has_reference=pairs.ref_chosen is not None, has_lengths=has_lengths or pairs.boundaries is not None
    )
    if beta is not None and beta.dim() > 0:
        check_sorted_losses(terms, beta, torch.Size((pairs.num_pairs,)), pairs.pair_weights)
    elif pairs.pair_weights is not None:
        check_sorted_losses(terms, pairs.pair_weights.new_empty(()), torch.Size(), pairs.pair_weights)
    check_preference_tensors(pairs._asdict(), beta=beta, keep=keep)
