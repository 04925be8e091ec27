"""The training step against the whole batch's loss by plain autograd, and against itself cut and spread otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from launched import WORKER, on_two_ranks
from same_run import CUTS, KeepGradients, assert_same_run
from worker import state

from fastdpo import DynamicBeta, preference_loss


def whole_batch(trainer: Any, loss: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients of `loss` over the first batch, each sequence in a forward of its own: no padding, no cut, no hook.

    The data order is the dataloader's; log-probs come from a float64 softmax of the model's full logits.
    """
    rows = next(iter(trainer.get_train_dataloader()))

    def logps(model: Any, completions: list[torch.Tensor]) -> torch.Tensor:
        sums = []
        for prompt, completion in zip(rows["pair_prompt_ids"], completions, strict=True):
            ids = torch.cat([prompt, completion])
            logits = model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1].double()
            sums.append(logits.log_softmax(-1).gather(1, completion[:, None]).sum())
        return torch.stack(sums)

    chosen, rejected = rows["pair_chosen_ids"], rows["pair_rejected_ids"]
    trainer.model.train()
    trainer.model.zero_grad()
    with torch.no_grad():
        ref = logps(trainer.parts.reference.ref_model, chosen), logps(trainer.parts.reference.ref_model, rejected)
    lengths = [torch.tensor([float(len(c)) for c in each]) for each in (chosen, rejected)]
    loss(logps(trainer.model, chosen), logps(trainer.model, rejected), *ref, lengths).backward()
    grads = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    return grads


def plain(**options: Any) -> Callable[..., torch.Tensor]:
    def loss(chosen, rejected, ref_chosen, ref_rejected, lengths):
        return preference_loss(
            chosen, rejected, ref_chosen, ref_rejected,
            beta=0.5, chosen_lengths=lengths[0], rejected_lengths=lengths[1], **options,
        ).loss  # fmt: skip

    return loss


def dynamic(**options: Any) -> Callable[..., torch.Tensor]:
    def loss(chosen, rejected, ref_chosen, ref_rejected, lengths):
        margins = (chosen - ref_chosen) - (rejected - ref_rejected)
        plan = DynamicBeta(beta=0.5, keep_ratio=0.6, seed=42, **options).plan(margins.detach().float())
        assert 0 < int(plan.keep.sum()) < len(margins)
        per_pair = -torch.nn.functional.logsigmoid(plan.beta.double() * margins)
        return per_pair[plan.keep].mean()

    return loss


STEPS = {
    "sigmoid": ({}, plain()),
    "ipo": ({"loss_type": ["ipo"]}, plain(loss_type="ipo")),
    "aot_unpaired": ({"loss_type": ["aot_unpaired"]}, plain(loss_type="aot_unpaired")),
    "sigmoid + 0.3 sft": (
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
        lambda c, r, rc, rr, n: plain()(c, r, rc, rr, n) - 0.3 * c.sum() / n[0].sum(),  # mean over tokens
    ),
    "dynamic, batch": ({"dynamic_beta": True, "keep_ratio": 0.6}, dynamic()),
    "dynamic, instance": (
        {"dynamic_beta": True, "keep_ratio": 0.6, "beta_scope": "instance", "beta_variant": "paper"},
        dynamic(scope="instance", variant="paper"),
    ),
}


@pytest.mark.parametrize("budget", ["1", "60", "100000"], ids=["one pair", "few pairs", "all pairs"])
@pytest.mark.parametrize("name", STEPS)
def test_step_has_the_gradient_of_the_whole_batchs_loss(name: str, budget: str, tmp_path: Path) -> None:
    options, loss = STEPS[name]
    keeper = KeepGradients()
    trainer = tiny.trainer(
        tmp_path,
        ref_model=tiny.llama(seed=1),
        callbacks=[keeper],
        micro_batch_tokens=budget,
        max_steps=1,
        max_grad_norm=0.0,
        **options,
    )
    for parameter_name, parameter in trainer.model.named_parameters():
        if "lora_B" in parameter_name:  # a fresh adapter has no gradient on A
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(parameter_name)))
    truth = whole_batch(trainer, loss)
    trainer.train()
    assert keeper.grads.keys() == truth.keys()
    scale = max(float(grad.abs().max()) for grad in truth.values())
    for parameter_name, grad in truth.items():
        torch.testing.assert_close(keeper.grads[parameter_name], grad, rtol=1e-4, atol=1e-5 * scale)


