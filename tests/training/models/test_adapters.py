"""What the configuration of a fresh adapter names is found in the model, or refused before the model is changed."""

from __future__ import annotations

from typing import Any

import families
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from fastdpo.training.models.adapters import expand_all_linear, with_adapter
from fastdpo.training.models.loading import lora_config
from fastdpo.training.options import ModelConfig

#: The linear layers of a Llama, without the head.
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def adapted(model: Any, config: Any) -> dict[str, set[int]]:
    """Last part of the name of a module that got an adapter → in which of the layers; -1 outside of them."""
    found: dict[str, set[int]] = {}
    for name, _ in with_adapter(model, config).named_parameters():
        if ".lora_A." in name or ".lora_embedding_A." in name:
            parts = name.split(".lora_")[0].split(".")
            found.setdefault(parts[-1], set()).add(int(parts[parts.index("layers") + 1]) if "layers" in parts else -1)
    return found


def test_all_linear_in_a_list_is_all_linear_layers_and_the_others() -> None:
    both = {0, 1}
    expected = dict.fromkeys(LINEAR, both)
    assert adapted(tiny.llama(), tiny.lora(target_modules="all-linear")) == expected
    for names, more in ((["all-linear"], {}), (["all-linear", "lm_head"], {"lm_head": {-1}}),
                        (["embed_tokens", "All-Linear"], {"embed_tokens": {-1}})):  # fmt: skip
        config = lora_config(ModelConfig(lora_target_modules=names))
        assert adapted(tiny.llama(), config) == expected | more
    pattern = lora_config(ModelConfig(lora_target_modules=r".*\.0\..*(q|v)_proj"))
    assert adapted(tiny.llama(), pattern) == {"q_proj": {0}, "v_proj": {0}}
    # Names are no patterns: a dot is one, and no other character
    dotted = lora_config(ModelConfig(lora_target_modules=["0.self_attn.q_proj"]))
    assert adapted(tiny.llama(), dotted) == {"q_proj": {0}}
    # GPT-2 has Conv1D where others have linear layers
    config = tiny.lora(target_modules=["all-linear", "wte"])
    expand_all_linear(families.made("GPT-2"), config)
    assert {name.rsplit(".", 1)[-1] for name in config.target_modules} == {"c_attn", "c_proj", "c_fc", "wte"}


def test_all_linear_in_a_list_reaches_experts_that_are_one_parameter() -> None:
    def mixture() -> Any:
        return MixtralForCausalLM(
            MixtralConfig(vocab_size=97, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                          num_attention_heads=2, num_key_value_heads=2, num_local_experts=2, router_aux_loss_coef=0.0)
        )  # fmt: skip

    alone, listed = (
        {
            name
            for name, p in with_adapter(mixture(), tiny.lora(target_modules=targets)).named_parameters()
            if p.requires_grad
        }
        for targets in ("all-linear", ["all-linear", "lm_head"])
    )
    assert any("experts" in name for name in alone)
    assert alone < listed
    assert all("lm_head" in name for name in listed - alone)
    # Names of transformers 4, which peft reads as those of 5
    assert adapted(mixture(), tiny.lora(target_modules=["q_proj", "w1", "w3"])).keys() >= {"q_proj"}
    with pytest.raises(ValueError, match=r"peft_config \(target_modules=\['q_proj', 'w1'\]\)"):
        with_adapter(mixture(), tiny.lora(target_modules=["q_proj", "w1"]))


