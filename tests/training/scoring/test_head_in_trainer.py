"""Scoring through `linear_logprob` against the models' full logits: numbers and gradients, whatever wraps the head."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from bitsandbytes.nn import Linear4bit
from families import MODELS, SIZES, adapted, alone, batch, made
from worker import state

from fastdpo.training.memory.plan import enable_checkpointing
from fastdpo.training.rows import MicroBatch
from fastdpo.training.scoring import CompletionScorer
from fastdpo.training.scoring import scorer as scoring
from fastdpo.training.scoring.head import Head, HeadReader, OpaqueHead, find_head

PAIRS = batch()
for _pair in PAIRS.examples:
    for _ids in _pair.completions:
        _ids.clamp_(max=95)  # two of the models below take token 96 out


def micro_batch() -> MicroBatch:
    return PAIRS.cut(10_000)[0]


def coefficients(micro: MicroBatch) -> torch.Tensor:
    """Some c = dL/dlogp per token, (2P, C)."""
    return torch.randn(micro.completion_mask.shape, generator=torch.Generator().manual_seed(1))


def truth(model: Any, micro: MicroBatch) -> torch.Tensor:
    """(2P, C) token log-probs in float64 from full logits, one sequence at a time."""
    rows = torch.zeros(micro.completion_mask.shape, dtype=torch.float64)
    indices = micro.indices.tolist()
    for row, index in enumerate([*indices, *indices]):
        completion = PAIRS.examples[index].completions[row // len(indices)]
        rows[row, : len(completion)] = alone(model, PAIRS.examples[index].prompt, completion)
    return rows


def gradients(model: Any, logps: torch.Tensor, micro: MicroBatch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (coefficients(micro) * logps).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def assert_numbers(model: Any, scorer: CompletionScorer, *, grads: bool = True) -> dict[str, torch.Tensor]:
    """Log-probs and gradients of a micro-batch are those of the full logits. Returns the latter."""
    micro = micro_batch()
    expected = truth(model, micro)
    found = scorer.tokens(model, micro).logps
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    if not grads:
        return {}
    expected_grads = gradients(model, expected, micro)
    found_grads = gradients(model, found, micro)
    assert expected_grads.keys() == found_grads.keys() != set()
    for name, grad in expected_grads.items():
        torch.testing.assert_close(
            found_grads[name],
            grad,
            rtol=0,
            atol=1e-5 * float(grad.abs().max()),
            msg=lambda text, name=name: name + text,
        )
    return expected_grads


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("fastdpo") and r.levelno >= logging.WARNING]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", MODELS)
def test_adapter_on_a_frozen_head(name: str, checkpointing: bool, caplog: pytest.LogCaptureFixture) -> None:
    """The policy with its adapter, and the reference with the adapter off: both without the model's own logits."""
    model = adapted(made(name))
    if checkpointing:
        enable_checkpointing(model, {"use_reentrant": False})
        model.enable_input_require_grads()
    scorer = CompletionScorer()
    assert isinstance(scorer.heads.read(model), Head)
    grads = assert_numbers(model, scorer)
    assert all("lora_" in each for each in grads)
    with model.disable_adapter(), torch.no_grad():
        assert_numbers(model, scorer, grads=False)
    assert not warnings_of(caplog)


@pytest.mark.parametrize("name", ["Llama", "Llama, tied head", "Gemma2", "Phi, biased head", "GPT-2", "Granite"])
def test_every_weight_is_trained(name: str) -> None:
    model = made(name)
    scorer = CompletionScorer()
    head = scorer.heads.read(model)
    assert head is not None
    grads = assert_numbers(model, scorer)
    trained = [each for each, p in model.named_parameters() if p is head.weight or p is head.bias]
    assert trained
    assert all(float(grads[each].abs().max()) > 0 for each in trained)


def test_head_as_module_to_save() -> None:
    """The adapter's own copy of the head while it is active, the base model's while it is off."""
    model = adapted(made("Phi, biased head"), target_modules=["q_proj"], modules_to_save=["lm_head"])
    copy = model.get_output_embeddings().modules_to_save["default"]
    with torch.no_grad():
        copy.weight.mul_(1.3)
        copy.bias.add_(torch.randn(97))
    scorer = CompletionScorer()
    assert scorer.heads.read(model).weight is copy.weight
    assert any("modules_to_save" in name for name in assert_numbers(model, scorer))
    with model.disable_adapter(), torch.no_grad():
        assert scorer.heads.read(model).weight is model.get_output_embeddings().original_module.weight
        assert_numbers(model, scorer, grads=False)


