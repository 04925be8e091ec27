"""One long pair: seconds and memory of its optimizer step, and the longest pair that a bound of memory holds.

SmolLM2-135M in NF4, LoRA r = 16 on all linear layers, float32, layers checkpointed, glibc's thresholds fixed so that
resident memory follows the tensors. A pair is a third prompt and two answers of a third each: one row of T tokens here,
two rows of ⅔·T in TRL. What checkpointing must keep is a layer's input per token, T·H·4 bytes in each of the 30 layers;
the figures of memory are growth beyond that, where the row is ours.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.long_pair_run import LongStep
from benchmarks.process import outcome_of
from benchmarks.report import Figure, at_most
from benchmarks.settings import Settings
from benchmarks.training import MAPPED, chosen, difference, in_trees
from benchmarks.training_cases import TrainingCase
from benchmarks.training_run import Contender, differing
from fastdpo import FastDPOConfig

TITLE = "one long pair: SmolLM2-135M NF4, LoRA r = 16, float32, checkpointed, glibc's thresholds fixed"
MB, GB = 10**6, 10**9
#: Of SmolLM2-135M.
LAYERS, HIDDEN, POSITIONS = 30, 576, 8192
#: Tokens of the pair that is measured, and of the longest whose answers stay within the model's positions.
TOKENS, LONGEST = 8192, POSITIONS * 3 // 2
#: Bytes of data that the process may map when the longest pair is looked for, model and libraries included.
LIMIT = 3 * GB
#: Bounds beside the untouched layers, of this tree or of another: growth beyond the layers' inputs, and seconds.
SMALLER, HARDLY_SLOWER = at_most(0.5), at_most(1.1)
#: The search for it ends when what holds and what does not are this factor apart.
GRAIN = 1.125
#: Tokens of the pair where only that everything runs is to be seen.
TINY = 48

TRL = "TRL as it comes"
#: Name of the search for the longest pairs, among the plans; without a choice, only --full has it.
SEARCH = "longest"


def contenders(settings: Settings) -> dict[str, Contender]:
    """By name, TRL last; ours with the lean body and without it, where the library has one."""
    own = {"fastdpo": Contender("fastdpo", environment=MAPPED)}
    if "lean_body" in {field.name for field in dataclasses.fields(FastDPOConfig)}:
        own = {
            f"lean_body={choice}": Contender("fastdpo", {"lean_body": choice}, environment=MAPPED)
            for choice in ("on", "off")
        }
    first = next(iter(own))
    # The other tree's own default, which it may not call by that name
    other = in_trees(first, Contender("fastdpo", environment=MAPPED), settings)
    return own | {name: each for name, each in other.items() if each.tree} | {TRL: Contender("trl", environment=MAPPED)}


def case_of(tokens: int) -> TrainingCase:
    """A short pair, then one of `tokens`: prompt, chosen and rejected a third each."""
    answer = tokens // 3
    prompt = tokens - 2 * answer
    return TrainingCase(pairs=1, steps=2, prompt=(prompt, prompt), completion=(answer, answer), warm_up=16)


def layer_inputs(tokens: int) -> int:
    """Bytes of the layers' inputs over a row of `tokens`, float32."""
    return tokens * HIDDEN * 4 * LAYERS


def run(settings: Settings) -> list[Figure]:
    known = contenders(settings)
    names = chosen(settings.plans, (*known, SEARCH))
    searches = SEARCH in settings.plans or (settings.full and not settings.plans)
    tokens = TINY if settings.tiny else TOKENS
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        bench = LongBench(settings, Path(folder), tokens)
        for turn in range(settings.rounds):
            listed = [name for name in known if name in names]
            for name in listed if turn % 2 == 0 else reversed(listed):
                bench.run(name, known[name])
        figures += step_figures(bench, known, settings)
        if searches:
            figures += longest_figures(known, settings)
    return figures


