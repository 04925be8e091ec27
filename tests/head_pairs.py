"""Pairs as hidden states and a head: small, ragged, with poison where nothing may be read."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastdpo.formulas import oracle

BACKENDS = ("torch", "triton")
B, T, H, V = 3, 6, 5, 23
HEAD = ("temperature", "logit_scale", "softcap", "ignore_index")
SOFT = {"softcap": 5.0, "logit_scale": 0.7, "temperature": 1.3}


def problem(pairs: int = B, seed: int = 0, ignore_index: int = -100, poison: bool = True) -> dict[str, Tensor]:
    """Ragged prompts and padding, ignored in the middle too; what is ignored holds NaN, also in the reference."""
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, V, (2 * pairs, T), generator=g)
    start = torch.randint(0, 3, (2 * pairs, 1), generator=g)
    end = start + torch.randint(1, 5, (2 * pairs, 1), generator=g)
    columns = torch.arange(T)
    targets[(columns < start) | (columns >= end)] = ignore_index
    targets[0] = torch.tensor([ignore_index, 1, 2, ignore_index, 0, V - 1])
    data = {
        "hidden": torch.randn(2 * pairs, T, H, generator=g),
        "weight": torch.randn(V, H, generator=g),
        "bias": torch.randn(V, generator=g),
        "ref_hidden": torch.randn(2 * pairs, T, H + 1, generator=g),
        "ref_weight": torch.randn(V, H + 1, generator=g),
        "ref_bias": torch.randn(V, generator=g),
    }
    if poison:
        for name in ("hidden", "ref_hidden"):
            data[name][targets == ignore_index] = math.nan
    return {**data, "targets": targets}


def token_logps(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: dict[str, Any]
) -> Tensor:
    head = {name: options[name] for name in HEAD if name in options}
    found = oracle.linear_logprob(
        hidden.double(), weight.double(), targets, bias=None if bias is None else bias.double(), **head
    )
    assert isinstance(found, Tensor)
    return found


def sums(logps: Tensor, targets: Tensor, options: dict[str, Any], *, plain: bool = False) -> Tensor:
    """Sequence by sequence and token by token, as the definitions of LD-DPO and of the mean read."""
    scored = targets != options.get("ignore_index", -100)
    totals = []
    for i, row in enumerate(logps):
        values = row[scored[i]]
        other = int(scored[(i + len(logps) // 2) % len(logps)].sum())
        weights = torch.ones_like(values)
        if options.get("ld_alpha") is not None and not plain:
            weights[other:] = options["ld_alpha"]
        divisor = max(len(values), 1) if options.get("average_log_prob") and not plain else 1
        totals.append((weights * values).sum() / divisor)
    return torch.stack(totals)


def expected_by_oracle(data: dict[str, Tensor], *, loss_options: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """float64: head, sums, `reference.preference_loss`. Missing tensors of `data` are left out."""
    targets = data["targets"]
    lengths = (targets != options.get("ignore_index", -100)).sum(1)
    logps = token_logps(data["hidden"], data["weight"], data.get("bias"), targets, options)
    chosen, rejected = sums(logps, targets, options).chunk(2)
    refs: tuple[Tensor, ...] = ()
    if "ref_hidden" in data:
        head = data.get("ref_weight", data["weight"]), data.get("ref_bias")
        with torch.no_grad():
            refs = sums(token_logps(data["ref_hidden"], *head, targets, options), targets, options).chunk(2)
    output = oracle.preference_loss(
        chosen,
        rejected,
        *refs,
        chosen_lengths=lengths.chunk(2)[0],
        rejected_lengths=lengths.chunk(2)[1],
        sft_logps=sums(logps, targets, options, plain=True).chunk(2)[0],
        **loss_options,
    )
    return {**output._asdict(), "chosen_logps": chosen.detach(), "rejected_logps": rejected.detach()}


def gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss.sum(), leaves))
