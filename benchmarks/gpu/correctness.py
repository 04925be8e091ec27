"""Stage 2: every kernel against float64 on fresh random inputs, freed memory poisoned before each head."""

from __future__ import annotations

import secrets
from collections.abc import Callable

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
    cases: dict[str, Callable[[], list[Error]]] = {
        "draws": lambda: checks.check_draws(sizes.draws, sizes.device, seed),
        "attention with shared prefixes": lambda: checks.check_attention(
            sizes.device, torch.bfloat16 if sizes.on_gpu else torch.float32, seed
        ),
    }
    for check in sizes.checks:
        cases[f"head: {check.name}"] = lambda check=check: checks.check_head(
            check, sizes.device, sizes.backend, seed, sizes.poison
        )
    for options in ({}, {"scope": "instance", "variant": "paper"}):
        name = ", ".join(options.values()) or "released, batch"
        cases[f"dynamic β: {name}"] = lambda options=options: checks.check_dynamic_beta(
            PAIRS, sizes.device, sizes.backend, seed, **options
        )
    for loss_type in sizes.losses:
        cases[f"loss: {loss_type}"] = lambda loss_type=loss_type: checks.check_loss(
            loss_type, PAIRS, sizes.device, sizes.backend, seed
        )
    wrong = measured = 0
    for name, case in cases.items():
        if report.skips(name, NEEDED if sizes.on_gpu else 0.0):
            continue
        with report.case(name):
            errors = case()
            report.add(
                name, **{error.name: error.seen for error in errors}, allowed={e.name: e.allowed for e in errors}
            )
            measured += 1
            if bad := [error for error in errors if not error.ok]:
                wrong += 1
                report.fail(name, "; ".join(map(str, bad)))
    report.add("summary", headline=f"{measured - wrong} of {len(cases)} comparisons hold, seed {seed}")
