"""Where a training step's time goes, by part of the model, beside its matrix products on their own.

One step runs under torch.profiler; every operator's own time is booked on the innermost label around it: a fused
function labels its pieces itself in both passes (`fastdpo.training.body.labels`), other modules are labelled here, and
what the backward runs under no label belongs to the part whose forward made its node. The floor is the time that the
same matrix products take outside the model, at the rate this machine reaches on their shapes.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function
from transformers.modeling_layers import GradientCheckpointingLayer

from benchmarks.report import Figure, at_most
from benchmarks.settings import Settings
from benchmarks.training import PLANS, chosen, training_case
from benchmarks.training_run import Contender, StepClock, build, quieten
from fastdpo.training.body.labels import ACTIVATION, ATTENTION, BODY, LORA, NF4, NORMS, PREFIX

TITLE = "profile of one training step: own time of operators, by part"
#: Parts beside those of the body.
HEAD_PRODUCTS, HEAD = "matrix products of the head", "rest of the head"
OPTIMIZER, OTHER = "optimizer and clipping", "residuals, gathers, copies, loss"
PARTS = (BODY, NF4, LORA, ATTENTION, NORMS, ACTIVATION, HEAD_PRODUCTS, HEAD, OPTIMIZER, OTHER)
#: Label of a whole 4-bit linear, whose products are the body's and whose other operators dequantise.
_LINEAR4BIT = "4-bit linear"
#: Products of two matrices → the place of the first among the arguments.
_PRODUCTS = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1}
#: Bounds of LoRA's share of the step, and of the step over the bare products of body and head.
LORA_SHARE, OVER_PRODUCTS = at_most(0.06), at_most(1.6)
#: Runs of a bare product, of which the best counts.
_REPEATS = 3


@dataclass(frozen=True)
class Product:
    """(m, k) @ (k, n); transposed: the second operand is a view of (n, k), as in a forward's x Wᵀ."""

    m: int
    k: int
    n: int
    transposed: bool

    @property
    def flops(self) -> int:
        return 2 * self.m * self.k * self.n


@dataclass
class Profile:
    """Microseconds of each part, and the matrix products in it with their numbers."""

    spent: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    products: dict[str, Counter[Product]] = field(default_factory=lambda: defaultdict(Counter))


class ProfiledStep(StepClock):
    """Profiles the last of `steps` steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps, self.profiler = steps, profile(activities=[ProfilerActivity.CPU], record_shapes=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.steps - 1:
            self.profiler.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        if state.global_step == self.steps:
            self.profiler.stop()


def run(settings: Settings) -> list[Figure]:
    figures = []
    for name in chosen(settings.plans or ("default",), tuple(PLANS)):
        figures += profile_plan(name, settings)
    return figures


def profile_plan(name: str, settings: Settings) -> list[Figure]:
    quieten()
    case = training_case(settings)
    options: dict[str, Any] = dict(PLANS[name].options)
    if PLANS[name].cached:
        options["reference"] = "precompute"
    clock = ProfiledStep(case.steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(Contender("fastdpo", options), case, folder, clock)
        label_parts(trainer.model, trainer.parts.passes.bodies)
        clock.mark()
        trainer.train()
    seconds = clock.spent(0)[-1]
    found = account(clock.profiler.events())
    return figures(name, found, seconds, clock.spent(0)[-2], settings)


def figures(name: str, found: Profile, seconds: float, unprofiled: float, settings: Settings) -> list[Figure]:
    """Of each part with its share, and its matrix products' time outside the model where it has some."""
    total = sum(found.spent.values()) / 1e6
    floors = {part: floor(products) for part, products in found.products.items()}
    listed = []
    for part in PARTS:
        spent = found.spent.get(part, 0.0) / 1e6
        bare = floors.get(part)
        note = f"{spent / seconds:.1%} of the step"
        if bare:
            flops = sum(product.flops * count for product, count in found.products[part].items())
            note += f"; {flops / 1e9:.0f} GFLOP, bare at {flops / bare / 1e9:.0f} GFLOP/s"
        against = "products alone" if bare else ""
        listed.append(Figure(name, part, spent, "s", against, bare, spent / bare if bare else None, note=note))
    bare = sum(floors.get(part, 0.0) for part in (BODY, HEAD_PRODUCTS))
    python = seconds - total
    note = f"the step before took {unprofiled:.1f} s without the profiler, on other pairs"
    lora, share = found.spent.get(LORA, 0.0) / 1e6, settings.target(LORA_SHARE)
    over = settings.target(OVER_PRODUCTS)
    return [
        *listed,
        Figure(name, "Python, dispatch, profiler", python, "s", note=f"{python / seconds:.1%} of the step"),
        Figure(name, "LoRA's share", lora, "s", "step", seconds, lora / seconds, share),
        Figure(name, "step", seconds, "s", "products of body and head", bare, seconds / bare, over, note),
    ]


