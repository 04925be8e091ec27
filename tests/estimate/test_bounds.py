"""`fastdpo estimate` refuses what `train` does, and takes bounded memory and time whatever it is asked."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, MixtralConfig

from fastdpo.estimate import counter as counting
from fastdpo.estimate import timing
from fastdpo.estimate.activations import Counts, count_live
from fastdpo.estimate.counter import LARGEST_SLICE, ConfigCounter, Training, counted_tokens
from fastdpo.estimate.devices import GPUS
from fastdpo.estimate.memory import MemoryEstimator, Run, Surroundings
from fastdpo.estimate.options import MAX_CARDS, MAX_PAIRS, EstimateConfig
from fastdpo.estimate.prediction import Estimate
from fastdpo.estimate.rows import PairShape, Row
from fastdpo.estimate.sites import Site
from fastdpo.estimate.timing import time_micro_batch
from fastdpo.training.models.loading import load_config
from fastdpo.training.models.setup import refuse_router_loss
from fastdpo.training.options import ModelConfig

LLAMA: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
SMALL: dict[str, Any] = {"device": "rtx-3060", "max_length": 24, "max_prompt_length": 10}
SHAPE = PairShape(10, 7)


def folder(path: Path, content: str | dict[str, Any]) -> str:
    text = content if isinstance(content, str) else json.dumps(LlamaConfig(**LLAMA).to_dict() | content)
    (path / "config.json").write_text(text, encoding="utf-8")
    return str(path)


def estimate(model: str, options: dict[str, Any] | None = None, **run: Any) -> Estimate:
    return Estimate(ModelConfig(model_name_or_path=model, **(options or {})), EstimateConfig(**(SMALL | run)))


def test_quantised_weights_cannot_be_trained() -> None:
    with pytest.raises(ValueError, match="quantised weights cannot be trained"):
        ModelConfig(load_in_4bit=True, use_lora=False)
    assert ModelConfig(load_in_4bit=True, use_lora=False, adapter_name_or_path="a")  # which is trained


REFUSED_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "length": ({"max_length": 10**18}, "max_length is more than 1,048,576"),
    "prompt": ({"max_length": 9, "max_prompt_length": 10**18}, "max_prompt_length is more than"),
    "batch": ({"per_device_train_batch_size": MAX_PAIRS + 1}, "per_device_train_batch_size is more than 16,777,216"),
    "no batch": ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0: at least 1"),
    "budget": ({"micro_batch_tokens": "9" * 5000}, "micro_batch_tokens has more than 18 digits"),
    "no digit": ({"micro_batch_tokens": "²"}, "micro_batch_tokens='²': 'auto' or a number of at least 1"),
    "cards": ({"gpu_memory": [f"{i}GB" for i in range(1, MAX_CARDS + 2)]}, "gpu_memory names 33 cards; at most 32"),
    "infinite card": ({"gpu_memory": ["infGB"]}, "gpu_memory='infGB': a size such as 12GB"),
    "workspace": ({"head_workspace": "1e999GB"}, "head_workspace='1e999GB': a size"),
}


@pytest.mark.parametrize("kind", REFUSED_OPTIONS)
def test_absurd_options_are_named(kind: str) -> None:
    changes, message = REFUSED_OPTIONS[kind]
    with pytest.raises(ValueError, match=message):
        EstimateConfig(**(SMALL | changes))


REFUSED_MODELS: dict[str, tuple[str | dict[str, Any], str]] = {
    "wide": ({"hidden_size": 10**9}, "hidden_size in the configuration of '.*' is 1e.09; predicted is up to 131,072"),
    "deep": ({"num_hidden_layers": 10**6}, "num_hidden_layers in the configuration of .*up to 512"),
    "no layer": ({"num_hidden_layers": 0}, "num_hidden_layers=0 in the configuration of '.*': at least 1"),
    "fewer": ({"num_hidden_layers": -1}, "num_hidden_layers=-1 in the configuration of"),
    "no token": ({"vocab_size": 0}, "vocab_size=0 in the configuration of"),
    "tokens": ({"vocab_size": 10**12}, "vocab_size in the configuration of"),
    "no key": ({"num_key_value_heads": 0}, "build no model from the LlamaConfig of '.*': ZeroDivisionError"),
    "activation": ({"hidden_act": "nix"}, "build no model from the LlamaConfig of '.*': KeyError: 'nix'"),
    "padding": ({"pad_token_id": 10**9}, "build no model from the LlamaConfig of '.*': AssertionError"),
    "type": ({"hidden_size": "big"}, "model='.*': config.json: .*hidden_size"),
    "heads": ({"num_attention_heads": 3}, "model='.*': config.json: .*not a multiple"),
    "dtype": ({"dtype": "float7"}, "can read no configuration .*float7"),
    "null": ("null", "'config.json' holds a NoneType, not a JSON object"),
    "nested": ("[" * 10**5, "'config.json' is no JSON .*recursion"),
    "no JSON": ("{", "'config.json' is no JSON"),
    "encoder-decoder": ('{"model_type": "t5"}', "T5Config, which has no causal language-model head"),
}


@pytest.mark.parametrize("kind", REFUSED_MODELS)
def test_odd_configurations_are_a_sentence(kind: str, tmp_path: Path) -> None:
    content, message = REFUSED_MODELS[kind]
    with pytest.raises((ValueError, OSError), match=message):
        estimate(folder(tmp_path, content))


@pytest.mark.parametrize("kind", ["type", "heads", "dtype", "null", "nested", "no JSON", "encoder-decoder"])
def test_train_refuses_these_with_the_same_sentence(kind: str, tmp_path: Path) -> None:
    name = folder(tmp_path, REFUSED_MODELS[kind][0])
    with pytest.raises((ValueError, OSError)) as found:
        estimate(name)
    with pytest.raises(type(found.value)) as expected:
        load_config(name)
    assert str(found.value).startswith(str(expected.value))


def test_a_dropped_router_loss_is_refused_with_the_same_sentence(tmp_path: Path) -> None:
    config = MixtralConfig(**LLAMA, num_local_experts=2)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="auxiliary loss") as found:
        estimate(str(tmp_path))
    with pytest.raises(ValueError, match="auxiliary loss") as expected:
        refuse_router_loss(config, None)
    assert str(found.value) == str(expected.value)
    with pytest.raises(ValueError, match=r"cannot be predicted: MixtralAttention gives its attention"):
        estimate(str(tmp_path), router_aux_loss_coef=0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_r": 10**18}, "lora_r is more than 131,072"),
        ({"lora_alpha": 10**18}, "lora_alpha is more than"),
        ({"lora_alpha": 10**400}, "lora_alpha=10*… .*a whole number"),
        ({"lora_target_modules": ["nix"]}, "nix"),
    ],
)
def test_an_adapter_that_cannot_be_made_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        estimate(folder(tmp_path, {}), options)


@given(st.integers(0, 10**6), st.integers(0, 40), st.integers(1, 40))
def test_scored_tokens_in_closed_form(tokens: int, prompt: int, completion: int) -> None:
    row = Row(tokens % 5000 + 1, PairShape(prompt, completion))
    assert row.scored == sum(chosen + rejected for _, chosen, rejected in row.pairs())


def counter(flash: bool) -> ConfigCounter:
    return ConfigCounter(LlamaConfig(**LLAMA), Training(ModelConfig(), torch.float32, flash=flash))


@pytest.mark.parametrize("flash", [False, True])
def test_a_longer_row_than_is_counted_lies_on_the_line(flash: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a count of it, as of any other."""
    monkeypatch.setattr(counting, "COUNTED_PAIRS", 8)
    made, row = counter(flash), Row(12 * SHAPE.tokens, SHAPE)
    assert counted_tokens(SHAPE) == 8 * SHAPE.tokens
    found, (skeleton,) = made.count(row), made.skeletons
    exact = count_live(skeleton.model, row, **made.options(skeleton))
    times = time_micro_batch(made, row, GPUS[0], training=True)
    monkeypatch.setattr(counting, "COUNTED_PAIRS", 32)
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(exact), rel=1e-3)
    assert times.flops == pytest.approx(time_micro_batch(made, row, GPUS[0], training=True).flops, rel=1e-9)


