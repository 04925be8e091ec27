"""Whose a file is: a run replaces and removes what it has written itself, and nothing else, through no link."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from fastdpo.training.runs.checkpoint import CheckpointError, checkpoints
from fastdpo.training.runs.folder import LOCK_FILE
from fastdpo.training.runs.run_list import RUN_FILE
from fastdpo.training.runs.start import resolve_resume

OPTIONS: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps"}


def finished(folder: Path, **options: Any) -> Any:
    """A whole run, as `fastdpo train` leaves it."""
    trainer = tiny.trainer(folder, **(OPTIONS | options))
    trainer.train()
    trainer.save_model()
    trainer.save_run({"eval_loss": 0.5})
    return trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    finished(folder)
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def content(folder: Path) -> dict[str, bytes | str]:
    """Everything below a folder: bytes of files, targets of links."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def test_overwriting_removes_the_run_and_nothing_of_the_users(copy: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    finished(outside)
    before = content(outside)
    users = {
        "notes.txt": b"mine",
        "best_2023/adapter_model.safetensors": b"precious",
        "checkpoint-2/notes.txt": b"why this one",
    }
    for name, data in users.items():
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes(data)
    (copy / "linked").symlink_to(outside)
    (copy / "README.md").write_text("I have changed the card")
    finished(copy, overwrite_output_dir=True, max_steps=1, save_steps=1)
    found = content(copy)
    assert content(outside) == before
    assert found["README.md"] == b"I have changed the card", "changed since the run wrote it: the user's now"
    assert b"aligned with DPO" in found["README.fastdpo.md"]
    assert found["linked"] == str(outside)
    assert found["notes.txt"] == b"mine"
    assert found["best_2023/adapter_model.safetensors"] == b"precious"
    assert found["checkpoint-2.kept/notes.txt"] == b"why this one"
    assert [path.name for path in checkpoints(copy)] == ["checkpoint-1"]
    assert load_file(copy / "checkpoint-1" / "adapter_model.safetensors").keys()


@pytest.mark.parametrize("inside", ["checkpoint-4", ".", "../run/checkpoint-2", "link/checkpoint-4"])
def test_a_source_of_the_run_in_the_folder_is_not_overwritten(inside: str, copy: Path) -> None:
    (copy / "link").symlink_to(copy)
    trainer = tiny.trainer(copy, overwrite_output_dir=True, **OPTIONS)
    trainer.parts.checkpoints.protect({"adapter_name_or_path": str(copy / inside)})
    before = content(copy)
    with pytest.raises(CheckpointError, match="adapter_name_or_path"):
        trainer.train()
    assert content(copy) == before


def test_a_source_around_the_folder_and_a_checkpoint_beside_it(copy: Path, tmp_path: Path) -> None:
    """The checkpoint of another run is resumed into a folder of its own, and may not be cleared by that."""
    trainer = tiny.trainer(copy, overwrite_output_dir=True, **OPTIONS)
    trainer.parts.checkpoints.protect({"dataset_name_or_path": str(tmp_path)})
    with pytest.raises(CheckpointError, match=r"dataset_name_or_path='.*' lies around output_dir"):
        trainer.train()
    other, before = tmp_path / "other", content(copy)
    finished(other)
    with pytest.raises(CheckpointError, match="holds another run"):
        tiny.trainer(other, **OPTIONS).train(resume_from_checkpoint=str(copy / "checkpoint-2"))
    resumed = tiny.trainer(tmp_path / "branch", **OPTIONS)
    resumed.train(resume_from_checkpoint=str(copy / "checkpoint-2"))
    assert content(copy) == before
    assert [path.name for path in checkpoints(tmp_path / "branch")] == ["checkpoint-4"]
    expected = load_file(copy / "checkpoint-4" / "adapter_model.safetensors")
    found = load_file(tmp_path / "branch" / "checkpoint-4" / "adapter_model.safetensors")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_files_that_were_there_stay(tmp_path: Path) -> None:
    users = {"README.md": b"my project", "run.yaml": b"# why beta is 0.5\nbeta: 0.5\n", "metrics.json": b"{}"}
    for name, data in users.items():
        (tmp_path / name).write_bytes(data)
    finished(tmp_path)
    found = content(tmp_path)
    assert {name: found[name] for name in users} == users
    assert {"README.fastdpo.md", "run.fastdpo.yaml", "metrics.fastdpo.json"} <= found.keys()
    again = tiny.trainer(tmp_path, **OPTIONS)
    again.train(resume_from_checkpoint="last")
    again.save_run({})
    assert content(tmp_path).keys() == found.keys(), "its own files are replaced"


