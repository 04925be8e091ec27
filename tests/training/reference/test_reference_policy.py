"""The reference is the model as it was at the start, however the policy is adapted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from bitsandbytes.nn import Linear4bit
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from tiny import NF4
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoModelForCausalLM

from fastdpo.training.models.quantized import keep_quantized_layers_trainable
from fastdpo.training.reference import ReferencePolicy, fingerprint

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
    trainer.parts.reference.ref_model.register_forward_hook(lambda *_: calls.append(1))
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


def same_bytes_but_one(tensor: torch.Tensor, at: float) -> None:
    """Flip the lowest bit of one byte of `tensor`, at this share of its length."""
    values = tensor.detach().view(-1).view(torch.uint8)
    values[min(int(at * len(values)), len(values) - 1)] ^= 1


@pytest.mark.parametrize("name", STARTS)
def test_fingerprint_is_of_the_start_and_not_of_training(name: str) -> None:
    """As after steps, in a reference pass, and as a resumed run that builds the start again has it."""
    make, _ = STARTS[name]
    model = make()
    reference = ReferencePolicy(model)
    first = reference.fingerprint()
    move_weights(model)
    with reference.active():
        assert reference.fingerprint() == first
    assert reference.fingerprint() == first == ReferencePolicy(make()).fingerprint()


def test_fingerprint_is_the_same_however_the_same_reference_is_come_by() -> None:
    """The base model under any fresh LoRA, trained in full, or as a separate model."""
    found = [
        ReferencePolicy(adapted()),
        ReferencePolicy(adapted(r=8, target_modules=["q_proj"])),
        ReferencePolicy(full_model()),
        ReferencePolicy(adapted(), ref_model=full_model()),
        ReferencePolicy(adapted(init_lora_weights=False), ref_model=full_model()),
    ]
    assert len({reference.fingerprint() for reference in found}) == 1
    others = [
        ReferencePolicy(adapted(init_lora_weights=False)),
        ReferencePolicy(full_model(), ref_model=tiny.llama(seed=1)),
        ReferencePolicy(tiny.llama().bfloat16()),
    ]
    assert len({reference.fingerprint() for reference in [*others, found[0]]}) == 4


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_fingerprint_sees_every_byte(data: st.DataObject) -> None:
    """One bit anywhere: weights, norms, a trained adapter; also where tensors are read in many chunks."""
    with pytest.MonkeyPatch.context() as patch:
        whole = ReferencePolicy(adapted(init_lora_weights=False)).fingerprint()
        patch.setattr(fingerprint, "_CHUNK_BYTES", 1000)
        model = adapted(init_lora_weights=False)
        assert ReferencePolicy(model).fingerprint() == whole
        state = model.state_dict()
        name = data.draw(st.sampled_from(sorted(state)))
        same_bytes_but_one(state[name], data.draw(st.floats(0, 1)))
        assert ReferencePolicy(model).fingerprint() != whole


def test_fingerprint_sees_every_part_of_a_quantised_weight(tmp_path: Path) -> None:
    """Packed values, statistics and their own statistics, code books, the offset; and a pass changes none of them."""
    tiny.llama(hidden_size=64).save_pretrained(tmp_path)

    def load() -> PeftModel:
        base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=NF4)
        keep_quantized_layers_trainable(base)  # as the trainer does; a pass would repack the weights
        return get_peft_model(base, tiny.lora())

    model = load()
    before = ReferencePolicy(model).fingerprint()
    logits(model)
    assert ReferencePolicy(model).fingerprint() == ReferencePolicy(load()).fingerprint() == before

    layer = next(module for module in reversed(list(model.modules())) if isinstance(module, Linear4bit))
    state = layer.weight.quant_state
    parts = [layer.weight.data, state.absmax, state.code, state.state2.absmax, state.state2.code]
    for part in parts:
        same_bytes_but_one(part, 0.5)
        assert ReferencePolicy(model).fingerprint() != before
        same_bytes_but_one(part, 0.5)
    assert ReferencePolicy(model).fingerprint() == before
    state.offset = state.offset + 0.25
    assert ReferencePolicy(model).fingerprint() != before


def test_fingerprint_sees_buffers_and_both_halves_of_a_wrapper_tensor() -> None:
    """As some quantisers keep their weights: one tensor to the outside, several within."""

    def found(first: float = 1.0, second: float = 2.0, scale: float = 3.0) -> str:
        model = torch.nn.Module()
        pair = TwoTensor(torch.full((4, 4), first), torch.full((4, 4), second))
        model.weight = torch.nn.Parameter(pair, requires_grad=False)
        model.register_buffer("scale", torch.tensor(scale))
        model.register_buffer("derived", torch.rand(3), persistent=False)
        return ReferencePolicy(model).fingerprint()

    assert found() == found()
    assert len({found(), found(first=5.0), found(second=5.0), found(scale=5.0)}) == 4


def test_tied_weights_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    plain = fingerprint._tensor_digest

    def counted(tensor: torch.Tensor) -> bytes:
        read.append(tensor.numel())
        return plain(tensor)

    monkeypatch.setattr(fingerprint, "_tensor_digest", counted)
    model = tiny.llama(tie_word_embeddings=True)
    ReferencePolicy(model)
    assert sum(read) == sum(parameter.numel() for parameter in model.parameters())
