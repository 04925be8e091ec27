"""Who holds memory at the fullest moment of a step, with the lean body off and on, and the longest pairs, predicted.

    python -m benchmarks.holders                    Llama-3.1-8B: the table of docs/memory.md
    python -m benchmarks.holders Qwen3-4B

NF4, LoRA r = 32 on all linear layers, bfloat16, checkpointing with offloaded layer inputs, one pair. Nothing is run.
"""

from __future__ import annotations

import sys

import torch

from fastdpo.estimate.architectures import find_config
from fastdpo.estimate.counter import ConfigCounter, Training
from fastdpo.estimate.holders import holders
from fastdpo.estimate.rows import PairShape, Row
from fastdpo.training.options import ModelConfig

#: A long pair, half of an answer's context prompt.
PAIR = PairShape(20_000, 20_000)
#: Holders of fewer bytes per token are summed up.
_LEAST = 64


def main(name: str) -> None:
    options = ModelConfig(model_name_or_path=name, load_in_4bit=True, lora_r=32)
    for lean in ("off", "on"):
        training = Training(
            options, torch.bfloat16, torch.bfloat16, flash=True, checkpointing=True, lean_body=lean
        )  # fmt: skip
        place, found = holders(ConfigCounter(find_config(name), training), Row(PAIR.tokens, PAIR), offload=True)
        print(f"\n{name}, lean_body={lean}: fullest after {place.operator} of {place.module or 'the head'}\n")
        print("| made by | operator | shape | dtype | bytes per token |\n| --- | --- | --- | --- | ---: |")
        for each in found:
            if abs(each.per_token) >= _LEAST:
                where = (
                    each.site.module or "embeddings, head" if not each.site.node else f"backward of {each.site.module}"
                )
                where += f" ({each.site.line})" if each.site.line else ""
                print(f"| {where} | {each.site.operator} | {each.shape} | {each.dtype} | {each.per_token:,.0f} |")
        rest = sum(each.per_token for each in found if abs(each.per_token) < _LEAST)
        print(f"| the rest | | | | {rest:,.0f} |")
        print(f"| all, and {sum(each.constant for each in found) / 1e6:,.0f} MB beside | | | | "
              f"{sum(each.per_token for each in found):,.0f} |")  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "Llama-3.1-8B")
