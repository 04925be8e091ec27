"""Kill a run at each of its own file operations, restart it as a person would, and compare to the bit.

python tests/kills.py                     all points of all scenarios: about 20 minutes on two cores (`make test-kills`)
python tests/kills.py --points 40         as many, drawn by --seed, spread over scenarios and kinds of operation
python tests/kills.py --scenario lazy --list          number and name every operation
python tests/kills.py --only "lazy:0:17:torn" --keep  one point again, and its folder kept

A scenario runs once undisturbed under a watch (`file_operations.py`), which gives its operations and what it must
leave. Then, for each: a fresh run is killed there, restarted, and must leave the same files, tensors, log and best
step, having trained no more than what the checkpoint it found lacks. A kill between two operations finds the disk
as the first one left it, so "after" is tried for the last one and for renames only, and operations that change nothing
are left out. Exit status 1 where a point fails, or where the watch has not seen all. The environment (one thread, no
hub) is the Makefile's, or conftest.py's.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kill_sabotage
import torch
from accelerate.state import AcceleratorState, GradientState
from file_operations import RENAMES, WRITES, Kill, Operation
from kill_runs import SCENARIOS, differences, left, published, run
from tqdm import tqdm


@dataclass(frozen=True)
class Point:
    """Where a run is killed: `operation`, number `number` of rank `rank`."""

    scenario: str
    rank: int
    number: int
    when: str
    operation: Operation

    def __str__(self) -> str:
        return f"{self.scenario}:{self.rank}:{self.number}:{self.when}  {self.when} {self.operation}"


@dataclass
class Undisturbed:
    """A scenario's run that nothing was done to: what it left and said, its operations by rank, what is wrong."""

    files: dict[str, Any]
    facts: dict[str, Any]
    operations: list[list[Operation]]
    wrong: list[str]


class Campaign:
    """Runs below `place`. broken: done to each trainer, to see that it is found."""

    def __init__(self, place: Path, broken: Callable[..., None] | None = None, *, keep: bool = False) -> None:
        self.place, self.broken, self.keep = place, broken, keep
        self.expected: dict[str, Undisturbed] = {}

    def undisturbed(self, name: str) -> Undisturbed:
        """Twice: under the watch, and without it, which must make no difference."""
        ends, lefts = [], []
        for watched in (True, False):
            place = self.place / f"{name} undisturbed {'watched' if watched else 'plain'}"
            ends.append(run(SCENARIOS[name], place, watched=watched, broken=self.broken))
            if any(ends[-1].codes):
                return Undisturbed({}, {}, [], [f"the undisturbed run ended with {ends[-1].codes}: {ends[-1].errors}"])
            lefts.append(left(place))
        wrong = ends[0].unseen + [f"without the watch {each}" for each in differences(*lefts)]
        return Undisturbed(lefts[0], ends[0].facts, ends[0].operations, wrong)

    def points(self, name: str) -> list[Point]:
        """Where to kill."""
        found = []
        for rank, operations in enumerate(self.expected[name].operations):
            changing = [(number, each) for number, each in enumerate(operations) if each.changed]
            for number, each in changing:
                whens = ["before"]
                if each.kind in WRITES and each.size > 1:
                    whens.append("torn")
                if each.kind in RENAMES or number == changing[-1][0]:
                    whens.append("after")
                found += [Point(name, rank, number, when, each) for when in whens]
        return found

    def attempt(self, point: Point) -> tuple[Point, list[str]]:
        """Kill there, restart, compare; what is wrong, in words."""
        place = Path(tempfile.mkdtemp(prefix="point-", dir=self.place))
        try:
            wrong = self._attempt(point, place)
        finally:
            if not self.keep:
                shutil.rmtree(place)
        return point, [*wrong, f"kept in {place}"] if wrong and self.keep else wrong

    def _attempt(self, point: Point, place: Path) -> list[str]:
        scenario, expected = SCENARIOS[point.scenario], self.expected[point.scenario]
        cut = run(scenario, place, (point.rank, Kill(point.number, point.when)), broken=self.broken)
        if cut.codes[point.rank] != -signal.SIGKILL or cut.cut is None:
            return [f"the run to be killed ended with {cut.codes}: {cut.errors or 'it has fewer operations this time'}"]
        if cut.cut.kind != point.operation.kind:
            return [f"operation {point.number} was this time {cut.cut}: runs are not alike"]
        steps = published(place / "files" / "run")
        again = run(scenario, place, broken=self.broken)
        if any(again.codes):
            return [*cut.late, f"the restart ended with {again.codes}: {again.errors}"]
        facts = expected.facts | {"steps trained": expected.facts["global_step"] - (steps[-1] if steps else 0)}
        if point.when == "after" and point.number == self._last(point):  # the run had ended, whatever it has kept
            facts["steps trained"] = 0
        # Fewer where a checkpoint that was whole, and not yet named, got its name in the restart
        facts["steps trained"] = min(facts["steps trained"], again.facts["steps trained"])
        return cut.late + differences(facts, again.facts) + differences(expected.files, left(place))

    def _last(self, point: Point) -> int:
        """The number of the last operation that changes something, of the point's rank; of rank 0 the run's last."""
        if point.rank:
            return -1
        operations = self.expected[point.scenario].operations[0]
        return max(number for number, each in enumerate(operations) if each.changed)


