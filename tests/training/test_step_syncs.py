"""A training step makes the host wait for its device where it says so, and nowhere else.

Seen on a CPU by `sync_watch`. The first step of a run is not watched: it settles the layout and the memory, and asks
each model once what it does to its logits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from sync_watch import Event, SyncWatch
from torch import Tensor

from fastdpo import DynamicBeta, FastDPOTrainer, preference_loss
from fastdpo.training.memory import MemoryTrial
from fastdpo.training.rows import attention
from fastdpo.training.scoring import CompletionScorer, Scores
from fastdpo.training.scoring import scorer as scoring

CHECK, PLAN = Event("cpu", "read"), Event("tolist", "own_kept")
#: Options, and the waits of every step.
STEPS: dict[str, tuple[dict[str, Any], list[Event]]] = {
    "DPO": ({}, [CHECK]),
    "DPO on triton": ({"backend": "triton"}, [CHECK]),
    "β-DPO": ({"dynamic_beta": True, "keep_ratio": 0.6}, [PLAN, CHECK]),
    "β-DPO on triton": ({"dynamic_beta": True, "keep_ratio": 0.6, "backend": "triton"}, [PLAN, CHECK]),
    "coupled without a plan": ({"loss_type": ["aot"]}, [CHECK]),
    "weights": (
        {"loss_type": ["sigmoid", "sft"], "use_weighting": True, "ld_alpha": 0.5, "gradient_checkpointing": "true"},
        [CHECK],
    ),
    "reference online": ({"reference": "online"}, [CHECK]),
    "full training": ({"peft_config": None}, [CHECK]),
}


def on_the_device(trainer: FastDPOTrainer) -> list[Tensor]:
    """What lies there before a step."""
    found = [*trainer.model.parameters(), *trainer.model.buffers(), *trainer.parts.reference.tensors()]
    return found if trainer.dynamic_beta is None else [*found, *trainer.dynamic_beta.buffers()]


def watched(folder: Path, **options: Any) -> list[SyncWatch]:
    """A run of two epochs, two steps each; what the steps after the first did. Forwards are among the copies."""
    trainer = tiny.trainer(folder, data=tiny.pairs(16), max_steps=4, micro_batch_tokens="110", **options)
    step, forward, watches = trainer.training_step, trainer.parts.passes.forward, []

    def forwarded(*args: Any, **kwargs: Any) -> Any:
        if watches:
            watches[-1].copies.append(Event("forward", "forward"))
        return forward(*args, **kwargs)

    def training_step(*args: Any) -> Tensor:
        if trainer.state.global_step == 0:
            return step(*args)
        watches.append(SyncWatch(on_the_device(trainer)))
        with watches[-1]:
            return step(*args)

    trainer.training_step, trainer.parts.passes.forward = training_step, forwarded
    trainer.train()
    assert len(watches) == 3
    return watches


@pytest.mark.parametrize("name", STEPS)
def test_the_host_waits_for_the_plan_and_the_check_only(name: str, tmp_path: Path) -> None:
    """New reference log-probs come with the check, known ones go in one copy."""
    options, expected = STEPS[name]
    known = ["begin"] * ("reference" not in options)
    for watch, epoch in zip(watched(tmp_path, **options), (1, 2, 2), strict=True):
        assert watch.syncs == expected
        before = [event.function for event in watch.copies]
        before, after = before[: before.index("forward")], before[before.index("forward") :]
        # To be trained on, or held until the plan; to be scored by policy or reference or each
        coupled = "dynamic_beta" in options or "aot" in options.get("loss_type", ())
        assert before[: len(known) + 1] == ["lengths", *known]
        assert set(before[len(known) + 1 :]) == {"lay_out"}
        assert len(before) - len(known) - 1 == 1 + (epoch == 1 or not known) + coupled
        # Which pairs the plan keeps is not known before
        assert after.count("lay_out") == coupled
        assert set(after) <= {"forward", "lay_out"}


def test_ids_stay_on_the_host(tmp_path: Path) -> None:
    """accelerate puts nothing on the device, one tensor at a time."""
    trainer = tiny.trainer(tmp_path, eval_dataset=tiny.pairs(4))
    loaders = (
        trainer.get_train_dataloader(),
        trainer.get_eval_dataloader(),
        trainer.get_test_dataloader(trainer.eval_dataset),
    )
    assert [loader.device for loader in loaders] == [None] * 3
    assert trainer.accelerator.device_placement


def in_the_scorer(look: Callable[[Tensor], object]) -> Callable[[pytest.MonkeyPatch], None]:
    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        tokens = CompletionScorer.tokens

        def looking(self: CompletionScorer, *args: Any, **kwargs: Any) -> Any:
            result = tokens(self, *args, **kwargs)
            look(result.logps.detach())
            return result

        monkeypatch.setattr(CompletionScorer, "tokens", looking)

    return plant


def rows_by_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_mask(values: Tensor, micro: Any) -> Tensor:
        return values.new_zeros(micro.completion_mask.shape).masked_scatter(micro.completion_mask, values)

    monkeypatch.setattr(scoring, "_to_rows", by_mask)


def indices_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scores, "at", lambda self, at: Scores.unstack(self.stack()[list(range(len(at)))], 2))


PLANTED: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "item": (in_the_scorer(lambda logps: logps.sum().item()), "item"),
    "condition": (in_the_scorer(lambda logps: 1 if (logps < 1).all() else 0), "__bool__"),
    "float": (in_the_scorer(lambda logps: float(logps.sum())), "__float__"),
    "numpy": (in_the_scorer(lambda logps: logps.numpy()), "numpy"),
    "to the host": (in_the_scorer(lambda logps: logps.to("cpu")), "to"),
    "nonzero": (in_the_scorer(lambda logps: logps.nonzero()), "nonzero"),
    "mask": (in_the_scorer(lambda logps: logps[logps < -1.0]), "index by a mask"),
    "repeats": (in_the_scorer(lambda logps: logps[0].repeat_interleave(torch.ones_like(logps[0]).long())), "repeat_"),
    "new values": (in_the_scorer(lambda logps: torch.tensor([1.0], device=logps.device)), "tensor"),
    "host tensor": (in_the_scorer(lambda logps: torch.ones(logps.shape[1]).to(logps.device)), "to"),
    "mixed": (in_the_scorer(lambda logps: logps * torch.ones(logps.shape[1])), "mul of a host tensor"),
    "masked_scatter's backward": (rows_by_mask, "masked_s"),
    "a list as index": (indices_of_the_host, "index of a host tensor"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_wait_is_seen(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, kind = PLANTED[name]
    plant(monkeypatch)
    for watch in watched(tmp_path):
        assert [event for event in watch.syncs if event.kind.startswith(kind)], watch.syncs


@pytest.mark.parametrize("scope", ["batch", "instance"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_loss_and_its_plan_wait_for_nothing(backend: str, scope: str) -> None:
    """Plan, loss, gradient and the statistics' commit."""
    chosen, rejected = (torch.randn(6, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(2))
    module = DynamicBeta(keep_ratio=0.5, scope=scope, backend=backend)
    with SyncWatch([chosen, rejected, *module.buffers()]) as watch:
        for _ in range(2):
            loss = preference_loss(
                chosen, rejected, torch.zeros_like(chosen), torch.zeros_like(chosen), beta=module, backend=backend
            ).loss
            loss.backward()
    assert watch.syncs == []
    assert int(module.step) == 2
    with SyncWatch([chosen]) as watch:
        float((2 * chosen.detach()).sum())
    assert watch.syncs != []


def test_attention_of_variable_length_waits_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of GPUs, over a stand-in that only has the shapes right."""
    calls = []

    def shapes(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        calls.append(len(k))
        return q + 0.01 * (k.mean() + v.mean())

    monkeypatch.setattr(attention, "varlen_attn", shapes)
    # Not on the first batch, whose log-probs would differ from those of unshared rows
    monkeypatch.setattr(attention, "_has_flash", lambda _: bool(trained))
    trained: list[bool] = []
    settle = MemoryTrial.settle
    monkeypatch.setattr(MemoryTrial, "settle", lambda self, dataset: (settle(self, dataset), trained.append(True)))
    for watch in watched(tmp_path):
        assert watch.syncs == [CHECK]
    assert calls