def test_adapter_on_the_head(caplog: pytest.LogCaptureFixture) -> None:
    """Computed by the model, and said once."""
    caplog.set_level(logging.INFO)
    model = adapted(made("Llama"), target_modules=["q_proj", "lm_head"])
    scorer = CompletionScorer()
    assert any("lm_head.lora_A" in name for name in assert_numbers(model, scorer))
    with model.disable_adapter(), torch.no_grad():
        assert_numbers(model, scorer, grads=False)
    (said,) = [r for r in caplog.records if r.name == "fastdpo.training.scoring.head"]
    assert said.levelno == logging.INFO
    assert "LlamaForCausalLM scores with its own logits: its output embedding is a peft." in said.getMessage()


def test_quantised_head() -> None:
    model = tiny.llama(vocab_size=97, hidden_size=128)
    weight = model.lm_head.weight.detach()
    model.lm_head = Linear4bit(128, 97, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    model.lm_head.weight.data = weight
    model.lm_head.to("cpu")
    assert model.lm_head.weight.dtype == torch.uint8
    model = adapted(model, target_modules=["q_proj"])
    assert isinstance(found := find_head(model), OpaqueHead)
    assert "bitsandbytes.nn.modules.Linear4bit" in found.reason
    assert_numbers(model, CompletionScorer())


def test_head_placed_by_accelerate() -> None:
    """As in models loaded with a device map: read if its weight stays where it is, not if it comes and goes."""
    model = made("Llama")
    add_hook_to_module(model.lm_head, AlignDevicesHook(execution_device="cpu"))
    placed = model.lm_head.forward
    scorer = CompletionScorer()
    assert scorer.heads.read(model) is not None
    assert_numbers(model, scorer)
    assert model.lm_head.forward is placed
    add_hook_to_module(
        model.lm_head, AlignDevicesHook(execution_device="cpu", offload=True, weights_map=model.lm_head.state_dict())
    )
    assert isinstance(find_head(model), OpaqueHead)


def test_weight_of_a_class_of_its_own() -> None:
    class Packed(torch.nn.Parameter):
        pass

    model = made("Llama")
    model.lm_head.weight = Packed(model.lm_head.weight.detach())
    assert "is a Packed" in find_head(model).reason


class Scaled(type(tiny.llama())):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 0.9
        return output


class Shifted(type(tiny.llama())):
    """By a bias per token that is no part of the head; in bfloat16 it is small next to the logits' rounding."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + torch.linspace(-0.02, 0.02, 97)
        return output


class Shortened(type(tiny.llama())):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits[..., :96]
        return output


class Masked(type(tiny.llama())):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits[..., 96] = float("-inf")
        return output


@pytest.mark.parametrize("kind", [Scaled, Shifted, Shortened, Masked])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "bf16"])
def test_unknown_treatment_of_the_logits(kind: type, autocast: bool, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = adapted(kind(tiny.llama(vocab_size=97).config))
    scorer = CompletionScorer(statistics=("log_sum_sq_probs",))
    micro = micro_batch()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        first, second = (scorer.tokens(model, micro, statistics=True) for _ in range(2))
    assert torch.equal(first.logps, second.logps)
    (said,) = warnings_of(caplog)
    assert said.startswith(f"{kind.__name__} does something to its logits that its configuration does not tell")
    if autocast:
        torch.testing.assert_close(first.logps.double(), truth(model, micro), rtol=0.02, atol=0.3)
    else:
        assert_numbers(model, scorer)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
def test_no_false_alarm_in_16_bits(name: str, weights: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    model = made(name).to(weights)
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        assert HeadReader().read(model) is not None
    assert not warnings_of(caplog)


def test_no_false_alarm_where_a_model_upcasts_its_logits(caplog: pytest.LogCaptureFixture) -> None:
    """xLSTM caps bfloat16 logits in float32: a comparison in bfloat16 would find another number."""
    torch.manual_seed(0)
    config = transformers.xLSTMConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=1, num_heads=4, output_logit_soft_cap=3.0
    )
    model = transformers.xLSTMForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.weight)  # logits of about 5
    head = HeadReader().read(model.bfloat16())
    assert head is not None, warnings_of(caplog)
    assert head.softcap == 3.0


FURTHER = {
    "Cohere2": ({"logit_scale": 0.3}, (0.3, None)),
    "HyperCLOVAX": ({"logits_scaling": 0.4}, (0.4, None)),
    "GraniteMoe": ({"logits_scaling": 2.5}, (0.4, None)),
    "NanoChat": ({"final_logit_softcapping": 2.0}, (1.0, 2.0)),
    "RecurrentGemma": ({"logits_soft_cap": 2.0, "lru_width": 32, "head_dim": 8}, (1.0, 2.0)),
    # Hidden states are divided before the head: not by the head
    "MiniCPM3": ({"dim_model_base": 8, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16}, (1.0, None)),
}


@pytest.mark.parametrize("name", FURTHER)
def test_configuration_is_read(name: str, caplog: pytest.LogCaptureFixture) -> None:
    options, expected = FURTHER[name]
    sizes = {k: v for k, v in SIZES.items() if (name, k) != ("RecurrentGemma", "initializer_range")}
    config = getattr(transformers, f"{name}Config")(**(sizes | options))
    head = HeadReader().read(getattr(transformers, f"{name}ForCausalLM")(config))
    assert head is not None, warnings_of(caplog)
    assert (head.logit_scale, head.softcap) == pytest.approx(expected)


def test_the_comparison_leaves_no_trace() -> None:
    """Neither in the mode of the model, nor in random numbers or gradients."""
    model = made("Llama")
    model.model.layers[0].self_attn.attention_dropout = 0.5
    random = torch.get_rng_state()
    assert HeadReader().read(model) is not None
    assert torch.equal(random, torch.get_rng_state())
    assert model.training
    assert model.lm_head.training
    assert all(p.grad is None for p in model.parameters())
    assert "forward" not in vars(model.lm_head)


RUNS = {
    "plain": {},
    "dynamic, several micro-batches": {"dynamic_beta": True, "keep_ratio": 0.7, "micro_batch_tokens": "90"},
    "weighted": {"use_weighting": True, "loss_type": ["sigmoid", "sft"]},
}


@pytest.mark.parametrize("name", RUNS)
def test_backends_train_alike(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps on each backend: losses, the trace of β and every other metric, and the adapters."""
    used = set()
    original = scoring.linear_logprob

    def spied(*args: Any, backend: str, workspace: int, **kwargs: Any) -> Any:
        used.add((backend, workspace))
        return original(*args, backend=backend, workspace=workspace, **kwargs)

    monkeypatch.setattr(scoring, "linear_logprob", spied)
    results = []
    for backend in ("torch", "triton"):
        options = {"optim": "sgd", "learning_rate": 0.05, "per_device_train_batch_size": 4} | RUNS[name]
        workspace = 100 * 1024 if backend == "triton" else 256 * 2**20  # the default: torch's, on a CPU, takes none
        options |= {"head_workspace": "100KiB"} if backend == "triton" else {}
        trainer = tiny.trainer(
            tmp_path / backend, model=tiny.llama(hidden_size=16), data=tiny.pairs(12), max_steps=3, backend=backend,
            **options,
        )  # fmt: skip
        trainer.train()
        assert used == {(backend, workspace)}
        used.clear()
        results.append((state(trainer), trainer.state.log_history))
    (weights, log), (other_weights, other_log) = results
    assert all(float(value.abs().max()) > 1e-4 for key, value in weights.items() if "lora_B" in key), "untrained"
    for key, value in weights.items():
        torch.testing.assert_close(other_weights[key], value, rtol=1e-5, atol=1e-5)
    for entry, other in zip(log, other_log, strict=True):
        for key in entry.keys() - {"train_runtime", "train_samples_per_second", "train_steps_per_second"}:
            assert other[key] == pytest.approx(entry[key], rel=1e-4, abs=1e-5), key
