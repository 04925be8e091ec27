"""Memory that runs out in the middle of a run changes how the batch is cut, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import tiny
import torch
from datasets import Dataset
from families import MODELS
from launched import WORKER, on_two_ranks
from same_run import CUTS, assert_same_run
from transformers import BloomConfig, BloomForCausalLM, TrainingArguments
from worker import injected, state

from fastdpo.estimate.options import EstimateConfig
from fastdpo.training.memory import OutOfMemory
from fastdpo.training.memory import trial as memory_trial
from fastdpo.training.memory.plan import checkpointing_name, is_out_of_memory
from fastdpo.training.memory.trial import largest_that_fits

#: Tokens of a pair of `even_pairs` in its row: 8 of prompt, 6 of either answer that are read, none of them shared.
PAIR = 20


def even_pairs(count: int) -> Dataset:
    """Pairs of token ids, each of `PAIR` tokens in a row that shares the prompt."""
    generator = torch.Generator().manual_seed(0)

    def ids(length: int, first: int) -> list[int]:
        # Both answers end in the same token, and begin with one of their own
        return [first, *torch.randint(1, 200, (length - 1,), generator=generator).tolist()]

    rows = [
        {"prompt_ids": ids(8, 1), "chosen_ids": ids(7, 2), "rejected_ids": ids(7, 3), "example_id": str(i)}
        for i in range(count)
    ]
    return Dataset.from_list(rows)


def randomised(trainer: Any) -> Any:
    """A LoRA that is not zero, so that policy and reference differ from the first step on."""
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return trainer


def build(folder: Path, oom: Callable[..., bool] | None = None, **options: Any) -> Any:
    """A trainer whose forward runs out of memory where `oom(trainer, model, micro)` says so."""
    settings: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.05, "data": tiny.pairs(22), "num_train_epochs": 1}
    trainer = randomised(tiny.trainer(folder, ref_model=tiny.llama(seed=1), **(settings | options)))
    return trainer if oom is None else injected(trainer, oom)


def trained(folder: Path, oom: Callable[..., bool] | None = None, **options: Any) -> Any:
    trainer = build(folder, oom, **options)
    trainer.train()
    return trainer


def outcome(trainer: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    return state(trainer), [{k: v for k, v in e.items() if k != "total_flos"} for e in trainer.state.log_history]


def recomputes(model: Any) -> bool:
    return bool(getattr(model, f"is_{checkpointing_name(model)}_checkpointing"))


class Once:
    """True for the `at`-th micro-batch of all those that `which` picks, only."""

    def __init__(self, at: int, which: Callable[..., bool]) -> None:
        self.at, self.which, self.seen = at, which, 0

    def __call__(self, *forward: Any) -> bool:
        self.seen += self.which(*forward)
        return self.which(*forward) and self.seen == self.at


def in_training(*_: Any) -> bool:
    return torch.is_grad_enabled()


def under_reference(trainer: Any, model: Any, micro: Any) -> bool:
    return model is trainer.parts.reference.ref_model


def above(tokens: int, which: Callable[..., bool]) -> Callable[..., bool]:
    return lambda trainer, model, micro: which(trainer, model, micro) and micro.input_ids.numel() > tokens


FAILURES: dict[str, Callable[[], Callable[..., bool]]] = {
    "large micro-batches, training": lambda: above(80, in_training),
    "large micro-batches, scoring": lambda: above(80, lambda *_: not torch.is_grad_enabled()),
    "large micro-batches under the reference": lambda: above(80, under_reference),
    "large micro-batches, always": lambda: above(60, lambda *_: True),
    # The second of two in the first step, and one of three in the second: others have left their gradients already
    "second micro-batch": lambda: Once(2, in_training),
    "fourth micro-batch": lambda: Once(4, in_training),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Runs whose memory never runs out."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return {
        name: outcome(trained(folder / name, micro_batch_tokens="110", **CUTS[name])) for name in ("plain", "dynamic")
    }


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("name", ["plain", "dynamic"])
def test_a_step_that_ran_out_of_memory_is_repeated(
    name: str, failure: str, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    options = CUTS[name] | {"micro_batch_tokens": "110"}
    fails = FAILURES[failure]()
    failures = []

    def counted(trainer: Any, *forward: Any) -> bool:
        if failed := fails(trainer, *forward):
            failures.append(any(p.grad is not None and bool(p.grad.any()) for p in trainer.model.parameters()))
        return failed

    again = trained(tmp_path, counted, **options)
    assert any(failures) if isinstance(fails, Once) else failures
    assert_same_run(undisturbed[name], outcome(again))


@pytest.mark.parametrize("layout", ["on", "off"])
def test_budgets_are_halved(layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """8 pairs of 20 tokens: no more than 160 count, of which 80, then 40, do not run out; scoring has its own budget.
    In rows of their own both answers take 15 tokens each, a pair 30: 240, 120, 60, 30."""
    options = {"data": even_pairs(8), "micro_batch_tokens": "1000", "prefix_sharing": layout, "packing": layout}
    trainer = trained(tmp_path, above(50, in_training), **options)
    batch = trainer.objective.batch(next(iter(trainer.get_train_dataloader())), torch.device("cpu"))
    assert batch.tokens(trainer.parts.layouts.layout) == [PAIR if layout == "on" else 30] * 8
    memory = trainer.parts.memory
    assert (memory.train_tokens, memory.score_tokens) == (40 if layout == "on" else 30, 4000)
    told = [r.getMessage() for r in caplog.records if "out of memory" in r.getMessage()]
    expected = [80, 40] if layout == "on" else [120, 60, 30]
    assert told == [f"out of memory: the step is repeated with training micro-batches of {n} tokens." for n in expected]


def test_the_scoring_budget_is_halved_alone(tmp_path: Path) -> None:
    options = {"data": even_pairs(8), "micro_batch_tokens": "1000"}
    trainer = trained(tmp_path, above(100, under_reference), **options)
    assert (trainer.parts.memory.train_tokens, trainer.parts.memory.score_tokens) == (1000, 80)


@pytest.mark.parametrize("name", ["plain", "dynamic"])
def test_a_repeated_step_draws_the_same_random_numbers(name: str, tmp_path: Path) -> None:
    """Dropout is kept. A run that fails in its first step, after some micro-batches have drawn theirs, is the run that
    had half the budget from the beginning; one that fails in its second is not, as its first was cut otherwise."""
    dropout = {"disable_dropout": False, "peft_config": tiny.lora(lora_dropout=0.3)}
    options = CUTS[name] | dropout | {"max_steps": 2}
    half = outcome(trained(tmp_path / "half", micro_batch_tokens="50", **options))
    failed = outcome(trained(tmp_path / "failed", Once(2, in_training), micro_batch_tokens="100", **options))
    assert_same_run(half, failed)
    later, _ = outcome(trained(tmp_path / "later", Once(5, in_training), micro_batch_tokens="100", **options))
    assert max(float((later[key] - value).abs().max()) for key, value in half[0].items()) > 1e-3, "no dropout"


def test_checkpointing_comes_when_not_even_one_pair_fits(
    undisturbed: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    again = build(tmp_path, lambda trainer, *_: in_training() and not trainer.parts.memory.checkpointing)
    assert not recomputes(again.model)
    again.train()
    assert "repeated with checkpointing" in caplog.text
    assert recomputes(again.model)
    assert_same_run(undisturbed["plain"], outcome(again))


def test_what_cannot_fit_ends_the_run(tmp_path: Path) -> None:
    trainer = build(tmp_path / "false", in_training, gradient_checkpointing="false", data=even_pairs(8))
    with pytest.raises(OutOfMemory, match=r"one pair of 20 tokens .* \(injected.* is '\d', of 20\..*max_length"):
        trainer.train()
    assert not recomputes(trainer.model)
    # Scoring keeps no activations, which checkpointing could save
    trainer = build(tmp_path / "scoring", under_reference, data=even_pairs(8))
    with pytest.raises(OutOfMemory, match="one pair of 20 tokens"):
        trainer.train()
    trainer = build(tmp_path / "auto", in_training, data=even_pairs(8))
    with pytest.raises(OutOfMemory, match="one pair of 20 tokens"):
        trainer.train()
    assert trainer.parts.memory.checkpointing, "it was tried"


def test_a_budget_of_one_pair_is_not_halved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = build(
        tmp_path, in_training, gradient_checkpointing="false", data=even_pairs(8), micro_batch_tokens=str(PAIR)
    )
    with pytest.raises(OutOfMemory, match=f"one pair of {PAIR} tokens"):
        trainer.train()
    assert trainer.parts.memory.train_tokens == PAIR
    assert "is repeated" not in caplog.text


def test_other_errors_are_not_taken_for_it(tmp_path: Path) -> None:
    def broken(*_: Any) -> bool:
        raise RuntimeError("size mismatch")

    trainer = build(tmp_path, broken)
    with pytest.raises(RuntimeError, match=r"^size mismatch$"):
        trainer.train()
    assert (trainer.parts.memory.train_tokens, trainer.parts.memory.score_tokens) == (1536, 6144)
    memory = [torch.OutOfMemoryError("…"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
    others = [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("out of memory")]
    assert [is_out_of_memory(error) for error in memory + others] == [True] * 3 + [False] * 2


@pytest.mark.parametrize("when", ["before training", "after"])
def test_evaluation_goes_on_with_less(when: str, tmp_path: Path) -> None:
    options = {"micro_batch_tokens": "110", "eval_dataset": tiny.pairs(10, seed=9), "max_steps": 1}
    whole, again = build(tmp_path / "whole", **options), build(tmp_path / "again", **options)
    if when == "after":
        whole.train(), again.train()
    injected(again, above(80, lambda *_: True))
    expected, found = whole.evaluate(), again.evaluate()
    assert again.parts.memory.score_tokens < whole.parts.memory.score_tokens == 440
    assert again.parts.memory.train_tokens == 110
    for key in (key for key in expected if key == "eval_loss" or "/" in key):
        assert found[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-5), key


def test_one_rank_alone(tmp_path: Path) -> None:
    """Two gloo ranks, of which the second runs out of memory: both repeat, and train what a single process trains.

    In the last run dropout is kept, and in the first step the second rank's pairs fit one micro-batch, the first's do
    not: the ranks have to take the same path all the same.
    """
    options = {"optim": "sgd", "learning_rate": 0.05, "num_train_epochs": 1}
    cuts = {"per_device_train_batch_size": 4, "micro_batch_tokens": "90"}
    jobs = [
        {
            "folder": str(tmp_path / name),
            "pairs": 22,
            "eval_pairs": 10,
            "options": CUTS[name] | options | cuts,
            "result": str(tmp_path / f"{name}.pt"),
            "oom": {"rank": 1, "above": 60},
        }
        for name in ("plain", "dynamic")
    ]
    kept = {"disable_dropout": False, "micro_batch_tokens": "80", "max_steps": 3}
    jobs.append({"folder": str(tmp_path / "kept"), "pairs": 22, "options": CUTS["dynamic"] | options | cuts | kept})
    on_two_ranks(WORKER, jobs)
    for name in ("plain", "dynamic"):
        result = torch.load(tmp_path / f"{name}.pt", weights_only=False)
        assert result["failures"] == [0, result["failures"][1]]
        assert result["failures"][1] > 0
        alone = tiny.trainer(
            tmp_path / f"single-{name}",
            data=tiny.pairs(22),
            eval_dataset=tiny.pairs(10, seed=9),
            **CUTS[name],
            **options,
        )
        alone.train()
        logs = [{k: v for k, v in entry.items() if k != "total_flos"} for entry in result["log"]]
        assert_same_run(outcome(alone), (result["state"], logs))
        for key, value in alone.evaluate().items():
            if key == "eval_loss" or "/" in key:
                assert result["metrics"][key] == pytest.approx(value, rel=1e-4, abs=1e-5), key


# What "auto" finds


@pytest.mark.parametrize(
    ("memory", "start", "cap", "tried", "found"),
    [
        # Doubled until it fails, then the middle between the last two
        (1000, 100, 10_000, [100, 200, 400, 800, 1600, 1200], 800),
        (1300, 100, 10_000, [100, 200, 400, 800, 1600, 1200], 1200),
        (10_000, 100, 500, [100, 200, 400, 500], 500),
        (450, 100, 500, [100, 200, 400, 500, 450], 450),
        (99, 100, 500, [100], 0),
        (400, 500, 300, [300], 300),
        (1, 1, 2, [1, 2], 1),
    ],
)
def test_largest_that_fits(memory: int, start: int, cap: int, tried: list[int], found: int) -> None:
    attempts = []

    def attempt(tokens: int) -> bool:
        attempts.append(tokens)
        return tokens <= memory

    assert largest_that_fits(attempt, start, cap) == found
    assert attempts == tried


def test_a_trial_leaves_nothing_behind(tmp_path: Path) -> None:
    """Neither gradients nor changed random numbers, weights, mode or attention; whether it fits or not."""
    trainer = build(
        tmp_path,
        above(100, in_training),
        data=even_pairs(16),
        disable_dropout=False,
        peft_config=tiny.lora(lora_dropout=0.3),
    )
    batch = [trainer.train_dataset[i] for i in range(8)]
    trainer.parts.layouts.settle(trainer.objective.batch_of(batch, trainer.args.device))
    rows, longest = trainer.parts.trial.longest(trainer.train_dataset)
    assert (len(rows), longest) == (8, PAIR)
    trainer.model.train()
    random, weights = torch.get_rng_state(), {n: p.clone() for n, p in trainer.model.named_parameters()}
    attention = trainer.model.config._attn_implementation
    assert [trainer.parts.trial.try_micro_batch(rows, tokens) for tokens in (20, 100, 120)] == [True, True, False]
    assert torch.equal(random, torch.get_rng_state())
    assert all(p.grad is None for p in trainer.model.parameters())
    assert all(torch.equal(p, weights[name]) for name, p in trainer.model.named_parameters())
    assert trainer.model.config._attn_implementation == attention != "fastdpo_segments"
    assert trainer.model.training
    assert trainer.parts.memory.train_tokens == 1536, "settled by who asked for the trial"
    assert trainer.parts.trial.tokens_within(2**30, trainer.train_dataset[0]) > 1000
    assert torch.equal(random, torch.get_rng_state())


def test_a_memory_limit_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More memory holds more tokens, in proportion; less than the process has says so, with the numbers."""
    monkeypatch.setattr(memory_trial, "map_large_blocks", lambda: True)  # not for the rest of the tests
    held = psutil.Process().memory_info().rss
    resident = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=held))
    # What earlier tests left comes and goes meanwhile
    monkeypatch.setattr(memory_trial, "psutil", SimpleNamespace(Process=lambda: resident))
    # Wide enough for a token to take some 50 kB
    model = {"hidden_size": 128, "intermediate_size": 512, "max_position_embeddings": 4096}
    options: dict[str, Any] = {"max_steps": 1, "ref_model": None, "per_device_train_batch_size": 64}
    options["data"] = tiny.pairs(64)

    def budget(room: int) -> int:
        trainer = tiny.trainer(
            tmp_path / str(room), model=tiny.llama(**model), memory_limit=f"{(held + room) // 10**6 + 1}MB", **options
        )
        trainer.train()
        assert trainer.parts.memory.score_tokens == 4 * trainer.parts.memory.train_tokens
        return trainer.parts.memory.train_tokens

    # 0.9 of the limit is planned for
    small, large = budget(held // 9 + 30_000_000), budget(held // 9 + 70_000_000)
    assert 32 < small < large, (small, large)
    trainer = tiny.trainer(tmp_path / "none", model=tiny.llama(**model), memory_limit="100MB", **options)
    with pytest.raises(OutOfMemory, match=r"memory_limit='100MB': \d+\.\d+ GB are taken .* the longest pair has 4\d"):
        trainer.train()
    assert trainer.parts.memory.checkpointing, "it was tried"


def bloom() -> BloomForCausalLM:
    return BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4))


