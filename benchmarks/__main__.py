"""`python -m benchmarks [SECTION ...]`: prints each section's figures beside what they are compared with."""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.contenders import warm_up
from benchmarks.linear_logprob import gpu_static
from benchmarks.report import Figure, as_json, machine, print_table
from benchmarks.settings import Settings

#: Section → its module, which bears the name of the operation that it measures.
SECTIONS = {
    "head": "linear_logprob.speed",
    "peers": "linear_preference_loss",
    "scaling": "linear_logprob.scaling",
    "memory": "linear_logprob.memory",
    "loss": "preference_loss",
    "accuracy": "linear_logprob.accuracy",
    "gpu_static": "linear_logprob.gpu_static",
}
#: Those of the whole training step, minutes each, that run only when they are named.
LONG_SECTIONS = {
    "training": "training",
    "ablation": "ablation",
    "profile_step": "profile_step",
    "long_pair": "long_pair",
}
#: Those that can run on another checkout's library beside this one's.
OF_TWO_TREES = ("training", "long_pair")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks", description="Ratios within one run; nothing is a test.")
    listed = f"of {', '.join(SECTIONS)} (default: these); {', '.join(LONG_SECTIONS)}"
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=listed)
    parser.add_argument("--threads", type=int, default=2, help="default 2")
    parser.add_argument("--repeats", type=int, default=5, help="best of so many runs, default 5")
    parser.add_argument(
        "--budget", type=float, default=10.0, help="seconds of a contender after which it rests, default 10"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of head, peers, scaling and memory")
    parser.add_argument("--full", action="store_true", help="also cases that take a minute each")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, which only show that everything runs")
    parser.add_argument("--plot", type=Path, help="write the scaling section's figure here")
    training = parser.add_argument_group("training, ablation, profile_step and long_pair")
    training.add_argument("--plans", default="", help="names of plans or stages, separated by commas; default all")
    training.add_argument("--steps", type=int, default=3, help="optimizer steps of which the first warms up, default 3")
    training.add_argument("--rounds", type=int, default=1, help="processes per contender, in turns, default 1")
    training.add_argument(
        "--outcomes", type=Path, help="keep each contender's outcome in this file, and take what it holds already"
    )
    training.add_argument(
        "--against", type=Path, help="training and long_pair: another checkout, whose library takes turns with this one"
    )
    parser.add_argument("--json", action="store_true", help="gpu_static alone: print its predictions as JSON")
    parser.add_argument("--output", type=Path, help="write all figures here as JSON")
    options = parser.parse_args(arguments)
    known = SECTIONS | LONG_SECTIONS
    if unknown := set(options.sections) - known.keys():
        parser.error(f"unknown section {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
    if options.steps < 2 or options.rounds < 1:
        parser.error(f"--steps {options.steps}, --rounds {options.rounds}: at least 2 and 1; the first step warms up")
    if options.outcomes is not None and not set(options.sections) & {"training", "ablation"}:
        parser.error(f"--outcomes {options.outcomes}: only training and ablation keep their outcomes; name one")
    if options.against is not None:
        if not set(options.sections) & set(OF_TWO_TREES):
            parser.error(f"--against {options.against}: only {' and '.join(OF_TWO_TREES)} compare two trees; name one")
        if not (options.against / "fastdpo" / "__init__.py").is_file():
            parser.error(f"--against {options.against}: no checkout of fastdpo, as it holds no fastdpo/__init__.py")
    if options.json and options.sections != ["gpu_static"]:
        parser.error(f"--json prints the section gpu_static; the sections are {options.sections or 'the default ones'}")
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, list[Figure]]:
    options = parse(arguments)
    if options.json:
        print(gpu_static.as_json())
        return {}
    torch.set_num_threads(options.threads)
    settings = Settings(
        options.threads,
        options.repeats,
        options.budget,
        DTYPES[options.dtype],
        options.full,
        options.tiny,
        options.plot,
        tuple(name.strip() for name in options.plans.split(",") if name.strip()),
        options.steps,
        options.rounds,
        options.outcomes,
        options.against,
    )
    print(", ".join(f"{name} {value}" for name, value in machine(options.threads).items()), flush=True)
    warm_up(settings.dtype)
    figures = {}
    for section in options.sections or SECTIONS:
        module = importlib.import_module(f"benchmarks.{(SECTIONS | LONG_SECTIONS)[section]}")
        start = time.perf_counter()
        figures[section] = module.run(settings)
        print_table(f"{module.TITLE} [{time.perf_counter() - start:.0f} s]", figures[section])
    if options.output is not None:
        options.output.write_text(as_json(figures, options.threads, settings.dtype), encoding="utf-8")
    missed = [figure for listed in figures.values() for figure in listed if figure.met is False]
    print(f"{len(missed)} of {sum(f.met is not None for listed in figures.values() for f in listed)} targets missed")
    return figures


if __name__ == "__main__":
    main()
