"""`fastdpo estimate`: what is counted without weights equals what real tensors take."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from fastdpo.commands.cli import main
from fastdpo.estimate.activations import count_live, micro_batch
from fastdpo.estimate.architectures import find_config, known_architectures
from fastdpo.estimate.counter import ConfigCounter, Training
from fastdpo.estimate.devices import GPUS
from fastdpo.estimate.memory import MemoryEstimator, Run, Surroundings
from fastdpo.estimate.options import EstimateConfig
from fastdpo.estimate.prediction import Estimate
from fastdpo.estimate.rows import PairShape, Row
from fastdpo.estimate.skeleton import Skeleton, is_4bit, quantization_constants, resident_bytes
from fastdpo.estimate.timing import time_micro_batch
from fastdpo.training.memory.counting import LiveBytes, flash_backward_workspace, gemm_4bit_workspace
from fastdpo.training.memory.head_workspace import gpu_head_workspace
from fastdpo.training.memory.plan import checkpointing_name, enable_checkpointing
from fastdpo.training.models.loading import lora_config
from fastdpo.training.options import ModelConfig

NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)
OPTIONS = ModelConfig(load_in_4bit=True, lora_r=4)
SHAPE = PairShape(10, 7)
SIZES: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def config(layers: int = 2, **overrides: Any) -> LlamaConfig:
    return LlamaConfig(**(SIZES | {"num_hidden_layers": layers} | overrides))


def training(**overrides: Any) -> Training:
    return Training(**({"options": OPTIONS, "dtype": torch.float32, "lean_body": "off"} | overrides))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """A Llama that bitsandbytes has really quantised, with a LoRA."""
    folder = tmp_path_factory.mktemp("llama")
    tiny.llama(**SIZES).save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, quantization_config=NF4, dtype=torch.float32)
    return get_peft_model(loaded, lora_config(OPTIONS)).train()


def saved_bytes(model: nn.Module, row: Row) -> int:
    """Distinct storages that autograd saves, parameters and the micro-batch's indices aside: another way to the bytes
    that a forward keeps."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own and x.is_floating_point():
            saved[x.untyped_storage().data_ptr()] = x
        return x

    with micro_batch(model, row) as forward, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        forward()
    return sum(x.untyped_storage().nbytes() for x in saved.values())


@pytest.mark.parametrize("tokens", [24, 61])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_count_without_weights_equals_real_tensors(real: nn.Module, tokens: int, checkpointing: bool) -> None:
    row = Row(tokens, SHAPE)
    if checkpointing:
        enable_checkpointing(real, {"use_reentrant": False})
    try:
        found = count_live(real, row)
    finally:
        getattr(real, f"{checkpointing_name(real)}_checkpointing_disable")()
    assert ConfigCounter(config(), training(checkpointing=checkpointing)).count(row) == found
    assert found.peak > found.kept > 0


def test_kept_is_what_autograd_saves(real: nn.Module) -> None:
    row = Row(61, SHAPE)
    kept, saved = count_live(real, row).kept, saved_bytes(real, row)
    assert kept == saved + 4  # the sum of the log-probs, from which the backward starts


def test_equal_layers_are_extrapolated_exactly() -> None:
    deep, row = config(7), Row(48, SHAPE)
    for checkpointing in (False, True):
        made = training(checkpointing=checkpointing)
        counter = ConfigCounter(deep, made)
        assert len(counter.skeletons) == 2
        full = Skeleton(deep, OPTIONS, torch.float32)
        if checkpointing:
            full.checkpoint_layers()
        assert counter.count(row) == count_live(full.model, row, head=full.head, mode=lambda full=full: full.mode)


