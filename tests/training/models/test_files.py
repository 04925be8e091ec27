"""Every weight comes from the file, and a file that cannot be read is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from fastdpo.training.models.loading import load_adapter, load_causal_lm, load_config, read_tokenizer

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of one model: whole, in shards, pickled, and an adapter on it."""
    folder, model = tmp_path_factory.mktemp("sources"), tiny.llama()
    for name, size in (("whole", "1GB"), ("shards", "40KB"), ("pickled", "1GB")):
        model.save_pretrained(folder / name, max_shard_size=size)
        tiny.tokenizer().save_pretrained(folder / name)
    (folder / "pickled" / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pickled" / "pytorch_model.bin")
    get_peft_model(tiny.llama(), tiny.lora()).save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def copy(sources: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(sources / name, tmp_path / name))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], name: str = "model.safetensors") -> None:
    weights = load_file(folder / name)
    change(weights)
    save_file(weights, folder / name, metadata={"format": "pt"})


def test_whole_models_are_as_they_were_saved(sources: Path) -> None:
    expected = tiny.llama().state_dict()
    for name in ("whole", "shards", "pickled"):
        found = load_causal_lm(str(sources / name)).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["Llama, tied head", "Gemma2", "GPT-2", "Cohere"])
def test_a_head_that_is_the_embedding_is_not_missing(name: str, tmp_path: Path) -> None:
    families.made(name).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = load_causal_lm(str(tmp_path))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


WRONG_WEIGHTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing": (
        lambda w: (w.pop(UP), w.pop("model.norm.weight")),
        f"lack 2 weights of the LlamaForCausalLM, '{UP}' first",
    ),
    "of another shape": (
        lambda w: w.update({UP: torch.zeros(3, 5)}),
        rf"1 weights have another shape .*'{UP}' first: \(3, 5\) in the file, \(64, 32\)",
    ),
    "of a further layer": (
        lambda w: w.update({UP.replace("1", "2"): torch.zeros(64, 32)}),
        "hold more layers than its config.json says: 'model.layers.2.mlp.up_proj.weight'",
    ),
    "under a prefix": (lambda w: [w.update({f"module.{k}": w.pop(k)}) for k in list(w)], "lack 21 weights"),
}


@pytest.mark.parametrize("name", WRONG_WEIGHTS)
def test_weights_that_are_not_the_models(name: str, copy: Callable[[str], Path]) -> None:
    change, message = WRONG_WEIGHTS[name]
    edit(folder := copy("whole"), change)
    with pytest.raises(ValueError, match=message) as error:
        load_causal_lm(str(folder), argument="ref_model")
    assert str(error.value).startswith(f"ref_model={str(folder)!r}: ")


def test_missing_weights_are_seen_in_four_bits(copy: Callable[[str], Path]) -> None:
    folder = copy("whole")
    assert isinstance(load_causal_lm(str(folder), quantization_config=tiny.NF4), LlamaForCausalLM)
    edit(folder, WRONG_WEIGHTS["missing"][0])
    with pytest.raises(ValueError, match="lack 2 weights"):
        load_causal_lm(str(folder), quantization_config=tiny.NF4)


def test_other_weights_in_the_file_are_said(copy: Callable[[str], Path], caplog: pytest.LogCaptureFixture) -> None:
    """A value head is of no use here, old buffers of rotary positions are of none anywhere."""
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    edit(folder := copy("whole"), lambda w: w.update(buffers | {"v_head.\x1bsummary": torch.ones(3)}))
    load_causal_lm(str(folder))
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("fastdpo")]
    assert said.endswith(
        r"1 weights of its files are none of the LlamaForCausalLM's and are not read: 'v_head.\x1bsummary'"
    )


def cut(name: str, share: float) -> Callable[[Path], Any]:
    return lambda f: (f / name).write_bytes((f / name).read_bytes()[: int((f / name).stat().st_size * share)])


