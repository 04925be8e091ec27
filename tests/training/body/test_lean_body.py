"""Lean bodies against the untouched model: outputs, gradients, products that are computed, and what is left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from bitsandbytes.nn import Linear4bit
from families import batch
from lean_models import ARCHITECTURES, LARGE, SMALL, errors, gradients, relative, untouched, with_lora
from packed_rows import LAYOUTS
from peft.tuners.lora import LoraLayer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.llama import modeling_llama

from fastdpo.training.body import LeanBody
from fastdpo.training.memory.plan import enable_checkpointing
from fastdpo.training.rows import Layout
from fastdpo.training.rows.attention import segments_active
from fastdpo.training.rows.choice import segment_obstacle
from fastdpo.training.scoring import CompletionScorer

#: Relative, in float32: a few roundings of 6e-8 in each of some forty products.
TOLERANCE = 1e-5
#: In bfloat16 each of them rounds to 4e-3, the untouched model's at other places.
TOLERANCE_16_BITS = 3e-2


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_and_gradients_of_every_architecture(name: str) -> None:
    model = with_lora(name)
    expected = gradients(model, None)
    for tiles in (SMALL, LARGE):
        body = LeanBody(model, tiles)
        assert not body.left
        assert not body.foreign
        assert max(errors(gradients(model, body), expected)) < TOLERANCE
    enable_checkpointing(model, {"use_reentrant": False})
    for tiles in (SMALL, LARGE):
        assert max(errors(gradients(model, LeanBody(model, tiles)), expected)) < TOLERANCE


@pytest.mark.parametrize("name", ["Llama", "Phi3", "Qwen2"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_four_bits(name: str, checkpointed: bool) -> None:
    """Slices of five and of 46 tokens: with LoRA beside the weights, and by way of them."""
    model = with_lora(name, quantized=True)
    expected = gradients(model, None)
    if checkpointed:
        enable_checkpointing(model, {"use_reentrant": False})
    for tiles in (SMALL, LARGE):
        assert max(errors(gradients(model, LeanBody(model, tiles)), expected)) < TOLERANCE


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True, "r": 8},
        {"target_modules": ["q_proj", "down_proj"]},
        {"modules_to_save": ["embed_tokens", "norm"]},
        {"bias": "all"},
        {"lora_dropout": 0.0, "exclude_modules": ["v_proj"]},
    ],
    ids=str,
)
def test_kinds_of_adapters(options: dict[str, Any]) -> None:
    model = with_lora("Qwen2", **options)
    body = LeanBody(model, SMALL)
    assert body.served
    assert max(errors(gradients(model, body), gradients(model, None))) < TOLERANCE


def test_several_adapters_and_none() -> None:
    model = with_lora("Llama")
    torch.manual_seed(2)
    model.add_adapter("second", tiny.lora(r=3, init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    body = LeanBody(model, SMALL)
    found, expected = gradients(model, body), gradients(model, None)
    assert sum("second" in name for name in found[1]) == 28
    assert max(errors(found, expected)) < TOLERANCE
    ids = torch.arange(1, 20)[None]
    with model.disable_adapter(), torch.no_grad():
        plain = model(input_ids=ids).logits
        with body.active():
            assert relative(model(input_ids=ids).logits, plain) < TOLERANCE


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Gemma3", "OLMo2"])
@pytest.mark.parametrize("layout", [Layout(), *LAYOUTS], ids=str)
def test_every_layout_of_rows(name: str, layout: Layout) -> None:
    model, scorer = with_lora(name), CompletionScorer()
    scorer.prepare(model)
    if not (layout.plain or layout.masked) and segment_obstacle(model, keeps_dropout=False):
        pytest.fail(f"{name} attends by segments")
    (micro,) = batch().cut(10**6, layout=layout)

    def forward() -> torch.Tensor:
        return scorer.token_logps(model, micro)

    def run(body: LeanBody | None) -> Any:
        if layout.plain or layout.masked:
            return gradients(model, body, forward)
        with segments_active([model]):
            return gradients(model, body, forward)

    assert max(errors(run(LeanBody(model, SMALL)), run(None))) < TOLERANCE


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["Llama", "Gemma3", "Phi3", "OLMo2"])
def test_bfloat16(name: str, autocast: bool) -> None:
    """Not farther from float32 than the untouched model is, and a tolerance."""
    model = with_lora(name, dtype=torch.bfloat16)
    exact = gradients(copy.deepcopy(model).float(), None)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, modules = gradients(model, LeanBody(model, SMALL)), gradients(model, None)
    assert found[0].dtype == modules[0].dtype
    for ours, theirs in zip(errors(found, exact), errors(modules, exact), strict=True):
        assert ours < theirs + TOLERANCE_16_BITS


class Products(TorchDispatchMode):
    """Counts matrix products by their FLOPs."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            first, second = args[-2:]
            self.flops += 2 * first.numel() * second.shape[-1]
        return func(*args, **(kwargs or {}))


