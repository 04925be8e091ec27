"""`python -m benchmarks.gpu`: what a card is asked in one go, see gpu/README.md.

Exit status: 0 all stages that were asked for are ok, 1 one is not, 2 bad arguments, 3 no card that could run them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu import NO_CARD
from benchmarks.gpu.runner import DRY_AT_ONCE, LOG, RESULTS, ROOT, STAGES, Runner, Stage, check_space

if TYPE_CHECKING:
    from rich.table import Table

OK, FAILED = 0, 1
#: A pipe has no width of its own.
WIDTH = 150
#: A driver that hangs does so at the first call.
PROBE_SECONDS = 90


def stage_numbers(text: str) -> tuple[Stage, ...]:
    """argparse's type of --stages: "1-4", "5-8", "2,4", "7"."""
    chosen: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last <= len(STAGES):
            raise argparse.ArgumentTypeError(f"{text!r}: numbers from 1 to {len(STAGES)}, as in 1-4 or 2,4.")
        chosen.update(range(first, last + 1))
    return tuple(stage for stage in STAGES if stage.number in chosen)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    listed = "\n".join(f"  {stage.number} {stage.name:12} at most {stage.seconds:3g} s" for stage in STAGES)
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu",
        description=f"Ask a card everything in one go.\n\nstages:\n{listed}",
        epilog="exit status: 0 ok, 1 a stage is not, 2 bad arguments, 3 no card that could run them",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--stages", type=stage_numbers, default=STAGES, help="such as 1-4 or 2,4; default all")
    parser.add_argument("--dry", action="store_true", help="every stage on the CPU at toy size: shows that it runs")
    default = Path(os.environ.get("OUT") or ROOT / "gpu" / "out")
    parser.add_argument("--out", type=Path, default=default, help=f"for {RESULTS} and {LOG}; default $OUT, or gpu/out")
    return parser.parse_args(arguments)


def find_card() -> dict[str, Any]:
    """What `benchmarks.gpu.probe` says, or a reason why it says nothing."""
    nothing: dict[str, Any] = {"versions": {}, "card": None}
    try:
        command = [sys.executable, "-m", "benchmarks.gpu.probe"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        reason = f"torch did not find a card within {PROBE_SECONDS} s. See whether `nvidia-smi` answers."
        return nothing | {"reason": reason}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        return nothing | {"reason": f"torch could not look for a card ({last}). See whether `nvidia-smi` answers."}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def keep_earlier(out: Path) -> None:
    """Move an earlier call's results aside, under their date."""
    earlier = out / RESULTS
    if earlier.exists():
        stamp = datetime.datetime.fromtimestamp(earlier.stat().st_mtime, datetime.timezone.utc)
        earlier.rename(out / f"results-{stamp:%Y%m%dT%H%M%S}.json")


def table(document: dict[str, Any], stages: Sequence[Stage]) -> Table:
    """What each stage says. Imports rich: whoever has no card needs none of it."""
    from rich.markup import escape
    from rich.table import Table

    card = document["card"]["name"] if document["card"] else "a CPU, toy sizes: no figure means anything"
    made = Table(title=escape(f"{card}, {document['date']}"), title_justify="left", title_style="bold")
    for name in ("stage", "", "s"):
        made.add_column(name, justify="right" if name == "s" else "left")
    made.add_column("what it says", overflow="fold")
    for stage in stages:
        outcome = document[stage.name]
        lines = [escape(line) for line in outcome.get("headlines", ())]
        lines += [f"[red]{escape(f'{name}: {reason}')}[/]" for name, reason in outcome.get("failed", {}).items()]
        lines += [escape(f"not measured: {name}: {reason}") for name, reason in outcome.get("skipped", {}).items()]
        if not outcome["ok"] and not outcome.get("failed"):
            lines.append(f"[red]{escape(outcome['reason'])}[/]")
        mark = "[green]ok[/]" if outcome["ok"] else "[red]NOT OK[/]"
        made.add_row(f"{stage.number} {stage.name}", mark, f"{outcome['seconds']:.0f}", "\n".join(lines))
    return made


def show(document: dict[str, Any], stages: Sequence[Stage]) -> None:
    """Print the table, or why there is none: the results are kept either way."""
    try:
        from rich.console import Console
    except ImportError as error:
        print(f"no table: {sys.executable} cannot import rich ({error}); install it, or read {RESULTS}.")
        return
    Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False).print(table(document, stages))


def refusal(found: dict[str, Any]) -> str:
    """Why nothing can run, with the next step, or ""."""
    if found["card"] is None:
        return f"{found['reason']} Without a card, --dry runs every stage at toy size."
    if os.environ.get("TRITON_INTERPRET", "") not in ("", "0"):
        value = os.environ["TRITON_INTERPRET"]
        return f"TRITON_INTERPRET={value} would run the kernels on the CPU beside a card. Unset it, or use --dry."
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that a stage at work is ended too
    found = find_card()
    if not options.dry and (reason := refusal(found)):
        print(f"no card: {reason}", flush=True)
        return NO_CARD
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        keep_earlier(options.out)
    except OSError as error:
        print(
            f"{options.out} cannot be used ({error}). Set OUT, or --out, to a folder that can be written.", flush=True
        )
        return FAILED
    if sentence := check_space(options.out):
        print(sentence, flush=True)
    document = {
        "card": None if options.dry else found["card"],
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC",
        "versions": found["versions"],
        "dry": options.dry,
        "kit": os.environ.get("FASTDPO_KIT"),
    }
    at_once = DRY_AT_ONCE if options.dry else 1
    ok = Runner(options.out, document, dry=options.dry, at_once=at_once).run(options.stages)
    show(document, options.stages)
    print(f"{options.out / RESULTS}, {options.out / LOG}", flush=True)
    return OK if ok else FAILED


if __name__ == "__main__":
    sys.exit(main())
