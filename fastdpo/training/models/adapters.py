"""A fresh adapter on a model: all that its configuration names is found there, or refused before anything is changed.

peft ignores a name that matches nothing as long as another one matches, and reads "all-linear" only where it stands
alone.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastdpo.shown import listed
from fastdpo.training.models.files import one_line
from fastdpo.training.models.quantized import is_quantized

ALL_LINEAR = "all-linear"
#: Options that `fastdpo train` has under another name.
_FLAGS = {"target_modules": "lora_target_modules", "modules_to_save": "lora_modules_to_save"}


def with_adapter(model: PreTrainedModel, peft_config: PeftConfig | None) -> PreTrainedModel:
    """`model` with a fresh adapter, or itself without `peft_config`.

    Raises TypeError, or ValueError where nothing could be trained or something that is named is not there.
    """
    if peft_config is None:
        if is_quantized(model) and not isinstance(model, PeftModel):
            raise ValueError("model is quantised, so its weights cannot be trained. Pass peft_config=LoraConfig(...).")
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError(
                "model has no trainable parameter. Load the adapter with is_trainable=True, or pass peft_config."
            )
        return model
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(f"peft_config is a {type(peft_config).__name__}; give a peft.LoraConfig.")
    if isinstance(model, PeftModel):
        raise ValueError(
            "model has an adapter already. Train that further without peft_config, or merge_and_unload() it first."
        )
    if peft_config.is_prompt_learning:
        raise ValueError(f"peft_config={type(peft_config).__name__} adds virtual tokens; use LoRA.")
    peft_config = copy.deepcopy(peft_config)  # peft writes into it what it has matched
    expand_all_linear(model, peft_config)
    check_names(model, peft_config)
    try:
        return get_peft_model(model, peft_config)
    except (ValueError, TypeError, NotImplementedError) as error:
        given = _given(peft_config, "target_modules")
        raise ValueError(f"peft_config ({given}) does not fit the model: {one_line(error)}") from error


def linear_layers(model: PreTrainedModel) -> set[str]:
    """Names of the linear layers, without the output head, as peft's "all-linear"."""
    head = model.get_output_embeddings()
    return {name for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head}


def expand_all_linear(model: PreTrainedModel, config: Any) -> None:
    """Put all linear layers into the place of "all-linear" where it is one of several targets, in place."""
    targets = getattr(config, "target_modules", None)
    if targets is None or isinstance(targets, str) or ALL_LINEAR not in {name.lower() for name in targets}:
        return
    others = {name for name in targets if name.lower() != ALL_LINEAR}
    if not others:
        config.target_modules = ALL_LINEAR
        return
    alone = _converted(model, _with(config, target_modules=ALL_LINEAR))
    if alone.target_modules == ALL_LINEAR:
        alone.target_modules = linear_layers(model)
    alone.target_modules = {*alone.target_modules, *others}
    vars(config).update(vars(alone))


def check_names(model: PreTrainedModel, config: Any) -> None:
    """Raise ValueError for names, layers or patterns of the configuration that match nothing in the model."""
    modules = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    converted = _converted(model, config)
    targets, layers = getattr(converted, "target_modules", None), getattr(config, "layers_to_transform", None)
    taken = _targeted(converted, modules) if targets else set()
    if isinstance(targets, str):
        if targets.lower() == ALL_LINEAR:
            taken = linear_layers(model)
        elif not taken:
            raise ValueError(_nothing(model, config, "target_modules", [targets], modules))
    elif targets:
        lost = [name for name in sorted(targets) if not _targeted(_with(converted, target_modules={name}), modules)]
        if layers is not None and not taken and len(lost) == len(targets):
            lost = [name for name in lost if not _named(name, modules)]  # the layers are at fault, below
        if lost:
            raise ValueError(_nothing(model, config, "target_modules", lost, modules))
    for option in ("modules_to_save", "exclude_modules"):
        names = getattr(config, option, None) or ()
        if isinstance(names, str):
            lost = [] if any(_matches(option, names, name) for name in modules) else [names]
        else:
            lost = [name for name in names if not _named(name, modules)]
        if lost:
            raise ValueError(_nothing(model, config, option, lost, modules))
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    wanted = getattr(converted, "target_parameters", None) or ()
    if lost := [name for name in wanted if not _named(name, parameters)]:
        raise ValueError(_nothing(model, config, "target_parameters", lost, parameters))
    taken |= {name for name in parameters if any(_named(each, [name]) for each in wanted)}
    for index in [] if layers is None else [layers] if isinstance(layers, int) else layers:
        if not _targeted(_with(config, layers_to_transform=[index]), modules):
            raise ValueError(
                f"peft_config.layers_to_transform={layers!r}: no target module is in layer {index!r} of the "
                f"{type(model).__name__}, which has {_count(model)} layers, counted from 0."
            )
    for option in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, option, None) or {}
        for pattern in patterns:
            _matches(option, pattern, "")  # on its own, for the message
        lost = [p for p in patterns if not any(_matches(option, rf"(.*\.)?({p})", name) for name in taken)]
        if lost:
            raise ValueError(_nothing(model, config, option, lost, sorted(taken)))


