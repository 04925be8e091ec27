"""Stage 2: kernels against float64 on fresh random inputs, freed memory poisoned before each head.

Fused heads come first and the separate fold last: a case for which no time is left is named in the table.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.gpu import checks
from benchmarks.gpu.checks import Error
from benchmarks.gpu.report import Report
from benchmarks.gpu.sizes import Sizes

#: A case compiles for some seconds.
NEEDED = 4.0
PAIRS = 64


def run(report: Report, sizes: Sizes) -> None:
    seed = secrets.randbits(31)
    report.add("seed", value=seed)
    device, backend = sizes.device, sizes.backend
    dtype = torch.bfloat16 if sizes.on_gpu else torch.float32
    cases: dict[str, Callable[[], list[Error]]] = {}
    heads = {
        f"head: {check.name}": (check, partial(checks.check_head, check, device, backend, seed, sizes.poison))
        for check in sizes.checks
    }
    cases |= {name: call for name, (check, call) in heads.items() if check.fused}
    cases["loss: per token"] = partial(checks.check_token_loss, PAIRS, device, backend, seed)
    cases["selective_logprob"] = partial(checks.check_selective, sizes.logits, device, backend, seed)
    cases["draws"] = partial(checks.check_draws, sizes.draws, device, seed)
    cases["attention with shared prefixes"] = partial(checks.check_attention, device, dtype, seed)
    for scope, variant in (("batch", "released"), ("instance", "paper")):
        cases[f"dynamic β: {scope}, {variant}"] = partial(
            checks.check_dynamic_beta, PAIRS, device, backend, seed, scope=scope, variant=variant
        )
    for loss_type in sizes.losses:
        cases[f"loss: {loss_type}"] = partial(checks.check_loss, loss_type, PAIRS, device, backend, seed)
    cases |= {name: call for name, (check, call) in heads.items() if not check.fused}
    wrong = measured = 0
    for name, case in cases.items():
        if report.skips(name, NEEDED if sizes.on_gpu else 0.0):
            continue
        with report.case(name):
            errors = case()
            figures: dict[str, Any] = {error.name: error.seen for error in errors}
            report.add(name, **figures, allowed={error.name: error.allowed for error in errors})
            measured += 1
            if bad := [error for error in errors if not error.ok]:
                wrong += 1
                report.fail(name, "; ".join(map(str, bad)))
    report.add("summary", headline=f"{measured - wrong} of {len(cases)} comparisons hold, seed {seed}")