def test_products_of_a_checkpointed_layer_end_before_the_mlp() -> None:
    """The modules compute each layer's products three times over (forward, recomputation, gradients of the input), the
    lean ones leave out `down` in the recomputation."""
    model = with_lora("Llama", r=1)
    enable_checkpointing(model, {"use_reentrant": False})
    counted = []
    for body in (None, LeanBody(model, LARGE)):
        with Products() as products:
            gradients(model, body)
        counted.append(products.flops)
    tokens, hidden, inner, layers = 46, 32, 64, 2
    down = 2 * tokens * hidden * inner * layers
    # LoRA's share, of rank 1, is a product or two of N·(H + I) each
    assert counted[1] == pytest.approx(counted[0] - down, abs=0.25 * down)
    assert counted[1] < counted[0]


def test_flops_without_checkpointing_are_the_modules_own() -> None:
    model = with_lora("Llama")
    counted = []
    for body in (None, LeanBody(model, LARGE)):
        with FlopCounterMode(display=False) as counter:
            gradients(model, body)
        counted.append(counter.get_total_flops())
    assert counted[1] <= counted[0]


def test_what_stays_with_peft_is_told() -> None:
    dora, dropping = with_lora("Llama", use_dora=True), with_lora("Llama", lora_dropout=0.1)
    for model, reason in ((dora, "Dora"), (dropping, "a dropout of 0.1")):
        body = LeanBody(model, SMALL)
        assert not body.reason
        assert len(body.served) == 5  # the norms
        (told,) = body.left
        assert reason in told
    assert max(errors(gradients(dora, LeanBody(dora, SMALL)), gradients(dora, None))) < TOLERANCE


def test_unknown_architecture() -> None:
    from families import made

    assert "model_type='gpt2'" in LeanBody(made("GPT-2"), SMALL).reason