def _converted(model: PreTrainedModel, config: Any) -> Any:
    """As peft has it in the end: names of experts that transformers 5 holds in one parameter are that parameter's."""
    converted = copy.deepcopy(config)
    try:
        convert_peft_config_for_transformers(converted, model=model, conversions=None)
    except ValueError as error:
        raise ValueError(f"peft_config ({_given(config, 'target_modules')}): {error}") from error
    return converted


def _with(config: Any, **changes: Any) -> Any:
    changed = copy.copy(config)
    vars(changed).update(changes)
    return changed


def _targeted(config: Any, modules: Iterable[str]) -> set[str]:
    """Those that peft would adapt: without what is excluded, saved in full, or in another layer."""

    def taken(name: str) -> Any:
        return _guarded("target_modules", lambda: check_target_module_exists(config, name))

    return {name for name in modules if taken(name)}


def _named(name: str, there: Iterable[str]) -> bool:
    """Whether `name` is one of the names that are there, or the last parts of one."""
    return any(each == name or each.endswith(f".{name}") for each in there)


def _matches(option: str, pattern: str, name: str) -> bool:
    return bool(_guarded(option, lambda: re.fullmatch(pattern, name)))


def _guarded(option: str, match: Callable[[], Any]) -> Any:
    try:
        return match()
    except re.error as error:
        raise ValueError(f"peft_config.{option}: {error.pattern!r} is no regular expression: {error}.") from error


def _count(model: PreTrainedModel) -> Any:
    return getattr(model.config.get_text_config(), "num_hidden_layers", "fewer")


def _given(config: Any, option: str) -> str:
    value = getattr(config, option, None)
    return f"{option}={sorted(value) if isinstance(value, (set, frozenset)) else value!r}"


def _nothing(model: PreTrainedModel, config: Any, option: str, lost: list[str], there: Iterable[str]) -> str:
    """The message of names that match nothing, with those of the model that are like them."""
    there = list(there)
    flag = f"peft_config.{option}" + (f" ({_FLAGS[option]})" if option in _FLAGS else "")
    if held := [name for name in lost if option == "target_modules" and _named(name, there)]:
        return (
            f"{flag}: {listed(held)} would get no adapter: modules_to_save, exclude_modules or layers_to_transform "
            "leave out every module of the name. Take it out of one of them."
        )
    what = "parameter" if option == "target_parameters" else "module"
    near = sorted({each for name in lost for each in _near(name, there)})
    advice = f" Near names: {listed(near)}." if near else f" There are: {listed(_last_parts(there), 12)}."
    return f"{flag}: {listed(lost)} matches no {what} of the {type(model).__name__}.{advice} Give names that are there."


def _near(name: str, there: Iterable[str]) -> list[str]:
    """Names of as many parts that are like it."""
    parts = name.count(".") + 1
    known = {".".join(each.split(".")[-parts:]) for each in there}
    return difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6)


def _last_parts(there: Iterable[str]) -> list[str]:
    return sorted({part for each in there if not (part := each.rsplit(".", 1)[-1]).isdigit()})
