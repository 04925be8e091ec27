"""QLoRA on the CPU: 4-bit layers stay trainable after a pass in eval mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from bitsandbytes.nn import Linear4bit
from tiny import NF4

from fastdpo.training.models.quantized import keep_quantized_layers_trainable


@pytest.fixture(scope="module")
def saved_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Linear layers of 128 columns: a size that bitsandbytes' CPU repacking accepts."""
    folder = tmp_path_factory.mktemp("llama")
    tiny.llama(hidden_size=128, intermediate_size=256).save_pretrained(folder)
    return str(folder)


def train(folder: Path, model: str, *, evaluate_first: bool, **options: Any) -> Any:
    trainer = tiny.FastDPOTrainer(
        model,
        args=tiny.config(folder, max_steps=3, **options),
        train_dataset=tiny.pairs(24),
        eval_dataset=tiny.pairs(6, 3),
        processing_class=tiny.tokenizer(),
        peft_config=tiny.lora(),
        quantization_config=NF4,
    )
    if evaluate_first:
        trainer.evaluate()
    trainer.train()
    return trainer


def test_training_after_an_evaluation_equals_training_without(
    saved_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the CPU kernel's flag forced on, an evaluation before training repacks the weights, if they are not kept."""
    original = Linear4bit.__init__

    def forced(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.support_avx512bf16_for_cpu = True

    monkeypatch.setattr(Linear4bit, "__init__", forced)
    plain = train(tmp_path / "plain", saved_llama, evaluate_first=False)
    after = train(tmp_path / "after", saved_llama, evaluate_first=True)
    layers = [m for m in after.model.modules() if isinstance(m, Linear4bit)]
    assert len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    assert not any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers)
    for (name, one), (_, other) in zip(plain.model.named_parameters(), after.model.named_parameters(), strict=True):
        if one.requires_grad:
            assert torch.equal(one, other), name
            assert one.grad is None or torch.isfinite(one.grad).all()


def test_flag_forced_on_would_repack(saved_llama: str) -> None:
    """The trap itself, where the library's CPU kernel can be had: without the guard the weight is repacked."""
    from bitsandbytes.functional import has_avx512bf16
    from transformers import AutoModelForCausalLM

    if not has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16, so bitsandbytes never repacks")
    model = AutoModelForCausalLM.from_pretrained(saved_llama, quantization_config=NF4, dtype=torch.float32).eval()
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 128)
    with torch.no_grad():
        layer(x)
    assert layer.weight.quant_state.packing_format_for_cpu
    guarded = AutoModelForCausalLM.from_pretrained(saved_llama, quantization_config=NF4, dtype=torch.float32).eval()
    assert keep_quantized_layers_trainable(guarded) == 14
    layer = guarded.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer(x)
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)


def test_quantised_model_without_an_adapter_is_refused(saved_llama: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model is quantised, so its weights cannot be trained"):
        tiny.FastDPOTrainer(
            saved_llama,
            args=tiny.config(tmp_path),
            train_dataset=tiny.pairs(8),
            processing_class=tiny.tokenizer(),
            quantization_config=NF4,
        )
