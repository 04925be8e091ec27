"""One reader: a flag, a line of YAML and a Python value that say the same give one config, or one sentence."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdpo.commands.options import OptionError, make_parser, parse
from fastdpo.commands.train import check_together
from fastdpo.demo.run import DemoConfig
from fastdpo.estimate.options import EstimateConfig
from fastdpo.training.options import DataConfig, FastDPOConfig, ModelConfig
from fastdpo.training.options.kinds import Kind, kinds_of

CONFIGS = (ModelConfig, DataConfig, FastDPOConfig)
PARSER = make_parser("fastdpo train", "", *CONFIGS)
KINDS: dict[str, Kind] = {name: kind for config in CONFIGS for name, kind in kinds_of(config).items()}
#: Of the machine, or of the outside: they start processes of a pool, read files, or set the library's log level.
UNTRIED = {"use_cpu", "output_dir", "ddp_backend", "local_rank", "deepspeed", "ddp_timeout", "full_determinism"}
OPTIONS = sorted(set(KINDS) - UNTRIED)
BASE = ["--use_cpu", "--output_dir", "out"]


def from_file(path: Path, text: str, *flags: str) -> tuple[Any, ...]:
    path.write_text(text, encoding="utf-8")
    return parse(PARSER, [str(path), *BASE, *flags])


def outcome(make: Any) -> Any:
    """The configs, or the sentence without the file and line."""
    try:
        return make()
    except ValueError as error:
        return str(error).partition("run.yaml, line 1: ")[2] or str(error)


def words(kind: Kind) -> st.SearchStrategy[str]:
    """Texts for an option, right and wrong."""
    odd = st.sampled_from(
        ["", " ", "off", "no", "yes", "1e-5", "8", "8.0", "8.5", "-1", "nan", "inf", "1e400", "9" * 5000, "0x10",
         "null ", "none", "TRUE", "on", "{", '{"a": 1}', '{"a": 1, "a": 2}', "[1]", "٣", "½", "é\u202e", "\x1b[2J",
         "#", "a: b", "'", "~/x", "auto", "1_0", "!x", "&a", "*a", "- a", "%", "@", "`", "|", ">"]
    )  # fmt: skip
    letters = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=8)
    right = {bool: st.sampled_from(["true", "false"]), int: st.integers(-3, 2000).map(str)}
    right |= {float: st.floats(-1, 3).map(repr), dict: st.just('{"num_cycles": 2}')}
    named = st.sampled_from(kind.choices) if kind.choices else right.get(kind.base or str, letters)
    return st.one_of(named, named, odd, letters).filter(lambda text: text != "--")


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_flag_and_line_of_yaml_say_the_same(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    name = data.draw(st.sampled_from(OPTIONS))
    value = data.draw(words(KINDS[name]))
    path = tmp_path_factory.getbasetemp() / "run.yaml"
    quoted = f"{data.draw(st.sampled_from([name, name.replace('_', '-')]))}: {yaml_text(value)}"
    flag = outcome(lambda: parse(PARSER, [*BASE, f"--{name}={value}"]))
    line = outcome(lambda: from_file(path, quoted))
    if isinstance(flag, str) or isinstance(line, str):
        assert line == flag
        assert name in flag or "activation_checkpointing" in name, "the option is named"
    else:
        assert line == flag
        assert [each.resolved() for each in line[2:]] == [each.resolved() for each in flag[2:]]


def yaml_text(value: str) -> str:
    """A double-quoted scalar."""
    return yaml.safe_dump(value, default_style='"', allow_unicode=True, width=10**6).strip()


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_lists_say_the_same(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    name = data.draw(st.sampled_from([name for name in OPTIONS if KINDS[name].many]))
    word = words(KINDS[name]).filter(lambda text: not text.startswith("-"))
    values = data.draw(st.lists(word, min_size=2, max_size=3))
    path = tmp_path_factory.getbasetemp() / "run.yaml"
    flag = outcome(lambda: parse(PARSER, [*BASE, f"--{name}", *values]))
    assert outcome(lambda: from_file(path, f"{name}: [{', '.join(map(yaml_text, values))}]")) == flag


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_shape_of_a_value_is_read_or_refused_by_name(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    name = data.draw(st.sampled_from(OPTIONS))
    scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))
    nested = st.recursive(
        scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=3), max_leaves=5
    )
    text = yaml.safe_dump({name: data.draw(nested)}, allow_unicode=data.draw(st.booleans()))
    found = outcome(lambda: from_file(tmp_path_factory.getbasetemp() / "run.yaml", text))
    assert not isinstance(found, str) or name in found or "activation_checkpointing" in name or "keys" in found


@settings(max_examples=150, deadline=None)
@given(
    content=st.one_of(
        st.binary(max_size=40), st.text(alphabet="a:-[]{}&*!<>|#'\"\n\t ?,b1%@", max_size=30).map(str.encode)
    )
)
def test_any_bytes_are_options_or_one_sentence(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    found = outcome(lambda: parse(PARSER, [str(path), *BASE]))
    assert not isinstance(found, str) or (found.isprintable() and "any.yaml" in found)


LINES = {
    "the same words as flags": (
        "packing: off\nsave_strategy: no\ntrain_split: yes\nlearning_rate: 1e-5\nmemory_limit: 4000000000\n"
        "loss_type: ipo\nlora_target_modules: [q_proj, v_proj]\nmax_length: null\ngradient_checkpointing: True\n",
        {"packing": "off", "save_strategy": "no", "train_split": "yes", "learning_rate": 1e-5, "loss_type": ["ipo"],
         "memory_limit": "4000000000", "lora_target_modules": ["q_proj", "v_proj"], "max_length": None,
         "gradient_checkpointing": "true"},
    ),
    "lists for what Python takes lists for": (
        "debug: [underflow_overflow]\nfsdp: []\nreport_to:\npacking: yes\nprefix_sharing: false\nmemory_limit: 4e9\n",
        {"debug": ["underflow_overflow"], "fsdp": [], "report_to": "none", "packing": "on", "prefix_sharing": "off",
         "memory_limit_bytes": 4_000_000_000},
    ),
    "beyond numbers": ("max_grad_norm: .inf\n", {"max_grad_norm": float("inf")}),
    "beyond numbers in a mapping": (
        "lr_scheduler_type: cosine_with_restarts\nlr_scheduler_kwargs: {num_cycles: -.INF, a: '.inf'}\n",
        {"lr_scheduler_kwargs": {"num_cycles": float("-inf"), "a": ".inf"}},
    ),
    "a mapping": (
        "lr_scheduler_type: cosine_with_restarts\nlr_scheduler_kwargs: {num_cycles: 2, a: 1e-5, b: '2', c: yes}\n",
        {"lr_scheduler_kwargs": {"num_cycles": 2, "a": 1e-5, "b": "2", "c": True}},
    ),
    "JSON": ("lr_scheduler_kwargs: '{\"num_cycles\": 2}'\n", {"lr_scheduler_kwargs": {"num_cycles": 2}}),
    "hyphens": ("learning-rate: 2e-5\n", {"learning_rate": 2e-5}),
    "nothing": ("# only a comment\n", {"beta": 0.1}),
    "a byte order mark": ("\ufeffbeta: 0.2\n", {"beta": 0.2}),
    "quoted null": ("run_name: 'null'\n", {"run_name": "null"}),
}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
def test_values_of_a_file(name: str, tmp_path: Path) -> None:
    text, expected = LINES[name]
    configs = from_file(tmp_path / "run.yaml", text)
    found = {each: getattr(config, each) for config in configs for each in kinds_of(type(config))}
    found["memory_limit_bytes"] = configs[2].memory_limit_bytes
    assert {each: found[each] for each in expected} == expected
    assert all(isinstance(found[each], type(value)) for each, value in expected.items()), "1.0 is 1 for =="


WRONG = {
    "twice": ("beta: 0.1\n\nbeta: 0.9\n", "run.yaml, line 3: beta stands in line 1 already"),
    "twice, by another spelling": ("lora-r: 8\nlora_r: 4\n", "run.yaml, line 2: lora_r stands in line 1 already"),
    "half a number": ("beta: 0.1\nlora_r: 8.5\n", "run.yaml, line 2: lora_r='8.5': a whole number"),
    "a float for a count": ("per_device_train_batch_size: 4.0\n", "line 1: per_device_train_batch_size='4.0': a whole"),
    "a list": ("beta: [0.1]\n", "line 1: beta is a list here: a finite number"),
    "a mapping": ("beta: {a: 1}\n", "line 1: beta is a mapping here: a finite number"),
    "a list in a list": ("loss_type: [sigmoid, [ipo]]\n", "line 1: loss_type holds a list or mapping within its list"),
    "null": ("lora_r: ~\n", "line 1: lora_r=None: a value is needed"),
    "null in a list": ("loss_type: [sigmoid, ]\nloss_weights: [1, null]\n", "line 2: loss_weights holds nothing"),
    "a choice": ("packing: maybe\n", "line 1: packing='maybe' is unknown; accepted are auto, on, off."),
    "out of range": ("max_steps: 1\nlearning_rate: -1\n", "line 2: learning_rate=-1.0: at least 0."),
    "beyond numbers": ("learning_rate: .nan\n", "line 1: learning_rate='nan': a finite number"),
    "beyond numbers, quoted": ("max_grad_norm: '.inf'\n", "line 1: max_grad_norm='.inf': a finite number"),
    "a list in a list of Python's": ("fsdp: [[a]]\n", "line 1: fsdp holds a list or mapping within its list"),
    "words of checkpointing": (
        "beta: 0.1\ngradient_checkpointing_kwargs: {use_reentrent: no}\n",
        "line 2: gradient_checkpointing_kwargs: 'use_reentrent' is unknown; .* Did you mean use_reentrant",
    ),
    "a pattern beside names": (
        "lora_target_modules: [q_proj, '.*(v|k)_proj']\n",
        r"line 1: lora_target_modules=.*: a regular expression stands alone, and '\.\*\(v\|k\)_proj' is one",
    ),
    "by another module": ("beta: -1\n", "line 1: beta=-1.0 must be positive"),
    "optimizer": ("optim: adamw_troch\n", r"Did you mean adamw_torch"),
    "scheduler": ("lr_scheduler_type: cosin\n", r"lr_scheduler_type='cosin' is unknown.*Did you mean cosine"),
    "unknown": ("lerning_rate: 1\n", "line 1: 'lerning_rate' is no option. Did you mean learning_rate"),
    "a flag only": ("no_dataloader_pin_memory: true\n", "Write dataloader_pin_memory: false"),
    "the parser's own": ("help_all: true\n", "'help_all' is no option"),
    "not UTF-8": (b"beta: 0.1\nrun_name: caf\xe9\n", r"line 2: not UTF-8 \(byte 0xe9\)"),
    "NUL": ('run_name: "a\\0b"\n', "line 1: run_name=.*NUL"),
    "no YAML": ("a: b: c\n", "line 1: not valid YAML: mapping values are not allowed here"),
    "a control character": (b"beta: \x07\n", "is not valid YAML"),
    "Python": ("run_name: !!python/object/apply:os.system [ls]\n", "the tag .* is not read"),
    "anchors": ("beta: &b 0.1\nmin_beta: *b\n", "line 1: anchors and aliases"),
    "merge keys": ("<<: {beta: 1}\n", "line 1: merge keys"),
    "two documents": ("beta: 1\n---\nbeta: 2\n", "line 2: a second document begins here"),
    "nesting": ("lr_scheduler_kwargs: " + "[" * 100_000, "line 1: more than 20 lists and mappings"),
    "a list at the top": ("- a\n", "holds a list; lines of the form 'name: value'"),
    "text at the top": ("beta\n", "holds text; lines of the form"),
    "twice in a mapping": ("fsdp_config: {a: 1, a: 2}\n", "'a' stands twice in one mapping"),
    "twice in JSON": ("lr_scheduler_kwargs: '{\"a\": 1, \"a\": 2}'\n", "'a' stands twice in one mapping"),
    "a hidden secret": ("model_init_kwargs: {token: <hidden>}\n", "line 1: model_init_kwargs=.* Give the secret"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_a_file_cannot_say(name: str, tmp_path: Path) -> None:
    text, message = WRONG[name]
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(OptionError, match=message) as raised:
        parse(PARSER, [str(path), *BASE])
    assert "\n" not in str(raised.value)


def test_paths_that_are_no_file_of_options(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large.yaml").write_bytes(b"#" * (1 << 21))
    for name, message in {
        "": "but a folder", "pipe": "but a folder or a device", "loop": "Too many levels|Symlink loop",
        "nothing.yaml": "no such file", "large.yaml": "larger than 1 MiB", "x" * 300: "File name too long",
    }.items():  # fmt: skip
        with pytest.raises(OptionError, match=message):
            parse(PARSER, [f"{tmp_path}/{name}", *BASE])


FLAGS = {
    "a typing error": (["--lerning_rate", "1"], "'--lerning_rate' is no option. Did you mean --learning_rate"),
    "no abbreviations": (["--learning_r", "1"], "'--learning_r' is no option. Did you mean --learning_rate"),
    "no value": (["--beta"], "--beta: expected one argument"),
    "two values": (["--lora_r", "8", "9"], "'9' must be the first argument"),
    "a flag's value": (["--lora_r", "8.5"], "^lora_r='8.5': a whole number, such as 8, is needed"),
    "what is beyond JSON": (["--lr_scheduler_kwargs", '{"a": NaN}'], "^lr_scheduler_kwargs=.*: a mapping"),
    "nobody's repository": (["--hub_model_id", "a/b"], "^hub_model_id='a/b' has no effect here: set push_to_hub=True"),
    "a path for JSON": (["--fsdp_config", "nothing.json"], r"^fsdp_config='nothing.json': JSON, or a file of it"),
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags(name: str) -> None:
    argv, message = FLAGS[name]
    with pytest.raises(OptionError, match=message):
        parse(PARSER, [*BASE, *argv], check=check_together)


def test_the_last_of_two_flags_counts() -> None:
    """As a script that passes on "$@" expects; a list is replaced as a whole."""
    twice = ["--beta", "0.1", "--loss_type", "ipo", "sft", "--no_disable_dropout"]
    args = parse(PARSER, [*BASE, *twice, "--beta=0.2", "--loss-type", "hinge", "--disable_dropout"])[2]
    assert (args.beta, args.loss_type, args.disable_dropout) == (0.2, ["hinge"], True)


def test_flags_come_before_the_file_and_are_not_blamed_on_it(tmp_path: Path) -> None:
    assert from_file(tmp_path / "run.yaml", "beta: 0.2\n", "--beta", "0.3")[2].beta == 0.3
    with pytest.raises(OptionError, match=r"^beta='x'"):
        from_file(tmp_path / "run.yaml", "beta: 0.2\n", "--beta", "x")
    one = parse(PARSER, [*BASE, "--optim_target_modules", "all-linear"])[2]
    two = parse(PARSER, [*BASE, "--optim_target_modules", "a", "b"])[2]
    assert (one.optim_target_modules, two.optim_target_modules) == ("all-linear", ["a", "b"])


PYTHON: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "text of a float": (FastDPOConfig, {"beta": "0.2"}, 0.2),
    "a float's int": (FastDPOConfig, {"beta": 1}, 1.0),
    "text of an int": (ModelConfig, {"lora_r": "8"}, 8),
    "text of true": (FastDPOConfig, {"dynamic_beta": "yes"}, True),
    "a number of tokens": (FastDPOConfig, {"micro_batch_tokens": 640}, "640"),
    "bytes": (FastDPOConfig, {"memory_limit": 4_000_000_000}, "4000000000"),
    "true as text": (FastDPOConfig, {"gradient_checkpointing": True}, "true"),
    "no trackers": (FastDPOConfig, {"report_to": None}, "none"),
    "numpy's bool": (FastDPOConfig, {"dynamic_beta": np.bool_(True)}, True),
    "numpy's bool for a switch": (FastDPOConfig, {"gradient_checkpointing": np.bool_(False)}, "false"),
    "numpy's int": (ModelConfig, {"lora_r": np.int64(8)}, 8),
    "a tensor": (FastDPOConfig, {"beta": torch.tensor(0.25)}, 0.25),
    "an int of a tensor": (FastDPOConfig, {"seed": torch.tensor(3)}, 3),
    "a tensor's half": (ModelConfig, {"lora_r": torch.tensor(8.5)}, "lora_r=tensor.8.5000.: a whole number"),
    "a switch": (FastDPOConfig, {"packing": True}, "on"),
    "a switch in words": (FastDPOConfig, {"prefix_sharing": "No"}, "off"),
    "bytes as a float": (FastDPOConfig, {"memory_limit": 4e9}, "4000000000"),
    "half a byte": (FastDPOConfig, {"memory_limit": 1.5}, "memory_limit=1.5: text"),
    "what means nothing special": (FastDPOConfig, {"ddp_find_unused_parameters": False}, False),
    "no settings": (FastDPOConfig, {"fsdp_config": {}}, {}),
    "keep none": (FastDPOConfig, {"save_total_limit": 0}, "save_total_limit=0: at least 1. Leave it out to keep every"),
    "a path": (ModelConfig, {"model_name_or_path": Path("a/b")}, "a/b"),
    "one of a list": (FastDPOConfig, {"loss_type": "ipo"}, ["ipo"]),
    "a tuple": (ModelConfig, {"lora_target_modules": ("a", "b")}, ["a", "b"]),
    "half": (ModelConfig, {"lora_r": 8.5}, "lora_r=8.5: a whole number"),
    "a whole float": (ModelConfig, {"lora_r": 8.0}, "lora_r=8.0: a whole number"),
    "true for a number": (ModelConfig, {"lora_r": True}, "lora_r=True: a whole number"),
    "a list for a float": (FastDPOConfig, {"beta": [0.1]}, r"beta=\[0.1\]: a finite number, such as 0.1, and no list"),
    "NaN": (FastDPOConfig, {"learning_rate": float("nan")}, "learning_rate=nan: a finite number"),
    "infinity": (FastDPOConfig, {"weight_decay": float("inf")}, "weight_decay=inf: a finite number"),
    "None": (FastDPOConfig, {"learning_rate": None}, "learning_rate=None: a value is needed"),
    "a number for text": (DataConfig, {"train_split": 0.5}, "train_split=0.5: text, is needed"),
    "a list": (FastDPOConfig, {"loss_weights": [1.0, "x"]}, r"loss_weights=.*: a list; .*\('x' in it is none\)"),
    "digits": (FastDPOConfig, {"max_steps": 10**5000}, "max_steps=a int of many digits: a whole number"),
    "epochs": (FastDPOConfig, {"num_train_epochs": -1}, "num_train_epochs=-1.0: at least 0."),
    "seed": (FastDPOConfig, {"seed": 2**32}, "seed=4294967296: at least 0, and at most 4294967295."),
    "no steps": (FastDPOConfig, {"max_steps": -2}, "max_steps=-2: at least 0; or -1, for none."),
    "a demo": (DemoConfig, {"minutes": "long"}, "minutes='long': a finite number"),
    "a demo's pairs": (DemoConfig, {"pairs": "²"}, "pairs='²': auto, all, or a number"),
    "an estimate": (EstimateConfig, {"max_length": "8.5"}, "max_length='8.5': a whole number"),
    "an estimate's size": (EstimateConfig, {"head_workspace": "infGB"}, "head_workspace='infGB': a size"),
}  # fmt: skip


@pytest.mark.parametrize("name", PYTHON)
def test_python_is_read_as_text_is(name: str) -> None:
    config, options, expected = PYTHON[name]
    more = {"output_dir": "out", "use_cpu": True} if config is FastDPOConfig else {}
    (option,) = options
    if isinstance(expected, str) and ":" in expected:
        with pytest.raises(OptionError, match=expected):
            config(**options, **more)
    else:
        found = getattr(config(**options, **more), option)
        assert (found, type(found)) == (expected, type(expected))


def test_every_option_has_a_kind_that_its_default_fits() -> None:
    for config in (*CONFIGS, EstimateConfig, DemoConfig):
        for each in dataclasses.fields(config):
            if each.init:
                default = each.default_factory() if callable(each.default_factory) else each.default
                assert kinds_of(config)[each.name].read(each.name, default) == default, each.name
