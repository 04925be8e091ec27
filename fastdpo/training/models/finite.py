"""Which weights hold numbers that are not finite: one pass over them, 0.1 to 0.3 s for each GB, and one wait."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastdpo.training.models.sharded import local


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained, by name; of sharded ones this rank's part."""
    return {name: local(p.detach()) for name, p in model.named_parameters() if p.requires_grad}


def frozen_weights(model: nn.Module) -> dict[str, Tensor]:
    """The others; of a weight in 4 bit the scales, which are not finite where a number of theirs was not."""
    return {
        name: part
        for name, p in model.named_parameters()
        if not p.requires_grad
        for part in _parts(p)
    }  # fmt: skip


def _parts(parameter: Tensor) -> Iterator[Tensor]:
    if type(parameter).__name__ == "Params4bit":  # whose own numbers are packed bits, of whatever dtype
        quantised = getattr(parameter, "quant_state", None)
        for name in ("offset", "absmax"):  # with doubly quantised scales the first alone is a number
            scale = getattr(quantised, name, None)
            if isinstance(scale, Tensor) and scale.is_floating_point():
                yield scale.detach()
                return
    elif not is_traceable_wrapper_subclass(plain := local(parameter.detach())):
        yield plain


@torch.no_grad()
def nonfinite(weights: Mapping[str, Tensor]) -> list[str]:
    """Names of the weights with a NaN or an infinity among them."""
    read = {name: each for name, each in weights.items() if _is_readable(each)}
    if not read:
        return []
    ends = [torch.stack(torch.aminmax(each)).double() for each in read.values()]  # both are NaN where there is one
    finite = torch.stack([each.to(ends[0].device) for each in ends]).isfinite().all(dim=1).tolist()
    return [name for name, good in zip(read, finite, strict=True) if not good]


def _is_readable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.itemsize > 1 and not tensor.is_meta and tensor.numel() > 0
