"""The tensors of the losses and of dynamic β, checked against each other and against the losses that read them.

Shapes, dtypes and devices only, of which no check waits for a device; options check themselves (`options.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastdpo.formulas.losses import LossTerm


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
