"""Kept reference log-probs in training: the same run as without, and each pair's reference computed once."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from peft import get_peft_model
from same_run import CUTS, assert_same_run
from transformers import EvalPrediction, TrainerCallback
from worker import state

from fastdpo.training.reference import REFERENCE_CACHE_FILE
from fastdpo.training.reference import store as reference_store
from fastdpo.training.runs.callbacks import TrainingInterrupted
from fastdpo.training.runs.run_list import RUN_FILE

PAIRS = 22


class Run:
    """A trainer on 22 pairs in batches of 8, and how many pairs have passed under its reference."""

    def __init__(self, folder: Path, **options: Any) -> None:
        settings: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.05, "data": tiny.pairs(PAIRS)}
        self.trainer = tiny.trainer(folder, **(settings | {"num_train_epochs": 1} | options))
        self.pairs = 0
        fill = self.trainer.parts.scorer.fill_reference

        def counted(scores: Any, result: Any, micro: Any) -> None:
            assert not result.logps.requires_grad
            self.pairs += len(micro)
            fill(scores, result, micro)

        self.trainer.parts.scorer.fill_reference = counted

    def train(self) -> Run:
        self.trainer.train()
        return self

    @property
    def outcome(self) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
        return state(self.trainer), self.trainer.state.log_history

    @property
    def file(self) -> Path:
        return Path(self.trainer.args.output_dir) / REFERENCE_CACHE_FILE


def continued() -> Any:
    """A model with an adapter that is not zero: its reference is the weights at the start."""
    torch.manual_seed(3)
    return get_peft_model(tiny.llama(), tiny.lora(init_lora_weights=False))


#: What the reference is: the adapter switched off, the weights at the start, another model.
REFERENCES: dict[str, Any] = {
    "adapters off": lambda: {},
    "weights at the start": lambda: {"model": continued(), "peft_config": None},
    "ref_model": lambda: {"ref_model": tiny.llama(seed=1)},
}


@pytest.mark.parametrize("kind", REFERENCES)
@pytest.mark.parametrize("name", ["plain", "dynamic"])
def test_two_epochs_are_the_same_and_compute_each_reference_once(name: str, kind: str, tmp_path: Path) -> None:
    """Dropout is kept: a computation ahead of training that drew a random number, or a data order that it changed,
    would give another run."""
    dropout = {"disable_dropout": False} | ({} if "weights" in kind else {"peft_config": tiny.lora(lora_dropout=0.2)})
    runs = {
        mode: Run(
            tmp_path / mode,
            reference=mode,
            num_train_epochs=2,
            micro_batch_tokens="110",
            **CUTS[name] | dropout | REFERENCES[kind](),
        ).train()
        for mode in ("online", "lazy", "precompute")
    }
    assert runs["lazy"].trainer.parts.reference.kind == kind
    assert {mode: run.pairs for mode, run in runs.items()} == {"online": 44, "lazy": PAIRS, "precompute": PAIRS}
    assert_same_run(runs["online"].outcome, runs["lazy"].outcome)
    assert_same_run(runs["online"].outcome, runs["precompute"].outcome)
    assert runs["lazy"].file.is_file()
    assert runs["precompute"].file.is_file()
    assert not runs["online"].file.exists()


def test_kept_values_are_those_of_the_reference(tmp_path: Path) -> None:
    """One sequence at a time through the base model, in float64; computed before the first step."""
    seen = []

    class AtFirstStep(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            seen.append(len(run.trainer.parts.references.cache))

    run = Run(tmp_path, reference="precompute", callbacks=[AtFirstStep()])
    run.train()
    assert seen == [PAIRS] * 3
    base = tiny.llama()
    for row in run.trainer.train_dataset:
        batch = run.trainer.objective.batch_of([row], run.trainer.args.device)
        kept = run.trainer.parts.references.recall(batch)
        assert not kept.missing
        for found, completion in zip(kept.logps[0], (row["chosen_ids"], row["rejected_ids"]), strict=True):
            ids = torch.tensor([[*row["prompt_ids"], *completion]])
            with torch.no_grad():
                logps = base(ids).logits[0, len(row["prompt_ids"]) - 1 : -1].double().log_softmax(-1)
            expected = logps.gather(1, torch.tensor(completion)[:, None]).sum()
            assert float(found) == pytest.approx(float(expected), abs=1e-4)


def test_pairs_that_share_ids_are_told_apart(tmp_path: Path) -> None:
    """The same prompt and chosen answer, the same rejected one, answers exchanged, another border between prompt and
    answer; and one pair twice, which is computed once."""
    ids = [
        ([1, 2, 3], [4, 5], [6, 7]),
        ([1, 2, 3], [4, 5], [6, 8]),
        ([1, 2, 3], [4, 9], [6, 7]),
        ([1, 2, 3], [6, 7], [4, 5]),
        ([1, 2], [3, 4, 5], [6, 7]),
        ([1, 2, 3, 4], [5], [6, 7]),
        ([1, 2, 3], [4, 5], [6, 7]),
    ]
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [{**dict(zip(columns, row, strict=True)), "example_id": str(i)} for i, row in enumerate(ids)]
    options: dict[str, Any] = {"data": Dataset.from_list(rows), "per_device_train_batch_size": 1, "num_train_epochs": 2}
    online, lazy = (Run(tmp_path / mode, reference=mode, **options).train() for mode in ("online", "lazy"))
    assert (online.pairs, lazy.pairs, len(lazy.trainer.parts.references.cache)) == (14, 6, 6)
    assert_same_run(online.outcome, lazy.outcome)


@pytest.mark.parametrize("mode", ["lazy", "precompute"])
def test_a_later_run_computes_nothing(mode: str, tmp_path: Path) -> None:
    first = Run(tmp_path / "run", reference=mode, save_strategy="epoch").train()
    content = first.file.read_bytes()
    again = Run(tmp_path / "run", reference=mode, overwrite_output_dir=True).train()
    elsewhere = Run(tmp_path / "other", reference=mode, reference_cache_dir=str(tmp_path / "run")).train()
    assert (first.pairs, again.pairs, elsewhere.pairs) == (PAIRS, 0, 0)
    assert first.file.read_bytes() == content
    assert not elsewhere.file.exists(), "it lies where it was asked for"
    for run in (again, elsewhere):
        assert_same_run(first.outcome, run.outcome)
    # Half of the data is new
    more = Run(tmp_path / "more", data=tiny.pairs(40), reference_cache_dir=str(tmp_path / "run")).train()
    assert more.pairs == 40 - PAIRS


STALE: dict[str, dict[str, Any]] = {
    "weights": {"model": lambda: tiny.llama(seed=2)},
    "max_length": {"max_length": 100},
    "max_prompt_length": {"max_prompt_length": 63},
    "tokenizer": {"processing_class": lambda: tiny.tokenizer(additional_special_tokens=["<x>"])},
    "torn": {},
}


@pytest.mark.parametrize("reason", STALE)
def test_a_file_of_something_else_is_computed_again(
    reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = Run(tmp_path / "run").train()
    if reason == "torn":
        first.file.write_bytes(first.file.read_bytes()[:-10])
    changes = {name: made() if callable(made) else made for name, made in STALE[reason].items()}
    expected = Run(tmp_path / "online", reference="online", **changes).train()
    changes = {name: made() if callable(made) else made for name, made in STALE[reason].items()}
    caplog.clear()
    again = Run(tmp_path / "again", reference_cache_dir=str(tmp_path / "run"), **changes).train()
    assert again.pairs == PAIRS
    assert_same_run(expected.outcome, again.outcome)
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and "is not used" in r.message]
    assert reason in warning
    assert "computed again" in warning
    # The file has been replaced
    changes = {name: made() if callable(made) else made for name, made in STALE[reason].items()}
    assert Run(tmp_path / "third", reference_cache_dir=str(tmp_path / "run"), **changes).train().pairs == 0


def test_loss_without_a_reference_keeps_none(tmp_path: Path) -> None:
    run = Run(tmp_path, loss_type=["simpo"], reference="precompute", eval_dataset=tiny.pairs(4, seed=9)).train()
    run.trainer.evaluate()
    assert run.pairs == 0
    assert not run.file.exists()


def test_evaluation_pairs_are_kept_too(tmp_path: Path) -> None:
    """Over three evaluations each pair's reference is computed once, and the figures are those of no cache."""
    options: dict[str, Any] = {
        "eval_dataset": tiny.pairs(10, seed=9),
        "eval_strategy": "steps",
        "eval_steps": 1,
        "ref_model": None,
    }
    online = Run(tmp_path / "online", reference="online", **options | {"ref_model": tiny.llama(seed=1)}).train()
    lazy = Run(tmp_path / "lazy", reference="lazy", **options | {"ref_model": tiny.llama(seed=1)}).train()
    assert lazy.pairs == PAIRS + 10
    assert sum("eval_loss" in entry for entry in lazy.trainer.state.log_history) == 3
    figures = [
        [{k: v for k, v in e.items() if k == "eval_loss" or "/" in k} for e in run.trainer.state.log_history]
        for run in (online, lazy)
    ]
    for one, other in zip(*figures, strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-5)
    # Before the first step the policy is its reference, and passes once for both
    fresh = Run(tmp_path / "fresh", **options)
    fresh.trainer.evaluate()
    assert fresh.pairs == 0
    assert len(fresh.trainer.parts.references.cache) == 10


