"""An objective that the package does not know, of thirty lines and from outside: its step, cut, ranks and resume.

The mean likelihood of single answers, −(1/B) Σ_b (1/|y_b|) Σ_t log π(y_bt): no pairs, no reference, no plan; and the
same with weights that the whole batch decides, so that it has to be scored first.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict
from launched import WORKER, on_two_ranks
from same_run import assert_same_run
from single_answers import Focused, MeanLikelihood, Relative, answers
from torch import Tensor
from worker import state

from fastdpo import FastDPOTrainer
from fastdpo.training.objectives import Objective

OPTIONS = {"max_steps": 4, "optim": "sgd", "learning_rate": 0.05, "beta": 0.1}
#: Ways to cut a batch into micro-batches and rows.
CUTS: list[dict[str, Any]] = [
    {},
    {"micro_batch_tokens": "30"},
    {"micro_batch_tokens": "30", "prefix_sharing": "off", "packing": "off"},
    {"gradient_checkpointing": "true", "prefix_sharing": "off"},
]


def trainer(folder: Path, objective: Objective, **options: Any) -> FastDPOTrainer:
    return tiny.trainer(folder, **({"data": answers(20), "objective": objective} | OPTIONS | options))


def row(**changes: Any) -> dict[str, Any]:
    return {"prompt_ids": [1, 2], "answer_ids": [3], "example_id": "odd"} | changes


def expected_gradients(model: Any, batch: list[dict[str, Any]], focused: bool) -> dict[str, Tensor]:
    """One sequence at a time, from all logits of the model."""
    losses = []
    for row in batch:
        ids = torch.tensor([row["prompt_ids"] + row["answer_ids"]])
        logps = model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1].log_softmax(-1)
        losses.append(-logps.gather(1, torch.tensor(row["answer_ids"])[:, None]).mean())
    stacked = torch.stack(losses)
    (stacked * (stacked.detach().softmax(0) if focused else 1 / len(batch))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("objective", [MeanLikelihood, Focused])
@pytest.mark.parametrize("cut", [{}, {"micro_batch_tokens": "30"}], ids=["whole", "cut"])
def test_the_gradients_are_the_losses_own(objective: type[Objective], cut: dict[str, Any], tmp_path: Path) -> None:
    made = trainer(tmp_path, objective(), **cut)
    for name, parameter in made.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    rows = [made.train_dataset[i] for i in range(8)]
    expected = expected_gradients(made.model, rows, objective is Focused)
    made.model.zero_grad()
    made.create_optimizer()
    made.training_step(made.model, made.data_collator(rows))
    found = {name: p.grad for name, p in made.model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()))


@pytest.mark.parametrize("objective", [MeanLikelihood, Focused])
def test_the_update_does_not_depend_on_the_cut(objective: type[Objective], tmp_path: Path) -> None:
    runs = []
    for number, cut in enumerate(CUTS):
        made = trainer(tmp_path / str(number), objective(), **cut)
        made.train()
        runs.append((state(made), made.state.log_history))
    for run in runs[1:]:
        assert_same_run(run, runs[0])
    assert {"loss", "accuracy", "nll"} <= runs[0][1][0].keys()
    assert runs[0][1][-2]["nll"] < runs[0][1][0]["nll"]


def test_the_update_does_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    """20 answers in batches of 8 per step: the last has duplicates where two ranks share it."""
    names = ("MeanLikelihood", "Focused")
    jobs = [
        {
            "folder": str(tmp_path / name),
            "pairs": 20,
            "objective": name,
            "options": {**OPTIONS, "per_device_train_batch_size": 4},
            "result": str(tmp_path / f"{name}.pt"),
        }
        for name in names
    ]
    on_two_ranks(WORKER, jobs)
    for name, objective in zip(names, (MeanLikelihood, Focused), strict=True):
        alone = trainer(tmp_path / f"single {name}", objective())
        alone.train()
        result = torch.load(tmp_path / f"{name}.pt", weights_only=False)
        # Duplicates count as work, in the last entry's FLOPs, and nowhere else
        assert_same_run((state(alone), alone.state.log_history[:-1]), (result["state"], result["log"][:-1]))


@pytest.mark.parametrize("objective", [MeanLikelihood, Focused])
def test_resume_is_bitwise_equal(objective: type[Objective], tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    straight = trainer(tmp_path / "straight", objective(), **saving)
    straight.train()
    resumed = trainer(tmp_path / "resumed", objective(), **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    found, expected = state(resumed), state(straight)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_evaluation_and_predictions(tmp_path: Path) -> None:
    """Over sets that no batch divides, and columns by name and completion."""
    made = trainer(tmp_path, MeanLikelihood(), eval_dataset=answers(11, seed=3), per_device_eval_batch_size=4)
    figures = made.evaluate()
    table = made.predict(answers(11, seed=3)).predictions
    logps, _, lengths = table.T
    assert figures["eval_loss"] == pytest.approx(float((-logps / lengths).mean()), rel=1e-5)
    assert figures["eval_nll"] == pytest.approx(float(-logps.sum() / lengths.sum()), rel=1e-5)
    assert lengths.tolist() == [len(ids) for ids in answers(11, seed=3)["answer_ids"]]


def test_kept_references_of_single_answers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In whatever way they come about the run is the same, and pairs' file in their place is told from theirs."""
    expected = trainer(tmp_path / "without", MeanLikelihood())
    expected.train()
    for way in ("online", "lazy", "precompute"):
        made = trainer(tmp_path / way, Relative(), reference=way, eval_dataset=answers(5, seed=1))
        assert made.evaluate()["eval_loss"] == 0.0
        made.train()
        for name, value in state(expected).items():
            torch.testing.assert_close(state(made)[name], value, rtol=1e-5, atol=1e-6)
        assert made.state.log_history[0]["loss"] == pytest.approx(0.0, abs=1e-5)
    tiny.trainer(tmp_path / "pairs", reference_cache_dir=str(tmp_path / "lazy"), max_steps=1).train()
    assert "completions was 1, is absent" in caplog.text
    assert "corrupted" not in caplog.text


