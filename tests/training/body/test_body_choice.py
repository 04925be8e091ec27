"""lean_body: what is asked for, what a model allows, and the check on the first batch."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from families import batch, made
from lean_models import with_lora
from peft import PeftModel
from torch import Tensor

import fastdpo.training.body.mlp
from fastdpo.training.body import BodyChoice
from fastdpo.training.body.products import Gradients
from fastdpo.training.rows.layout import PLAIN
from fastdpo.training.scoring import CompletionScorer


def choice(model: Any, folder: Path, **options: Any) -> BodyChoice:
    return BodyChoice(tiny.config(folder, **options), CompletionScorer(), [model], tiny.ranks())


def settle(bodies: BodyChoice) -> BodyChoice:
    bodies.settle(batch(), PLAIN, nullcontext)
    return bodies


def test_a_body_that_agrees_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    bodies = settle(choice(with_lora("Llama"), tmp_path))
    assert len(bodies.bodies) == 1
    assert "lean body of LlamaForCausalLM: 9 modules." in caplog.text


def test_the_check_leaves_nothing(tmp_path: Path) -> None:
    """Gradients and random numbers are as they were, also with a dropout that draws some."""
    model = with_lora("Llama", lora_dropout=0.5)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    before = torch.get_rng_state()
    bodies = settle(choice(model, tmp_path))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters() if p.grad is not None)
    assert bodies.bodies, "both passes draw the same dropout"


@pytest.mark.parametrize("wrong", ["forward", "backward"])
def test_a_body_that_differs_is_not_used(
    wrong: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"_{wrong}"
    own = getattr(fastdpo.training.body.mlp, name)

    def spoilt(*args: Any, **kwargs: Any) -> Any:
        first, *rest = own(*args, **kwargs)
        return (first * 1.05, *rest)

    monkeypatch.setattr(fastdpo.training.body.mlp, name, spoilt)
    bodies = settle(choice(with_lora("Llama"), tmp_path))
    assert not bodies.bodies
    said = {"forward": "log-probs differ", "backward": "the gradient of '"}[wrong]
    assert said in caplog.text
    with pytest.raises(ValueError, match=f"lean_body='on' cannot be had: LlamaForCausalLM: {said}"):
        settle(choice(with_lora("Llama"), tmp_path, lean_body="on"))


def test_what_on_refuses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An unknown architecture, and a layer that a user has replaced; auto says what it does without."""
    caplog.set_level(logging.INFO)
    assert not choice(made("GPT-2"), tmp_path).bodies
    assert "no lean body: model_type='gpt2'" in caplog.text
    with pytest.raises(ValueError, match="lean_body='on' cannot be had: model_type='gpt2'"):
        choice(made("GPT-2"), tmp_path, lean_body="on")
    model = with_lora("Llama")
    layer = model.base_model.model.model.layers[1]
    layer.mlp = torch.nn.Sequential(layer.mlp)
    assert choice(model, tmp_path).bodies
    with pytest.raises(ValueError, match=r"layers\.1\.mlp': not the architecture's own.*Set it to 'auto' or 'off'"):
        choice(model, tmp_path, lean_body="on")
    assert not choice(with_lora("Llama"), tmp_path, lean_body="off").bodies


def test_sharded_runs_go_without(tmp_path: Path) -> None:
    model = with_lora("Llama")
    arguments = CompletionScorer(), [model], tiny.ranks()
    assert not BodyChoice(tiny.config(tmp_path), *arguments, sharded=True).bodies
    with pytest.raises(ValueError, match="FSDP gathers a layer's weights"):
        BodyChoice(tiny.config(tmp_path, lean_body="on"), *arguments, sharded=True)


def trained(folder: Path, **options: Any) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    trainer = tiny.trainer(folder, max_steps=3, seed=3, **options)
    trainer.train()
    assert isinstance(trainer.model, PeftModel)
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return weights, [each for each in trainer.state.log_history if "loss" in each]


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": "true"}, {"dynamic_beta": True}], ids=str)
def test_a_run_with_a_lean_body_is_the_run_without(options: dict[str, Any], tmp_path: Path) -> None:
    lean, lean_log = trained(tmp_path / "on", lean_body="on", **options)
    plain, log = trained(tmp_path / "off", lean_body="off", **options)
    # AdamW's first steps are the gradients' signs: a tiny one that rounds to the other side moves by 2·lr
    for ours, theirs, tolerance in zip(lean_log, log, (1e-5, 1e-3, 1e-3), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=tolerance)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=tolerance)
    moved = torch.cat([(lean[name] - plain[name]).abs().flatten() for name in plain])
    assert float(moved.mean()) < 1e-5


def test_evaluation_and_reference_are_lean_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {True: 0, False: 0}
    own = fastdpo.training.body.mlp._forward

    def counted(*args: Any) -> Any:
        calls[torch.is_grad_enabled()] += 1
        return own(*args)

    monkeypatch.setattr(fastdpo.training.body.mlp, "_forward", counted)
    trainer = tiny.trainer(tmp_path, lean_body="on", eval_dataset=tiny.pairs(4, seed=9))
    trainer.evaluate()
    checked = 2  # layers, in the check
    # The policy and the reference are one model before the first step, over one micro-batch
    assert calls[False] - checked == 2


@pytest.mark.parametrize(("held", "bodies"), [(20, 1), (5, 0)])
def test_a_check_that_memory_does_not_hold(
    held: int, bodies: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is made on fewer tokens, and without one that fits the modules stay as they are; the run goes on."""
    tried = []

    def token_logps(self: CompletionScorer, model: Any, micro: Any) -> Tensor:
        found = own(self, model, micro)
        tried.append(found.shape[-1])
        if found.shape[-1] > held:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return found

    own = CompletionScorer.token_logps
    monkeypatch.setattr(CompletionScorer, "token_logps", token_logps)
    made = choice(with_lora("Llama"), tmp_path)
    ids = torch.arange(1, 97)
    made.settle(tiny.batch_of((ids, ids[:60], ids[1:61])), PLAIN, nullcontext)
    assert len(made.bodies) == bodies
    assert tried == ([48, 24, 12, 12] if bodies else [48, 24, 12, 6])
    assert ("memory does not hold the check" in caplog.text) == (not bodies)


def test_modules_to_save_do_not_keep_a_body_from_being_demanded(tmp_path: Path) -> None:
    model = with_lora("Llama", modules_to_save=["input_layernorm"])
    (body,) = settle(choice(model, tmp_path, lean_body="on")).bodies
    assert len(body.left["it is trained as a whole (modules_to_save)"]) == 2


def test_a_factor_is_seen_in_16_bits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Gradients that are 1.1 times the true ones hide among the roundings of each, and not over all layers."""
    model = with_lora("Llama", dtype=torch.bfloat16)
    assert settle(choice(model, tmp_path, bf16=True)).bodies
    own = Gradients.listed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gradients, "listed", lambda self: [None if g is None else 1.1 * g for g in own(self)])
        assert not settle(choice(model, tmp_path, bf16=True)).bodies
    assert "times the untouched model's over all layers" in caplog.text