def test_more_to_compute_takes_no_less() -> None:
    made = MemoryEstimator(
        LlamaConfig(**LLAMA), Training(ModelConfig(), torch.float32, flash=True), Surroundings(1_000_000, "a test")
    )
    by_length = [made.total(Run(PairShape.longest(n, 8), 4, 1)) for n in (16, 17, 100, 5000)]
    by_batch = [made.total(Run(SHAPE, n, 10**17)) for n in (1, 2, 31, 33, 1000, MAX_PAIRS)]
    by_budget = [made.total(Run(SHAPE, MAX_PAIRS, n)) for n in (1, 24, 100, 768, 769, 10**6, 10**17)]
    for totals in (by_length, by_batch, by_budget):
        assert totals == sorted(totals)
        assert totals[-1] > 1.5 * totals[0]


# Counting itself is replaced by a line: what is left is who is asked to count what


@contextlib.contextmanager
def bounded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Row]]:
    """Every count stays within the bounds; what was asked for."""
    asked: list[Row] = []

    def check(row: Row) -> None:
        asked.append(row)
        assert row.tokens <= 4 * LARGEST_SLICE

    def line(model: Any, row: Row, **_: Any) -> Counts:
        check(row)
        site = Site("", "", "")
        return Counts(1000 * row.tokens + 7, {site: 1500 * row.tokens + 9}, {site: 1100 * row.tokens})

    @contextlib.contextmanager
    def nothing(model: Any, row: Row, **_: Any) -> Iterator[Any]:
        check(row)
        yield lambda: torch.ones(1, requires_grad=True) * row.tokens

    with monkeypatch.context() as patch:
        patch.setattr(counting, "count_sites", line)
        patch.setattr(timing, "micro_batch", nothing)
        yield asked