WRONG = {
    "one of two": ({"target_modules": ["q_proj", "qq_proj"]}, r"lora_target_modules\): 'qq_proj' matches no module of "
                   "the LlamaForCausalLM. Near names: 'o_proj', 'q_proj', 'v_proj'"),
    "nothing like it": ({"target_modules": ["zzz"]}, "'zzz' matches no module.*There are: 'act_fn', 'down_proj'"),
    "beside all-linear": ({"target_modules": ["all-linear", "lm_hed"]}, "'lm_hed' matches no.*'lm_head'"),
    "several parts": ({"target_modules": ["self_attn.qproj"]}, "Near names: .*'self_attn.q_proj'"),
    "part of a name": ({"target_modules": ["proj"]}, "'proj' matches no module"),
    "regex": ({"target_modules": r".*\.q_prj"}, r"'\.\*\\\\\.q_prj' matches no module"),
    "no regex": ({"target_modules": "(q"}, r"peft_config.target_modules: '\(q' is no regular expression: missing \)"),
    "control characters": ({"target_modules": ["q\x1b[2J"]}, r"'q\\x1b\[2J' matches no module"),
    "no target": ({"target_modules": []}, "No `target_modules` passed"),
    "no layer": ({"target_modules": ["mlp"]}, r"target_modules=\['mlp'\]\) does not fit the model: Target module"),
    "rank": ({"target_modules": ["q_proj"], "r": 0}, "does not fit the model: `r` should be a positive integer"),
    "saved": ({"modules_to_save": ["lm_hed"]}, r"lora_modules_to_save\): 'lm_hed' matches.*'lm_head'"),
    "saved, end of a name": ({"modules_to_save": ["head"]}, "'head' matches no module"),
    "target that is saved": ({"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
                             "'lm_head' would get no adapter: modules_to_save"),
    "excluded": ({"exclude_modules": ["k_porj"]}, "exclude_modules: 'k_porj' matches no module.*'k_proj'"),
    "excluded, regex": ({"exclude_modules": "zz.*"}, "exclude_modules: 'zz.*' matches no module"),
    "target that is excluded": ({"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]},
                                "'k_proj' would get no adapter: modules_to_save, exclude_modules"),
    "layer": ({"target_modules": ["q_proj"], "layers_to_transform": [0, 7]},
              r"layers_to_transform=\[0, 7\]: no target module is in layer 7 of the LlamaForCausalLM, which has 2"),
    "only layer": ({"target_modules": ["q_proj"], "layers_to_transform": 2}, "no target module is in layer 2"),
    "rank pattern": ({"target_modules": ["q_proj"], "rank_pattern": {"k_proj": 2}},
                     "rank_pattern: 'k_proj' matches no module.*'q_proj'"),
    "alpha pattern": ({"alpha_pattern": {"(": 2}}, r"alpha_pattern: '\(' is no regular expression"),
    "parameter": ({"target_modules": ["q_proj"], "target_parameters": ["q_prj.weight"]},
                  "target_parameters: 'q_prj.weight' matches no parameter.*'q_proj.weight'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_names_that_match_nothing_are_refused(name: str) -> None:
    options, message = WRONG[name]
    model = tiny.llama()
    with pytest.raises(ValueError, match=message):
        with_adapter(model, tiny.lora(**options))
    if "does not fit" not in message:  # peft finds that out while it puts adapters in
        assert not any("lora_" in name for name, _ in model.named_parameters())


def test_names_of_other_adapters_are_held_too() -> None:
    config = IA3Config(target_modules=["k_proj", "zz"], feedforward_modules=[], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="'zz' matches no module"):
        with_adapter(tiny.llama(), config)


def test_what_is_there_is_taken_as_named() -> None:
    config = tiny.lora(
        target_modules=["q_proj", "k_proj"],
        exclude_modules=["layers.0.self_attn.q_proj"],
        rank_pattern={r"layers\.1\..*q_proj": 2},
        alpha_pattern={"k_proj": 3},
        modules_to_save=["lm_head"],
    )
    model = with_adapter(tiny.llama(), config)
    layers = model.base_model.model.model.layers
    assert isinstance(layers[0].self_attn.q_proj, nn.Linear)
    assert layers[1].self_attn.q_proj.r == {"default": 2}
    assert layers[0].self_attn.k_proj.scaling == {"default": 3 / 4}
    assert model.base_model.model.lm_head.modules_to_save.default.weight.requires_grad
    assert config.target_modules == {"q_proj", "k_proj"}  # the user's own stays as it was
    assert adapted(tiny.llama(), tiny.lora(target_modules=["q_proj"], layers_to_transform=1)) == {"q_proj": {1}}


NAMES = st.sampled_from(
    sorted(LINEAR | {"embed_tokens", "lm_head", "all-linear", "self_attn.q_proj", "layers.1.mlp.up_proj"})
)
STRAY = st.text("abcq_.proj", min_size=1, max_size=8).filter(lambda name: name.rsplit(".", 1)[-1] not in LINEAR)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(NAMES, min_size=1, max_size=4), st.lists(STRAY, max_size=1), st.randoms())
def test_any_names(valid: list[str], stray: list[str], order: Any) -> None:
    """Names of the model in any order and number are all adapted, and nothing else; one other name refuses them."""
    names = [*valid, *stray]
    order.shuffle(names)
    config = LoraConfig(target_modules=names, r=2)
    if stray:
        with pytest.raises(ValueError, match="matches no module of the LlamaForCausalLM"):
            with_adapter(tiny.llama(), config)
        return
    both = {0, 1}
    expected: dict[str, set[int]] = dict.fromkeys(LINEAR, both) if "all-linear" in valid else {}
    for name in valid:
        last, where = name.rsplit(".", 1)[-1], both
        if last in ("embed_tokens", "lm_head"):
            where = {-1}
        if name.startswith("layers.1"):
            where = {1}
        if name != "all-linear":
            expected = expected | {last: expected.get(last, set()) | where}
    assert adapted(tiny.llama(), config) == expected