def test_dynamic_beta_follows_a_loss_that_has_a_beta(tmp_path: Path) -> None:
    """Log-ratio gaps are 0 at the start, so β stays β0; the raw log-probs that the likelihood term reads are not."""
    trainer = tiny.trainer(tmp_path, loss_type=["sft", "sigmoid"], dynamic_beta=True, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["beta/m0"] == pytest.approx(0.0, abs=1e-5)
    assert trainer.state.log_history[0]["beta/value"] == pytest.approx(0.5, abs=1e-4)


#: One row per completion through transformers' and peft's own modules, and the reference in every step.
PLAINEST = {"prefix_sharing": "off", "packing": "off", "reference": "online", "lean_body": "off"}
#: Ways to compute the same update.
PARTITIONS: list[dict[str, str]] = [
    {"micro_batch_tokens": "1"},
    {"micro_batch_tokens": "90"},
    {"micro_batch_tokens": "90", "packing": "off", "reference": "precompute"},
    {"micro_batch_tokens": "90", "prefix_sharing": "off", "gradient_checkpointing": "true", "lean_body": "on"},
    {"micro_batch_tokens": "90"} | PLAINEST,
]


def run(folder: Path, pairs: int = 24, **options: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    trainer = tiny.trainer(folder, data=tiny.pairs(pairs), **options)
    trainer.train()
    return state(trainer), trainer.state.log_history


@pytest.mark.parametrize("name", CUTS)
def test_update_does_not_depend_on_the_cut(name: str, tmp_path: Path) -> None:
    """22 pairs in batches of 8: the last batch is short. Nor on the layout, on when the reference is computed, or on a
    lean body."""
    options = {"optim": "sgd", "learning_rate": 0.05, "num_train_epochs": 1} | CUTS[name]
    whole = run(tmp_path / "all", pairs=22, micro_batch_tokens="100000", **PLAINEST, **options)
    start = run(tmp_path / "start", pairs=22, **(options | {"learning_rate": 1e-12}))
    assert max(float((whole[0][k] - start[0][k]).abs().max()) for k in whole[0] if "lora" in k) > 5e-3
    for i, cut in enumerate(PARTITIONS):
        assert_same_run(whole, run(tmp_path / str(i), pairs=22, **cut, **options))
    halves = options | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert_same_run(whole, run(tmp_path / "accumulated", pairs=22, **halves))


def test_update_does_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    """Two gloo ranks, 22 pairs in global batches of 8: the last batch has wrapped duplicates, and micro-batches of one
    pair next to a whole-batch run in one process. In the second epoch the ranks see each other's pairs, whose reference
    is known from the first or from ahead of training; the single process computes it in every step."""
    options = {"optim": "sgd", "learning_rate": 0.05, "num_train_epochs": 2}
    modes = {"plain": {"reference": "lazy"}, "dynamic": {"reference": "precompute", "packing": "off"}}
    jobs = [
        {
            "folder": str(tmp_path / name),
            "pairs": 22,
            "eval_pairs": 10,
            "options": CUTS[name]
            | options
            | modes[name]
            | {"per_device_train_batch_size": 4, "micro_batch_tokens": "90"},
            "result": str(tmp_path / f"{name}.pt"),
        }
        for name in ("plain", "dynamic")
    ]
    # The same run once more, with checkpoints, and resumed from its first: the dataloader then skips batches
    options_of_saved = jobs[1]["options"] | {"save_strategy": "steps", "save_steps": 1}
    jobs.append(jobs[1] | {"folder": str(tmp_path / "saved"), "options": options_of_saved, "result": None})
    resumed = {"resume": str(tmp_path / "saved" / "checkpoint-1"), "result": str(tmp_path / "resumed.pt")}
    jobs.append(jobs[2] | resumed)
    on_two_ranks(WORKER, jobs)
    for name in ("plain", "dynamic"):
        result = torch.load(tmp_path / f"{name}.pt", weights_only=False)
        alone = tiny.trainer(
            tmp_path / f"single-{name}",
            data=tiny.pairs(22),
            eval_dataset=tiny.pairs(10, seed=9),
            **CUTS[name],
            **options,
            **PLAINEST,
        )
        alone.train()
        single = state(alone), list(alone.state.log_history)
        # 10 pairs in batches of 8 per rank: the wrapped duplicates do not count
        for key, value in alone.evaluate().items():
            if key == "eval_loss" or "/" in key:
                assert result["metrics"][key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
        ignored = {"total_flos"}
        logs = [{k: v for k, v in entry.items() if k not in ignored} for entry in result["log"]]
        expected = [{k: v for k, v in entry.items() if k not in ignored} for entry in single[1]]
        assert_same_run((single[0], expected), (result["state"], logs))
    straight, again = (torch.load(tmp_path / f"{name}.pt", weights_only=False) for name in ("dynamic", "resumed"))
    for name, value in straight["state"].items():
        assert torch.equal(value, again["state"][name]), name
