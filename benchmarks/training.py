"""The whole training step beside TRL's: pairs per second and growth of memory, together, for named plans.

SmolLM2-135M in NF4, LoRA r = 16 on all linear layers, float32 arithmetic, 8 pairs shaped like HH per optimizer step.
Each contender trains in a process of its own (`benchmarks.training_run`), on the same pairs, from the same weights, and
its first step is checked against TRL's before any ratio is given. `--against PATH` runs every plan on the library of
another checkout too, in turns with this one's.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from safetensors.torch import load_file

from benchmarks.process import outcome_of
from benchmarks.report import Figure, Target, at_least, at_most
from benchmarks.settings import Settings
from benchmarks.training_cases import TrainingCase, count_tokens, preference_ids
from benchmarks.training_run import Contender, Outcome, differing

TITLE = "training step: SmolLM2-135M NF4, LoRA r = 16 on all linear layers, float32, one process each"
GIB = 2**30
VOCAB = 49152
#: Largest relative difference from TRL, of the first step's loss, and of its gradients in their norm.
TOLERANCE = 1e-4
#: Bounds of another tree's seconds over this one's, and of this one's growth over the other's.
FASTER, NO_MORE = at_least(1.12), at_most(1.0)
#: Memory that glibc's allocator keeps for itself is given back: blocks of 64 KiB and more are mapped one by one.
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}


@dataclass(frozen=True)
class Peer:
    """One way to run TRL's DPOTrainer, and bytes that it needs."""

    contender: Contender
    needs: float


