"""Arguments of the losses and of dynamic β, checked in one place for the functions, the modules and the trainer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastdpo.formulas.losses import F_DIVERGENCES, LOSSES, Loss, LossTerm

STATS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
BETA_SCOPES = ("batch", "instance")
BETA_VARIANTS = ("released", "paper")


def check_loss_options(
    loss_types: str | Sequence[str],
    *,
    loss_weights: Sequence[float] | None = None,
    beta: float | Tensor = 0.1,
    label_smoothing: float = 0.0,
    f_divergence: str = "reverse_kl",
    **parameters: float,
) -> tuple[LossTerm, ...]:
    """Validate a loss, or a weighted list of losses, and fill in the parameters' defaults.

    Label smoothing must be read by at least one loss of the list; an f-divergence by every loss with a reference. A
    tensor β is not checked, as that would wait for the device.

    Raises:
        ValueError: an option is unknown, out of range, or would be ignored by the losses chosen.
    """
    names = [loss_types] if isinstance(loss_types, str) else list(loss_types)
    unknown = [name for name in names if name not in LOSSES]
    if unknown or not names:
        raise ValueError(f"loss_type={unknown or names!r} is unknown; choose among {', '.join(LOSSES)}.")
    losses = [LOSSES[name] for name in names]
    weights = [1.0] * len(losses) if loss_weights is None else [float(weight) for weight in loss_weights]
    if len(weights) != len(losses):
        raise ValueError(
            f"loss_weights has {len(weights)} entries for {len(losses)} losses {names}; give one for each."
        )
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"loss_weights={weights}: every weight must be finite.")
    if not isinstance(beta, Tensor) and not (0.0 < beta < math.inf):
        raise ValueError(f"beta={beta} must be positive and finite; 0.1 is the usual choice.")
    _check_label_smoothing(losses, label_smoothing)
    _check_f_divergence(losses, f_divergence)
    known = {name for loss in losses for name in loss.parameters} | set(F_DIVERGENCES[f_divergence])
    if stray := sorted(set(parameters) - known):
        accepted = ", ".join(sorted(known)) or "none"
        raise ValueError(f"loss parameter {stray} is not used by {names} with {f_divergence}; they take: {accepted}.")
    _check_parameters(parameters)
    return tuple(
        LossTerm(loss, weight, {name: parameters.get(name, default) for name, default in loss.parameters.items()})
        for loss, weight in zip(losses, weights, strict=True)
    )


def _check_label_smoothing(losses: Sequence[Loss], label_smoothing: float) -> None:
    names = [loss.name for loss in losses]
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing} must be in [0, 0.5), as a share of flipped labels.")
    if label_smoothing > 0.0 and not any(loss.uses_label_smoothing for loss in losses):
        users = ", ".join(loss.name for loss in LOSSES.values() if loss.uses_label_smoothing)
        raise ValueError(f"label_smoothing={label_smoothing} has no effect on {names}; set 0, or use one of {users}.")
    if "exo_pair" in names and label_smoothing == 0.0:
        raise ValueError("loss_type='exo_pair' takes log(label_smoothing), so 0 is infinite; 1e-3 is recommended.")


def _check_f_divergence(losses: Sequence[Loss], f_divergence: str) -> None:
    if f_divergence not in F_DIVERGENCES:
        raise ValueError(f"f_divergence={f_divergence!r} is unknown; choose one of {', '.join(F_DIVERGENCES)}.")
    if f_divergence == "reverse_kl":
        return
    stray = [loss.name for loss in losses if loss.needs_reference and not loss.supports_f_divergence]
    if stray or not any(loss.supports_f_divergence for loss in losses):
        users = ", ".join(loss.name for loss in LOSSES.values() if loss.supports_f_divergence)
        names = stray or [loss.name for loss in losses]
        raise ValueError(f"f_divergence={f_divergence!r} does not act on {names}; use reverse_kl, or one of {users}.")


def _check_parameters(parameters: Mapping[str, float]) -> None:
    for name, value in parameters.items():
        if not math.isfinite(value):
            raise ValueError(f"{name}={value} must be finite.")
    # Above 1 the exponential half of DiscoPOP grows without bound for badly ranked pairs
    if not 0.0 < (tau := parameters.get("discopop_tau", 0.05)) <= 1.0:
        raise ValueError(f"discopop_tau={tau} must be in (0, 1]; 0.05 is the paper's.")
    for name in ("simpo_gamma", "cpo_alpha"):
        if (value := parameters.get(name, 0.0)) < 0.0:
            raise ValueError(f"{name}={value} must not be negative.")


def check_loss_inputs(terms: Sequence[LossTerm], *, has_reference: bool, has_lengths: bool) -> None:
    """Raise ValueError where a loss needs reference log-probs or lengths that are not there."""
    for loss, _, _ in terms:
        if loss.needs_reference and not has_reference:
            raise ValueError(f"loss_type={loss.name!r} needs ref_chosen_logps and ref_rejected_logps; pass both.")
        if loss.needs_lengths and not has_lengths:
            raise ValueError(f"loss_type={loss.name!r} needs chosen_lengths and rejected_lengths; pass both.")


def check_pair_tensors(**tensors: Tensor | None) -> None:
    shape = tensors["chosen_logps"].shape if tensors["chosen_logps"] is not None else ()
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.dim() != 1 or tensor.shape != shape):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; all pair tensors are (B,), as chosen_logps.")


#: The most pairs of one batch that a triton kernel holds.
MAX_TRITON_PAIRS = 4096


def check_preference_tensors(
    pairs: Mapping[str, Tensor | None],
    *,
    beta: Tensor | None = None,
    keep: Tensor | None = None,
    backend: str = "torch",
) -> None:
    """Check the tensors of the loss operators (`ops.preference_loss.operators.PairTensors`), without reading any value.

    Raises:
        TypeError: log-probs that are not floating point, boundaries that are not int64, or float64 for triton.
        ValueError: shapes or devices that do not fit, or more pairs than triton's kernels hold.
    """
    chosen, boundaries = pairs["chosen"], pairs["boundaries"]
    assert chosen is not None
    per_token = boundaries is not None
    first = "token_logps" if per_token else "chosen_logps"
    named = {first: chosen, "boundaries": boundaries, "beta": beta, "keep": keep}
    for name in ("rejected", "ref_chosen", "ref_rejected"):
        named[f"{name}_logps"] = pairs[name]
    named |= {name: pairs[name] for name in ("chosen_lengths", "rejected_lengths", "pair_weights", "sft_logps")}
    if per_token and pairs["ref_rejected"] is None:
        named["ref_token_logps"] = named.pop("ref_chosen_logps")
    if boundaries is not None and (boundaries.dim() != 1 or boundaries.shape[0] % 2 == 0):
        raise ValueError(f"boundaries has shape {tuple(boundaries.shape)}; pass (2B + 1,), B chosen rows first.")
    if boundaries is not None and boundaries.dtype != torch.int64:
        raise TypeError(f"boundaries has dtype {boundaries.dtype}; pass int64.")
    if chosen.dim() != 1:
        raise ValueError(f"{first} has shape {tuple(chosen.shape)}; pass one dimension.")
    num_pairs = chosen.shape[0] if boundaries is None else (boundaries.shape[0] - 1) // 2
    for name, tensor in named.items():
        if tensor is None:
            continue
        if tensor.device != chosen.device:
            raise ValueError(f"{name} is on {tensor.device} and {first} on {chosen.device}; put them on one device.")
        if name.endswith("logps") and not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}; pass a floating-point type.")
        if name == "boundaries" or (name == "beta" and tensor.dim() == 0):
            continue
        per_token = name in ("token_logps", "ref_token_logps")
        expected = tuple(chosen.shape) if per_token else (num_pairs,)
        if tensor.dim() != 1 or tensor.shape[0] != expected[0]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; {expected} is needed, as {first} says.")
    for name, tensor in named.items():
        if tensor is not None and name.endswith("logps"):
            check_triton(name, tensor, num_pairs, backend)


def check_boundaries(boundaries: Tensor, token_logps: Tensor) -> None:
    """Raise ValueError for row boundaries that fall, or leave [0, N]. On a CPU only: elsewhere it would wait."""
    if type(boundaries) is not Tensor or boundaries.device.type != "cpu" or boundaries.numel() == 0:
        return
    first, last, tokens = int(boundaries[0]), int(boundaries[-1]), token_logps.shape[0]
    if first < 0 or last > tokens or bool((boundaries.diff() < 0).any()):
        raise ValueError(
            f"boundaries run from {first} to {last} for {tokens} tokens; they must not fall, nor leave [0, {tokens}]."
        )


def check_plan_tensors(margins: Tensor, m0: Tensor, sigma: Tensor, step: Tensor, *, backend: str = "torch") -> None:
    """Check the tensors of dynamic β's operators, as `check_preference_tensors` does the losses'."""
    if margins.dim() != 1 or margins.shape[0] == 0:
        raise ValueError(f"margins have shape {tuple(margins.shape)}; pass one margin per pair, of at least one pair.")
    if not margins.is_floating_point():
        raise TypeError(f"margins have dtype {margins.dtype}; pass a floating-point type.")
    for name, tensor in (("m0", m0), ("sigma", sigma), ("step", step)):
        if tensor.dim() != 0:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; pass a 0-D tensor.")
        if tensor.device != margins.device:
            raise ValueError(f"{name} is on {tensor.device} and the margins on {margins.device}; move the module.")
    if step.dtype != torch.int64:
        raise TypeError(f"step has dtype {step.dtype}; pass int64.")
    check_triton("margins", margins, margins.shape[0], backend)


def check_triton(name: str, tensor: Tensor, num_pairs: int, backend: str) -> None:
    if backend == "triton" and tensor.dtype == torch.float64:
        raise TypeError(f"{name} is float64; the triton kernels compute in float32. Use backend='torch'.")
    if backend == "triton" and num_pairs > MAX_TRITON_PAIRS:
        raise ValueError(
            f"{name}: {num_pairs} pairs in one batch; the triton kernels hold up to {MAX_TRITON_PAIRS}. "
            "Use backend='torch'."
        )


def check_sorted_losses(
    terms: Sequence[LossTerm], beta: Tensor, shape: torch.Size, pair_weights: Tensor | None
) -> None:
    if beta.dim() > 0 and beta.shape != shape:
        raise ValueError(f"beta has shape {tuple(beta.shape)}; pass a float, a 0-D tensor or one value per pair.")
    names = [loss.name for loss, _, _ in terms if loss.sorts_batch]
    if names and beta.dim() > 0:
        raise ValueError(f"{names} match pairs by rank, so β cannot differ between pairs; pass one beta.")
    if names and pair_weights is not None:
        raise ValueError(f"{names} match pairs by rank, so pair_weights have no pair to act on; leave them out.")


def check_dynamic_beta_options(
    *,
    beta: float,
    alpha: float,
    momentum: float,
    keep_ratio: float,
    min_beta: float,
    scope: str,
    variant: str,
    seed: int,
) -> None:
    """Raise ValueError for a setting of `dynamic_beta` that is out of range."""
    if not 0.0 < beta < math.inf:
        raise ValueError(f"beta={beta} must be positive and finite; 0.1 is the usual choice.")
    if not 0.0 <= alpha < math.inf:
        raise ValueError(f"alpha={alpha} must be at least 0 and finite; 0.6 is the paper's, 0 keeps β fixed.")
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"momentum={momentum} must be in [0, 1); 0.9 is the paper's.")
    if not 0.0 < keep_ratio <= 1.0:
        raise ValueError(f"keep_ratio={keep_ratio} must be in (0, 1]; 0.8 is the paper's, 1 keeps every pair.")
    if not 0.0 < min_beta <= beta:
        raise ValueError(f"min_beta={min_beta} must be positive and at most beta={beta}; 1e-3 is the paper's.")
    if scope not in BETA_SCOPES:
        raise ValueError(f"scope={scope!r} is unknown; choose one of {', '.join(BETA_SCOPES)}.")
    if variant not in BETA_VARIANTS:
        raise ValueError(f"variant={variant!r} is unknown; choose one of {', '.join(BETA_VARIANTS)}.")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed} must be in [0, 2**63).")


def check_head_options(stats: Sequence[str], *, temperature: float, logit_scale: float, softcap: float | None) -> None:
    """Raise ValueError for an option of `linear_logprob` that is unknown or out of range."""
    if unknown := sorted(set(stats) - set(STATS)):
        raise ValueError(f"stats={unknown} are unknown; choose among {', '.join(STATS)}.")
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"softcap={softcap} must be positive and finite, or None for no cap.")
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be positive and finite; 1.0 leaves the logits as they are.")
    if not math.isfinite(logit_scale):
        raise ValueError(f"logit_scale={logit_scale} must be finite; 1.0 leaves the logits as they are.")
