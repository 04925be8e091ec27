"""liger-kernel's functions in the lean body: against float64, in models and in a run, and where they are refused.

Its kernels run in Triton's interpreter (`liger_interpreted`). Compiled, and on a card, none of this has run.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import liger_interpreted
import pytest
import tiny
import torch
import transformers.trainer
from families import batch, made
from lean_models import LARGE, SMALL, errors, gradients, relative, with_lora
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

import fastdpo.training.body.liger
from fastdpo.training.body import BodyChoice, LeanBody
from fastdpo.training.body.activation import ACTIVATIONS
from fastdpo.training.body.architectures import ARCHITECTURES
from fastdpo.training.body.functions import Functions, own_functions
from fastdpo.training.body.liger import liger_functions
from fastdpo.training.body.norm import NormKind
from fastdpo.training.memory.plan import enable_checkpointing
from fastdpo.training.options import FastDPOConfig
from fastdpo.training.options.liger import VERSIONS
from fastdpo.training.rows.layout import PLAIN
from fastdpo.training.scoring import CompletionScorer

#: Relative to float64: roundings of 6e-8 and 5e-4 in sums and a few products. The interpreter cannot multiply bfloat16.
TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3}
KINDS = {
    "llama": NormKind(eps="eps"),
    "gemma": NormKind(eps="eps", offset=1.0, rounds_first=False),
    "olmo2": NormKind(eps="eps", rounds_first=False),
}


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> Functions:
    liger_interpreted.interpret(monkeypatch)
    return liger_functions()


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pulled(outputs: tuple[Tensor, ...], inputs: list[Tensor]) -> list[Tensor]:
    """Outputs, and the gradients of their weighted sum."""
    grads = [normal(*each.shape, seed=7 + i).to(each.dtype) for i, each in enumerate(outputs)]
    return [*(each.detach().clone() for each in outputs), *torch.autograd.grad(outputs, inputs, grads)]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_norms(kind: str, dtype: torch.dtype, liger: Functions) -> None:
    """y = (o + w) x / √(mean x² + ε), with widths that fill no block, and rows of a head."""
    module = nn.RMSNorm(33, dtype=dtype).requires_grad_(False)
    module.weight.copy_(normal(33, seed=1))
    module.eps = 0.1
    for shape in ((2, 5, 33), (2, 3, 4, 33)):
        x = normal(*shape, dtype=dtype).requires_grad_()
        found = pulled((liger.norm(x, module, KINDS[kind]),), [x])
        z = x.detach().double().requires_grad_()
        weight = module.weight.double() + (kind == "gemma")
        expected = pulled((weight * z / (z.square().mean(-1, keepdim=True) + 0.1).sqrt(),), [z])
        for ours, true in zip(found, expected, strict=True):
            assert ours.dtype == dtype
            assert relative(ours, true) < TOLERANCES[dtype]
    assert (liger.served, liger.left) == ({"RMSNorm"}, {})


@pytest.mark.parametrize(
    ("name", "module"), [("llama", LlamaRMSNorm), ("gemma2", Gemma2RMSNorm), ("olmo2", Olmo2RMSNorm)]
)
def test_norms_round_where_the_modules_do(name: str, module: type[nn.Module], liger: Functions) -> None:
    """In 16 bits a result is the module's own to the bit, but where a float32 sum ends on a rounding's edge; rounded at
    the other place a quarter of them differs."""
    own = module(64).half().requires_grad_(False)
    own.weight.copy_(normal(64, seed=1))
    x = normal(20, 64, dtype=torch.float16)
    found = liger.norm(x, own, ARCHITECTURES[name].norm)
    assert float((found != own(x)).float().mean()) < 0.02


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_rotary_positions(shared: bool, dtype: torch.dtype, liger: Functions) -> None:
    """Pairs (x₁, x₂) times e^{iθ}, as complex numbers; rows whose positions start again, each elsewhere."""
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1, 2]] if shared else [[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4]])
    angles = position_ids[..., None] * torch.tensor([1.0, 0.3, 0.01])  # three pairs, in a block of four
    cos, sin = (torch.cat([f(angles)] * 2, -1).to(dtype) for f in (torch.cos, torch.sin))
    inputs = [normal(2, 7, heads, 6, dtype=dtype, seed=heads).requires_grad_() for heads in (3, 1)]
    leaves = [each.double().detach().requires_grad_() for each in inputs]

    def turned(x: Tensor) -> Tensor:
        turn = torch.complex(cos.double(), sin.double())[..., None, :3]
        pairs = torch.complex(x[..., :3], x[..., 3:]) * turn
        return torch.cat([pairs.real, pairs.imag], -1)

    expected = pulled(tuple(turned(each) for each in leaves), leaves)
    # In place, so on copies
    query, key = (each.clone() for each in inputs)
    found = pulled(liger.rotate(query, key, cos, sin), inputs)
    for ours, true in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert relative(ours, true) < TOLERANCES[dtype]
    assert (liger.served, liger.left) == ({"RoPE"}, {})


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("name", "act"),
    [("silu", lambda x: x * x.sigmoid()), ("gelu_pytorch_tanh", lambda x: nn.functional.gelu(x, approximate="tanh"))],
)
@pytest.mark.parametrize("spent", [True, False])
def test_activations(
    name: str, act: Callable[[Tensor], Tensor], dtype: torch.dtype, spent: bool, liger: Functions
) -> None:
    both = normal(2 * 5 * 33, dtype=dtype)
    gate, up = both.view(2, 5, 33).unbind(0)
    dh = normal(5, 33, seed=2).to(dtype)
    g, u = (each.double().requires_grad_() for each in (gate.clone(), up.clone()))
    h = act(g) * u
    expected = [h.detach(), *torch.autograd.grad(h, [g, u], dh.double())]
    activation, kept = liger.activations[name].of(gate), both.clone()
    for ours in (activation, ACTIVATIONS[name]):
        room = ours.room(both, spent=spent and ours is not activation)  # the first must leave it for the second
        dg, du = room.view(2, 5, 33).unbind(0)
        found, awaited = ours.start(dg, du, gate, up)
        found = found.clone()
        assert relative(ours.forward(gate, up), expected[0]) < TOLERANCES[dtype]
        awaited.copy_(dh)
        ours.finish(awaited, dg, du, gate, up)
        for one, true in zip((found, dg, du), expected, strict=True):
            assert relative(one, true) < 3 * TOLERANCES[dtype]
        assert torch.equal(both, kept), "what a forward kept is as it was"
    if spent:
        room = activation.room(both, spent=True)
        assert room.data_ptr() == both.data_ptr()
        _, awaited = activation.start(gate, up, gate, up)
        awaited.copy_(dh)
        activation.finish(awaited, gate, up, gate, up)
        assert max(relative(gate, expected[1]), relative(up, expected[2])) < 3 * TOLERANCES[dtype]


SERVED = {
    "Llama": ({"RMSNorm", "RoPE", "SwiGLU"}, {}),
    "Gemma3": ({"RMSNorm", "RoPE", "GeGLU"}, {}),
    "OLMo2": ({"RMSNorm", "RoPE", "SwiGLU"}, {}),
    "Phi3": (
        {"RMSNorm"},
        {"RoPE": "a part of each head has no position", "SwiGLU": "gate and up come side by side from one layer"},
    ),
}


@pytest.mark.parametrize("name", SERVED)
def test_models(name: str, liger: Functions) -> None:
    """Outputs and gradients are the untouched model's, kept and recomputed; what was left to ours is said."""
    model = with_lora(name)
    ids = torch.randint(1, 97, (2, 7), generator=torch.Generator().manual_seed(1))

    def forward() -> Tensor:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits

    expected = gradients(model, None, forward)
    assert max(errors(gradients(model, LeanBody(model, LARGE, liger), forward), expected)) < 1e-5
    enable_checkpointing(model, {"use_reentrant": False})
    assert max(errors(gradients(model, LeanBody(model, SMALL, liger), forward), expected)) < 1e-5
    assert (liger.served, liger.left) == SERVED[name]