def test_weights_and_constants_equal_the_quantised_model(real: nn.Module) -> None:
    skeleton = Skeleton(config(), OPTIONS, torch.float32)

    def sizes(model: nn.Module) -> tuple[int, int, int]:
        frozen = resident_bytes(p for p in model.parameters() if not p.requires_grad)
        trained = resident_bytes(p for p in model.parameters() if p.requires_grad)
        return frozen, trained, sum(x.numel() * x.element_size() for x in quantization_constants(model))

    assert sizes(skeleton.model) == sizes(real)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # as their model cards and safetensors indices count them
        ("Llama-3-8B", 8_030_261_248),
        ("Llama-3.1-8B", 8_030_261_248),
        ("Llama-3.2-1B", 1_235_814_400),
        ("Qwen3-4B", 4_022_468_096),
        ("Mistral-7B", 7_248_023_552),
        ("Qwen2.5-7B", 7_615_616_512),
        ("SmolLM2-135M", 134_515_008),
    ],
)
def test_known_architectures_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(find_config(name))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert name in known_architectures()


def test_live_bytes_of_a_hand_worked_example() -> None:
    x = torch.ones(1000, requires_grad=True)
    with LiveBytes() as counted:
        y = x * 2  # 4,000 bytes; x is the caller's
        z = y.exp()  # 4,000 more, which the exponential saves
        assert counted.live == 8000
        view = z[10:]  # none
        assert counted.live == 8000
        del y  # saved by nobody
        assert counted.live == 4000
        total = view.sum()  # 4
        assert counted.live == 4004
    assert counted.peak == 8000
    assert total.requires_grad


def test_workspace_of_a_4_bit_product_is_what_its_implementation_takes(real: nn.Module) -> None:
    """bitsandbytes' own Python implementation, whose operators are seen when it is called directly."""
    from bitsandbytes.backends.default.ops import _gemm_4bit_default_impl

    layer = next(module for module in real.modules() if is_4bit(module))
    state, x = layer.weight.quant_state, torch.ones(5, 128)
    arguments = (x, layer.weight.view(-1, 1), state.shape, state.state2.absmax, state.blocksize, state.quant_type)
    nested = {"absmax_8bit": state.absmax, "absmax_code": state.state2.code, "absmax_offset": state.offset}
    with LiveBytes() as counted:
        product = _gemm_4bit_default_impl(*arguments, **nested)
    assert counted.peak == gemm_4bit_workspace(*arguments, **nested) + 4 * product.numel()


def test_workspaces_of_a_gpu_by_hand() -> None:
    """Head: 100 rows, V = 1,000, H = 64 in bfloat16 are one chunk of 1,024 columns: E, the accumulator, a top and a sum
    of 8 tiles of 128 columns, and rows and padding; a reference has the sums alone. FlashAttention's backward: 30 + 10
    queries in two sequences, each up to 128 more, float32 of 4 heads of 48 → 64 and one number; keys of 50 tokens,
    shared by two heads each, have 2 x 4 heads x 48 x 2 bytes."""
    hidden, weight = (torch.empty(n, 64, dtype=torch.bfloat16, device="meta") for n in (100, 1000))
    tops = 2 * 4 * 8 * 100
    rest = 16 * 100 + 4096
    options = (None, None, 1.0, 1.0, None, torch.bfloat16)
    policy = gpu_head_workspace(hidden, weight, None, *options, True, workspace=2**28)
    reference = gpu_head_workspace(hidden, weight, None, *options, False, workspace=2**28)
    assert policy == 100 * 1024 * 2 + 100 * 64 * 4 + tops + rest
    assert reference == tops + rest
    query = torch.empty(40, 4, 48, dtype=torch.bfloat16, device="meta")
    key = torch.empty(50, 2, 48, dtype=torch.bfloat16, device="meta")
    bounds = torch.empty(3, dtype=torch.int32, device="meta")
    found = flash_backward_workspace(query, query, key, key, query, query, bounds, bounds, 30, 40, True, bounds)
    assert found == (40 + 2 * 128) * 4 * (64 + 1) * 4 + 2 * 50 * 4 * 48 * 2


def test_attention_keeps_no_scores() -> None:
    """q, k and v, the output and one number per query and head are kept, on a GPU k and v in the segments' order: the
    bytes per token do not grow with the pairs."""

    def per_token(counter: ConfigCounter, shape: PairShape) -> float:
        return (counter.count(Row(4 * shape.tokens, shape)).kept - counter.count(Row(2 * shape.tokens, shape)).kept) / (
            2 * shape.tokens
        )

    for flash in (True, False):
        counter = ConfigCounter(config(), training(flash=flash))
        assert per_token(counter, PairShape(10, 10)) == pytest.approx(per_token(counter, PairShape(80, 80)), rel=1e-3)