@pytest.mark.parametrize("kind", ["softcaps", "adapter on the head", "ALiBi"])
def test_a_memory_limit_counts_what_the_run_does(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models without attention by segments, or whose logits are their own, are counted in the layout they train in."""
    monkeypatch.setattr(memory_trial, "map_large_blocks", lambda: True)
    models = {"softcaps": lambda: MODELS["Gemma2"](), "adapter on the head": tiny.llama, "ALiBi": bloom}
    lora = tiny.lora(target_modules=["q_proj", "lm_head"]) if kind == "adapter on the head" else tiny.lora()
    data = Dataset.from_dict(
        {"prompt_ids": [[1, 2, 3]] * 8, "chosen_ids": [[4, 5]] * 8, "rejected_ids": [[6, 7, 8]] * 8,
         "example_id": [str(i) for i in range(8)]}
    )  # fmt: skip
    limit = f"{psutil.Process().memory_info().rss // 10**6 * 2}MB"
    trainer = tiny.trainer(
        tmp_path, model=models[kind](), data=data, ref_model=None, memory_limit=limit, peft_config=lora, max_steps=1
    )
    trainer.train()
    assert trainer.parts.memory.train_tokens >= 8


# Options


def test_spellings_of_checkpointing_are_one_option(tmp_path: Path) -> None:
    on, off = ([{"gradient_checkpointing": each} for each in (flag, str(flag).lower())] for flag in (True, False))
    renamed = hasattr(TrainingArguments, "activation_checkpointing")  # from transformers 5.21 on
    if renamed:
        on, off = [*on, {"activation_checkpointing": True}], [*off, {"activation_checkpointing": False}]
    for expected, spellings in ((True, on), (False, off)):
        for options in spellings:
            trainer = tiny.trainer(tmp_path, **options)
            assert trainer.parts.memory.checkpointing is expected
            assert recomputes(trainer.model) is expected
    assert not tiny.trainer(tmp_path).parts.memory.checkpointing, "auto"
    # Before, transformers has no such option, and says so
    with pytest.raises((ValueError, TypeError), match="contradict" if renamed else "unexpected keyword"):
        tiny.config(tmp_path, gradient_checkpointing="false", activation_checkpointing=True)
    with pytest.raises(ValueError, match="gradient_checkpointing='maybe' is unknown; accepted are auto, true, false"):
        tiny.config(tmp_path, gradient_checkpointing="maybe")


def test_options_that_cannot_act_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="activation_offloading=True has no effect here: it moves activations from a GPU to the host"
    ):
        tiny.trainer(tmp_path, activation_offloading=True)
    with pytest.raises(ValueError, match="but gradient_checkpointing='false'"):
        EstimateConfig(device="rtx-3060", activation_offloading=True, gradient_checkpointing=False)
    with pytest.raises(ValueError, match="memory_limit='8GB' has no effect here: micro_batch_tokens='512'"):
        tiny.config(tmp_path, memory_limit="8GB", micro_batch_tokens="512")
    for wrong in ("much", "-3GB", "0GB"):
        with pytest.raises(ValueError, match=f"memory_limit='{wrong}': a (positive )?size such as 12GB"):
            tiny.config(tmp_path, memory_limit=wrong)
