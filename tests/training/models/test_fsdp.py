"""FSDP2 over two gloo ranks against the same run in one process, whole checkpoints, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsdp_worker
import pytest
import tiny
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from bitsandbytes.nn import Linear4bit
from fsdp_worker import build, outcome
from launched import on_two_ranks
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from fastdpo.training.models.sharded import check_plugin

WORKER = Path(fsdp_worker.__file__)
SGD = {"max_steps": 5, "optim": "sgd", "learning_rate": 0.05}
ADAM = {"max_steps": 5, "learning_rate": 1e-3}
#: 22 pairs in global batches of 8: the last batch of an epoch has wrapped duplicates.
JOBS: dict[str, dict[str, Any]] = {
    "lora": {"options": SGD, "eval_pairs": 10},
    # One or two pairs of eight are kept, so that a rank may have none
    "filtered": {"options": SGD | {"dynamic_beta": True, "keep_ratio": 0.15, "reference": "precompute"}},
    # The reference is the weights at the start, swapped in and out of the shards
    "full": {"options": ADAM, "adapter": None, "eval_pairs": 10},
    "tied": {"options": SGD | {"learning_rate": 1e-2}, "adapter": None, "model": {"tie_word_embeddings": True}},
    "head saved": {"options": ADAM | {"save_strategy": "steps"}, "adapter": {"modules_to_save": ["lm_head"]}},
    # Each rank with an arena of its own
    "offloaded": {"options": SGD | {"gradient_checkpointing": True}, "offloaded": True},
    "qlora": {"options": SGD | {"reference": "online"}, "storage": "float32", "ref_model": True},
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks made of every job, in one launch, and the jobs themselves."""
    root = tmp_path_factory.mktemp("fsdp")
    own = {"fsdp": True, "per_device_train_batch_size": 4, "micro_batch_tokens": "90"}
    tiny.llama(hidden_size=128, intermediate_size=256).save_pretrained(root / "base")
    jobs = {
        name: {"pairs": 22, "folder": str(root / name), "result": str(root / f"{name}.pt"), "base": str(root / "base")}
        | job
        | {"options": job["options"] | own}
        for name, job in JOBS.items()
    }
    jobs["head saved"]["options"]["save_steps"] = 2
    resumed = {"resume": str(root / "head saved" / "checkpoint-2"), "result": str(root / "resumed.pt")}
    jobs["resumed"] = jobs["head saved"] | resumed
    on_two_ranks(WORKER, list(jobs.values()))
    results = {name: torch.load(job["result"], weights_only=False) for name, job in jobs.items()}
    return {"root": root, "jobs": jobs, "results": results}


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_sharded_run_equals_the_run_in_one_process(name: str, sharded: dict[str, Any], tmp_path: Path) -> None:
    found = sharded["results"][name]
    job = sharded["jobs"][name] | {"folder": str(tmp_path / "alone"), "options": JOBS[name]["options"]}
    alone = build(job)
    start = {key: p.detach().clone() for key, p in alone.model.named_parameters() if p.requires_grad}
    expected = outcome(job, alone)
    assert found["replicated"] == []
    assert found["weights"].keys() == expected["weights"].keys()
    for key, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][key], value, rtol=1e-5, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
    assert max(float((expected["weights"][key] - value).abs().max()) for key, value in start.items()) > 1e-3
    pairs = [*zip(found["log"], expected["log"], strict=True)]
    for one, other in [*pairs, (found["before"], expected["before"]), (found["after"], expected["after"])]:
        for key in other:
            if key in ("loss", "eval_loss", "grad_norm") or ("/" in key and not key.endswith("accuracies")):
                assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-5), key


@pytest.mark.slow
def test_layer_inputs_of_a_sharded_run_go_to_the_host(sharded: dict[str, Any]) -> None:
    found = sharded["results"]["offloaded"]
    assert found["moved"]
    assert (found["faults"], found["kept"]) == ([], 0)


@pytest.mark.slow
def test_resumed_run_equals_the_straight_one(sharded: dict[str, Any]) -> None:
    straight, again = (sharded["results"][name]["weights"] for name in ("head saved", "resumed"))
    for name, value in straight.items():
        assert torch.equal(value, again[name]), name


@pytest.mark.slow
def test_saved_weights_load_without_fsdp(sharded: dict[str, Any]) -> None:
    saved = sharded["root"]
    loaded = {
        "lora": PeftModel.from_pretrained(tiny.llama(), saved / "lora"),
        "full": AutoModelForCausalLM.from_pretrained(saved / "full"),
    }
    for name, model in loaded.items():
        for key, parameter in model.named_parameters():
            assert torch.equal(parameter, sharded["results"][name]["weights"][key]), key


def plugin(**options: Any) -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(**({"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT"} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fsdp_version": 1}, "FSDP version 1 is not supported"),
        ({"activation_checkpointing": True}, "Set gradient_checkpointing=True instead"),
        ({"state_dict_type": "SHARDED_STATE_DICT"}, "Set FULL_STATE_DICT"),
        ({"cpu_offload": True}, "cpu_offload is not supported"),
    ],
)
def test_what_fsdp_cannot_do_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_plugin(plugin(**options), nn.Linear(2, 2))


def test_fsdp1_is_refused_by_the_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"fsdp_config: version=1 is not supported"):
        tiny.config(tmp_path, fsdp=True, fsdp_config={"version": 1})


def test_4bit_weights_stored_as_bytes_are_refused() -> None:
    check_plugin(plugin(), Linear4bit(64, 64, quant_storage=torch.bfloat16))
    with pytest.raises(ValueError, match="Set bnb_4bit_quant_storage"):
        check_plugin(plugin(), Linear4bit(64, 64).to("cpu"))
