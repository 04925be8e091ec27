"""Stage 5: the head's policy forward and backward through fastdpo and its peers, same tensors: time, peak, error.

The error is that of the gradient with respect to the hidden states, in its norm, against float64. Liger has no
log-probs to call: its own DPO loss over eight sequences is differentiated, and compared with that of float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks import cases, contenders
from benchmarks.cases import HeadCase, HeadInputs
from benchmarks.gpu.checks import in_norm
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.report import Report, Skipped
from benchmarks.gpu.sizes import MIB, Sizes

#: Seconds of one peer at one shape, compilation included.
NEEDED = 6.0
#: Of those that compile anew for every shape. Estimated.
COMPILING = {"full logits, torch.compile": 20.0, "Liger": 20.0}
#: What counts as the same gradient: the coarsest peer sums 16-bit logits.
ALLOWED = 0.2
#: Of our own: E and the gradient in 16 bits; a chunk of the vocabulary that is lost costs ten times as much.
OWN_ALLOWED = 2.0**-7
SEQUENCES, BETA = 8, 0.1


@dataclass(frozen=True)
class Peer:
    """call: gradient of the hidden states. module: what it needs. on_gpu: it runs there only. own_loss: Liger's."""

    call: Callable[[HeadInputs], Tensor]
    module: str = "torch"
    on_gpu: bool = False
    own_loss: bool = False


def peers(compile_backend: str) -> dict[str, Peer]:
    return {
        "fastdpo": Peer(contenders.fastdpo_policy_head),
        "TRL": Peer(contenders.trl_policy_head, "trl.trainer.utils"),
        "cut-cross-entropy": Peer(contenders.cce_policy_head, "cut_cross_entropy", on_gpu=True),
        "full logits": Peer(contenders.full_logits_policy_head),
        "full logits, torch.compile": Peer(contenders.CompiledPolicyHead(compile_backend)),
        # Last: it compiles for the longest
        "Liger": Peer(
            partial(contenders.liger_policy_head, sequences=SEQUENCES), "liger_kernel.chunked_loss", own_loss=True
        ),
    }


def true_unit_gradient(x: HeadInputs, rows: int) -> tuple[Tensor, Tensor]:
    """Log-probs (N,) and W_y − Σ p_v W_v (N, H) in float64, `rows` rows at a time."""
    weight = x.weight.double()
    logps, gradients = [], []
    for hidden, targets in zip(x.hidden.detach().split(rows), x.targets.split(rows), strict=True):
        log_probs = (hidden.double() @ weight.t()).log_softmax(-1)
        logps.append(log_probs.gather(1, targets[:, None]).squeeze(1))
        gradients.append(weight[targets] - log_probs.exp_() @ weight)
    return torch.cat(logps), torch.cat(gradients)


def liger_coefficients(logps: Tensor) -> Tensor:
    """dL/dlogp (N,) of L = mean −log σ(β·(chosen − rejected)) over sequences of equal length, chosen first."""
    sums = logps.view(SEQUENCES, -1).sum(1).requires_grad_()
    chosen, rejected = sums.chunk(2)
    loss = -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()
    (coefficients,) = torch.autograd.grad(loss, sums)
    return coefficients.repeat_interleave(len(logps) // SEQUENCES)


def with_truths(case: HeadCase, sizes: Sizes) -> tuple[HeadInputs, dict[bool, Tensor]]:
    """Inputs, and the gradient of the hidden states in float64: of weighted log-probs, and of Liger's own loss."""
    x = cases.head_inputs(case, sizes.dtype, device=sizes.device)
    logps, unit = true_unit_gradient(x, sizes.truth_rows)
    return x, {False: x.grad_logps.double()[:, None] * unit, True: liger_coefficients(logps)[:, None] * unit}


def check_available(name: str, peer: Peer, on_gpu: bool) -> None:
    """Raise Skipped where the peer cannot run here."""
    try:
        __import__(peer.module)
    except ImportError as error:
        raise Skipped(f"{name} cannot be imported ({error}); the kit of `make gpu-kit` has it") from error
    if peer.on_gpu and not on_gpu:
        raise Skipped(f"{name}'s kernels need a GPU")


def run(report: Report, sizes: Sizes) -> None:
    clock = Clock(sizes.device, sizes.seconds)
    for case in sizes.heads:
        _shape(report, sizes, clock, case)


def _shape(report: Report, sizes: Sizes, clock: Clock, case: HeadCase) -> None:
    """All peers on one shape, whose tensors are let go before the next one's are made."""
    made = None
    with report.case(f"{case.name}: inputs and truth"):
        made = with_truths(case, sizes)
    if made is None:
        return
    (x, truths), found = made, []
    for name, peer in peers(sizes.compile_backend).items():
        title = f"{case.name}: {name}"
        if report.skips(title, COMPILING.get(name, NEEDED) if sizes.on_gpu else 0.0):
            continue
        with report.case(title):
            check_available(name, peer, sizes.on_gpu)
            error = in_norm(peer.call(x), truths[peer.own_loss])
            times, peak = clock.time(partial(peer.call, x)), clock.peak(partial(peer.call, x)) / MIB
            report.add(title, gradient_error=error, peak_mib=peak, **times.figures())
            if not error <= (OWN_ALLOWED if name == "fastdpo" else ALLOWED):
                report.fail(title, f"its gradient differs from float64's by {error:.1e} of its norm")
            found.append(f"{name} {times.ms:.3g} ms {peak:,.0f} MiB {error:.0e}")
    report.add(f"{case.name}: summary", headline=f"{case.name}, policy: {'; '.join(found)}")
