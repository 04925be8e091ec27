"""Log-probs of targets from logits or from hidden states, per token and summed over completions, in eager PyTorch.

Shapes: B completions, T token positions, H hidden size, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.formulas.head_options import check_head_options
from fastdpo.formulas.oracle.precision import at_least_float32


def selective_logprob(logits: Tensor, targets: Tensor, *, ignore_index: int = -100, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature)[target]. (..., V) logits, (...) targets → (...), 0 where ignored.

    Raises:
        ValueError: temperature is not positive, or the shapes do not fit.
    """
    if not temperature > 0.0:
        raise ValueError(f"temperature={temperature} must be positive; 1.0 leaves the logits as they are.")
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} need targets {tuple(logits.shape[:-1])}: {tuple(targets.shape)}"
        )
    ignored = targets == ignore_index
    # Ignored rows are emptied before the softmax, or a NaN there would reach other rows' gradients
    logits = at_least_float32(logits).masked_fill(ignored.unsqueeze(-1), 0.0) / temperature
    target_logits = logits.gather(-1, targets.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    return (target_logits - logits.logsumexp(-1)).masked_fill(ignored, 0.0)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    stats: Sequence[str] = (),
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Log-probs of the targets under the head: logits = (h Wᵀ + b)·logit_scale, softcap·tanh(·/softcap), /temperature.

    Args:
        hidden: (..., H).
        weight: (V, H).
        targets: (...), int64.
        bias: (V,).
        softcap: bound of the logits, as in Gemma 2; None for none.
        stats: names of further outputs, over the distribution that is scored: "entropy" in nats, "mean_logits" over
            the vocabulary, "is_top1" (bool; the first of equal logits counts), "log_sum_sq_probs" = log Σ_v p_v².

    Returns:
        (...) log-probs, 0 where ignored; with `stats`, also {name: (...)}, 0 or False where ignored.

    Raises:
        ValueError: an unknown stat, a softcap or temperature that is not positive, or shapes that do not fit.
    """
    check_head_options(stats, temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"hidden (..., H), weight (V, H) and targets (...) do not fit: "
            f"{tuple(hidden.shape)}, {tuple(weight.shape)}, {tuple(targets.shape)}."
        )
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    ignored = targets == ignore_index
    hidden = hidden.to(dtype).masked_fill(ignored.unsqueeze(-1), 0.0)
    logits = F.linear(hidden, weight.to(dtype), None if bias is None else bias.to(dtype)) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature  # (..., V)
    logps = selective_logprob(logits, targets, ignore_index=ignore_index)
    if not stats:
        return logps
    values = distribution_statistics(logits, targets, stats)
    return logps, {name: value.masked_fill(ignored, 0) for name, value in values.items()}


def distribution_statistics(logits: Tensor, targets: Tensor, stats: Sequence[str]) -> dict[str, Tensor]:
    """`stats` of softmax(logits), by `linear_logprob`'s names. (..., V) logits, (...) targets → {name: (...)}."""
    if not stats:
        return {}
    log_probs = logits.log_softmax(-1)
    values = {
        "entropy": lambda: -(log_probs.exp() * log_probs).sum(-1),
        "mean_logits": lambda: logits.mean(-1),
        "is_top1": lambda: logits.argmax(-1) == targets,
        "log_sum_sq_probs": lambda: (2.0 * log_probs).logsumexp(-1),
    }
    return {name: values[name]() for name in stats}


def completion_weights(
    completion_mask: Tensor,
    *,
    other_lengths: Tensor | None = None,
    ld_alpha: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Weight of every token in its sequence's log-prob, so that Σ_t weight·logp is `completion_logps`.

    1 on completion tokens and 0 elsewhere; with `ld_alpha` the tokens of a completion beyond the length of the other
    one of its pair weigh `ld_alpha` (LD-DPO, 2409.06411 eq. 11).

    Args:
        completion_mask: (B, T), nonzero on completion tokens.
        other_lengths: (B,), length in tokens of the other completion of the pair.
        ld_alpha: in [0, 1]; 1 is plain DPO.

    Returns:
        (B, T) weights in `dtype`.

    Raises:
        ValueError: ld_alpha is outside [0, 1], or only one of ld_alpha and other_lengths is given.
    """
    mask = completion_mask != 0
    if (ld_alpha is None) != (other_lengths is None):
        raise ValueError(f"ld_alpha={ld_alpha} and other_lengths go together: pass both for LD-DPO, or neither.")
    if ld_alpha is None or other_lengths is None:
        return mask.to(dtype)
    if not 0.0 <= ld_alpha <= 1.0:
        raise ValueError(f"ld_alpha={ld_alpha} must be in [0, 1]; 1 is plain DPO.")
    beyond = mask.cumsum(dim=1) > other_lengths.unsqueeze(1)
    return mask.to(dtype).masked_fill(mask & beyond, ld_alpha)


def completion_logps(
    token_logps: Tensor,
    completion_mask: Tensor,
    *,
    other_lengths: Tensor | None = None,
    ld_alpha: float | None = None,
) -> Tensor:
    """log π(y|x), summed over the completion's tokens. (B, T), (B, T) → (B,). Options as in `completion_weights`."""
    token_logps = at_least_float32(token_logps)
    weights = completion_weights(
        completion_mask, other_lengths=other_lengths, ld_alpha=ld_alpha, dtype=token_logps.dtype
    )
    return (weights * token_logps.masked_fill(completion_mask == 0, 0.0)).sum(dim=1)
