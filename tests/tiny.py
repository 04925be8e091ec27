"""Tiny random models, a byte-level tokenizer and synthetic pairs: what the trainer's tests train."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastdpo import FastDPOConfig, FastDPOTrainer
from fastdpo.training.ranks import Ranks
from fastdpo.training.rows import Example, TokenBatch

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
#: QLoRA's quantisation, computed in float32.
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)


def tokenizer(**special: str | None) -> PreTrainedTokenizerFast:
    """One token per byte, and </s>; no padding token unless asked for."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["</s>", *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", **special)
    made.chat_template = CHAT_TEMPLATE
    return made


def llama(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A two-layer Llama in float32 whose logits are far from uniform."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "eos_token_id": 0,
        "bos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | overrides)))


def pairs(count: int, seed: int = 0) -> Dataset:
    """Plain pairs of ragged lengths whose chosen answer uses other letters than the rejected one."""
    rng = random.Random(seed)

    def text(alphabet: str, low: int, high: int) -> str:
        return "".join(rng.choice(alphabet) for _ in range(rng.randint(low, high)))

    rows = [
        {"prompt": text("abcdefgh", 3, 20), "chosen": text("ijklmn", 2, 12), "rejected": text("opqrst", 2, 12)}
        for _ in range(count)
    ]
    return Dataset.from_list(rows)


def batch_of(*examples: tuple[list[int] | torch.Tensor, ...]) -> TokenBatch:
    """A batch of token ids on the host: (prompt, completion, ...) each."""
    ids = [[torch.as_tensor(each) for each in example] for example in examples]
    made = [Example(prompt, tuple(completions)) for prompt, *completions in ids]
    return TokenBatch(made, [str(i) for i in range(len(made))], torch.device("cpu"))


def ranks() -> Ranks:
    """One process on the CPU."""
    return Ranks(0, 1, torch.device("cpu"))


def lora(**overrides: Any) -> LoraConfig:
    """A LoRA on every linear layer."""
    return LoraConfig(
        **({"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | overrides)
    )


def config(folder: Path | str, **overrides: Any) -> FastDPOConfig:
    """A silent run of 8 pairs per step on the CPU."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "beta": 0.5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "max_length": 128,
        "max_prompt_length": 64,
    }
    return FastDPOConfig(**(settings | overrides))


def trainer(folder: Path | str, *, model: Any = None, data: Dataset | None = None, **options: Any) -> FastDPOTrainer:
    """A trainer of a tiny Llama with a fresh LoRA; `options` are FastDPOConfig's, or the trainer's own arguments."""
    own = ("ref_model", "eval_dataset", "processing_class", "peft_config", "callbacks", "optimizers", "objective")
    arguments = {name: options.pop(name) for name in own if name in options}
    arguments = {"peft_config": lora(), "processing_class": tokenizer()} | arguments
    return FastDPOTrainer(
        llama() if model is None else model,
        args=config(folder, **options),
        train_dataset=pairs(16) if data is None else data,
        **arguments,
    )


def conversation(prompt: list[str], chosen: list[str], rejected: list[str]) -> dict[str, list[dict[str, str]]]:
    """Texts of alternating turns, the first of the prompt a user's."""
    roles = ["user", "assistant"] * 4

    def turns(texts: list[str], first: int) -> list[dict[str, str]]:
        return [{"role": r, "content": t} for r, t in zip(roles[first:], texts, strict=False)]

    return {
        "prompt": turns(prompt, 0),
        "chosen": turns(chosen, len(prompt)),
        "rejected": turns(rejected, len(prompt)),
    }