def test_a_precomputation_that_is_stopped_takes_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has by then is kept, and the next start computes the rest in the same rounds: the run is bitwise that of
    one computation."""
    monkeypatch.setattr(reference_store, "ROUND", 4)
    options = {"reference": "precompute", "micro_batch_tokens": "90"}
    run = Run(tmp_path / "run", **options)
    share, kept = run.trainer.parts.references.share, []

    def stopped() -> None:
        share()
        kept.append(len(run.trainer.parts.references.cache))
        if len(kept) == 2:
            run.trainer.stop_signals.received = 15

    monkeypatch.setattr(run.trainer.parts.references, "share", stopped)
    with pytest.raises(
        TrainingInterrupted, match=r"SIGTERM: stopped before step 1, nothing is trained. Start the same"
    ):
        run.train()
    assert kept[:2] == [4, 8]
    assert run.pairs == 8
    assert {path.name for path in run.file.parent.iterdir()} == {run.file.name, RUN_FILE}
    again = Run(tmp_path / "run", **options).train()
    assert again.pairs == PAIRS - 8
    straight = Run(tmp_path / "straight", **options).train()
    assert straight.file.read_bytes() == again.file.read_bytes()
    for name, value in straight.outcome[0].items():
        assert torch.equal(value, again.outcome[0][name]), name


def test_cache_folder_without_a_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"reference_cache_dir='x' has no effect here: reference='online'"):
        tiny.config(tmp_path, reference="online", reference_cache_dir="x")


def test_evaluation_of_a_rank_that_knows_all_its_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank misses some, so that all of them take the policy's own scores: this one has none to fill in."""
    trainer = tiny.trainer(tmp_path, data=tiny.pairs(6), eval_dataset=tiny.pairs(6, seed=1))
    first = trainer.evaluate()
    answers = iter([True, False])
    batch = trainer.objective.batch_of([trainer.eval_dataset[i] for i in range(6)], trainer.args.device)
    monkeypatch.setattr(trainer.parts.sharding, "most", lambda value: next(answers, value))
    scored = trainer.parts.batch_scores.evaluated(batch)
    assert next(answers, None) is None
    assert trainer.evaluation_metrics(EvalPrediction(scored, None))["loss"] == pytest.approx(first["eval_loss"])