@pytest.mark.parametrize("name", ["tokenizer.json", "adapter_model.safetensors", "checkpoint-7"])
def test_names_that_the_run_needs_are_refused_before_anything_is_trained(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / name).mkdir(parents=True) if name == "checkpoint-7" else None
    folder.mkdir(exist_ok=True)
    (folder / name / "mine" if name == "checkpoint-7" else folder / name).write_text("mine")
    before = content(folder)
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match=f"holds {name}, which no run wrote there"):
            tiny.trainer(folder, overwrite_output_dir=overwrite, **OPTIONS).train()
    assert content(folder) == before


def test_rotation_counts_steps_and_the_runs_own_checkpoints(copy: Path) -> None:
    """A clock that was a day ahead makes no checkpoint the newest, and what is not the run's is neither counted nor
    removed."""
    users = copy / "checkpoint-1"
    users.mkdir()
    (users / "mine").write_text("mine")
    for path in checkpoints(copy):
        os.utime(path, (time.time() + 86400,) * 2)
    resumed = tiny.trainer(copy, **(OPTIONS | {"max_steps": 8, "save_total_limit": 2}))
    resumed.train(resume_from_checkpoint="last")
    assert [path.name for path in checkpoints(copy)] == ["checkpoint-1", "checkpoint-6", "checkpoint-8"]
    assert (users / "mine").read_text() == "mine"


def test_last_follows_the_branch_that_was_trained(copy: Path, tmp_path: Path) -> None:
    """From checkpoint-2, with another interval: neither the higher step of the older branch nor the clock counts, and
    rotation removes what lies beside the branch first."""
    options = OPTIONS | {"max_steps": 3, "save_steps": 3}
    tiny.trainer(copy, **options).train(resume_from_checkpoint=str(copy / "checkpoint-2"))
    assert [path.name for path in checkpoints(copy)] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    os.utime(copy / "checkpoint-4", (time.time() + 86400,) * 2)
    assert resolve_resume(copy, "last") == copy / "checkpoint-3"
    moved = Path(shutil.copytree(copy, tmp_path / "moved"))  # as a whole, to another place
    assert resolve_resume(moved, True) == moved / "checkpoint-3"
    longer = options | {"max_steps": 5, "save_steps": 5, "save_total_limit": 3}
    tiny.trainer(copy, **longer).train(resume_from_checkpoint="last")
    assert [path.name for path in checkpoints(copy)] == ["checkpoint-2", "checkpoint-3", "checkpoint-5"]


def test_a_checkpoint_that_was_copied_alone_is_resumed_and_then_the_runs(copy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "alone"
    shutil.copytree(copy / "checkpoint-2", folder / "checkpoint-2")
    tiny.trainer(folder, save_total_limit=1, **OPTIONS).train(resume_from_checkpoint="last")
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-4"]


def test_a_finished_run_that_is_resumed_trains_nothing_and_changes_nothing_but_its_log(copy: Path, caplog: Any) -> None:
    before = content(copy)
    resumed = tiny.trainer(copy, **OPTIONS)
    result = resumed.train(resume_from_checkpoint="last")
    assert result.metrics == {}
    assert "checkpoint at step 4 of 4: this run is finished, nothing is trained." in caplog.text
    assert resumed.parts.checkpoints.is_complete(4)
    after = content(copy)
    assert {name for name in after.keys() | before.keys() if after.get(name) != before.get(name)} <= {RUN_FILE}
    (copy / "adapter_model.safetensors").unlink()
    assert not resumed.parts.checkpoints.is_complete(4)
    resumed.save_model()
    assert content(copy)["adapter_model.safetensors"] == before["adapter_model.safetensors"]


def test_nothing_is_published_by_a_run_that_has_lost_its_lock(tmp_path: Path) -> None:
    """As after a suspension in which another process took it over."""

    class Lost(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                (tmp_path / LOCK_FILE).unlink()

    with pytest.raises(OSError, match="is no longer locked by this process"):
        tiny.trainer(tmp_path, callbacks=[Lost()], **OPTIONS).train()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]


def test_a_card_is_written_by_the_first_rank_alone(tmp_path: Path) -> None:
    """As transformers' push_to_hub calls it: another rank is not there to agree."""

    class Alone:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"{name}: the other ranks would be waited for")

    trainer = tiny.trainer(tmp_path, **OPTIONS)
    trainer.train()
    trainer.saving.ranks = Alone()
    trainer.create_model_card()
    assert "aligned with DPO" in (tmp_path / "README.md").read_text()
    assert not list(tmp_path.glob("_*"))


