"""Counter-based noise: the published test vector, the ends of the range, laws, and the Triton kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdpo.formulas.rng import gumbel, philox_uniform, philox_word, word_to_uniform

SEEDS = [0, 1, 12345, 2**31 + 5, 2**32 - 1, 2**40 + 7, 2**63 - 1]
STEPS = [0, 1, 7, 2**31 + 1]

KERNEL_DRAWS = """
import sys, torch
from fastdpo_kernels import rng
draws = dict()
for seed in {seeds}:
    for step in {steps}:
        draws[seed, step] = rng.uniform(seed, step, 300), rng.gumbel(seed, torch.tensor(step), 300)
torch.save(draws, sys.argv[1])
"""

#: A GPU machine as far as `rng` can tell: fake tensors for its memory, and launches that are only recorded.
COMPILED_DRAWS = """
import json, torch, triton
from torch._subclasses.fake_tensor import FakeTensorMode
from fastdpo_kernels import rng

refused = []
for arguments in ((0, 3, 8), (0, 3, 8, "cpu"), (0, torch.tensor(3), 8)):
    try:
        rng.uniform(*arguments)
    except ValueError as error:
        refused.append(str(error))
launches = []
triton.JITFunction.run = lambda self, *args, **options: launches.append([str(x.device) for x in args[:2]])
torch.cuda.is_available, torch.cuda.current_device = lambda: True, lambda: 1
with FakeTensorMode():
    rng.uniform(0, 3, 8)
    rng.gumbel(0, 3, 8, "cuda:0")
    rng.gumbel(0, torch.full((), 3, dtype=torch.int64, device="cuda:1"), 8)
print(json.dumps([refused, launches]))
"""


def kernel_process(script: str, *arguments: str, interpret: bool) -> str:
    """What a process of its own prints: whether Triton interprets is decided at import."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "01"[interpret], "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout


def test_published_vector() -> None:
    """Philox-4x32-10 of counter 0 and key 0 (Random123's kat_vectors) begins with 6627e8d5."""
    zero = torch.zeros((), dtype=torch.int64)
    assert philox_word(0, zero, zero).item() == 0x6627E8D5


def test_ends_of_the_range_by_hand() -> None:
    """As int32: 0 → 0, 1 → 1, 2³¹ − 1 is the largest, −2³¹ folds to it, −1 folds to 0. Never 0, never 1."""
    words = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 1])
    largest = 1.0 - 2.0**-24
    assert word_to_uniform(words).tolist() == pytest.approx([2**-31, 2**-31, largest, largest, 2**-31], rel=1e-7)
    assert (word_to_uniform(words) < 1.0).all()
    assert (-torch.log(-torch.log(word_to_uniform(words)))).isfinite().all()


def test_step_in_a_tensor_draws_the_same() -> None:
    assert torch.equal(philox_uniform(3, torch.tensor(7), 50), philox_uniform(3, 7, 50))
    assert torch.equal(philox_uniform(3, 7, 50)[:20], philox_uniform(3, 7, 20))


def test_moments() -> None:
    """100,000 draws: uniform mean ½ ± 4·0.0009; Gumbel mean 0.577216 and variance π²/6 = 1.644934."""
    u, g = philox_uniform(0, 0, 100_000).double(), gumbel(0, 1, 100_000).double()
    assert u.mean().item() == pytest.approx(0.5, abs=0.004)
    assert u.var().item() == pytest.approx(1 / 12, abs=0.002)
    assert g.mean().item() == pytest.approx(0.577216, abs=0.017)
    assert g.var().item() == pytest.approx(1.644934, abs=0.05)
    assert abs(torch.corrcoef(torch.stack([u, philox_uniform(0, 1, 100_000).double()]))[0, 1]) < 0.013


def test_triton_draws_the_same(tmp_path: Path) -> None:
    """Uniforms bit for bit, Gumbel draws to 2 ulp of max(1, |g|)."""
    kernel_process(KERNEL_DRAWS.format(seeds=SEEDS, steps=STEPS), str(tmp_path / "draws.pt"), interpret=True)
    draws = torch.load(tmp_path / "draws.pt")
    assert len(draws) == len(SEEDS) * len(STEPS)
    for (seed, step), (uniforms, gumbels) in draws.items():
        assert torch.equal(uniforms, philox_uniform(seed, step, 300))
        expected = gumbel(seed, step, 300)
        ulp = torch.finfo(torch.float32).eps * expected.abs().clamp(min=1.0)
        assert ((gumbels - expected).abs() <= 2 * ulp).all()


def test_an_integer_step_draws_on_the_gpu() -> None:
    """Compiled kernels take the current GPU by default, and name `device` rather than launch on a CPU's memory."""
    refused, launches = json.loads(kernel_process(COMPILED_DRAWS, interpret=False))
    assert len(refused) == 3
    assert all("device" in message and "TRITON_INTERPRET=1" in message for message in refused)
    assert launches == [["cuda:1"] * 2, ["cuda:0"] * 2, ["cuda:1"] * 2]  # of (out, step)


def test_interpreted_kernels_draw_on_the_cpu() -> None:
    from fastdpo_kernels import rng

    assert rng.uniform(0, 3, 8).device.type == "cpu"
    with pytest.raises(ValueError, match=r"device='cuda', but step is on cpu"):
        rng.uniform(0, torch.tensor(3), 8, "cuda")
