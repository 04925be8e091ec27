"""The command `fastdpo`: train, verify, demo, estimate, info, each in a file of its name.

Exit codes: 0 done; 1 the run failed (a non-finite loss, memory, another rank); 2 an option, file, model or machine
cannot be used; 3 a defect, of fastdpo or of a library under it; 128 + n stopped by signal n after saving a checkpoint.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from fastdpo.commands.output import make_output_visible
from fastdpo.commands.stages import begun, doing, run_of
from fastdpo.shown import shown, terminal
from fastdpo.version import __version__

_HELP = """usage: fastdpo COMMAND [options]

Preference optimisation on one GPU: exact β-DPO under a memory-frugal QLoRA trainer.

commands:
  demo      align a small chat model on this machine and show what changed
  train     align your own model on your own pairs
  verify    whether a run or a checkpoint is whole, and what a resume would compare
  estimate  predict the memory and time of a training run, without weights or a GPU
  info      versions, devices, and which backends can run here

fastdpo COMMAND --help lists a command's options; fastdpo --version prints the version.
"""

#: Set to 1 to see the traceback of an error that the command reports in one line.
TRACEBACK = "FASTDPO_TRACEBACK"

#: oneDNN keeps a compiled primitive for each of the last 1,024 shapes. Micro-batches differ in shape, so a bfloat16 run
#: on a CPU grew by 35 MB per step of 8 pairs; with short caches it does not, and is no slower. Read at torch's import.
_ONEDNN_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}


def _train(argv: list[str]) -> int:
    from fastdpo.commands.train import main

    return main(argv)


def _verify(argv: list[str]) -> int:
    from fastdpo.commands.verify import main

    return main(argv)


def _demo(argv: list[str]) -> int:
    from fastdpo.commands.demo import main

    return main(argv)


def _estimate(argv: list[str]) -> int:
    from fastdpo.commands.estimate import main

    return main(argv)


def _info(argv: list[str]) -> int:
    from fastdpo.commands.info import main

    return main(argv)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "verify": _verify,
    "demo": _demo,
    "estimate": _estimate,
    "info": _info,
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    make_output_visible()
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_HELP, end="")
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(f"fastdpo {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        print(f"fastdpo: {argv[0]!r} is no command; there are {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    return _reported(lambda: COMMANDS[argv[0]](argv[1:]))


def _reported(command: Callable[[], int]) -> int:
    """Run `command`; whatever it raises becomes a sentence and an exit code (`verdicts`)."""
    for name, capacity in _ONEDNN_CACHES.items():
        os.environ.setdefault(name, capacity)
    from fastdpo.training.runs.callbacks import TrainingInterrupted

    try:
        code = command()
        sys.stdout.flush()
        return code
    except TrainingInterrupted as stop:
        return int(stop.code or 0)  # the trainer has said what it saved
    except KeyboardInterrupt:
        _say("stopped", "outside of a training step. What had been saved is intact.", style="bold yellow")
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        if os.environ.get(TRACEBACK) == "1":
            raise
        return _report(error)


def _report(error: Exception) -> int:
    from fastdpo.commands.tracebacks import keep_traceback
    from fastdpo.commands.verdicts import DEFECT, verdict
    from fastdpo.training.runs.failures import RankStopped, last_checkpoint

    if isinstance(error, RankStopped):
        return 1  # the trainer has said which, and why
    found = verdict(error)
    _say(found.title, found.sentence, style="bold red")
    if found.code == DEFECT and doing(error) == "training" and begun(error):
        _say("", last_checkpoint(str(run_of(error))), style="")
    kept = keep_traceback(error) if found.code == DEFECT else None
    where = f"the traceback is in {kept}" if kept else f"{TRACEBACK}=1 shows where it was raised"
    terminal(stderr=True).print(shown(f"({where})"), style="dim", markup=False)
    return found.code


def _say(title: str, sentence: str, *, style: str) -> None:
    console = terminal(stderr=True)
    if title:
        console.print(title, style=style, markup=False, end=" ")
    console.print(shown(sentence, lines=True), markup=False)


if __name__ == "__main__":
    sys.exit(main())