def test_what_is_left_to_ours(liger: Functions) -> None:
    """Other dtypes than liger's results would have, and those that it has not."""
    module = nn.RMSNorm(8, eps=0.1).requires_grad_(False)
    assert liger.norm(normal(2, 8, dtype=torch.bfloat16), module, KINDS["llama"]).dtype == torch.float32
    x, angles = normal(1, 2, 1, 8), torch.zeros(1, 2, 8, dtype=torch.bfloat16)
    assert liger.rotate(x, x, angles + 1, angles)[0].dtype == torch.float32
    assert liger.activations["silu"].of(x.double()) == ACTIVATIONS["silu"]
    liger.activations["gelu"].of(x)
    assert not liger.served
    assert liger.left == {
        "RMSNorm": "a weight in torch.float32 meets torch.bfloat16",
        "RoPE": "positions in torch.bfloat16 meet torch.float32",
        "SwiGLU": "liger-kernel has none for torch.float64",
        "activation": "liger-kernel has none for 'gelu'",
    }
    assert "computes nothing; RMSNorm by ours: a weight" in liger.told()


def test_second_derivatives_are_refused(liger: Functions) -> None:
    x = normal(2, 8).requires_grad_()
    y = liger.norm(x, nn.RMSNorm(8, eps=0.1).requires_grad_(False), KINDS["llama"])
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs on the CPU may have what acts on a GPU alone."""
    monkeypatch.setattr("fastdpo.training.options.config.check_effects", lambda args, on_gpu: None)


@pytest.mark.usefixtures("liger", "as_on_a_gpu")
def test_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first step is that of a run without, checked and said; transformers patches nothing."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(transformers.trainer, "apply_liger_kernel", None)
    seen = {}
    for asked in (True, False):
        trainer = tiny.trainer(
            tmp_path / str(asked),
            max_steps=1,
            data=tiny.pairs(1),
            max_length=14,
            max_prompt_length=6,
            use_liger_kernel=asked,
        )
        trainer.train()
        seen[asked] = next(each for each in trainer.state.log_history if "loss" in each)
        assert trainer.options.asked.use_liger_kernel == trainer.options.resolved.use_liger_kernel == asked
        assert dataclasses.replace(trainer.args).use_liger_kernel is asked, "args of a trainer make another"
    assert seen[True]["grad_norm"] == pytest.approx(seen[False]["grad_norm"], rel=1e-5)
    version = importlib.metadata.version("liger-kernel")
    said = f"9 modules. liger-kernel {version} computes RMSNorm, RoPE, SwiGLU."
    assert said in caplog.text


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_function_that_differs_is_refused(tmp_path: Path, liger: Functions, monkeypatch: pytest.MonkeyPatch) -> None:
    own = fastdpo.training.body.liger._functions

    def spoilt(name: str) -> Any:
        forward, backward = own(name)
        return (lambda g, u: (g, u, 1.05 * forward(g, u)[2]), backward) if name == "SwiGLU" else (forward, backward)

    monkeypatch.setattr(fastdpo.training.body.liger, "_functions", spoilt)
    bodies = BodyChoice(
        tiny.config(tmp_path, use_liger_kernel=True), CompletionScorer(), [with_lora("Llama")], tiny.ranks()
    )
    with pytest.raises(ValueError, match=r"use_liger_kernel=True cannot be had.*log-probs differ.*Drop it\."):
        bodies.settle(batch(), PLAIN, nullcontext)


def test_where_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"use_liger_kernel=True has no effect here: .* this run is on a CPU\. Drop it"
    ):
        tiny.config(tmp_path, use_liger_kernel=True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: False)
    options: dict[str, Any] = {"output_dir": str(tmp_path), "use_liger_kernel": True}
    with pytest.raises(ValueError, match=r"serve in the lean body, and lean_body='off'\. Set lean_body to auto or on"):
        FastDPOConfig(**options, lean_body="off")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.7.0")
    pattern = re.escape(f"needs liger-kernel {VERSIONS}, whose functions are known, and version '0.7.0' is installed")
    with pytest.raises(ValueError, match=pattern):
        FastDPOConfig(**options)

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    with pytest.raises(ValueError, match=r"it is not installed: pip install 'liger-kernel>=0\.8\.5,<0\.9', or drop it"):
        FastDPOConfig(**options)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_model_without_a_lean_body_is_refused(tmp_path: Path) -> None:
    config = tiny.config(tmp_path, use_liger_kernel=True)
    with pytest.raises(ValueError, match=r"use_liger_kernel=True cannot be had, .*model_type='gpt2'.* Drop it"):
        BodyChoice(config, CompletionScorer(), [made("GPT-2")], tiny.ranks())


def test_the_range_is_that_of_the_extra() -> None:
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nliger = ["liger-kernel{VERSIONS}"]\n' in text
    assert own_functions(2**20).told() == ""
