"""The longest pair that cards hold, predicted, for six models: the table of docs/memory.md. Nothing is run.

    python -m benchmarks.longest_pairs
    python -m benchmarks.longest_pairs Llama-3.1-8B --offload_embeddings

NF4, LoRA r = 32 on all linear layers, bfloat16, checkpointing with offloaded layer inputs, the lean body, one pair of
which a third is prompt. A cell: tokens of the pair / of one answer with its prompt.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fastdpo.estimate.options import EstimateConfig
from fastdpo.estimate.prediction import Estimate
from fastdpo.training.options import ModelConfig

#: With their configurations' own positions, 131,072 for Llama-3.1-8B.
MODELS = ("Llama-3.1-8B", "Mistral-7B", "Qwen2.5-7B", "Qwen3-4B", "Llama-3.2-1B", "SmolLM2-135M")
CARDS = ("6GB", "8GB", "12GB", "16GB", "24GB")
#: Context of supervised fine-tuning of Llama-3.1-8B that Unsloth publishes, by card; measured there, on one row.
UNSLOTH = {"8GB": 2_972, "12GB": 21_848, "16GB": 40_724, "24GB": 78_475}


def cells(model: str, *, offload_embeddings: bool = False) -> list[str]:
    """Of one model, a card each."""
    options = ModelConfig(model_name_or_path=model, load_in_4bit=True, lora_r=32)
    config = EstimateConfig(
        gpu_memory=list(CARDS),
        activation_offloading=True,
        offload_embeddings=offload_embeddings,
        lean_body="on",
        longest_pair=True,
    )
    pairs = [fit.longest_pair for fit in Estimate(options, config).fits]
    return ["none" if pair is None else f"{pair.tokens:,} / {pair.context:,}" for pair in pairs]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.longest_pairs", description=__doc__)
    parser.add_argument("models", nargs="*", default=MODELS, help=f"default: {', '.join(MODELS)}")
    parser.add_argument("--offload_embeddings", action="store_true", help="frozen, untied ones stay on the host")
    options = parser.parse_args(arguments)
    print(f"| model | {' | '.join(CARDS)} |\n| --- |{' ---: |' * len(CARDS)}")
    for model in options.models:
        print(f"| {model} | {' | '.join(cells(model, offload_embeddings=options.offload_embeddings))} |", flush=True)
    if "Llama-3.1-8B" in options.models:
        published = [f"– / {UNSLOTH[card]:,}" if card in UNSLOTH else "" for card in CARDS]
        print(f"| Llama-3.1-8B, Unsloth's SFT, published | {' | '.join(published)} |")


if __name__ == "__main__":
    main()
