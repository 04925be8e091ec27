"""Where the time of a step goes: FLOPs and bytes of every operator, counted on fake tensors, at a device's peak rates.

An operator takes the longer of its FLOPs at the GEMM rate and its bytes, each input read and each output written once,
at the memory's bandwidth; operators follow one another. This is a lower bound and a MODEL: launches, caches and the
rates that real kernels reach are not in it. Its shares say what a step is bound by.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdpo.estimate.activations import micro_batch
from fastdpo.estimate.counter import SHALLOW, ConfigCounter, counted_tokens
from fastdpo.estimate.devices import Device
from fastdpo.estimate.rows import Row
from fastdpo.ops.linear_logprob.tiles import FUSED_ROWS, MAX_ROWS

#: The order of the report.
KINDS = ("frozen GEMMs", "dequantisation", "LoRA", "attention", "norms, activations, copies", "head", "optimizer")
#: Products, whether they make their result, write it into a tensor that is given, or add to it.
_GEMMS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")
#: Adapters whose A are multiplied together at most: of queries, keys and values.
_STACKED = 3
#: Bytes per parameter that AdamW reads and writes beside its states: the parameter twice, its gradient once.
_OPTIMIZER_BYTES = 12


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes of one operator, by kind of work."""

    kind: str
    flops: float
    bytes: float

    def seconds(self, device: Device) -> float:
        """At the device's peak rates."""
        return max(self.flops / (device.teraflops * 1e12), self.bytes / (device.gigabytes_per_second * 1e9))


