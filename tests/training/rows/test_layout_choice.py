"""Which layout `auto` takes for which model, what `on` refuses, and the check on the first batch."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from families import MODELS, SIZES, batch
from peft import PromptTuningConfig, get_peft_model
from same_run import assert_same_run
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MptConfig,
    MptForCausalLM,
)
from worker import state

from fastdpo.training.rows import PLAIN, Layout, LayoutChoice
from fastdpo.training.rows.attention import SEGMENT_ATTENTION
from fastdpo.training.rows.choice import obstacle
from fastdpo.training.scoring import CompletionScorer

SEGMENTS = Layout(sharing=True, packing=True)
MASK = Layout(sharing=True, masked=True)  # packed only if asked: it is quadratic in the row


def choose(model: Any, folder: Path, *others: Any, **options: Any) -> Layout:
    torch.manual_seed(0)
    choice = LayoutChoice(tiny.config(folder, **options), CompletionScorer(), [model, *others], tiny.ranks())
    pairs = batch()
    own = [each.config._attn_implementation for each in (model, *others)]
    random, training = torch.get_rng_state(), model.training
    try:
        layout = choice.settle(pairs)
    finally:
        assert [each.config._attn_implementation for each in (model, *others)] == own
        assert torch.equal(random, torch.get_rng_state())
        assert model.training is training
    assert choice.settle(pairs) is layout
    return layout


def told(caplog: pytest.LogCaptureFixture, level: int = logging.INFO) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "fastdpo.training.rows.choice" and r.levelno == level]


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fastdpo")


#: Models whose rows hold one sequence, and why.
OBSTACLES: dict[str, tuple[Any, str]] = {
    "Bloom": (
        lambda: BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)),
        "BloomForCausalLM: its ALiBi counts distances along the row",
    ),
    "MPT": (
        lambda: MptForCausalLM(MptConfig(vocab_size=97, d_model=32, n_layers=2, n_heads=4, max_seq_len=64)),
        "MptForCausalLM: its ALiBi",
    ),
    "Falcon with ALiBi": (
        lambda: FalconForCausalLM(
            FalconConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True)
        ),
        "FalconForCausalLM: its ALiBi",
    ),
    "Mamba": (
        lambda: MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4)),
        "MambaForCausalLM: it carries a recurrent state along the row",
    ),
    "convolutions": (
        lambda: Lfm2ForCausalLM(
            Lfm2Config(**SIZES | {"intermediate_size": 64}, layer_types=["conv", "full_attention"])
        ),
        "Lfm2ForCausalLM: it has layers of type conv",
    ),
    "dynamic rotary frequencies": (
        lambda: tiny.llama(
            vocab_size=97, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
        ),
        "LlamaForCausalLM: its rotary frequencies depend on the longest position",
    ),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_models_that_mix_tokens_along_the_row(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made, reason = OBSTACLES[name]
    assert choose(made(), tmp_path) == PLAIN
    assert any(each.startswith("one row per answer: ") and reason in each for each in told(caplog))
    assert not told(caplog, logging.WARNING)
    for option in ("prefix_sharing", "packing"):
        with pytest.raises(ValueError, match=f"{option}='on' cannot be had: .*{reason}.*Set it to 'auto' or 'off'"):
            choose(made(), tmp_path, **{option: "on"})
    assert choose(made(), tmp_path, prefix_sharing="off", packing="off") == PLAIN


def test_an_adapter_of_virtual_tokens() -> None:
    tuned = get_peft_model(tiny.llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert obstacle(tuned) == "its adapter prepends virtual tokens"
    assert obstacle(get_peft_model(tiny.llama(), tiny.lora())) == ""


@pytest.mark.parametrize("name", MODELS)
def test_models_that_can(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The check on the first batch agrees, with rounding in 16 bits too."""
    expected = MASK if name == "Gemma2" else SEGMENTS
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        torch.manual_seed(0)
        assert choose(MODELS[name]().to(dtype), tmp_path) == expected, dtype
    assert not told(caplog, logging.WARNING)
    assert f"rows of a micro-batch: {expected}" in told(caplog)
    if name == "Gemma2":
        assert any("Gemma2ForCausalLM: it caps its attention logits" in each for each in told(caplog))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_dense_mask_where_attention_is_more_than_a_softmax(
    implementation: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def model(**options: Any) -> Any:
        made = tiny.llama(vocab_size=97, **options).train()
        made.set_attn_implementation(implementation)
        return made

    assert choose(model(attention_dropout=0.1), tmp_path, disable_dropout=False) == MASK
    assert any("it drops attention weights at random" in each for each in told(caplog))
    assert choose(model(attention_dropout=0.1), tmp_path) == SEGMENTS, "without dropout there is nothing to drop"
    assert choose(model(), tmp_path, disable_dropout=False) == SEGMENTS
    assert not told(caplog, logging.WARNING)


def test_what_the_options_ask_for(tmp_path: Path) -> None:
    llama, gemma = tiny.llama(vocab_size=97), MODELS["Gemma2"]()
    cases: list[tuple[dict[str, str], Layout, Layout]] = [
        ({}, SEGMENTS, MASK),
        ({"packing": "on"}, SEGMENTS, Layout(True, True, True)),
        ({"packing": "off"}, Layout(True), MASK),
        ({"prefix_sharing": "off"}, Layout(packing=True), PLAIN),
        ({"prefix_sharing": "off", "packing": "on"}, Layout(packing=True), Layout(packing=True, masked=True)),
        ({"prefix_sharing": "on"}, SEGMENTS, MASK),
        ({"prefix_sharing": "on", "packing": "on"}, SEGMENTS, Layout(True, True, True)),
        ({"prefix_sharing": "off", "packing": "off"}, PLAIN, PLAIN),
    ]
    for options, of_llama, of_gemma in cases:
        assert choose(llama, tmp_path, **options) == of_llama, options
        assert choose(gemma, tmp_path, **options) == of_gemma, options


def test_attention_that_takes_neither(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gemma = MODELS["Gemma2"]()
    gemma.config._attn_implementation = "flash_attention_2"
    choice = LayoutChoice(tiny.config(tmp_path), CompletionScorer(), [gemma], tiny.ranks())
    candidates = choice._candidates(SEGMENTS)
    assert [layout for layout, _ in candidates] == [SEGMENTS, MASK]
    assert "caps its attention logits" in candidates[0][1]
    assert "its attention implementation 'flash_attention_2' takes no dense mask" in candidates[1][1]


# The check on the first batch


class IgnoresPositions(LlamaForCausalLM):
    def forward(self, *args: Any, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class MixesNeighbours(LlamaForCausalLM):
    """Every token sees the one before it in the row, beside attention."""

    def forward(self, input_ids: Tensor, inputs_embeds: None = None, **kwargs: Any) -> Any:
        embedded = self.get_input_embeddings()(input_ids)
        before = torch.nn.functional.pad(embedded, (0, 0, 1, 0))[:, :-1]
        return super().forward(inputs_embeds=embedded + 0.5 * before, **kwargs)


class DropsArguments(LlamaForCausalLM):
    """As models that pass to their layers what they know only."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
        kwargs.pop("segments", None)
        kwargs.pop("attention_mask", None)
        return super().forward(input_ids=input_ids, position_ids=position_ids, **kwargs)


@pytest.mark.parametrize("kind", [IgnoresPositions, MixesNeighbours, DropsArguments])
def test_a_model_that_does_otherwise_than_it_tells(
    kind: type, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Found out on the first batch: a warning, and training as with one row per completion."""

    def model() -> Any:
        torch.manual_seed(0)
        return kind(tiny.llama().config)

    options: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 2}
    results = []
    for name, mode in (("auto", {}), ("off", {"prefix_sharing": "off", "packing": "off"})):
        trainer = tiny.trainer(tmp_path / name, model=model(), **options, **mode)
        trainer.train()
        assert trainer.parts.layouts.layout == PLAIN
        results.append((state(trainer), trainer.state.log_history))
    warnings = told(caplog, logging.WARNING)
    assert [each.split(" is not used: ")[0] for each in warnings] == [str(SEGMENTS), str(MASK)]
    reason = "log-probs differ from those of unshared rows by"
    assert reason in warnings[1]
    assert ("called fastdpo_segments without segments" if kind is DropsArguments else reason) in warnings[0]
    assert_same_run(results[1], results[0])
    for option in ("prefix_sharing", "packing"):
        trainer = tiny.trainer(tmp_path / option, model=model(), **options, **{option: "on"})
        with pytest.raises(ValueError, match=rf"(?s){option}='on' cannot be had: .*differ from those of unshared rows"):
            trainer.train()
        assert trainer.model.config._attn_implementation == "sdpa"


def test_a_model_full_of_nan_is_not_the_layouts_matter(tmp_path: Path) -> None:
    model = tiny.llama(vocab_size=97)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    assert choose(model, tmp_path) == SEGMENTS


# In a run


def test_models_attend_in_their_own_way_after_a_step(tmp_path: Path) -> None:
    """And after an error within one; evaluation ahead of training settles the layout too."""
    seen = []
    trainer = tiny.trainer(tmp_path, ref_model=tiny.llama(seed=1), eval_dataset=tiny.pairs(4, seed=9), max_steps=2)
    models = [trainer.model, trainer.parts.reference.ref_model]
    forward = trainer.parts.passes.forward

    def implementations() -> list[str]:
        return [each.config._attn_implementation for each in models]

    def spied(model: Any, micro: Any, **options: Any) -> Any:
        seen.append((implementations(), micro.segments is not None))
        return forward(model, micro, **options)

    trainer.parts.passes.forward = spied
    own = implementations()
    assert SEGMENT_ATTENTION not in own
    trainer.evaluate()
    assert trainer.parts.layouts.layout == SEGMENTS
    evaluated = len(seen)
    assert evaluated
    assert implementations() == own
    trainer.train()
    assert len(seen) > evaluated
    assert all(used == ([SEGMENT_ATTENTION] * 2, True) for used in seen)
    assert implementations() == own

    def broken(*_: Any, **__: Any) -> Any:
        assert implementations() == [SEGMENT_ATTENTION] * 2
        raise RuntimeError("broken")

    trainer.parts.passes.forward = broken
    for call in (trainer.train, trainer.evaluate):
        with pytest.raises(RuntimeError, match="broken"):
            call()
        assert implementations() == own


#: Another architecture as the reference, and the layout of both.
OTHERS: dict[str, tuple[Any, Layout]] = {
    "GPT-2": (
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=257, n_embd=32, n_layer=1, n_head=4, n_positions=128)),
        SEGMENTS,
    ),
    "Gemma2": (
        lambda: transformers.Gemma2ForCausalLM(
            transformers.Gemma2Config(**SIZES | {"vocab_size": 257}, head_dim=8, query_pre_attn_scalar=8)
        ),
        MASK,
    ),
    "Bloom": (lambda: BloomForCausalLM(BloomConfig(vocab_size=257, hidden_size=32, n_layer=1, n_head=4)), PLAIN),
}


@pytest.mark.parametrize("name", OTHERS)
def test_reference_of_another_architecture(name: str, tmp_path: Path) -> None:
    made, layout = OTHERS[name]
    results = []
    for folder, mode in (("auto", {}), ("off", {"prefix_sharing": "off", "packing": "off"})):
        torch.manual_seed(0)
        trainer = tiny.trainer(
            tmp_path / folder, ref_model=made(), optim="sgd", learning_rate=0.05, max_steps=2, **mode
        )
        trainer.train()
        assert trainer.parts.layouts.layout == (layout if folder == "auto" else PLAIN)
        results.append((state(trainer), trainer.state.log_history))
    assert_same_run(*results)