def test_only_while_active_and_only_this_instance() -> None:
    model = with_lora("Llama")
    other, before = with_lora("Llama"), {name: id(type(m).forward) for name, m in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    body = LeanBody(model, SMALL)
    with body.active():
        assert sum("forward" in vars(m) for m in model.modules()) == len(body.served) == 9
        assert not any("forward" in vars(m) for m in other.modules())
        assert model.state_dict().keys() == state.keys()
    assert not any("forward" in vars(m) for m in model.modules())
    assert {name: id(type(m).forward) for name, m in model.named_modules()} == before


def test_layers_of_somebody_else_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    """A replaced MLP, a hook, a replaced forward: each is named, and its results are its own."""
    model = with_lora("Llama")
    first, second = model.base_model.model.model.layers
    calls = []
    first.self_attn.q_proj.register_forward_hook(lambda *_: calls.append("hook"))
    own = second.mlp.forward
    second.mlp.forward = lambda x: 2 * own(x)
    body = LeanBody(model, SMALL)
    assert body.foreign == ["base_model.model.model.layers.1.mlp"]
    assert body.left == {"a hook is registered on it": ["base_model.model.model.layers.0.self_attn"]}
    assert max(errors(gradients(model, body), gradients(model, None))) < TOLERANCE
    assert calls == ["hook", "hook"]
    first.mlp.register_forward_hook(lambda *_: None)
    with body.active():
        assert "forward" not in vars(first.mlp)
        assert "forward" in vars(first.input_layernorm)
    assert "1 modules, since the trainer was built: a hook is registered on it" in caplog.text


@pytest.mark.parametrize("what", ["LlamaMLP", "apply_rotary_pos_emb"])
def test_a_patched_class_is_left_alone(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_lora("Llama")
    if what == "LlamaMLP":
        own = modeling_llama.LlamaMLP.forward
        monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: 2 * own(self, x))
    else:
        monkeypatch.setattr(modeling_llama, what, lambda q, k, cos, sin, unsqueeze_dim=1: (q, k))
    body = LeanBody(model, SMALL)
    assert all("modeling_llama's own" in reason for reason in body.left)
    assert max(errors(gradients(model, body), gradients(model, None))) < TOLERANCE


def test_products_narrower_than_the_hidden_states(caplog: pytest.LogCaptureFixture) -> None:
    """bfloat16 products for float32 hidden states: LoRA's small share keeps its digits, as peft adds it in float32."""
    model = with_lora("Llama", quantized=True)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = torch.bfloat16
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data *= 1e-3
    expected = gradients(model, None)
    assert max(errors(gradients(model, LeanBody(model, SMALL)), expected)) < TOLERANCE
    assert "4-bit layers compute in torch.bfloat16 for inputs of torch.float32" in caplog.text


def dropping(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout["default"] = torch.nn.Dropout(0.5)


def another_kind(model: Any) -> None:
    model.add_adapter("second", tiny.lora(r=3, init_lora_weights=False, use_dora=True))
    model.set_adapter("second")


def unfrozen(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "layernorm" in name or "gate_proj.base_layer" in name:
            parameter.requires_grad_(True)


@pytest.mark.parametrize("change", [dropping, another_kind, unfrozen])
def test_what_changes_after_the_body_was_built(change: Callable[[Any], None], caplog: pytest.LogCaptureFixture) -> None:
    """The modules that cannot be served any more compute what they compute themselves, which is told once."""
    model = with_lora("Llama")
    body = LeanBody(model, SMALL)
    change(model)
    runs = []
    for each in (body, None, body):
        torch.manual_seed(4)
        runs.append(gradients(model, each))
    expected = runs.pop(1)
    for found in runs:
        assert relative(found[0], expected[0]) < TOLERANCE
        assert found[1].keys() == expected[1].keys()
        assert all(relative(found[1][name], true) < TOLERANCE for name, true in expected[1].items() if true.norm() > 0)
    told = [record.getMessage() for record in caplog.records]
    assert told
    assert len(told) == len(set(told))


@torch.no_grad()
def test_an_adapter_that_is_merged_for_a_while() -> None:
    """It counts once, and not at all where it is switched off, which peft does by taking it out of the weights."""
    model, ids = with_lora("Llama"), torch.arange(1, 20)[None]
    body = LeanBody(model, SMALL)
    expected = model(input_ids=ids).logits
    with model.disable_adapter():
        plain = model(input_ids=ids).logits
    model.merge_adapter()
    with body.active():
        assert relative(model(input_ids=ids).logits, expected) < TOLERANCE
        with model.disable_adapter():
            assert relative(model(input_ids=ids).logits, plain) < TOLERANCE
    model.merge_adapter()
    model.unmerge_adapter()
    with body.active():
        assert sum("forward" in vars(m) for m in model.modules()) == len(body.served)
        assert relative(model(input_ids=ids).logits, expected) < TOLERANCE


def test_an_activation_that_was_replaced_is_left_alone() -> None:
    model = with_lora("Phi3")
    first, second = model.base_model.model.model.layers
    first.mlp.activation_fn = torch.nn.GELU()
    second.mlp.activation_fn.register_forward_hook(lambda *_: None)
    body = LeanBody(model, SMALL)
    name = "base_model.model.model.layers"
    assert body.left == {
        "its activation is a GELU, not the configuration's 'silu'": [f"{name}.0.mlp"],
        "a hook is registered on it": [f"{name}.1.mlp"],
    }
    assert max(errors(gradients(model, body), gradients(model, None))) < TOLERANCE


def test_adapters_of_different_dtypes_on_one_layer() -> None:
    model = with_lora("Llama", target_modules=["o_proj"])
    model.add_adapter("second", tiny.lora(r=3, init_lora_weights=False, target_modules=["o_proj"]))
    model.base_model.set_adapter(["default", "second"])
    for name, parameter in model.named_parameters():
        if ".second." in name:
            parameter.data = parameter.data.bfloat16()
    body = LeanBody(model, SMALL)
    assert "its adapters are of different dtypes" in body.left
    assert relative(gradients(model, body)[0], gradients(model, None)[0]) < TOLERANCE


def test_second_derivatives_are_refused() -> None:
    model = with_lora("Llama")
    ids = torch.arange(1, 9)[None]
    weight = next(p for p in model.parameters() if p.requires_grad)
    with LeanBody(model, SMALL).active():
        (grad,) = torch.autograd.grad(model(input_ids=ids).logits.sum(), weight, create_graph=True)
        with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
            grad.sum().backward()


def test_a_frozen_model_keeps_nothing() -> None:
    """Without anything to train, nothing is saved for a backward."""
    model = untouched("Llama").requires_grad_(False)
    saved = []
    with LeanBody(model, SMALL).active(), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        model(input_ids=torch.arange(1, 9)[None])
    assert not saved