class OperatorTimes(TorchDispatchMode):
    """Sums seconds and FLOPs of all operators, by kind.

    visible: pairs of a query and a key in a row; what attention over variable lengths computes.
    rank: of the LoRA, which tells its products from others.
    """

    def __init__(self, device: Device, visible: int, rank: int | None) -> None:
        super().__init__()
        self.device, self.visible, self.rank = device, visible, rank
        self.seconds: dict[str, float] = defaultdict(float)
        self.flops: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not _only_looks(func, args, result):
            for work in self._work(func, args, kwargs or {}, result):
                self.seconds[work.kind] += work.seconds(self.device)
                self.flops[work.kind] += work.flops
        return result

    def _work(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> list[Work]:
        moved = _bytes((args, kwargs, result))
        name = str(func)
        if name == "bitsandbytes.gemm_4bit.default":
            a, shape = args[0], args[2]
            count = math.prod(shape)
            dense = count * a.element_size()
            gemm = Work("frozen GEMMs", 2 * count * (a.numel() // a.shape[-1]), _bytes((a, result)) + dense)
            return [gemm, Work("dequantisation", 0, _bytes((args[1:], kwargs)) + dense)]
        if name.startswith("bitsandbytes."):
            return [Work("dequantisation", 0, moved)]
        if name == "fastdpo.linear_logprob.default":
            hidden, weight, unit = args[0], args[1], args[9]
            products = 2 if unit else 1
            logits = hidden.shape[0] * weight.shape[0]
            # On a CPU a float32 tile is written and read for each; on a GPU 16-bit exponentials, for the policy only
            if self.device.name == "cpu":
                rows, moved = MAX_ROWS, products * 8 * logits
            else:
                rows, moved = FUSED_ROWS, 2 * weight.element_size() * logits if unit else 0
            weights = products * weight.numel() * weight.element_size() * -(-hidden.shape[0] // rows)
            return [Work("head", products * 2 * logits * hidden.shape[1], moved + weights)]
        if "attn" in name or "attention" in name:
            return [Work("attention", self._attention_flops(name, args), moved)]
        if name.startswith("fastdpo."):
            return [Work("head", 0, moved)]
        if func._schema.name in _GEMMS:
            first, second = args[-2:]
            flops = 2 * first.numel() * second.shape[-1]
            ranks = [self.rank * count for count in range(1, _STACKED + 1)] if self.rank else []
            kind = "LoRA" if min(*first.shape[-2:], second.shape[-1]) in ranks else "frozen GEMMs"
            return [Work(kind, flops, _bytes((args, result)))]
        return [Work("norms, activations, copies", 0, moved)]

    def _attention_flops(self, name: str, args: Any) -> float:
        """Two products forward, five backward, over what a query sees."""
        products = 5 if "backward" in name else 2
        query, key = [x for x in args if isinstance(x, Tensor)][1 if "backward" in name else 0 :][:2]
        if query.dim() == 3:  # (tokens, heads, D), of variable length
            return products * 2 * query.shape[1] * query.shape[2] * self.visible
        *batch, queries, depth = query.shape
        seen = queries * key.shape[-2] - queries * (queries - 1) / 2
        return products * 2 * math.prod(batch) * depth * seen


def _only_looks(func: Any, args: Any, result: Any) -> bool:
    """Whether an operator moves nothing: a view, or a question about a tensor."""
    outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
    if not outputs:
        return not func._schema.is_mutable
    if func._schema.is_mutable:
        return False
    storages = {id(x.untyped_storage()) for x in tree_leaves(args) if isinstance(x, Tensor)}
    return all(id(x.untyped_storage()) in storages for x in outputs)


def _bytes(tree: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tree_leaves(tree) if isinstance(x, Tensor))


@dataclass(frozen=True)
class PassTimes:
    """Seconds and FLOPs by kind of one micro-batch."""

    seconds: dict[str, float]
    flops: dict[str, float]

    def extrapolated(self, other: PassTimes, steps: float) -> PassTimes:
        """`steps` times the difference to `other` further on."""
        return PassTimes(
            _extrapolated(self.seconds, other.seconds, steps), _extrapolated(self.flops, other.flops, steps)
        )


def time_micro_batch(counter: ConfigCounter, row: Row, device: Device, *, training: bool) -> PassTimes:
    """A micro-batch of a training pass, forward and backward, or of a scoring pass.

    Of a row that is longer than is counted everything but attention is linear in its tokens.
    """
    ends = _counted_ends(row, counter.form_tokens if counter.training.flash else None)
    if ends is None:
        return _counted_times(counter, row, device, training)
    half, whole = (_counted_times(counter, each, device, training) for each in ends)
    found = half.extrapolated(whole, (row.tokens - ends[1].tokens) / (ends[1].tokens - ends[0].tokens))
    seen = row.visible / ends[1].visible  # attention of a long row is bound by its products
    return PassTimes(
        found.seconds | {"attention": whole.seconds["attention"] * seen},
        found.flops | {"attention": whole.flops["attention"] * seen},
    )


def _counted_ends(row: Row, longest: int | None) -> tuple[Row, Row] | None:
    """Two rows of the same kind through which a line is drawn; None where the row itself is counted. longest: tokens of
    the longest row that is counted on a GPU."""
    shape = row.shape
    if longest is not None and row.tokens > longest:
        if shape.tokens > longest // 4:
            first, second = (shape.scaled(size) for size in (longest // 2, longest))
            return Row(first.tokens, first), Row(second.tokens, second)
        most = longest // shape.tokens // 2 * 2 * shape.tokens
        return Row(most // 2, shape), Row(most, shape)
    if row.tokens > (most := counted_tokens(shape)):
        return Row(most // 2, shape), Row(most, shape)
    return None


def _counted_times(counter: ConfigCounter, row: Row, device: Device, training: bool) -> PassTimes:
    options = counter.training.options
    found = []
    for skeleton in counter.skeletons:
        times = OperatorTimes(device, row.visible, options.lora_r if options.use_lora else None)
        with micro_batch(skeleton.model, row, **counter.options(skeleton)) as forward, times:
            if training:
                forward().sum().backward()
            else:
                with torch.no_grad():
                    forward()
        found.append(PassTimes(times.seconds, times.flops))
    if len(found) == 1:
        return found[0]
    steps = counter.layers - SHALLOW[1]
    return found[0].extrapolated(found[1], steps)


def _extrapolated(first: dict[str, float], second: dict[str, float], steps: float) -> dict[str, float]:
    return {kind: value + steps * (value - first.get(kind, 0.0)) for kind, value in second.items()}


def optimizer_seconds(parameter_bytes: int, state_bytes: int, device: Device) -> float:
    """AdamW's traffic: parameters, gradients and states read, parameters and states written."""
    parameters = parameter_bytes / 4
    return (_OPTIMIZER_BYTES * parameters + 2 * state_bytes) / (device.gigabytes_per_second * 1e9)


@dataclass(frozen=True)
class StepTimes:
    """Seconds of an optimizer step over a batch: one scoring pass over it, and one training pass, each by kind."""

    scoring: dict[str, float]
    training: dict[str, float]

    @classmethod
    def of(cls, make: Callable[[Row, bool], PassTimes], row: Row, scoring_row: Row, batch_tokens: int) -> StepTimes:
        """Micro-batches as often as the batch's tokens fill them."""
        return cls(
            _scaled(make(scoring_row, False).seconds, batch_tokens / scoring_row.tokens),
            _scaled(make(row, True).seconds, batch_tokens / row.tokens),
        )


def _scaled(seconds: dict[str, float], factor: float) -> dict[str, float]:
    return {kind: seconds[kind] * factor for kind in KINDS if seconds.get(kind)}