def label_parts(model: nn.Module, bodies: Any = None) -> None:
    """Let every module of a known kind name its part to the profiler, but those of lean bodies, which do so."""
    lean = [name for body in getattr(bodies, "bodies", ()) for name in body.served]
    for name, module in model.named_modules():
        if any(name == each or name.startswith(f"{each}.") for each in lean):
            continue
        kind = type(module).__name__
        if isinstance(module, GradientCheckpointingLayer):
            # Recomputed in the midst of some node's backward, of whose part the layer's own operators are not
            _label(module, OTHER)
        elif isinstance(module, Linear4bit):
            _label(module, _LINEAR4BIT)
        elif isinstance(module, LoraLayer):
            _label(module, LORA)
        elif "RMSNorm" in kind or isinstance(module, nn.LayerNorm):
            _label(module, NORMS)
        elif name.endswith(("self_attn", "rotary_emb")):
            _label(module, ATTENTION)
        elif name.endswith("mlp"):
            _label(module, ACTIVATION)


def _label(module: nn.Module, part: str) -> None:
    forward: Callable[..., Any] = module.forward

    def labelled(*args: Any, **kwargs: Any) -> Any:
        with record_function(PREFIX + part):
            return forward(*args, **kwargs)

    module.forward = labelled


def account(events: Iterable[FunctionEvent]) -> Profile:
    """Book the own time of every operator."""
    events = list(events)
    # A node of the backward bears the number of the forward operator that made it. So do those before that made none.
    makers: dict[int, FunctionEvent] = {}
    for event in sorted(events, key=lambda each: each.time_range.start):
        if event.sequence_nr >= 0 and not _in_backward(event):
            makers[event.sequence_nr] = event
    found = Profile()
    for event in events:
        part = part_of(event, makers)
        found.spent[part] += event.self_cpu_time_total
        if event.name in _PRODUCTS and (product := _product(event)) is not None:
            found.products[part][product] += 1
    return found


def part_of(event: FunctionEvent, makers: dict[int, FunctionEvent]) -> str:
    chain = list(_ancestors(event))
    label = _innermost(chain)
    if label is None and _in_backward(event):
        node = next((each for each in chain if each.sequence_nr in makers), None)
        label = None if node is None else _innermost(_ancestors(makers[node.sequence_nr]))
    if label is None:
        return ATTENTION if any("scaled_dot_product" in each.name.lower() for each in chain) else OTHER
    if label == HEAD:
        return HEAD_PRODUCTS if event.name in _PRODUCTS else HEAD
    if label == _LINEAR4BIT:
        return BODY if event.name in _PRODUCTS else NF4
    return label


def _innermost(chain: Iterable[FunctionEvent]) -> str | None:
    """What the nearest of the events that say so belong to."""
    for name in (each.name for each in chain):
        if name.startswith(PREFIX):
            return name.removeprefix(PREFIX)
        if name.startswith("Optimizer.") or "clip_grad" in name:
            return OPTIMIZER
        if name.startswith("fastdpo::segment_attention"):
            return ATTENTION
        if name.startswith("fastdpo::") or "logprob" in name.lower():
            return HEAD
    return None


def _ancestors(event: FunctionEvent | None) -> Iterable[FunctionEvent]:
    """`event`, its caller, …"""
    while event is not None:
        yield event
        event = event.cpu_parent


def _in_backward(event: FunctionEvent) -> bool:
    return any(each.name.startswith("autograd::engine") for each in _ancestors(event))


def _product(event: FunctionEvent) -> Product | None:
    shapes: Any = event.input_shapes
    first = _PRODUCTS[event.name]
    operands = [tuple(shape) for shape in shapes[first : first + 2]]
    if [len(shape) for shape in operands] != [2, 2]:
        return None
    (m, k), (_, n) = operands
    return Product(m, k, n, transposed=not _in_backward(event))


def floor(products: Counter[Product]) -> float:
    """Seconds that the products take on their own, outputs preallocated."""
    total = 0.0
    for product, count in products.items():
        first = torch.randn(product.m, product.k)
        second = torch.randn(product.n, product.k).t() if product.transposed else torch.randn(product.k, product.n)
        out = torch.empty(product.m, product.n)
        best = float("inf")
        for _ in range(_REPEATS):
            start = time.perf_counter()
            torch.mm(first, second, out=out)
            best = min(best, time.perf_counter() - start)
        total += count * best
    return total
