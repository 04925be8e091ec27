"""The reference is the model as it was at the start, however the policy is adapted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model

from fastdpo.training.reference_policy import ReferencePolicy

IDS = torch.arange(1, 13)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.clone()


def adapted(**overrides: Any) -> PeftModel:
    torch.manual_seed(5)
    return get_peft_model(tiny.llama(), tiny.lora(**overrides))


def move_weights(model: Any) -> None:
    """As training does: every trainable weight changes."""
    for index, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
        parameter.data.add_(0.2 * noise)


def full_model() -> Any:
    return tiny.llama()


def stacked() -> Any:
    """A fresh adapter, trained, on top of an earlier one that stays active and frozen."""
    model = adapted(init_lora_weights=False)
    model.add_adapter("second", tiny.lora())
    model.base_model.set_adapter(["default", "second"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".second." in name)
    return model


STARTS = {
    "fresh LoRA": (lambda: adapted(), "adapters off"),
    "trained LoRA": (lambda: adapted(init_lora_weights=False), "weights at the start"),
    "LoRA with a saved head": (
        lambda: adapted(modules_to_save=["lm_head"], target_modules=["q_proj"]),
        "weights at the start",
    ),
    "LoRA with biases": (lambda: adapted(bias="lora_only"), "weights at the start"),
    "PiSSA": (lambda: adapted(init_lora_weights="pissa"), "weights at the start"),
    "DoRA": (lambda: adapted(use_dora=True), "weights at the start"),
    "LoRA on a frozen, trained LoRA": (lambda: stacked(), "weights at the start"),
    "every weight": (full_model, "weights at the start"),
}


@pytest.mark.parametrize("name", STARTS)
def test_reference_is_the_model_at_the_start(name: str) -> None:
    make, kind = STARTS[name]
    model = make()
    start = logits(model)
    reference = ReferencePolicy(model)
    assert reference.kind == kind
    assert reference.equals_policy()
    move_weights(model)
    trained = logits(model)
    assert not reference.equals_policy()
    assert float((trained - start).abs().max()) > 0.1
    with reference.active() as active:
        torch.testing.assert_close(logits(active), start, rtol=0, atol=1e-5)
    assert torch.equal(logits(model), trained), "the policy came back changed"


def test_error_in_a_reference_pass_leaves_the_policy() -> None:
    model = adapted(init_lora_weights=False)
    reference = ReferencePolicy(model)
    move_weights(model)
    trained = logits(model)
    with pytest.raises(KeyboardInterrupt), reference.active():
        raise KeyboardInterrupt
    assert torch.equal(logits(model), trained)


def test_continued_adapter_starts_with_margin_zero_and_then_moves(tmp_path: Path) -> None:
    """Against the bare base model the margins would not be zero; with the adapter as its own reference for ever, the
    loss would stay log 2."""
    trainer = tiny.trainer(
        tmp_path, model=adapted(init_lora_weights=False), peft_config=None, max_steps=6, eval_dataset=tiny.pairs(8, 3)
    )
    assert trainer.evaluate()["eval_rewards/margins"] == 0.0
    trainer.train()
    assert trainer.evaluate()["eval_rewards/margins"] > 0.1
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=1e-4)
    assert losses[-1] < 0.6


def test_frozen_policy_is_not_taken_for_its_reference() -> None:
    model = adapted()
    reference = ReferencePolicy(model)
    move_weights(model)
    model.requires_grad_(False)
    assert not reference.equals_policy()


def test_dropout_of_the_model_does_not_reach_the_reference(tmp_path: Path) -> None:
    """With dropout kept on, reference and scored log-probs are still of the model without it: margin 0 at the start."""
    model = tiny.llama(attention_dropout=0.5)
    trainer = tiny.trainer(
        tmp_path, model=model, disable_dropout=False, dynamic_beta=True, max_steps=1, micro_batch_tokens="1"
    )
    trainer.train()
    assert trainer.state.log_history[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert model.model.layers[0].self_attn.attention_dropout == 0.5


def test_separate_reference_model_is_used_and_not_trained(tmp_path: Path) -> None:
    reference = tiny.llama(seed=1)
    before = {name: p.clone() for name, p in reference.named_parameters()}
    trainer = tiny.trainer(tmp_path, ref_model=reference, max_steps=2, eval_dataset=tiny.pairs(4, 3))
    # Policy and reference differ from the start: eight random-weight log-prob gaps are not zero
    assert abs(trainer.evaluate()["eval_rewards/margins"]) > 0.01
    trainer.train()
    assert all(torch.equal(before[name], p) for name, p in reference.named_parameters())


def test_evaluation_caches_the_reference_and_touches_no_statistic(tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path, ref_model=tiny.llama(seed=1), max_steps=3, dynamic_beta=True, eval_dataset=tiny.pairs(8, 3)
    )
    trainer.train()
    state = {name: value.clone() for name, value in trainer.dynamic_beta.state_dict().items()}
    assert state["step"] == 3
    first = trainer.evaluate()
    calls = []
    trainer.reference.ref_model.register_forward_hook(lambda *_: calls.append(1))
    second = trainer.evaluate()
    assert not calls, "reference log-probs of evaluation pairs were computed twice"
    assert {k: v for k, v in first.items() if "/" in k} == {k: v for k, v in second.items() if "/" in k}
    assert all(torch.equal(state[name], value) for name, value in trainer.dynamic_beta.state_dict().items())


def test_evaluation_does_not_depend_on_the_evaluation_batch(tmp_path: Path) -> None:
    """10 pairs in batches of 4 and of 16, with a loss that sorts the pairs: computed over all of them at once."""
    figures = []
    for size in (4, 16):
        trainer = tiny.trainer(
            tmp_path / str(size),
            ref_model=tiny.llama(seed=1),
            per_device_eval_batch_size=size,
            loss_type=["aot_unpaired"],
            eval_dataset=tiny.pairs(10, 3),
        )
        figures.append({k: v for k, v in trainer.evaluate().items() if k == "eval_loss" or "/" in k})
    assert figures[0] == pytest.approx(figures[1], rel=1e-5, abs=1e-5)
