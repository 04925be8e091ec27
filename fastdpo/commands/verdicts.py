"""What ended a command: the one place that turns an exception into a sentence and an exit code.

An error is one of four things:

refusal   raised by a statement of fastdpo, for what a user can mend: its message is the sentence; exit code 2
machine   a file, a disk, a package, memory: the cause, and what was being done; exit code 2, or 1 for memory
library   a library's own refusal, before training, of what the user has named: its message and whose; exit code 2
defect    anything else, of fastdpo or of a library under it; exit code 3

What ends a run that had begun (a loss that is not finite, a pair or an optimizer that memory does not hold) brings its
own sentence; exit code 1.
"""

from __future__ import annotations

import dis
import errno
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError

from fastdpo.commands.stages import begun, doing
from fastdpo.training.memory.plan import OutOfMemory, is_out_of_memory
from fastdpo.training.runs.failures import OptimizerOutOfMemory
from fastdpo.training.runs.nonfinite import NonFiniteLossError

FAILED, REFUSED, DEFECT = 1, 2, 3
#: Types by which fastdpo, and the libraries under it, refuse what they are given.
_REFUSALS = (ValueError, TypeError, OSError, ImportError)
#: Libraries whose refusals are answers to what a user has named: options, files, models, data sets of the hub.
_ANSWERING = {
    "accelerate", "bitsandbytes", "datasets", "huggingface_hub", "peft", "safetensors", "tokenizers", "transformers",
    "httpcore", "httpcore2", "httpx", "httpx2",
}  # fmt: skip
#: Further types of theirs: of broken weights, of data sets, of the connection to the hub.
_ANSWERS = (*_REFUSALS, SafetensorError, DatasetsError, HfHubHTTPError.__bases__[0])
#: Characters of somebody else's message that are shown.
_LONGEST = 600
#: The machine's causes and what to do about them.
_ADVICE = {
    errno.EACCES: "give this user the right to it, or name another path",
    errno.EPERM: "give this user the right to it, or name another path",
    errno.EROFS: "name a path that can be written to",
    errno.ENOSPC: "free some space, or name an output_dir on another disk",
    errno.EDQUOT: "free some space, or name an output_dir on another disk",
    errno.ELOOP: "the links lead in a circle: mend them, or name the file itself",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EISDIR: "name a file",
    errno.ENOTDIR: "a part of the path is a file: name a folder",
    errno.EEXIST: "choose another name, or move it away",
    errno.ENOENT: "check the path",
    errno.EIO: "look at the disk's health",
}


@dataclass(frozen=True)
class Verdict:
    """code: of the exit. title: what the sentence begins with. sentence: cause and next step."""

    code: int
    title: str
    sentence: str


def verdict(error: Exception) -> Verdict:
    """What `error` means to the person at the terminal."""
    title, frames = f"error {type(error).__name__}:", list(_frames(error))
    if isinstance(error, (NonFiniteLossError, OptimizerOutOfMemory, OutOfMemory)):
        return Verdict(FAILED, title, str(error))
    ours = bool(frames) and _package(frames[-1][0]) == "fastdpo" and _raises(*frames[-1])
    if is_out_of_memory(error):
        return Verdict(FAILED, title, _out_of_memory(error))
    if isinstance(error, _REFUSALS) and ours:
        return Verdict(REFUSED, title, str(error))
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("fastdpo"):
        package = error.name.partition(".")[0]
        cause = f"the package {package!r}, which is not installed, was needed {_while(error)}"
        return Verdict(REFUSED, title, f"{cause}: pip install {package}")
    if isinstance(error, OSError) and error.errno is not None:
        return Verdict(REFUSED, title, _of_the_machine(error))
    whose = next((name for name in map(_package, (f for f, _ in reversed(frames))) if not _is_standard(name)), "")
    answering = _ANSWERING | ({"torch"} if doing(error) == "reading the options" else set())  # of its process groups
    if isinstance(error, _ANSWERS) and whose in answering and not begun(error):
        return Verdict(REFUSED, title, f"{_while(error)}, {whose} says: {_short(error)}")
    told = f" ({_short(error)})" if str(error) else ""
    defect = (
        f"{type(error).__name__} {_while(error)}{told}. This is a defect of fastdpo or of a library under it, and none "
        "of your input's; please report it with its traceback"
    )
    return Verdict(DEFECT, "defect:", defect)


def _frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    """Frames from the outermost to the one that raised, each with the offset of the instruction it was at."""
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame, trace.tb_lasti
        trace = trace.tb_next


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _raises(frame: FrameType, offset: int) -> bool:
    """Whether the frame was at a `raise` statement, and not at an operation that failed."""
    return dis.opname[frame.f_code.co_code[offset]] == "RAISE_VARARGS"


def _is_standard(package: str) -> bool:
    return package in sys.stdlib_module_names


def _while(error: BaseException) -> str:
    return f"while {doing(error) or 'the command was at work'}"


def _short(error: BaseException) -> str:
    text = str(error).strip()
    return text if len(text) <= _LONGEST else text[:_LONGEST].rstrip() + " ..."


def _of_the_machine(error: OSError) -> str:
    names = " and ".join(repr(str(name)) for name in (error.filename, error.filename2) if name is not None)
    advice = _ADVICE.get(error.errno or 0, "see what the system says of it")
    return f"{names or 'a file'}: {error.strerror or _short(error)}, {_while(error)}; {advice}"


def _out_of_memory(error: BaseException) -> str:
    return (
        f"memory ran out {_while(error)} ({_short(error).partition(chr(10))[0]}). Lower max_length or "
        "per_device_train_batch_size, set gradient_checkpointing=true, load the model with load_in_4bit=true; "
        "fastdpo estimate predicts what fits"
    )
