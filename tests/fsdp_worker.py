"""Runs of one rank, for tests that shard the model over two: python fsdp_worker.py '[{job}, ...]'."""

from __future__ import annotations

import json
import sys
from typing import Any

import tiny
import torch
from late_copies import LateCopies
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from worker import leave

from fastdpo.training.memory.layer_inputs import LayerInputs


def load(job: dict[str, Any]) -> PreTrainedModel:
    """A tiny Llama, or the one at `base` in 4 bits that are kept in the dtype `storage`."""
    if "storage" not in job:
        return tiny.llama(**job.get("model", {}))
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=getattr(torch, job["storage"]),
    )
    return AutoModelForCausalLM.from_pretrained(job["base"], quantization_config=quantization, dtype=torch.float32)


def build(job: dict[str, Any]) -> Any:
    """The trainer of `job`: {"folder", "pairs", "options": FastDPOConfig's, and what is read below}."""
    options = dict(job["options"])
    if "adapter" in job:
        options["peft_config"] = None if job["adapter"] is None else tiny.lora(**job["adapter"])
    if job.get("ref_model"):
        options["ref_model"] = load(job)
    if "eval_pairs" in job:
        options["eval_dataset"] = tiny.pairs(job["eval_pairs"], seed=9)
    trainer = tiny.trainer(job["folder"], model=load(job), data=tiny.pairs(job["pairs"]), **options)
    if job.get("offloaded"):
        trainer.parts.memory.layer_inputs = LayerInputs(trainer.model, LateCopies())
    return trainer


def outcome(job: dict[str, Any], trainer: Any) -> dict[str, Any]:
    """Train, and evaluate before and after; whole weights, statistics, log, metrics, and parameters not sharded."""
    before = trainer.evaluate() if "eval_pairs" in job else {}
    trainer.train(resume_from_checkpoint=job.get("resume"))
    log = list(trainer.state.log_history)
    after = trainer.evaluate() if "eval_pairs" in job else {}
    trainer.save_model()
    parameters = {name: p.detach() for name, p in trainer.model.named_parameters()}
    weights = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).clone()
        for name, p in parameters.items()
        if "storage" not in job or "lora" in name
    }
    if trainer.dynamic_beta is not None:
        weights |= {f"dynamic_beta.{name}": value for name, value in trainer.dynamic_beta.state_dict().items()}
    replicated = [name for name, p in parameters.items() if not isinstance(p, DTensor)]
    found = {"weights": weights, "log": log, "before": before, "after": after, "replicated": replicated}
    if inputs := trainer.parts.memory.layer_inputs:
        found |= {"faults": inputs.arena.copies.faults, "kept": inputs.arena.live, "moved": inputs.arena.copies.out}
    return found


def main(job: dict[str, Any]) -> None:
    """Do `job`; rank 0 writes what came of it to `result`."""
    torch.set_num_threads(1)
    trainer = build(job)
    found = outcome(job, trainer)
    if trainer.is_world_process_zero():
        torch.save(found, job["result"])


if __name__ == "__main__":
    for each in json.loads(sys.argv[1]):
        main(each)
    leave()
