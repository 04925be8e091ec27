"""The head against the floor: fastdpo.linear_logprob over three bare GEMMs of the same shapes."""

from __future__ import annotations

from benchmarks import cases, contenders
from benchmarks.report import Figure, at_most
from benchmarks.settings import Settings
from benchmarks.timing import interleave, synchronizer

TITLE = "head: policy forward + backward and reference forward, over h Wᵀ, P W, h Wᵀ"

#: Of the seconds that a contender gets in a case: more where there is a target, less where there is none.
TARGETED_SHARE, UNTARGETED_SHARE = 1.5, 0.25


def run(settings: Settings) -> list[Figure]:
    figures = []
    for case in cases.TINY_HEAD if settings.tiny else cases.HEAD_CASES:
        inputs = cases.head_inputs(case, settings.dtype)
        timings = interleave(
            contenders.against_floor(inputs),
            settings.repeats,
            settings.budget * (TARGETED_SHARE if case.target else UNTARGETED_SHARE),
            synchronizer(inputs.hidden.device),
        )
        ours, floor = timings["fastdpo"], timings["floor"]
        gigabytes = case.bytes(settings.dtype.itemsize) / 1e9
        figures.append(
            Figure(
                case.name,
                "fastdpo",
                1e3 * ours.best,
                "ms",
                "3 bare GEMMs",
                1e3 * floor.best,
                ours.best / floor.best,
                settings.target(at_most(case.target)),
                f"{case.flops / 1e9:.0f} GFLOP ({case.flops / ours.best / 1e9:.0f}/s), at least {gigabytes:.2f} GB; "
                f"ratio of medians {ours.median / floor.median:.3f}, best of {len(ours.seconds)}",
            )
        )
    return figures
