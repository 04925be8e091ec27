"""One training run in its own process, for tests that kill it, signal it or start two ranks of it.

python worker.py '{"folder": ..., "options": {FastDPOConfig}, "event": ..., "at": step, "of": rank, "pairs": n,
                   "eval_pairs": n, "resume": ..., "result": path, "oom": {"rank": r, "above": tokens},
                   "objective": class of single_answers}'
python worker.py serve      forks a process for every line [job, file for its stderr] and prints the return code
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import single_answers
import tiny
import torch
import torch.distributed as dist
from peft import get_peft_model_state_dict
from transformers import PreTrainedTokenizerFast, TrainerCallback

from fastdpo.training.runs import saving as checkpointing


class Event(TrainerCallback):
    """Does something to its own process at the start of step `at`; where there are several ranks, to that of `rank`."""

    def __init__(self, kind: str, at: int, rank: int | None = None) -> None:
        self.kind, self.at, self.rank = kind, at, rank

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 != self.at or self.rank not in (None, args.process_index):
            return
        if self.kind == "oom in the optimizer":
            kwargs["optimizer"].step = lambda: torn(kwargs["model"])
            return
        if self.kind == "kill in save":
            # The manifest and the rename are still to come when this is called.
            checkpointing.close = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
            return
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "sigterm": signal.SIGTERM, "sigint": signal.SIGINT}[self.kind])


def torn(model: Any) -> None:
    """An optimizer's step that runs out of memory once it has updated one of the weights."""
    next(p for p in model.parameters() if p.requires_grad).data.add_(1.0)
    raise torch.OutOfMemoryError("injected")


def state(trainer: Any) -> dict[str, torch.Tensor]:
    """Adapter and DynamicBeta tensors of a trainer."""
    found = {name: value.detach().clone() for name, value in get_peft_model_state_dict(trainer.model).items()}
    if trainer.dynamic_beta is not None:
        found |= {f"dynamic_beta.{name}": value.clone() for name, value in trainer.dynamic_beta.state_dict().items()}
    return found


def injected(trainer: Any, fails: Callable[..., bool]) -> Any:
    """`trainer`, whose forward of a micro-batch runs out of memory where `fails(trainer, model, micro)` says so."""
    forward = trainer.parts.passes.forward

    def limited(model: Any, micro: Any, **options: Any) -> Any:
        if fails(trainer, model, micro):
            raise torch.OutOfMemoryError("injected")
        return forward(model, micro, **options)

    trainer.parts.passes.forward = limited
    return trainer


def main(job: dict[str, Any]) -> None:
    """Train as `job` says; rank 0 writes the final state and the log to `result`."""
    torch.set_num_threads(1)
    callbacks = [Event(job["event"], job["at"], job.get("of"))] if "at" in job else []
    if job.get("event") == "sigterm in the tokenisation":
        PreTrainedTokenizerFast.__call__ = lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)
    if "eval_pairs" in job:
        job["options"]["eval_dataset"] = tiny.pairs(job["eval_pairs"], seed=9)
    data = tiny.pairs(job.get("pairs", 24))
    if "objective" in job:
        job["options"]["objective"] = getattr(single_answers, job["objective"])()
        data = single_answers.answers(job["pairs"])
    trainer = tiny.trainer(job["folder"], data=data, callbacks=callbacks, **job["options"])
    failures = 0

    def fails(trainer: Any, model: Any, micro: Any) -> bool:
        nonlocal failures
        failed = trainer.args.process_index == job["oom"]["rank"] and micro.input_ids.numel() > job["oom"]["above"]
        failures += failed
        return bool(failed)

    if "oom" in job:
        injected(trainer, fails)
    trainer.train(resume_from_checkpoint=job.get("resume"))
    log = list(trainer.state.log_history)
    metrics = trainer.evaluate() if "eval_pairs" in job else {}
    of_ranks = [failures]
    if dist.is_initialized():
        of_ranks = [0] * dist.get_world_size()
        dist.all_gather_object(of_ranks, failures)
    if trainer.is_world_process_zero() and job.get("result"):
        torch.save({"state": state(trainer), "log": log, "metrics": metrics, "failures": of_ranks}, job["result"])


def leave() -> None:
    """End this process; where there are several ranks, once all are done and without the interpreter's teardown, which
    gloo's threads abort now and then."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def serve() -> None:
    """One process per job: the import is done, and a killed one takes nothing with it."""
    for line in sys.stdin:
        job, stderr = json.loads(line)
        child = os.fork()
        if child == 0:
            signal.alarm(300)  # a run that hangs
            for number, path in ((0, os.devnull), (1, os.devnull), (2, stderr)):
                os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
            main(job)
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        serve()
        sys.exit()
    for each in json.loads(sys.argv[1]):
        main(each)
    leave()
