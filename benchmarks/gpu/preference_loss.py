"""Stage 6: the loss with dynamic β, forward and backward: latency of eager calls, and of a CUDA graph's replay."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks import cases
from benchmarks.cases import LossCase
from benchmarks.gpu.checks import LOSS_ALLOWED, largest
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.report import Report
from benchmarks.gpu.sizes import Sizes
from fastdpo import DynamicBeta, preference_loss
from fastdpo.loss import token_preference_loss

#: Runs before a capture, on a stream of their own: compilation and lazy initialisation may not be captured.
WARM_UP = 3


class Step:
    """Loss and gradient of fixed log-probs, from sums or per token. The statistics move on with every call."""

    def __init__(self, pairs: int, device: str, *, per_token: bool) -> None:
        tokens, references, boundaries = cases.loss_inputs(LossCase(pairs), device=device)
        self.dynamic_beta = DynamicBeta().to(device)
        self.boundaries = boundaries if per_token else None
        if per_token:
            self.leaf, self.references = tokens, references
        else:
            lengths = boundaries.diff().tolist()
            sums, refs = (torch.stack([part.sum() for part in x.detach().split(lengths)]) for x in (tokens, references))
            self.leaf, self.references = sums.requires_grad_(), refs

    def reset(self) -> None:
        for buffer in self.dynamic_beta.buffers():
            buffer.zero_()

    def __call__(self) -> tuple[Tensor, Tensor]:
        if self.boundaries is None:
            sides = (*self.leaf.chunk(2), *self.references.chunk(2))
            loss = preference_loss(*sides, beta=self.dynamic_beta).loss
        else:
            loss = token_preference_loss(self.leaf, self.boundaries, self.references, beta=self.dynamic_beta).loss
        (gradient,) = torch.autograd.grad(loss, self.leaf)
        return loss.detach(), gradient


def captured(
    step: Callable[[], tuple[Tensor, Tensor]], device: str
) -> tuple[Callable[[], object], tuple[Tensor, Tensor]]:
    """A replay of `step`, and the tensors that it fills. On a CPU, which has no graphs, the call itself."""
    if device != "cuda":
        held = step()

        def call() -> None:
            for target, value in zip(held, step(), strict=True):
                target.copy_(value)

        return call, held
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = step()
    return graph.replay, held


def repeat(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


def run(report: Report, sizes: Sizes) -> None:
    clock = Clock(sizes.device, sizes.seconds / 4)
    for per_token in (False, True):
        for pairs in sizes.pairs:
            name = f"{pairs} pairs, from {'tokens' if per_token else 'sums'}"
            with report.case(name):
                step = Step(pairs, sizes.device, per_token=per_token)
                times = clock.time(step)
                report.add(name, headline=f"{name}: eager {1e3 * times.ms:,.0f} µs", **times.figures())
            with report.case(f"{name}: graph"):
                step = Step(pairs, sizes.device, per_token=per_token)
                expected = [x.clone() for x in step()]
                replay, held = captured(step, sizes.device)
                step.reset()
                replay()
                error = max(largest(seen, true, 1.0 / pairs) for seen, true in zip(held, expected, strict=True))
                times = clock.time(partial(repeat, replay, sizes.replays))
                one = 1e3 * times.ms / sizes.replays
                report.add(f"{name}: graph", headline=f"{name}: replay {one:,.1f} µs", microseconds=one, error=error)
                if not error <= LOSS_ALLOWED:
                    report.fail(f"{name}: graph", f"a replay differs from an eager call by {error:.1e}")