number = st.one_of(st.integers(-2, 3000), st.integers(0, 25).map(lambda e: 10**e), st.integers(-(10**30), 10**30))
size = st.one_of(
    st.builds("{}{}".format, st.floats(), st.sampled_from(["GB", "GiB", "MB", "", "XB"])), st.text(max_size=4)
)
options = st.fixed_dictionaries(
    {},
    optional={
        "gpu_memory": st.lists(size, max_size=3),
        "max_length": number,
        "max_prompt_length": st.none() | number,
        "micro_batch_tokens": st.just("auto") | number.map(str) | st.text(max_size=4),
        "per_device_train_batch_size": number,
        "gradient_checkpointing": st.sampled_from(["auto", "true", "false", "maybe"]),
        "activation_offloading": st.booleans(),
        "head_workspace": size,
        "bf16": st.sampled_from([None, True, False]),
    },
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return folder(tmp_path_factory.mktemp("llama"), {})


sensible = st.builds(
    lambda length, share, cards, **others: {
        "max_length": length,
        "max_prompt_length": None if share is None else max(1, int((length - 1) * share)),
        "gpu_memory": [f"{card}GB" for card in cards],
        **others,
    },
    length=st.integers(2, 2**20),
    share=st.none() | st.floats(0.0, 1.0),
    cards=st.lists(st.floats(0.001, 9e9), max_size=2),
    micro_batch_tokens=st.just("auto") | st.integers(1, 10**18 - 1).map(str),
    per_device_train_batch_size=st.integers(1, MAX_PAIRS),
    gradient_checkpointing=st.sampled_from(["auto", "true"]),
    activation_offloading=st.booleans(),
)
any_number_of = partial(settings, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check_figures(config: EstimateConfig, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with bounded(monkeypatch) as asked:
        found = Estimate(ModelConfig(model_name_or_path=model), config).as_dict()
    assert len(asked) <= 40 * (1 + len(config.gpu_memory))
    times = (*found["seconds_per_scoring_pass"].values(), *found["seconds_per_training_pass"].values())
    for figure in (*found["parts"].values(), found["peak_bytes"], *times):
        assert math.isfinite(figure)
        assert figure >= 0


@any_number_of(max_examples=25)
@given(run=sensible)
def test_any_run_that_can_be_gives_figures(run: dict[str, Any], llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_figures(EstimateConfig(**({"device": "rtx-3060"} | run)), llama, monkeypatch)


@any_number_of(max_examples=200)
@given(run=options)
def test_any_options_give_figures_or_a_sentence(
    run: dict[str, Any], llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal, config = "", None
    try:
        config = EstimateConfig(**({"device": "rtx-3060", "max_prompt_length": None} | run))
    except ValueError as error:
        refusal = str(error)
    if config is None:
        assert any(name in refusal for name in EstimateConfig.__dataclass_fields__)
    else:
        check_figures(config, llama, monkeypatch)