def test_work_of_a_lean_body_is_that_of_its_modules() -> None:
    """Its products write into tensors and add to them, and those with A are one: the frozen FLOPs stay the same."""
    row = Row(2 * SHAPE.tokens, SHAPE)
    lean, plain = (
        time_micro_batch(ConfigCounter(config(), training(lean_body=body)), row, GPUS[0], training=True).flops
        for body in ("on", "off")
    )
    assert lean["frozen GEMMs"] == plain["frozen GEMMs"] > 0
    assert lean["LoRA"] == pytest.approx(plain["LoRA"], rel=0.02)


def test_work_is_counted_as_the_formulas_say() -> None:
    """FLOPs of a two-layer Llama: 2 per weight and token forward, as many backward for the inputs, except for q, k and
    v of the first layer, as the embedding is frozen; a LoRA's weights have gradients too. Attention by pairs of query
    and key, two products forward and five backward; the head N x H x V twice with its unit gradient."""
    row = Row(24, SHAPE)  # one pair: 10 + 7 + 7
    counter = ConfigCounter(config(), training(flash=True))
    hidden, wide, kv, vocab, rank = 128, 192, 64, 257, 4
    first = hidden * hidden + 2 * hidden * kv
    weights = 2 * (first + hidden * hidden + 3 * hidden * wide)
    sums = 2 * (4 * hidden + 2 * (hidden + kv) + 3 * (hidden + wide))  # in + out of every LoRA
    visible = 17 * 18 // 2 + 7 * 10 + 7 * 8 // 2
    # Older transformers form the rotary angles, one per token and frequency, as a product
    angles = 2 * 24 * 16

    scoring = time_micro_batch(counter, row, GPUS[0], training=False).flops
    assert scoring["frozen GEMMs"] - 2 * 24 * weights in (0, angles)
    assert scoring["LoRA"] == 2 * 24 * rank * sums
    assert scoring["attention"] == 2 * 2 * 2 * hidden * visible
    assert scoring["head"] == 2 * 14 * hidden * vocab

    both = time_micro_batch(counter, row, GPUS[0], training=True).flops
    assert both["frozen GEMMs"] - 2 * 24 * (2 * weights - first) in (0, angles)
    assert both["LoRA"] == 2 * 24 * rank * (3 * sums - 3 * hidden)
    assert both["attention"] == 2 * 7 * 2 * hidden * visible
    assert both["head"] == 2 * 2 * 14 * hidden * vocab


def estimator(checkpointing: bool = False) -> MemoryEstimator:
    return MemoryEstimator(
        config(), training(flash=True, checkpointing=checkpointing), Surroundings(1_000_000, "a test")
    )


def test_largest_budget_and_pair_fit_and_a_little_more_does_not() -> None:
    made, run = estimator(), Run(SHAPE, 64, 48)
    memory = made.total(Run(SHAPE, 64, 480))
    tokens = made.largest_budget(run, memory)
    assert made.total(Run(SHAPE, 64, tokens)) <= memory < made.total(Run(SHAPE, 64, tokens + 16))
    assert tokens == pytest.approx(480, abs=16)
    pair = made.largest_pair(run, made.total(Run(SHAPE.scaled(240), 64, 1)))
    assert pair is not None
    assert pair.tokens == pytest.approx(240, abs=16)
    assert made.largest_budget(run, 1_000_000) == 0
    assert made.largest_pair(run, 1_000_000) is None


def test_checkpointing_trades_activations_and_offloading_moves_the_inputs_of_layers() -> None:
    run = Run(SHAPE, 64, 480)
    parts = {part.name: part.bytes for part in estimator().parts(run)}
    kept = {part.name: part.bytes for part in estimator(True).parts(run)}
    assert kept["activations"] < parts["activations"] / 3
    offloaded = {part.name: part.bytes for part in estimator(True).parts(Run(SHAPE, 64, 480, offload=True))}
    assert kept["activations"] - offloaded["activations"] == 0  # of two layers, which are both on the device