def test_a_save_that_fails_leaves_nothing_and_says_what_is_whole(tmp_path: Path, monkeypatch: Any) -> None:
    trainer = tiny.trainer(tmp_path, **OPTIONS)
    save = trainer.model.save_pretrained

    def full(folder: str, **kwargs: Any) -> None:
        save(folder, **kwargs)
        if trainer.state.global_step == 4:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer.model, "save_pretrained", full)
    message = (
        r"checkpoint-4 could not be written into .*: \[Errno 28\] No space left on device \(\d+ MiB are free there\)"
    )
    with pytest.raises(CheckpointError, match=message + r"\. The last whole checkpoint is .*checkpoint-2\. Make room"):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("_")] == []
    assert resolve_resume(tmp_path, "last") == tmp_path / "checkpoint-2"


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), CheckpointError),
        (RuntimeError("basic_ios::clear: iostream error"), CheckpointError),
        (Exception("No space left on device (os error 28)"), CheckpointError),  # as tokenizers says it
        (Exception("data did not match any variant"), Exception),
        (RuntimeError("CUDA error: an illegal memory access"), RuntimeError),
        (
            torch.distributed.DistBackendError("writev [127.0.0.1]:2345: Broken pipe"),
            torch.distributed.DistBackendError,
        ),
    ],
)
def test_only_a_failure_to_write_is_said_to_be_one(error: Exception, raised: type, tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, **OPTIONS)

    def fails(_: str) -> None:
        raise error

    trainer._save_optimizer_and_scheduler = fails
    with pytest.raises(raised) as found:
        trainer.train()
    assert type(found.value) is raised
    assert ("could not be written" in str(found.value)) is (raised is CheckpointError)