def test_the_guide_shows_this_objective() -> None:
    guide = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert f"```python\n{inspect.getsource(MeanLikelihood)}```" in guide


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (answers(4).remove_columns("answer_ids"), r"no \['answer_ids'\] \(found: .*give it token ids"),
        (Dataset.from_list([row(), row(prompt_ids=[])]), r"example 'odd' has no token in \['prompt_ids'\]"),
        (Dataset.from_list([row(answer_ids=[]), row()]), r"example 'odd' has no token in \['answer_ids'\]"),
        (Dataset.from_list([row(answer_ids=[3] * 127)]), "example 'odd' has 129 tokens, more than max_length=128"),
        (DatasetDict(train=answers(4), test=answers(2)), "is a DatasetDict; pass one of its splits: train, test"),
    ],
)
def test_data_that_it_cannot_read_is_refused(data: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, MeanLikelihood(), data=data)


@pytest.mark.parametrize("option", [{"dynamic_beta": True}, {"loss_type": ["ipo"]}, {"ld_alpha": 0.5}])
def test_options_that_it_does_not_read_are_refused(option: dict[str, Any], tmp_path: Path) -> None:
    (name,) = option
    with pytest.raises(ValueError, match=rf"{name}=.* has no effect with objective=MeanLikelihood"):
        trainer(tmp_path, MeanLikelihood(), **option)
    if name != "dynamic_beta":
        made = MeanLikelihood()
        made.reads = (name,)
        trainer(tmp_path, made, **option)


def test_its_model_is_not_tagged_as_another_method(tmp_path: Path) -> None:
    assert trainer(tmp_path, MeanLikelihood()).model.model_tags == ["fastdpo"]


def test_a_run_is_not_resumed_under_another_objective(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer(tmp_path, MeanLikelihood(), **saving).train()
    with pytest.raises(ValueError, match=r"was trained with objective='MeanLikelihood', this run has objective='Foc"):
        trainer(tmp_path, Focused(), **saving).train(resume_from_checkpoint=True)