def test_optimizer_states_are_those_of_torch_and_bitsandbytes(real: nn.Module) -> None:
    trained = [p for p in real.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    states = sum(x.numel() * x.element_size() for s in optimizer.state.values() for x in s.values() if x.dim())
    optimizer.zero_grad()
    parts = {part.name: part.bytes for part in estimator().parts(Run(SHAPE, 4, 48))}
    assert parts["optimizer"] == states
    assert parts["gradients"] == parts["adapters"] == sum(p.numel() * 4 for p in trained)


def run_cli(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(["estimate", *argv])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_command_prints_parts_that_sum_to_the_peak(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config(4).save_pretrained(tmp_path)
    code, out, _ = run_cli(
        capsys, "--model_name_or_path", str(tmp_path), "--load_in_4bit", "--gpu_memory", "1GB", "--json",
        "--max_length", "64", "--max_prompt_length", "32", "--gradient_checkpointing", "true",
    )  # fmt: skip
    found = json.loads(out)
    assert code == 0
    assert found["predicted"] is True
    assert sum(found["parts"].values()) == found["peak_bytes"] <= 10**9
    assert found["gradient_checkpointing"] is True
    assert [fit["gpu_memory"] for fit in found["fits"]] == ["1GB"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "model_name_or_path is required"),
        (("--model_name_or_path", "Llama-3-8B", "--gpu_memory", "many"), "gpu_memory='many': a size such as 12GB"),
        (("--model_name_or_path", "Llama-3-8B", "--max_length", "9", "--max_prompt_length", "9"), "leaves no room"),
        (("--model_name_or_path", "Llama-3-8B", "--micro_batch_tokens", "few"), "'auto' or a number of at least 1"),
        (("--model_name_or_path", "./nowhere", "--gpu_memory", "1GB"), "no such folder"),
        (
            ("--model_name_or_path", "Llama-3-8B", "--gpu_memory", "1GB", "--use_dora"),
            "use_dora=True cannot be predicted",
        ),
        (("--model_name_or_path", "Llama-3-8B", "--device", "cpu", "--gpu_memory", "1GB"), "has no effect"),
    ],
)
def test_command_says_what_it_cannot_use(
    argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run_cli(capsys, *argv)
    assert code == 2
    assert message in err.replace("\n", " ")


def fastdpo(*argv: str) -> str:
    """What the command prints, in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "TRITON_INTERPRET")}
    command = [sys.executable, "-m", "fastdpo.commands.cli", *argv]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_prediction_for_the_demo_is_within_15_percent_of_its_peak(tmp_path: Path) -> None:
    predicted = json.loads(fastdpo("estimate", "--demo", "--json"))["peak_bytes"]
    printed = fastdpo("demo", "--pairs", "24", "--output_dir", str(tmp_path / "demo"))
    measured = float(re.search(r"peak memory ([\d.]+) GiB", printed)[1]) * 2**30  # type: ignore[index]
    assert predicted == pytest.approx(measured, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "card", "checkpointing"), [("Llama-3-8B", "12GB", "on"), ("SmolLM2-135M", "8GB", "off")]
)
def test_cells_of_the_documented_table(name: str, card: str, checkpointing: str) -> None:
    lines = (Path(__file__).parents[2] / "docs/memory.md").read_text(encoding="utf-8").splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    row = next(cells for cells in table if cells[:2] == [name, checkpointing])
    documented = row[table[0].index(card)]
    fit = Estimate(
        ModelConfig(model_name_or_path=name, load_in_4bit=True),
        EstimateConfig(gpu_memory=[card], gradient_checkpointing=str(checkpointing == "on").lower()),
    ).fits[0]
    assert fit.longest_pair is not None
    longest = fit.longest_pair.prompt + fit.longest_pair.completion
    assert documented == f"{fit.micro_batch_tokens:,} / {longest:,}"
