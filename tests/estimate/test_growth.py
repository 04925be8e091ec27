"""The counted growth of a step over one long pair, against the resident memory of a process that takes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdpo.estimate.architectures import find_config
from fastdpo.estimate.counter import ConfigCounter, Training
from fastdpo.estimate.rows import PairShape, Row
from fastdpo.estimate.skeleton import Skeleton, resident_bytes
from fastdpo.training.memory.host import MAPPED_FROM
from fastdpo.training.options import ModelConfig

OPTIONS = ModelConfig(model_name_or_path="SmolLM2-135M", dtype="float32", load_in_4bit=True, lora_r=16)


def counted(shape: PairShape) -> int:
    """Activations at the fullest moment, and the gradients, which the step before has given back."""
    config = find_config("SmolLM2-135M")
    live = ConfigCounter(config, Training(OPTIONS, torch.float32, checkpointing=True, lean_body="on")).count(
        Row(shape.tokens, shape)
    )
    model = Skeleton(config, OPTIONS, torch.float32).model
    return max(live.peak, live.scoring_peak) + resident_bytes(p for p in model.parameters() if p.requires_grad)


def measured(shape: PairShape) -> int:
    """Of the second step of a trainer. Blocks are mapped one by one, as a `memory_limit` has them."""
    lengths = {"prompt": [shape.prompt] * 2, "completion": [shape.completion] * 2}
    command = [
        sys.executable, "-m", "benchmarks.long_pair_run",
        json.dumps({"trainer": "fastdpo", "options": {"lean_body": "on", "micro_batch_tokens": 256}}),
        "--case", json.dumps({"pairs": 1, "steps": 2, "warm_up": 16, **lengths}),
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "TRITON_INTERPRET")}
    environment["MALLOC_MMAP_THRESHOLD_"] = str(MAPPED_FROM)
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True, text=True)
    growth: int = json.loads(done.stdout.strip().splitlines()[-1])["growth"]
    return growth


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1023, 4095])
def test_counted_growth_of_a_long_pair_is_within_10_percent_of_the_measured(tokens: int) -> None:
    shape = PairShape(tokens // 3, tokens // 3)
    assert counted(shape) == pytest.approx(measured(shape), rel=0.1)