def drawn(points: dict[str, list[Point]], count: int, seed: int) -> list[Point]:
    """`count` of them: a tenth of two ranks', which are slow, as many of each other scenario; kinds in turn, each at a
    random place."""
    rng, chosen = random.Random(seed), []
    slow = [name for name in points if SCENARIOS[name].ranks > 1] if len(points) > 1 else []
    shares = {name: max(1, count // 10) for name in slow}
    quick = [name for name in points if name not in slow]
    left_over = max(0, count - sum(shares.values()))
    shares |= {name: (left_over + index) // len(quick) for index, name in enumerate(quick)}
    for name, share in shares.items():
        kinds = defaultdict(list)
        for point in points[name]:
            kinds[point.operation.kind, point.when].append(point)
        queues = list(kinds.values())
        rng.shuffle(queues)
        for queue in queues:
            rng.shuffle(queue)
        turns = [queue[turn] for turn in range(len(points[name])) for queue in queues if turn < len(queue)]
        chosen += turns[:share]
    return chosen


def warm_up(place: Path) -> None:
    """One run in this process, so that those forked from it find everything imported."""
    import tiny

    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # its thread would not survive a fork, its locks might
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = tiny.trainer(place / "warm-up", data=tiny.pairs(8), max_steps=1, save_strategy="steps", save_steps=1)
        trainer.train()
        trainer.save_model()
        trainer.save_run({})
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", action="append", choices=SCENARIOS, help="these only")
    parser.add_argument("--points", type=int, help="how many, drawn by --seed; all by default")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--only", action="append", help="scenario:rank:number:when, as failures are listed")
    parser.add_argument("--matching", help='points whose line holds this text: "torn write run/metrics.json"')
    parser.add_argument("--list", action="store_true", help="the operations, and nothing is killed")
    parser.add_argument("--keep", action="store_true", help="keep the folders")
    parser.add_argument("--workers", type=int, default=2, help="runs at once")
    parser.add_argument("--broken", choices=kill_sabotage.KINDS, help="with a defect, which must be found")
    args = parser.parse_args(argv)
    place = Path(tempfile.mkdtemp(prefix="kills-"))
    try:
        return Command(args, place).run()
    finally:
        if not args.keep:
            shutil.rmtree(place)


class Command:
    """What `main` was asked for."""

    def __init__(self, args: argparse.Namespace, place: Path) -> None:
        self.args = args
        self.campaign = Campaign(place, kill_sabotage.KINDS.get(args.broken), keep=args.keep)
        self.started = time.monotonic()

    def run(self) -> int:
        """The exit status."""
        only = self.args.only or []
        names = self.args.scenario or [
            name for name in SCENARIOS if not only or name in {o.split(":")[0] for o in only}
        ]
        warm_up(self.campaign.place)
        with multiprocessing.get_context("fork").Pool(self.args.workers) as pool:
            self.campaign.expected = dict(zip(names, pool.map(self.campaign.undisturbed, names), strict=True))
        wrong = {name: each.wrong for name, each in self.campaign.expected.items() if each.wrong}
        for name, said in wrong.items():
            self.say(f"{name}: {len(said)} things are wrong before any kill:", *said[:10])
        if self.args.list:
            for name in names:
                for rank, operations in enumerate(self.campaign.expected[name].operations):
                    self.say(*(f"{name}:{rank}:{n}  {o}{'' if o.changed else '  (no change)'}"
                               for n, o in enumerate(operations)))  # fmt: skip
            return 1 if wrong else 0
        points = {name: self.campaign.points(name) for name in names if self.campaign.expected[name].operations}
        counts = ", ".join(f"{name} {len(each)}" for name, each in points.items())
        if only:
            points = {
                name: [each for each in some if str(each).split("  ")[0] in only] for name, some in points.items()
            }
        if text := self.args.matching:
            points = {name: [each for each in some if text in str(each)] for name, some in points.items()}
        chosen = [point for each in points.values() for point in each]
        if self.args.points is not None:
            chosen = drawn(points, self.args.points, self.args.seed)
        self.say(f"points: {counts}; {len(chosen)} of them are tried")
        failed = self.tried(chosen)
        self.say_grouped(failed)
        self.say(f"{len(chosen) - len(failed)} of {len(chosen)} resume to the bit ({self.seconds():.0f} s)")
        return 1 if failed or wrong or not chosen else 0

    def tried(self, points: list[Point]) -> list[tuple[Point, list[str]]]:
        """Those that fail, with what is wrong; progress is said on the way."""
        failed = []
        # Forked anew, as they must know what is expected
        with multiprocessing.get_context("fork").Pool(self.args.workers) as pool:
            for done, (point, wrong) in enumerate(pool.imap_unordered(self.campaign.attempt, points), 1):
                if wrong:
                    failed.append((point, wrong))
                if done % 50 == 0:
                    self.say(f"{done} of {len(points)}, {len(failed)} failed, {self.seconds():.0f} s")
        return sorted(failed, key=lambda each: points.index(each[0]))

    def say_grouped(self, failed: list[tuple[Point, list[str]]]) -> None:
        """Points that fail alike under one heading, which says how the first of them does."""
        groups = defaultdict(list)
        for point, said in failed:
            groups[re.sub(r"\d+|/\S*", "", said[0])].append((point, said))
        for alike in sorted(groups.values(), key=len, reverse=True):
            self.say(f"{len(alike)} fail alike, the first with", *(f"    {each}" for each in alike[0][1][:8]))
            self.say(*(f"  {point}" for point, _ in alike))

    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    def say(self, *lines: str) -> None:
        """On stdout, at once."""
        print(*lines, sep="\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