def test_weights_saved_elsewhere_appear_whole_and_replace_nothing_where_saving_fails(
    copy: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    trainer, elsewhere = tiny.trainer(tmp_path / "run2", **OPTIONS), tmp_path / "elsewhere"
    trainer.save_model(str(elsewhere))
    before = content(elsewhere)
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= before.keys()
    assert "training_args.bin" not in before

    def torn(folder: str, **_: Any) -> None:
        Path(folder, "adapter_model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer.model, "save_pretrained", torn)
    with pytest.raises(OSError, match="No space left"):
        trainer.save_model(str(elsewhere))
    assert content(elsewhere) == before


def test_the_folder_is_one_processs_at_a_time(copy: Path) -> None:
    """Refused by name, and nothing was touched; what is left by the holder's end is taken over."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        trainer = tiny.trainer(copy, **OPTIONS)
        with trainer.parts.checkpoints.held():
            os.write(writer, b"x")
            time.sleep(60)
        os._exit(0)
    try:
        assert os.read(reader, 1) == b"x"
        before = content(copy)
        with pytest.raises(OSError, match=rf"output_dir=.* is in use by process {child} on "):
            tiny.trainer(copy, overwrite_output_dir=True, **OPTIONS).train()
        assert content(copy) == before
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    tiny.trainer(copy, **OPTIONS).train(resume_from_checkpoint="last")
    assert not (copy / LOCK_FILE).exists()


def test_a_refused_resume_changes_nothing(copy: Path, tmp_path: Path) -> None:
    """Neither the run that would be overwritten, nor the branch that `last` follows."""
    other = Path(shutil.copytree(copy, tmp_path / "other"))
    before = content(copy)
    for folder, options in ((other, {"overwrite_output_dir": True}), (copy, {})):
        trainer = tiny.trainer(copy, learning_rate=0.5, **OPTIONS, **options)
        with pytest.raises(CheckpointError, match=r"learning_rate=0\.5"):
            trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        assert content(copy) == before
    assert resolve_resume(copy, "last") == copy / "checkpoint-4"


def test_an_output_folder_that_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    finished(tmp_path / "run", save_total_limit=1)
    assert {"adapter_model.safetensors", "checkpoint-4"} <= {path.name for path in (tmp_path / "disk").iterdir()}
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-4"]


def test_a_checkpoint_that_was_moved_and_linked_back_is_the_users(copy: Path, tmp_path: Path) -> None:
    moved = tmp_path / "disk"
    (copy / "checkpoint-4").rename(moved)
    (copy / "checkpoint-4").symlink_to(moved)
    (moved / "notes").write_text("mine")
    before = content(moved)
    with pytest.raises(CheckpointError, match="holds checkpoint-4, which no run wrote there"):
        tiny.trainer(copy, **OPTIONS).train(resume_from_checkpoint=str(copy / "checkpoint-2"))
    assert content(moved) == before


def test_a_link_in_the_place_of_what_is_written_aside_is_not_followed(copy: Path, tmp_path: Path) -> None:
    """Its name is the run's id, which can be read by then."""
    (tmp_path / "outside").mkdir()
    run = json.loads((copy / RUN_FILE).read_text())["run"]
    (copy / f"_fastdpo-{run}").symlink_to(tmp_path / "outside")
    trainer = tiny.trainer(copy, **(OPTIONS | {"max_steps": 6}))
    with pytest.raises(CheckpointError, match=rf"_fastdpo-{run} is a link, which is not followed"):
        trainer.train(resume_from_checkpoint="last")
    assert not list((tmp_path / "outside").iterdir())


def test_what_lies_in_the_place_of_a_checkpoint_is_looked_at(copy: Path, tmp_path: Path) -> None:
    """Another run's under a name of this one's list, and a file that was edited since: both stay."""
    other = tmp_path / "other"
    finished(other, seed=7)
    shutil.rmtree(copy / "checkpoint-2")
    shutil.copytree(other / "checkpoint-2", copy / "checkpoint-2")
    theirs = content(copy / "checkpoint-2")
    state = copy / "checkpoint-4" / "trainer_state.json"
    longer = OPTIONS | {"max_steps": 8, "save_total_limit": 1}
    tiny.trainer(copy, **longer).train(resume_from_checkpoint="last")
    assert content(copy / "checkpoint-2") == theirs
    assert not state.exists(), "this one was the run's"
    (copy / "checkpoint-8" / "trainer_state.json").write_text("{}")
    shutil.rmtree(copy / "checkpoint-2")
    finished(copy, max_steps=1, save_steps=1, overwrite_output_dir=True)
    assert content(copy / "checkpoint-8.kept") == {"trainer_state.json": b"{}"}
    tiny.trainer(tmp_path / "third", **OPTIONS).train()
    copied = shutil.copytree(other / "checkpoint-2", tmp_path / "third" / "checkpoint-9")
    with pytest.raises(CheckpointError, match="holds another run"):
        tiny.trainer(tmp_path / "third", **OPTIONS).train(resume_from_checkpoint=str(copied))


def test_a_trainer_that_has_left_its_folder_does_not_write_over_the_next_run(tmp_path: Path) -> None:
    first = tiny.trainer(tmp_path, **OPTIONS)
    first.train()
    second = tiny.trainer(tmp_path, overwrite_output_dir=True, **OPTIONS)
    second.train()
    second.save_model()
    before = content(tmp_path)
    with pytest.raises(CheckpointError, match="holds another run since this one has left it"):
        first.save_model()
    assert content(tmp_path) == before


@pytest.mark.parametrize("original", ["moved", "there"])
def test_the_best_checkpoint_of_a_run_that_was_moved_or_copied_is_its_own(original: str, tmp_path: Path) -> None:
    """The first step is the best one by this measure."""
    best = {
        "eval_strategy": "steps", "eval_steps": 2, "eval_dataset": tiny.pairs(4, seed=9),
        "load_best_model_at_end": True, "metric_for_best_model": "rewards/margins",
        "greater_is_better": False, "save_total_limit": 2,
    }  # fmt: skip
    first = tiny.trainer(tmp_path / "run", **OPTIONS, **best)
    first.train()
    expected = {name: p.detach().clone() for name, p in first.model.named_parameters() if p.requires_grad}
    copied = Path(shutil.copytree(tmp_path / "run", tmp_path / "copy"))
    if original == "moved":
        shutil.rmtree(tmp_path / "run")
    else:  # another run there by now
        (tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors").write_bytes(b"")
    again = tiny.trainer(copied, **OPTIONS, **best)
    again.train(resume_from_checkpoint="last")
    assert again.state.best_model_checkpoint == str(copied / "checkpoint-2")
    found = {name: p for name, p in again.model.named_parameters() if p.requires_grad}
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    shutil.rmtree(copied / "checkpoint-2")
    with pytest.raises(CheckpointError, match="best checkpoint so far is checkpoint-2, which lies neither in"):
        tiny.trainer(copied, **OPTIONS, **best).train(resume_from_checkpoint="last")
