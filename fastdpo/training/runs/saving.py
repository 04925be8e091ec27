"""The checkpoints of one run: its folder claimed, whole checkpoints written, and what a resume must share compared.

What a checkpoint holds beside transformers' own files is given: modules by file name, the reference log-probs that are
known, and the identity of the run. They get their place together or not at all.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerState
from transformers.trainer_callback import ExportableState

from fastdpo.training.durable import remove_incomplete
from fastdpo.training.lock import LockedError
from fastdpo.training.options import FastDPOConfig
from fastdpo.training.ranks import Ranks
from fastdpo.training.reference import ReferenceStore
from fastdpo.training.runs.checkpoint import CheckpointError, close, faults, step_in
from fastdpo.training.runs.folder import RunFolder
from fastdpo.training.runs.identity import Identity
from fastdpo.training.runs.run_list import RUN_FILE
from fastdpo.training.runs.start import Start, begin_start, is_resume, list_of_start, read_list
from fastdpo.training.runs.valid_json import valid_json

logger = logging.getLogger(__name__)

TRAINER_STATE_FILE = "trainer_state.json"
#: What errors of writing say that have no type of their own: torch's of an archive in C++, tokenizers' in Rust.
_WRITERS = ("PytorchStreamWriter", "inline_container", "iostream error", "(os error ")


@contextmanager
def held_by_first(folder: RunFolder, ranks: Ranks, writes: bool) -> Iterator[None]:
    """The folder is this run's: held by the rank that `writes`; all enter and leave together. Raises LockedError on all
    of them."""
    with ExitStack() as stack:
        ranks.by_first((lambda: stack.enter_context(folder.held())) if writes else None)
        yield


def _is_failed_write(error: BaseException) -> bool:
    if isinstance(error, LockedError):  # the folder is another process's by now
        return False
    named = type(error) in (RuntimeError, Exception) and any(name in str(error) for name in _WRITERS)
    return named or isinstance(error, (OSError, SafetensorError))


class Checkpoints:
    """The output folder of a run and what is saved there.

    Args:
        args, ranks: of the run.
        references: whose log-probs a checkpoint holds.
        modules: gives file name → module whose state belongs to a checkpoint, as they are when it is called.

    Attributes:
        folder: of the run; the first rank changes it.
        identity: what a checkpoint is saved with; given to `claim`.
        placed: where the files of the last `published` are.
    """

    def __init__(
        self,
        args: FastDPOConfig,
        ranks: Ranks,
        references: ReferenceStore,
        modules: Callable[[], Mapping[str, nn.Module]],
    ) -> None:
        self.args, self.ranks, self.references, self.modules = args, ranks, references, modules
        self.folder = RunFolder(args.output_dir)
        self.identity: Identity | None = None
        self.placed: list[Path] = []
        self._claimed = False
        self._sources: Mapping[str, str | Path | None] = {}
        self._needed: Collection[str] = ()
        self._keep: Collection[Path] = ()

    # The folder

    def protect(
        self, sources: Mapping[str, str | Path | None], *, needed: Collection[str] = (), keep: Collection[Path] = ()
    ) -> None:
        """What `claim` must not clear, added to what is known. sources: of the run, by option; one in the folder is
        refused. needed: names of files that it will write. keep: files of the other run that stay."""
        self._sources = {**self._sources, **sources}
        self._needed, self._keep = [*self._needed, *needed], [*self._keep, *keep]

    @contextmanager
    def held(self) -> Iterator[None]:
        """The folder is this process's; all ranks enter and leave together. Raises LockedError on all of them."""
        with held_by_first(self.folder, self.ranks, self.args.should_save):
            yield

    def claim(self, resume_from_checkpoint: str | bool | None = None, identity: Identity | None = None) -> str | None:
        """Take the folder over for this run, under `held`; the checkpoint to resume from, or None. identity: what
        checkpoints are saved with, and what the one to resume from is compared with.

        Raises CheckpointError on all ranks: see `check_start`; nothing was changed then.
        """
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint

        self.identity = identity

        def work() -> str | None:
            start = self._take(resume_from_checkpoint)
            return None if start.resume is None else str(start.resume)

        resume = self.ranks.by_first(work if self.args.should_save else None)
        self._claimed = True
        return resume

    def _take(self, resume: str | bool | None) -> Start:
        folder = self.folder
        # What an earlier call of train has left is this trainer's own
        overwrite = self.args.overwrite_output_dir or self._claimed
        start = begin_start(folder, resume, overwrite=overwrite, sources=self._sources, needed=self._needed)
        if start.manifest is not None and self.identity is not None:
            honoured = self.identity.check(str(start.resume), start.manifest.identity)
            if honoured is not None:
                logger.warning("%s", honoured)
        if start.resume is None and is_resume(resume):
            if self._claimed:
                raise CheckpointError(
                    f"{folder.path} holds no checkpoint yet, and this trainer's weights may have moved. Build a new "
                    "trainer, which starts from the beginning."
                )
            logger.warning("%s holds no checkpoint yet: the run starts from the beginning.", folder.path)
        # From here on the folder is changed
        remove_incomplete(folder.path / RUN_FILE)
        folder.list = read_list(folder.path)
        if folder.list is not None:
            folder.recover()
            if not start.in_place and not self._claimed:
                folder.clear(self._keep)
        folder.begin(list_of_start(folder, start, keep=self._claimed))
        return start

    @contextmanager
    def published(self, name: str, *, finished: int | None = None) -> Iterator[Path]:
        """A folder aside, whose files then get their names in the run's folder together; all ranks call it. finished:
        the step, where these are the last files of a finished run.

        Raises CheckpointError where a folder that this run has not claimed yet holds another one, or where the files
        cannot be written.
        """
        with self.held():
            if not self._claimed:
                self.claim(False)
            first = self.args.should_save
            staged = Path(self.ranks.by_first((lambda: str(self.folder.stage(name))) if first else None))
            with self.written(staged):
                yield staged
                self.ranks.wait()
                publish = (lambda: self.folder.publish(staged, finished=finished)) if first else None
                self.placed = self.ranks.by_first(publish)
                if first:
                    shutil.rmtree(staged)

    def publish_alone(self, name: str, write: Callable[[Path], None]) -> None:
        """`published` without the other ranks, who do not wait for it: of the first one, for what `write` puts into the
        folder aside."""
        with self.folder.held():
            if not self._claimed:
                self._take(False)
                self._claimed = True
            staged = self.folder.stage(name)
            write(staged)
            self.folder.publish(staged)
            shutil.rmtree(staged)

    def is_complete(self, step: int) -> bool:
        """Whether the files of the run that ended with `step` are there already, whole; all ranks call it."""

        def work() -> bool:
            run = self.folder.list
            return run is not None and run.finished == step and not faults(self.folder.path, run.files)

        return self.ranks.by_first(work if self.args.should_save else None)

    # A checkpoint

    def begin(self, step: int) -> Path:
        """An empty folder aside for the checkpoint of `step`, which all ranks write into."""
        name = f"checkpoint-{step}"
        return Path(self.ranks.by_first((lambda: str(self.folder.stage(name))) if self.args.should_save else None))

    @contextmanager
    def written(self, staged: Path) -> Iterator[None]:
        """Around all writes of a checkpoint: one that fails leaves nothing behind, and says what is whole."""
        with ExitStack() as stack:
            stack.push(partial(self._explain, staged))
            yield

    def _explain(self, staged: Path, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        """Raise CheckpointError where `error` is a failure to write; every other one goes on."""
        if error is None or not _is_failed_write(error):
            return
        if self.args.should_save:
            shutil.rmtree(staged, ignore_errors=True)
        newest = self.folder.newest() if self.args.should_save else None
        last = f"The last whole checkpoint is {newest}." if newest else "No checkpoint had been saved yet."
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        cause += f" ({shutil.disk_usage(self.args.output_dir).free / 2**20:.0f} MiB are free there)"
        raise CheckpointError(
            f"{staged.name} could not be written into {self.args.output_dir!r}: {cause}. {last} Make room or mend "
            "the cause, then continue with --resume_from_checkpoint last."
        ) from error

    def finish(self, staged: Path, state: TrainerState, callbacks: Iterable[Any]) -> str:
        """Add the states of trainer, callbacks, modules and reference log-probs, wait for all ranks' files, and give it
        its place, which is returned."""
        assert self.identity is not None, "claim gives it"
        if self.args.should_save:
            for name, module in self.modules().items():
                save_file(module.state_dict(), str(staged / name))
            self.references.save_into(staged)
            _export_states(state, callbacks)
            # transformers' own, with null for what is no finite number: the gradient norm of a step that fp16 skipped
            text = valid_json(dataclasses.asdict(state), indent=2, sort_keys=True) + "\n"
            (staged / TRAINER_STATE_FILE).write_text(text, encoding="utf-8")
        self.ranks.wait()  # every rank's random state is written
        identity = self.identity

        def work() -> str:
            folder = self.folder
            assert folder.list is not None
            branch = [name for name in folder.owned_checkpoints() if name in folder.list.branch]
            older = [name for name in branch if (step_in(name) or 0) < state.global_step]  # a step may be saved again
            manifest = close(
                staged,
                run=folder.list.run,
                step=state.global_step,
                parent=(older[-1], folder.list.checkpoints[older[-1]].seal) if older else None,
                resumable=not self.args.save_only_model,
                identity=identity.as_entries(),
            )
            return str(folder.publish_checkpoint(staged, manifest))

        return str(self.ranks.by_first(work if self.args.should_save else None))

    def rotate(self, best: str | None) -> None:
        """Remove what `save_total_limit` leaves no place for, of this run's checkpoints; all ranks call it."""
        if self.args.should_save:
            self.folder.rotate(self.args.save_total_limit, best)
        self.ranks.wait()

    def load_modules(self, folder: str) -> None:
        """The modules' states as the checkpoint `folder` has them."""
        for name, module in self.modules().items():
            module.load_state_dict(load_file(str(Path(folder) / name)))


def _export_states(state: TrainerState, callbacks: Iterable[Any]) -> None:
    """Write what callbacks keep into `state`, as transformers does."""
    for callback in callbacks:
        if isinstance(callback, ExportableState):
            name, exported = type(callback).__name__, callback.state()
            saved = state.stateful_callbacks[name]
            if isinstance(saved, list):
                saved.append(exported)
            else:
                state.stateful_callbacks[name] = exported