class LongBench:
    """Steps over the pair, each in a process of its own, and their gradients."""

    def __init__(self, settings: Settings, folder: Path, tokens: int) -> None:
        self.settings, self.folder, self.tokens = settings, folder, tokens
        self.steps: dict[str, list[LongStep]] = {}

    def gradients(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def run(self, name: str, contender: Contender) -> None:
        print(f"{name}, {self.tokens:,} tokens …", end=" ", flush=True)
        step = start(contender, self.tokens, self.settings.threads, gradients=self.gradients(name))
        self.steps.setdefault(name, []).append(step)
        print(f"{step.seconds:.1f} s, {step.growth / MB:,.0f} MB, {busy(step):.2f} cores busy", flush=True)

    def seconds(self, name: str) -> float:
        """The best round's."""
        return min(step.seconds for step in self.steps[name])

    def growth(self, name: str) -> int:
        """Bytes, the median round's."""
        growths = sorted(step.growth for step in self.steps[name])
        return growths[len(growths) // 2]


def start(
    contender: Contender, tokens: int, threads: int, *, limit: int | None = None, gradients: Path | None = None
) -> LongStep:
    """The step over a pair of `tokens` in a fresh process. Raises as `benchmarks.process.outcome_of`."""
    arguments = [contender.written(), "--case", json.dumps(differing(case_of(tokens))), "--threads", str(threads)]
    arguments += [] if limit is None else ["--limit", str(limit)]
    arguments += [] if gradients is None else ["--gradients", str(gradients)]
    module = "benchmarks.long_pair_run"
    return LongStep(**outcome_of(module, arguments, contender.environment, tree=contender.tree))


def busy(step: LongStep) -> float:
    """Cores that it kept busy."""
    return step.cpu_seconds / step.seconds


def step_figures(bench: LongBench, known: dict[str, Contender], settings: Settings) -> list[Figure]:
    """Each contender's step; then the first of ours beside the others, its loss and gradients compared before.

    Raises ValueError where they differ.
    """
    case, inputs = f"{bench.tokens:,} tokens", layer_inputs(bench.tokens)
    figures = [Figure(case, "layer inputs of our row", inputs / MB, "MB")]
    for name in bench.steps:
        growth = bench.growth(name)
        cores = ", ".join(f"{busy(step):.2f}" for step in bench.steps[name])
        figures += [
            Figure(case, f"{name}: step", bench.seconds(name), "s", note=f"{cores} cores busy"),
            Figure(case, f"{name}: growth", growth / MB, "MB", note=f"{growth / bench.tokens / 1e3:.0f} KB per token"),
        ]
    ours, *others = bench.steps or ("",)
    for other in others:
        losses = bench.steps[ours][0].loss, bench.steps[other][0].loss
        beside = f"{ours} beside {other}"
        figures.append(difference(beside, (ours, other), losses, (bench.gradients(ours), bench.gradients(other))))
        mine, theirs = bench.seconds(ours), bench.seconds(other)
        is_trl = known[other].trainer == "trl"
        slower = None if is_trl else settings.target(HARDLY_SLOWER)
        figures.append(Figure(beside, "step", mine, "s", other, theirs, mine / theirs, slower))
        grown, peer = bench.growth(ours) / MB, bench.growth(other) / MB
        if is_trl:  # whose rows, and so its layers' inputs, are others
            figures.append(Figure(beside, "growth", grown, "MB", other, peer, grown / peer))
        else:
            mine, theirs = grown - inputs / MB, peer - inputs / MB
            smaller = settings.target(SMALLER)
            what = "growth beyond layer inputs"
            figures.append(Figure(beside, what, mine, "MB", other, theirs, mine / theirs, smaller))
    return figures


def longest_figures(known: dict[str, Contender], settings: Settings) -> list[Figure]:
    """The longest pair of ours and of TRL within LIMIT bytes."""
    case = f"process of {LIMIT / GB:g} GB"
    cap = TINY if settings.tiny else LONGEST
    found = {}
    for name in (next(iter(known)), TRL):

        def holds(tokens: int, name: str = name) -> bool:
            print(f"{name}, {tokens:,} tokens in {LIMIT / GB:g} GB …", end=" ", flush=True)
            step = start(known[name], tokens, settings.threads, limit=LIMIT)
            print(f"{step.seconds:.1f} s" if step.held else "not held", flush=True)
            return step.held

        # Ours are long: from the top. TRL's steps near the top would take minutes each
        found[name] = longest(holds, cap if known[name].trainer == "fastdpo" else min(1024, cap), cap)
    figures = []
    for name, (held, refused) in found.items():
        said = f"{refused:,} do not fit" if refused is not None else "as long as the model's positions allow"
        note = f"{said}; an answer's context: {held * 2 // 3:,}"
        ratio = held / found[TRL][0] if name != TRL and found[TRL][0] else None
        against = "" if name == TRL else TRL
        baseline = None if name == TRL else found[TRL][0]
        figures.append(Figure(case, f"{name}: longest pair", held, "tokens", against, baseline, ratio, note=note))
    return figures


def longest(holds: Callable[[int], bool], first: int, cap: int) -> tuple[int, int | None]:
    """Tokens that hold, and fewest tried that do not, at most GRAIN apart; (cap, None) where `cap` holds.

    From `first` on it doubles or halves until one of each is known, then takes the middle.
    """
    held, tokens = 0, first
    refused: int | None = None
    while True:
        if holds(tokens):
            held = tokens
            if held >= cap:
                return held, None
        else:
            refused = tokens
        if refused is not None and refused <= max(held * GRAIN, TINY):
            return held, refused
        tokens = min(2 * held, cap) if refused is None else (held + refused) // 2
