"""What a resumed run must share with the run that it continues, part by part, and what it may change."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset, Features, Sequence, Value
from peft import get_peft_model
from safetensors.torch import load_file

from fastdpo.data import load_preferences
from fastdpo.training.runs.checkpoint import CheckpointError
from fastdpo.training.runs.identity import Identity, data_digest

OPTIONS: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", "lr_scheduler_type": "cosine"}
PAIRS = tiny.pairs(16)


def exchanged(pairs: Dataset) -> Dataset:
    return pairs.rename_columns({"chosen": "rejected", "rejected": "chosen"})


def with_template() -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("</s>", "</s>\n")
    return tokenizer


def sgd(model: Any) -> dict[str, Any]:
    model = get_peft_model(model, tiny.lora())
    trained = [p for p in model.parameters() if p.requires_grad]
    return {"model": model, "peft_config": None, "optimizers": (torch.optim.SGD(trained, lr=1e-2), None)}


#: What the refusal names → what is changed. Options of the objective, seeds, batches: in test_resume.py
FIXED: dict[str, dict[str, Any]] = {
    "training data": {"data": exchanged(PAIRS)},
    "training data=": {"data": PAIRS.select([1, 0, *range(2, 16)])},
    "training data='15 rows": {"data": PAIRS.select(range(15))},
    "max_prompt_length=5": {"max_prompt_length": 5},
    "adapter lora_alpha=64": {"peft_config": tiny.lora(lora_alpha=64)},
    "adapter r=8": {"peft_config": tiny.lora(r=8)},
    "adapter use_rslora=True": {"peft_config": tiny.lora(use_rslora=True)},
    "adapter lora_dropout=0.1": {"peft_config": tiny.lora(lora_dropout=0.1), "disable_dropout": False},
    "trained parameters": {"peft_config": tiny.lora(target_modules=["q_proj"])},
    "learning_rate=0.001": {"learning_rate": 1e-3},
    "optim='sgd'": {"optim": "sgd"},
    "adam_beta2=0.99": {"adam_beta2": 0.99},
    "weight_decay=0.1": {"weight_decay": 0.1},
    "max_grad_norm=0.5": {"max_grad_norm": 0.5},
    "lr_scheduler_type='linear'": {"lr_scheduler_type": "linear"},
    "warmup_steps=2": {"warmup_steps": 2},
    "tokenizer": {"processing_class": with_template()},
    "data_seed=7": {"data_seed": 7},
    "train_sampling_strategy='sequential'": {"train_sampling_strategy": "sequential"},
    "optimizer='torch.optim.sgd.SGD'": sgd(tiny.llama()),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("identity") / "run"
    tiny.trainer(folder, data=PAIRS, **OPTIONS).train()
    return folder


@pytest.mark.parametrize("part", FIXED)
def test_another_value_of_a_fixed_part_is_refused_with_both(part: str, run: Path) -> None:
    name = re.escape(part.partition("=")[0])
    trainer = tiny.trainer(run, **({"data": PAIRS} | OPTIONS | FIXED[part]))
    message = rf"checkpoint-2 was trained with .*{name}=.*, this run has .*{re.escape(part)}.*Resume with the run's own"
    with pytest.raises(CheckpointError, match=message):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))


def test_another_base_of_the_policy_is_refused_although_the_reference_is_the_same(tmp_path: Path) -> None:
    tiny.trainer(tmp_path, ref_model=tiny.llama(seed=3), **OPTIONS).train()
    other = tiny.trainer(tmp_path, ref_model=tiny.llama(seed=3), model=tiny.llama(seed=5), **OPTIONS)
    with pytest.raises(CheckpointError, match="was trained with model weights="):
        other.train(resume_from_checkpoint="last")


def test_a_reference_of_another_config_is_another_reference(tmp_path: Path) -> None:
    """Equal weights that compute something else."""
    tiny.trainer(tmp_path, ref_model=tiny.llama(seed=3), **OPTIONS).train()
    other = tiny.trainer(tmp_path, ref_model=tiny.llama(seed=3, rms_norm_eps=1e-2), **OPTIONS)
    with pytest.raises(CheckpointError, match="was trained with reference model config="):
        other.train(resume_from_checkpoint="last")


def test_groups_of_a_given_optimizer_and_a_given_schedule_count(tmp_path: Path) -> None:
    def given(rates: tuple[float, float], gamma: float) -> dict[str, Any]:
        model = get_peft_model(tiny.llama(), tiny.lora())
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [{"params": trained[:4], "lr": rates[0]}, {"params": trained[4:], "lr": rates[1]}]
        optimizer = torch.optim.AdamW(groups)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=gamma)
        return {"model": model, "peft_config": None, "optimizers": (optimizer, schedule)}

    tiny.trainer(tmp_path, **OPTIONS, **given((1e-2, 1e-3), 0.5)).train()
    for other, named in ((((1e-2, 1e-2), 0.5), "optimizer groups"), (((1e-2, 1e-3), 0.1), "scheduler gamma=0.5")):
        with pytest.raises(CheckpointError, match=f"was trained with {named}"):
            tiny.trainer(tmp_path, **OPTIONS, **given(*other)).train(resume_from_checkpoint="last")
    tiny.trainer(tmp_path, **OPTIONS, **given((1e-2, 1e-3), 0.5)).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )


def test_what_another_version_does_not_know_is_off_there() -> None:
    saved = {"fixed": {"r": 4, "old": None}, "noted": {}}
    Identity({"r": 4, "new": False, "newer": []}, {}).check("checkpoint-2", saved)
    for own, said in (({"r": 4, "new": True}, "new=None, this run has new=True"), ({}, "r=4, this run has r=None")):
        with pytest.raises(CheckpointError, match=said):
            Identity(own, {}).check("checkpoint-2", saved)


def test_more_steps_are_trained_at_the_rates_of_the_longer_schedule(tmp_path: Path) -> None:
    linear = OPTIONS | {"lr_scheduler_type": "linear", "learning_rate": 8e-3}
    tiny.trainer(tmp_path, **linear).train()
    longer = tiny.trainer(tmp_path, **(linear | {"max_steps": 8}))
    longer.train(resume_from_checkpoint="last")
    rates = {entry["step"]: entry["learning_rate"] for entry in longer.state.log_history if "learning_rate" in entry}
    assert {step: rates[step] for step in (5, 6, 7, 8)} == pytest.approx({5: 4e-3, 6: 3e-3, 7: 2e-3, 8: 1e-3})


def test_evaluation_data_counts_where_it_decides_what_is_kept(tmp_path: Path) -> None:
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": tiny.pairs(4, seed=9)}
    best = evaluated | {"load_best_model_at_end": True, "metric_for_best_model": "rewards/margins"}
    other = {"eval_dataset": tiny.pairs(4, seed=8)}
    for folder, options, refused in ((tmp_path / "best", best, True), (tmp_path / "plain", evaluated, False)):
        tiny.trainer(folder, **OPTIONS, **options).train()
        again = tiny.trainer(folder, **OPTIONS, **(options | other))
        if refused:
            with pytest.raises(CheckpointError, match="was trained with evaluation data="):
                again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        else:
            again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))


def test_what_has_a_meaning_is_honoured_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """More steps, another interval of saves, other micro-batches: as one run that had these from the start."""
    constant = OPTIONS | {"lr_scheduler_type": "constant"}
    tiny.trainer(tmp_path / "run", data=PAIRS, **constant).train()
    changed = constant | {"max_steps": 6, "save_steps": 3, "micro_batch_tokens": "90"}
    resumed = tiny.trainer(tmp_path / "run", data=PAIRS, **changed)
    resumed.train(resume_from_checkpoint="last")
    assert (
        "checkpoint-4 was saved with max_steps=4, micro_batch_tokens='auto', save_steps=2; this run has max_steps=6, "
        "micro_batch_tokens='90', save_steps=3, which is honoured." in caplog.text
    )
    straight = tiny.trainer(tmp_path / "straight", data=PAIRS, **(changed | {"save_steps": 6}))
    straight.train()
    names = [
        folder / "checkpoint-6" / "adapter_model.safetensors" for folder in (tmp_path / "run", tmp_path / "straight")
    ]
    one, other = map(load_file, map(str, names))
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-5, atol=1e-5)


def test_the_digest_of_data_is_of_content_and_order() -> None:
    rows = [
        {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]},
        {"prompt_ids": [6], "chosen_ids": [7, 8], "rejected_ids": [9]},
    ]
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    data = Dataset.from_list(rows)
    digest = data_digest(data, columns)
    narrow = data.cast(Features({name: Sequence(Value("int32")) for name in columns}))
    same = (
        narrow,
        data.add_column("note", ["a", "b"]),
        Dataset.from_list(rows * 2).select([2, 3]),
        data.select([1, 0]).select([1, 0]),
    )
    assert {data_digest(each, columns) for each in same} == {digest}
    moved = [{**rows[0], "prompt_ids": [1], "chosen_ids": [2, 3]}, rows[1]]
    cut = [{**rows[0], "prompt_ids": [1]}, {**rows[1], "prompt_ids": [2, 6]}]  # the same ids in other rows
    made = [Dataset.from_list(each) for each in (moved, cut, [rows[0], rows[0]])]
    other = (data.select([1, 0]), data.select([0]), *made)
    digests = {data_digest(each, columns) for each in other} | {data_digest(data, columns[::-1]), digest}
    assert len(digests) == len(other) + 2


def test_the_digest_of_data_of_which_rows_were_left_out() -> None:
    """However the rows that are left are looked up, and past the parts that are read at a time."""
    rng, columns = random.Random(0), ["prompt_ids", "chosen_ids"]
    rows = [{name: [rng.randrange(100) for _ in range(rng.randrange(1, 4))] for name in columns} for _ in range(50_000)]
    left = [row for number, row in enumerate(rows) if number % 101 and not 30_000 < number < 30_500]
    every = Dataset.from_list(rows)
    kept = every.select([number for number in range(50_000) if number % 101 and not 30_000 < number < 30_500])
    assert data_digest(kept, columns) == data_digest(Dataset.from_list(left), columns)
    assert data_digest(every.select(range(50_000)[::-1]), columns) == data_digest(
        Dataset.from_list(rows[::-1]), columns
    )
    assert data_digest(kept, columns) != data_digest(every.select(range(len(left))), columns)


def test_a_file_of_the_same_size_and_time_is_read_again(tmp_path: Path) -> None:
    """A copy that keeps the time of what it replaces, as rsync's does, is another file all the same."""
    path = tmp_path / "pairs.jsonl"
    row = {"prompt": "q ", "chosen": "aaa", "rejected": "bbb"}
    found = []
    for chosen, rejected in (("aaa", "bbb"), ("bbb", "aaa")):
        path.write_text(json.dumps({**row, "chosen": chosen, "rejected": rejected}) + "\n")
        os.utime(path, ns=(10**18, 10**18))
        found.append(load_preferences(path, cache_dir=tmp_path / "cache")[0]["chosen"])
    assert found == ["aaa", "bbb"]


def test_an_optimizer_of_other_weights_is_refused(tmp_path: Path) -> None:
    """Made before the adapter was, it would move nothing that is trained."""
    model = tiny.llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match=r"optimizers: the SGD holds 21 parameters, 21 of which are not trained, and la"
    ):
        tiny.trainer(tmp_path, model=model, optimizers=(optimizer, None))
