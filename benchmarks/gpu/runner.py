"""Runs stages one after the other, each in a process group of its own with a time limit, and keeps what they found.

After each of them results.json is replaced at once, so that a reader finds the last whole one; everything that a stage
prints goes to log.txt.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[2]
RESULTS, LOG = "results.json", "log.txt"
#: Seconds before its limit at which a stage begins no further case.
MARGIN = 5.0
#: `--dry` measures nothing, so several stages run at a time, and on a busy machine they may take longer.
DRY_AT_ONCE, DRY_PATIENCE = 2, 4
#: What stages write beside the results: compiled kernels above all.
NEEDED_SPACE = 2**30
#: Capability from which on the kernels and bfloat16 products exist.
MIN_CAPABILITY = [8, 0]


@dataclass(frozen=True)
class Stage:
    """number: of --stages. name: its key in results.json. seconds: its limit, from the start of its process on.
    kernels: it needs sm_80. module: what runs, default benchmarks.gpu.NAME."""

    number: int
    name: str
    seconds: float
    kernels: bool = False
    module: str = ""

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "benchmarks.gpu.stage", self.module or f"benchmarks.gpu.{self.name}"]


#: Stages 1 to 4 are to be over within 240 s of the command, 5 to 8 within 300 s. SLACK of that is for what is no
#: stage's: the kit's installation, the look for a card, starting and ending processes.
HALVES, SLACK = (240.0, 300.0), 12.0
STAGES = (
    Stage(1, "ceilings", 25),
    Stage(2, "correctness", 80, kernels=True),
    Stage(3, "products", 33, module="benchmarks.gpu.linear_logprob.products"),
    Stage(4, "head", 90, kernels=True, module="benchmarks.gpu.linear_logprob.speed"),
    Stage(5, "peers", 82, module="benchmarks.gpu.linear_logprob.peers"),
    Stage(6, "loss", 20, kernels=True, module="benchmarks.gpu.preference_loss"),
    Stage(7, "training", 145, kernels=True),
    Stage(8, "suite", 41, kernels=True),
)


class Runner:
    """One call's stages. document: what results.json holds. at_once: stages at a time; more than one measures nothing,
    and interleaves in the log."""

    def __init__(self, out: Path, document: dict[str, Any], *, dry: bool, at_once: int = 1) -> None:
        self.out, self.document, self.dry, self.at_once = out, document, dry, at_once
        self.processes: list[subprocess.Popen[bytes]] = []

    def run(self, stages: Sequence[Stage]) -> bool:
        """Whether all of `stages` are ok and results.json is written. An interrupt ends the stages at work."""
        written = True
        with ThreadPoolExecutor(self.at_once) as pool:
            # The longest first, where several run at a time
            order = stages if self.at_once == 1 else sorted(stages, key=lambda stage: -stage.seconds)
            outcomes = {stage: pool.submit(self._judged, stage) for stage in order}
            try:
                for stage in stages:
                    self.document[stage.name] = outcome = outcomes[stage].result()
                    written = self.save()
                    said = "ok" if outcome["ok"] else f"not ok: {outcome['reason']}"
                    print(f"{stage.number} {stage.name}: {said} [{outcome['seconds']:.0f} s]", flush=True)
            except BaseException:  # an interrupt: nothing is left running, and nothing is begun
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self.processes):
                    end_group(process)
                raise
        return written and all(self.document[stage.name]["ok"] for stage in stages)

    def limit(self, stage: Stage) -> float:
        """Seconds that the stage may take."""
        return stage.seconds * (DRY_PATIENCE if self.dry else 1)

    def _judged(self, stage: Stage) -> dict[str, Any]:
        print(f"{stage.number} {stage.name} (at most {self.limit(stage):g} s) ...", flush=True)
        reason = self._unfit(stage)
        return {"ok": False, "seconds": 0.0, "reason": reason} if reason else self._outcome(stage)

    def _unfit(self, stage: Stage) -> str:
        """Why this card cannot run the stage, or ""."""
        card = self.document["card"]
        if self.dry or not stage.kernels or card is None or card["capability"] >= MIN_CAPABILITY:
            return ""
        major, minor = card["capability"]
        return (
            f"the card ({card['name']}) is sm_{major}{minor} and the kernels need sm_80. Use an Ampere card or newer."
        )

    def _outcome(self, stage: Stage) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            lines = Path(folder) / "lines"
            lines.touch()
            start = time.monotonic()
            status = self._execute(stage, lines)
            return outcome(self.limit(stage), status, time.monotonic() - start, lines.read_text(encoding="utf-8"))

    def _execute(self, stage: Stage, lines: Path) -> int | None:
        """The stage's exit status; None where it was ended at its limit. No process of its group is left behind."""
        limit = self.limit(stage)
        command = [*stage.command, "--lines", str(lines), "--seconds", str(max(limit - MARGIN, 0.0))]
        command += ["--dry"] if self.dry else []
        with self._log() as log:
            print(f"\n== stage {stage.number} {stage.name}", file=log, flush=True)
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.environment(), stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
            self.processes.append(process)
            try:
                return process.wait(limit)
            except subprocess.TimeoutExpired:
                return None
            finally:
                end_group(process)
                self.processes.remove(process)

    def _log(self) -> TextIO:
        try:
            return (self.out / LOG).open("a", encoding="utf-8")
        except OSError as error:
            print(f"{self.out / LOG} cannot be written ({error}): this stage's output is lost.", flush=True)
            return open(os.devnull, "w", encoding="utf-8")

    def environment(self) -> dict[str, str]:
        """Of a stage: no network; `--dry` sees no card and interprets every kernel."""
        values = dict(os.environ)
        path = [str(ROOT), str(ROOT / "kernels"), values.get("PYTHONPATH", "")]
        values |= {"PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        values |= {"PYTHONFAULTHANDLER": "1", "TOKENIZERS_PARALLELISM": "false"}
        if self.dry:
            values |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "FASTDPO_BACKEND": "triton"}
            values |= {"OMP_NUM_THREADS": "1"}
        return values

    def save(self) -> bool:
        """Replace results.json in one step. Says why where it cannot be written."""
        try:
            write_atomically(self.out / RESULTS, json.dumps(self.document, indent=1, ensure_ascii=False) + "\n")
        except OSError as error:
            print(f"{self.out / RESULTS} cannot be written ({error}). Set OUT to a folder on another disk.", flush=True)
            return False
        return True