def put(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda f: (f / name).write_bytes(content)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
INDEX = "model.safetensors.index.json"
BROKEN: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "weights cut": ("whole", cut("model.safetensors", 0.5), "'model.safetensors' is torn"),
    "weights empty": ("whole", put("model.safetensors", b""), "'model.safetensors' is empty"),
    "weights of zeros": ("whole", put("model.safetensors", bytes(999)), "'model.safetensors' is torn"),
    "a pointer": ("whole", put("model.safetensors", LFS), "'model.safetensors' is a pointer of Git LFS"),
    "one shard cut": ("shards", cut("model-00002-of-00004.safetensors", 0.9), "'model-00002-of-00004.safetensors' is"),
    "one shard gone": ("shards", lambda f: (f / "model-00003-of-00004.safetensors").unlink(),
                       f"'{INDEX}' names 'model-00003-of-00004.safetensors', which is not there \\(1 of 4"),
    "index cut": ("shards", cut(INDEX, 0.5), f"'{INDEX}' is no JSON"),
    "index of another kind": ("shards", put(INDEX, b"[]"), f"'{INDEX}' holds a list"),
    "index without a map": ("shards", put(INDEX, b"{}"), f"'{INDEX}' has no 'weight_map'"),
    "pickle cut": ("pickled", cut("pytorch_model.bin", 0.5), "'pytorch_model.bin' is torn"),
    "pickle empty": ("pickled", put("pytorch_model.bin", b""), "'pytorch_model.bin' is empty"),
    "config cut": ("whole", cut("config.json", 0.5), "'config.json' is no JSON"),
    "config without a type": ("whole", put("config.json", b"{}"), "'config.json' has no 'model_type'"),
    "config no text": ("whole", put("config.json", b"\xff\xfe{"), "'config.json' is no UTF-8 text"),
    "config that fits nothing": ("whole", put("config.json", b'{"model_type": "llama", "hidden_size": "x"}'),
                                 "config.json: Validation error for field 'hidden_size'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_the_broken_file_of_a_model_is_named(name: str, copy: Callable[[str], Path]) -> None:
    source, breaks, message = BROKEN[name]
    breaks(folder := copy(source))
    with pytest.raises(ValueError, match=message) as error:
        load_causal_lm(str(folder))
    assert str(error.value).startswith(f"model={str(folder)!r}: ")
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(" it again.")


BROKEN_TOKENIZERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (cut("tokenizer.json", 0.5), "'tokenizer.json' is no JSON"),
    "empty": (put("tokenizer.json", b""), "'tokenizer.json' is empty"),
    "another document": (put("tokenizer.json", b"{}"), "'tokenizer.json' has no 'added_tokens', 'model'"),
    "configuration cut": (cut("tokenizer_config.json", 0.5), "'tokenizer_config.json' is no JSON"),
    "configuration of another kind": (put("tokenizer_config.json", b"[]"), "'tokenizer_config.json' holds a list"),
    "template": (put("chat_template.jinja", b"\xff"), "'chat_template.jinja' is no UTF-8 text"),
    "gone": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer can be made of the files there"),
}


@pytest.mark.parametrize("name", BROKEN_TOKENIZERS)
def test_the_broken_file_of_a_tokenizer_is_named(name: str, copy: Callable[[str], Path]) -> None:
    breaks, message = BROKEN_TOKENIZERS[name]
    breaks(folder := copy("whole"))
    with pytest.raises(ValueError, match=message) as error:
        read_tokenizer(str(folder), "tokenizer_name_or_path")
    assert str(error.value).startswith(f"tokenizer_name_or_path={str(folder)!r}: ")
    with pytest.raises(FileNotFoundError, match=r"tokenizer_name_or_path='\./nothing': no such folder"):
        read_tokenizer("./nothing", "tokenizer_name_or_path")


ADAPTERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (cut("adapter_model.safetensors", 0.5), "'adapter_model.safetensors' is torn"),
    "configuration": (put("adapter_config.json", b"{"), "'adapter_config.json' is no JSON"),
    "another shape": (
        lambda f: edit(f, lambda w: w.update({min(w): torch.zeros(4, 7)}), "adapter_model.safetensors"),
        "does not fit the model.*size mismatch",
    ),
    "one weight less": (
        lambda f: edit(f, lambda w: w.pop(min(w)), "adapter_model.safetensors"),
        "does not fit the model.*1 weights are in one only",
    ),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_broken_file_of_an_adapter_is_named(name: str, copy: Callable[[str], Path]) -> None:
    breaks, message = ADAPTERS[name]
    breaks(folder := copy("adapter"))
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(tiny.llama(), str(folder))
    assert str(error.value).startswith(f"adapter={str(folder)!r}")


def test_errors_that_no_file_explains_pass(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect stays one."""

    def defect(*_: Any, **__: Any) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", defect)
    with pytest.raises(KeyError, match="a defect"):
        load_causal_lm(str(sources / "whole"))
    assert load_config(str(sources / "whole")).model_type == "llama"
