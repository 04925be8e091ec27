"""Stage 4: the head, policy forward and backward and reference, by plan and kernel, beside the bare products.

Bare are three products in vocabulary chunks into outputs that exist: h Wᵀ twice, and A += P W in float32 once. The
device's time and the host's are apart: where the second reaches the first, launches are what costs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from triton.runtime.errors import OutOfResources

import fastdpo
from benchmarks import cases
from benchmarks.cases import HeadCase, HeadInputs
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.linear_logprob.plans import Plan, environment, plans, tile_calls
from benchmarks.gpu.linear_logprob.products import plain_head
from benchmarks.gpu.report import Report, Skipped
from benchmarks.gpu.sizes import MIB, Sizes

#: Seconds of one plan at one shape, or of one tile, compilation included.
NEEDED = 4.0


def policy_and_reference(x: HeadInputs, plan: Plan) -> Callable[[], torch.Tensor]:
    """What a training step asks of a frozen head; every row is scored."""

    def call() -> torch.Tensor:
        with environment(plan.environment):
            logps = fastdpo.linear_logprob(x.hidden, x.weight, x.targets, ignore_index=None, **plan.options)
            assert isinstance(logps, torch.Tensor)  # no statistics were asked for
            (gradient,) = torch.autograd.grad(logps, x.hidden, x.grad_logps)
            reference_only(x, plan)()
        return gradient

    return call


def reference_only(x: HeadInputs, plan: Plan) -> Callable[[], object]:
    def call() -> object:
        with environment(plan.environment), torch.no_grad():
            return fastdpo.linear_logprob(x.ref_hidden, x.weight, x.targets, ignore_index=None, **plan.options)

    return call


def bare(x: HeadInputs, chunk: int) -> Callable[[], None]:
    """The three products, a chunk of the vocabulary at a time."""
    hidden, reference, weight = x.hidden.detach(), x.ref_hidden, x.weight
    logits = weight.new_empty(len(hidden), min(chunk, len(weight)))
    probs = torch.rand_like(logits)
    total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    head = plain_head(weight)

    def call() -> None:
        for part in weight.split(chunk):
            columns = len(part)
            head.matmul(hidden, part.t(), logits[:, :columns])
            head.matmul_add(probs[:, :columns], part, total)
            head.matmul(reference, part.t(), logits[:, :columns])

    return call


def run(report: Report, sizes: Sizes) -> None:
    clock = Clock(sizes.device, sizes.seconds)
    for case in sizes.heads:
        if report.skips(case.name, NEEDED if sizes.on_gpu else 0.0):
            continue
        with report.case(case.name):
            x = cases.head_inputs(case, sizes.dtype, device=sizes.device)
            floor = clock.time(bare(x, sizes.chunk))
            report.add(f"{case.name}: bare products", teraflops=case.flops / floor.ms / 1e9, **floor.figures())
            x = cases.head_inputs(case, sizes.head_dtype, device=sizes.device)
            best = _plans(report, sizes, clock, case, x, floor.ms)
            if best is not None:
                name, ms = best
                text = f"{case.name}: {ms:.3g} ms ({name}), bare products {floor.ms:.3g} ms, ratio {ms / floor.ms:.3f}"
                report.add(f"{case.name}: best", headline=text, plan=name, ms=ms, ratio=ms / floor.ms)
    for case in sizes.heads:  # after all plans: each tile compiles for seconds
        for store in (True, False):
            _tiles(report, sizes, clock, case, store)


def _plans(
    report: Report, sizes: Sizes, clock: Clock, case: HeadCase, x: HeadInputs, floor: float
) -> tuple[str, float] | None:
    """Times every plan; the fastest one."""
    best: tuple[str, float] | None = None
    for name, plan in plans(sizes).items():
        title = f"{case.name}: {name}"
        if report.skips(title, NEEDED if sizes.on_gpu else 0.0):
            continue
        with report.case(title):
            whole, reference = policy_and_reference(x, plan), reference_only(x, plan)
            times = clock.measure({"whole": whole, "reference": reference})
            ms = times["whole"].ms
            report.add(
                title,
                ratio=ms / floor,
                teraflops=case.flops / ms / 1e9,
                peak_mib=clock.peak(whole) / MIB,
                reference_ms=times["reference"].ms,
                reference_host_ms=times["reference"].host_ms,
                **times["whole"].figures(),
            )
            best = min(best or (name, ms), (name, ms), key=lambda found: found[1])
    return best


def _tiles(report: Report, sizes: Sizes, clock: Clock, case: HeadCase, store: bool) -> None:
    """The fused kernel alone by tile, beside cuBLAS on the same columns."""
    title = f"{case.name}: kernel by tile, {'with' if store else 'without'} exponentials"
    needed = NEEDED if sizes.on_gpu else 0.0
    if report.skips(title, needed):
        return
    with report.case(title):
        x = cases.head_inputs(case, sizes.head_dtype, device=sizes.device)
        columns = min(sizes.chunk, case.vocab)
        calls = tile_calls(x, columns, store=store)
        logits = x.weight.new_empty(case.rows, columns)
        head, hidden, weight = plain_head(x.weight), x.hidden.detach(), x.weight[:columns].t()
        product = clock.time(lambda: head.matmul(hidden, weight, logits)).ms
        found: dict[str, float] = {}
        for tile, call in calls.items():
            if report.skips(f"{title}: {tile}", needed):
                break
            with report.case(f"{title}: {tile}"):
                try:
                    times = clock.time(call)
                except OutOfResources as error:
                    raise Skipped(f"it does not fit this card ({error})") from error
                report.add(f"{title}: {tile}", of_cublas=product / times.ms, **times.figures())
                found[tile] = times.ms
        if found:
            best = min(found, key=found.__getitem__)
            text = f"{title}: {best}, {found[best]:.3g} ms, {product / found[best]:.0%} of cuBLAS"
            report.add(f"{title}: best", headline=text, tiles=len(found))