def write_atomically(path: Path, text: str) -> None:
    """`path` holds either what it held or all of `text`, also after a crash."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}", delete=False
    ) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the process's group, itself included."""
    with contextlib.suppress(ProcessLookupError):  # all of it has ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def outcome(limit: float, status: int | None, seconds: float, lines: str) -> dict[str, Any]:
    """What results.json says of a stage: ok, seconds, reason where it is not, headlines, figures, failed, skipped."""
    entries = [json.loads(line) for line in lines.splitlines() if line.endswith("}")]  # the last may be torn
    failed = {entry["failed"]: entry["reason"] for entry in entries if "failed" in entry}
    result: dict[str, Any] = {"ok": status == 0 and not failed, "seconds": round(seconds, 1)}
    if reason := _reason(limit, status, entries, failed):
        result["reason"] = reason
    result["headlines"] = [entry["headline"] for entry in entries if "headline" in entry]
    result["figures"] = {entry["case"]: entry["figures"] for entry in entries if entry.get("figures")}
    result["failed"] = failed
    result["skipped"] = {entry["skipped"]: entry["reason"] for entry in entries if "skipped" in entry}
    return result


def _reason(limit: float, status: int | None, entries: list[dict[str, Any]], failed: dict[str, str]) -> str:
    error = next((entry["error"] for entry in entries if "error" in entry), None)
    at_work = next((entry["begin"] for entry in reversed(entries) if "begin" in entry), "its start")
    if status is None:
        return f"it took more than its {limit:g} s, at {at_work!r}, and was ended; {LOG} has its output."
    if error is not None:
        return str(error)
    if status < 0:
        return f"it was ended by signal {-status}, at {at_work!r}; {LOG} has its output."
    if failed:
        name, reason = next(iter(failed.items()))
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        return f"{name}: {reason}{more}"
    return f"it ended with status {status}; {LOG} has its output." if status else ""


def check_space(out: Path) -> str:
    """A sentence where the disk of `out` has little left, or ""."""
    free = shutil.disk_usage(out).free
    if free >= NEEDED_SPACE:
        return ""
    return (
        f"the disk of {out} has {free / 2**20:.0f} MiB free and compiled kernels and results may need "
        f"{NEEDED_SPACE / 2**20:.0f}: stages may fail. Free some, or set OUT and TRITON_CACHE_DIR to another disk."
    )