ONE_BY_ONE = {"gradient_checkpointing": False, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
_BY_TWO = {"gradient_checkpointing": False, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
PEERS = {
    "TRL as it comes": Peer(Contender("trl"), 15e9),
    "TRL fastest": Peer(Contender("trl", {"gradient_checkpointing": False}), 20e9),
    "TRL leanest": Peer(Contender("trl", ONE_BY_ONE), 5e9),
}
#: On request: how much of TRL's growth is its allocator's, what its rounding of the LoRA changes, other micro-batches.
VARIANTS = {
    "TRL as it comes (mapped)": Peer(Contender("trl", environment=MAPPED), 15e9),
    "TRL fastest (mapped)": Peer(Contender("trl", {"gradient_checkpointing": False}, environment=MAPPED), 20e9),
    "TRL leanest (mapped)": Peer(Contender("trl", ONE_BY_ONE, environment=MAPPED), 5e9),
    "TRL as it comes (bfloat16 LoRA)": Peer(Contender("trl", rounded_lora=True), 15e9),
    "TRL by two (no checkpointing)": Peer(Contender("trl", _BY_TWO), 8e9),
}


@dataclass(frozen=True)
class Plan:
    """Attributes:
    options: of FastDPOConfig.
    against: the peer.
    speed: bound of the peer's seconds over its own.
    growth: bound of its growth over the peer's.
    cached: an earlier run over the same pairs has filled the reference cache.
    agrees: its first step is TRL's.
    """

    options: dict[str, str | bool | int | float]
    against: str
    speed: Target | None = None
    growth: Target | None = None
    cached: bool = False
    agrees: bool = True


PLANS = {
    "default": Plan({}, "TRL as it comes", at_least(2.8), at_most(0.5)),
    "cached": Plan({}, "TRL as it comes", at_least(3.8), cached=True),
    "fastest": Plan({"micro_batch_tokens": "2048"}, "TRL fastest", at_least(2.3), at_most(0.4)),
    "leanest": Plan({"micro_batch_tokens": "1"}, "TRL leanest", at_least(2.0), at_most(0.6)),
    "beta-DPO": Plan({"dynamic_beta": True}, "TRL as it comes", at_least(2.3), agrees=False),
}


def run(settings: Settings) -> list[Figure]:
    case = training_case(settings)
    plans = {name: PLANS[name] for name in chosen(settings.plans, (*PLANS, *VARIANTS)) if name in PLANS}
    peers = {name: peer for name, peer in PEERS.items() if any(plan.against == name for plan in plans.values())}
    peers |= {name: VARIANTS[name] for name in settings.plans if name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(case, settings, Path(folder))
        for _ in range(settings.rounds):
            for name, peer in peers.items():
                if peer.needs < psutil.virtual_memory().available or settings.tiny:
                    bench.run(name, peer.contender)
            for name, plan in plans.items():
                turns = list(in_trees(name, Contender("fastdpo", plan.options), settings).items())
                for each, contender in turns if bench.round % 2 == 0 else reversed(turns):
                    bench.run(each, bench.filled(contender) if plan.cached else contender)
            bench.round += 1
        figures = [workload(case)]
        for name, peer in peers.items():
            figures += peer_figures(name, peer, bench)
        for name, plan in plans.items():
            figures += plan_figures(name, plan, bench, settings)
            figures += tree_figures(name, bench, settings)
    return figures


def in_trees(name: str, contender: Contender, settings: Settings) -> dict[str, Contender]:
    """`contender` on this tree's library, and on the other's where one is named."""
    found = {name: contender}
    if settings.against is not None:
        found[other_name(name, settings)] = dataclasses.replace(contender, tree=str(settings.against.resolve()))
    return found


def other_name(name: str, settings: Settings) -> str:
    """What a contender is called that runs on the other tree's library."""
    assert settings.against is not None
    return f"{name} of {settings.against.resolve().name}"


def training_case(settings: Settings) -> TrainingCase:
    case = TrainingCase(steps=settings.steps)
    return case.tiny() if settings.tiny else case


def chosen(names: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    """`names`, or all where none is given. Raises ValueError for one that is unknown."""
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"--plans {', '.join(unknown)}: unknown; choose from {', '.join(known)}.")
    return names or known


class Bench:
    """Runs contenders in processes of their own, and keeps their outcomes and first gradients.

    With a file of outcomes, one that it holds is not measured again: an interrupted run goes on where it stopped.
    """

    def __init__(self, case: TrainingCase, settings: Settings, folder: Path) -> None:
        self.case, self.settings, self.folder, self.round = case, settings, folder, 0
        self.kept = None if settings.outcomes is None else settings.outcomes.resolve()
        self.outcomes: dict[str, list[Outcome]] = {}
        if self.kept is not None and self.kept.is_file():
            document = json.loads(self.kept.read_text(encoding="utf-8"))
            if document["case"] != json.loads(json.dumps(asdict(case))):
                raise ValueError(f"--outcomes {settings.outcomes} holds those of another case; name another file.")
            self.outcomes = {name: [Outcome(**each) for each in found] for name, found in document["outcomes"].items()}

    def gradients(self, name: str) -> Path:
        """File of the first step's."""
        folder = self.folder if self.kept is None else self.kept.with_suffix(".gradients")
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name}.safetensors"

    def run(self, name: str, contender: Contender) -> Outcome:
        """This round's outcome of `contender`."""
        found = self.outcomes.setdefault(name, [])
        if len(found) <= self.round:
            print(f"{name} …", end=" ", flush=True)
            found.append(start(contender, self.case, self.settings.threads, self.gradients(name)))
            last = found[-1]
            seconds = ", ".join(f"{each:.1f}" for each in last.seconds)
            print(f"{seconds} s, {last.growth / GIB:.2f} GiB, {last.busy:.2f} cores busy", flush=True)
            if self.kept is not None:
                held = {each: [asdict(one) for one in outcomes] for each, outcomes in self.outcomes.items()}
                self.kept.write_text(json.dumps({"case": asdict(self.case), "outcomes": held}), encoding="utf-8")
        return found[self.round]

    def filled(self, contender: Contender) -> Contender:
        """`contender` with a reference cache that a run over the same pairs has filled."""
        folder = str(self.folder / f"references of {Path(contender.tree).name or 'this tree'}")
        options = contender.options | {"reference_cache_dir": folder}
        if not Path(folder).is_dir():
            filling = options | {"reference": "precompute", "max_steps": 1}
            start(dataclasses.replace(contender, options=filling), self.case, self.settings.threads)
        return dataclasses.replace(contender, options=options)

    def seconds(self, name: str) -> float:
        """Seconds per step, the best round's."""
        return min(outcome.seconds_per_step for outcome in self.outcomes[name])

    def growth(self, name: str) -> float:
        """Bytes, the median round's."""
        growths = sorted(outcome.growth for outcome in self.outcomes[name])
        return growths[len(growths) // 2]


def start(contender: Contender, case: TrainingCase, threads: int, gradients: Path | None = None) -> Outcome:
    """The outcome of a fresh process, by the driver of this tree, or by its own where an older tree lacks a name.

    Raises as `benchmarks.process.outcome_of`.
    """
    arguments = [contender.written(), "--case", json.dumps(differing(case)), "--threads", str(threads)]
    arguments += [] if gradients is None else ["--gradients", str(gradients.resolve())]
    module, environment, tree = "benchmarks.training_run", contender.environment, contender.tree
    try:
        found = outcome_of(module, arguments, environment, tree=tree)
    except ImportError as error:
        if not tree:
            raise
        print(f"({error}; by its own driver)", end=" ", flush=True)
        found = outcome_of(module, arguments, environment, tree=tree, own_driver=True)
    return Outcome(**found)


def workload(case: TrainingCase) -> Figure:
    tokens = count_tokens(preference_ids(case, VOCAB), case, range(1, case.steps))
    note = f"{tokens.rows:.0f} without padding, {tokens.shared:.0f} with shared prompts, {tokens.scored:.0f} scored"
    return Figure("workload", "tokens per step", tokens.padded, "as TRL pads", note=note)


def peer_figures(name: str, peer: Peer, bench: Bench) -> list[Figure]:
    if name not in bench.outcomes:
        return [Figure(name, "step", note=f"not run: may need {peer.needs / GIB:.0f} GiB")]
    return [
        Figure(name, "step", bench.seconds(name), "s", note=_rate(name, bench)),
        Figure(name, "growth of memory", bench.growth(name) / GIB, "GiB"),
    ]


def plan_figures(name: str, plan: Plan, bench: Bench, settings: Settings) -> list[Figure]:
    """Agreement first, then seconds and growth beside the peer's."""
    case = f"{name} {_written(plan.options)}".strip()
    if plan.against not in bench.outcomes:
        return [Figure(case, "step", bench.seconds(name), "s", note=f"{plan.against} was not run")]
    figures = [agreement(case, name, plan.against, bench)] if plan.agrees else []
    return figures + beside(case, name, plan.against, bench, (plan.speed, plan.growth), settings)


def tree_figures(name: str, bench: Bench, settings: Settings) -> list[Figure]:
    """Beside the other tree, where one is named: its first step is the same, whatever the plan."""
    if settings.against is None:
        return []
    case, other = f"{name}, this tree", other_name(name, settings)
    return [agreement(case, name, other, bench), *beside(case, name, other, bench, (FASTER, NO_MORE), settings)]


def beside(
    case: str, name: str, other: str, bench: Bench, bounds: tuple[Target | None, Target | None], settings: Settings
) -> list[Figure]:
    """Seconds and growth beside those of `other`. bounds: of its seconds over ours, of our growth over its."""
    speed, growth = (settings.target(bound) for bound in bounds)
    ours, theirs = bench.seconds(name), bench.seconds(other)
    step = Figure(case, "step", ours, "s", other, theirs, theirs / ours, speed, _rate(name, bench))
    ours, theirs = bench.growth(name) / GIB, bench.growth(other) / GIB
    return [step, Figure(case, "growth of memory", ours, "GiB", other, theirs, ours / theirs, growth)]


def _rate(name: str, bench: Bench) -> str:
    rounds = bench.outcomes[name]
    busy = ", ".join(f"{outcome.busy:.2f}" for outcome in rounds)
    return f"{bench.case.pairs / bench.seconds(name):.3f} pairs/s, {busy} cores busy"


def _written(options: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())


def agreement(case: str, name: str, peer: str, bench: Bench) -> Figure:
    """`difference` of the first steps."""
    losses = bench.outcomes[name][0].loss, bench.outcomes[peer][0].loss
    return difference(case, (name, peer), losses, (bench.gradients(name), bench.gradients(peer)))


def difference(case: str, names: tuple[str, str], losses: tuple[float, float], files: tuple[Path, Path]) -> Figure:
    """The larger of two relative differences from the second's step, of the loss and of all LoRA gradients in `files`.

    Raises ValueError if it is too large: what computes something else is not compared.
    """
    (ours, theirs), (name, peer) = losses, names
    own, other = (load_file(file) for file in files)
    if own.keys() != other.keys():
        raise ValueError(f"{name} and {peer} train different parameters, such as {min(own.keys() ^ other.keys())}.")
    gap = sum(float((own[key].double() - other[key].double()).square().sum()) for key in own) ** 0.5
    norm = sum(float(other[key].double().square().sum()) for key in own) ** 0.5
    errors = abs(ours - theirs) / abs(theirs), gap / norm
    if not max(errors) <= TOLERANCE:
        raise ValueError(f"{name} differs from {peer}: loss by {errors[0]:.1e}, gradients by {errors[1]:.1e}.")
    note = f"loss {ours:.6f} off by {errors[0]:.0e}, gradients by {errors[1]:.0e}"
    return Figure(
        case, "same step: difference", max(errors), "", "allowed", TOLERANCE, max(errors) / TOLERANCE,
        at_most(1.0), note,
    )  # fmt: skip
