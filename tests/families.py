"""Tiny models of thirteen families, one batch of pairs for them, and one sequence at a time as the truth."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fastdpo.training.models.dropout import disable_dropout
from fastdpo.training.rows import TokenBatch

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
MODELS = {
    "Llama": lambda: tiny.llama(vocab_size=97),
    "Llama, tied head": lambda: tiny.llama(vocab_size=97, tie_word_embeddings=True),
    "Mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES)),
    "Qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
    "Qwen3, tied head": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True)),
    # Softcaps on attention and on logits, and a sliding window shorter than the rows
    "Gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=3.0, query_pre_attn_scalar=8, sliding_window=6)
    ),
    "Gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SIZES,
            head_dim=8,
            final_logit_softcapping=2.0,
            query_pre_attn_scalar=8,
            sliding_window=6,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
    "Phi, biased head": lambda: biased(PhiForCausalLM(PhiConfig(**SIZES))),
    "OLMo2": lambda: Olmo2ForCausalLM(Olmo2Config(**SIZES)),
    "GPT-2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
    ),
    "GPT-NeoX": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**{k: v for k, v in SIZES.items() if "key_value" not in k})),
    "Cohere": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.3)),
    "Granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=2.5)),
}


def biased(model: Any) -> Any:
    """transformers starts the bias at zero, where it could be forgotten unseen."""
    torch.nn.init.normal_(model.lm_head.bias)
    return model


LENGTHS = [(7, 4, 9), (1, 12, 1), (15, 3, 5), (4, 6, 6)]  # prompt, chosen, rejected


def batch() -> TokenBatch:
    generator = torch.Generator().manual_seed(3)
    ids = [[torch.randint(1, 97, (n,), generator=generator) for n in lengths] for lengths in LENGTHS]
    return tiny.batch_of(*ids)


def alone(model: Any, prompt: torch.Tensor, completion: torch.Tensor) -> torch.Tensor:
    """Token log-probs of one completion, from all logits of the one sequence, in float64."""
    logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1].double()
    return logits.log_softmax(-1).gather(1, completion[:, None])[:, 0]


def made(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().train()
    disable_dropout(model)
    return model


def adapted(model: Any, **options: Any) -> PeftModel:
    torch.manual_seed(5)
    return get_peft_model(model, tiny.lora(init_lora_weights=False, **options)).train()
