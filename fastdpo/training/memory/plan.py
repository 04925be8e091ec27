"""How much of a batch goes through the model at once, and whether its layers are checkpointed.

Neither changes a result, so both follow the memory: `MemoryPlan` holds them, `guarded` runs a part of a step and turns
an out-of-memory error on any rank into `RetryStep` on all of them, and `shrink` gives the step less to hold before it
is repeated. What a step holds at its peak is one micro-batch's activations: small micro-batches without checkpointing
cost less time than large ones with it, so checkpointing comes last, when not even one pair fits.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size
from peft import PeftModel
from transformers import PreTrainedModel

from fastdpo.training.memory.layer_inputs import LayerInputs
from fastdpo.training.memory.pinned import CudaCopies
from fastdpo.training.options import FastDPOConfig
from fastdpo.training.ranks import Ranks

logger = logging.getLogger(__name__)

T = TypeVar("T")
#: A scoring pass keeps no activations, so its micro-batches are this many times larger.
SCORING_BUDGET_FACTOR = 4
ADVICE = (
    "Lower max_length, quantise the model (load_in_4bit), set gradient_checkpointing=True or, on a GPU, "
    "activation_offloading=True. `fastdpo estimate` predicts what fits."
)


class RetryStep(Exception):
    """Memory ran out on some rank: repeat the step with a smaller plan. `cause`: this rank's error, if any."""

    def __init__(self, cause: BaseException | None) -> None:
        super().__init__("out of memory")
        self.cause = cause


class OutOfMemory(RuntimeError):
    """Memory does not hold one pair, and the memory plan has nothing left to try."""


def checkpointing_name(model: PreTrainedModel) -> str:
    """What the installed transformers calls checkpointing: "activation" from 5.21 on, "gradient" before."""
    return "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"


def enable_checkpointing(model: PreTrainedModel, kwargs: dict[str, Any], **own: Any) -> None:
    """Recompute layers in the backward: `kwargs` for torch's checkpoint, `own` for the model's method."""
    name = checkpointing_name(model)
    getattr(model, f"{name}_checkpointing_enable")(**{f"{name}_checkpointing_kwargs": kwargs}, **own)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory, of a device or of the host, ran out."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or should_reduce_batch_size(error)


class MemoryPlan:
    """Settings that follow the memory; `args.checkpointing` is the option `gradient_checkpointing`.

    train_tokens, score_tokens: budgets of passes that keep activations, and of those that don't.
    checkpointing: whether layers keep their inputs only. layer_inputs: where, if that is the host.
    repeats: whether a step can be repeated; with FSDP, ranks wait for each other in the middle of a forward."""

    def __init__(self, args: FastDPOConfig, model: PreTrainedModel, ranks: Ranks, *, repeats: bool = True) -> None:
        self.args, self.model, self.ranks, self.repeats = args, model, ranks, repeats
        self.train_tokens = args.train_token_budget
        self.score_tokens = SCORING_BUDGET_FACTOR * self.train_tokens
        self.checkpointing = False
        self.layer_inputs: LayerInputs | None = None
        self.settled = args.micro_batch_tokens != "auto"
        if args.checkpointing == "true" or args.activation_offloading:
            self.checkpoint_layers()

    def checkpoint_layers(self) -> None:
        """Switch checkpointing on, with the run's arguments for it."""
        name = checkpointing_name(self.model)
        kwargs: dict[str, Any] = {"use_reentrant": False} | (getattr(self.args, f"{name}_checkpointing_kwargs") or {})
        offload = kwargs.pop("offload", False) or self.args.activation_offloading
        every = kwargs.pop("every_n_layers", 1)
        enable_checkpointing(self.model, kwargs, every_n_layers=every)
        if isinstance(self.model, PeftModel) and kwargs["use_reentrant"]:
            self.model.enable_input_require_grads()
        if offload:
            self.layer_inputs = LayerInputs(self.model, CudaCopies(self.args.device))
        self.checkpointing = True

    def settle(self, tokens: int) -> None:
        """Take `tokens` as the budget that was found."""
        self.train_tokens, self.score_tokens = tokens, SCORING_BUDGET_FACTOR * tokens
        self.settled = True

    def guarded(self, work: Callable[[], T], *, local: bool = False) -> T:
        """`work()`, on which all ranks agree: RetryStep if memory ran out on any of them; `local`: on this one."""
        result: T | None = None
        cause: BaseException | None = None
        try:
            result = work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if not self.repeats:
                raise OutOfMemory(
                    f"{error} With FSDP, a step that ran out of memory on one rank cannot be repeated. Lower "
                    f"micro_batch_tokens ({self.train_tokens} now). {ADVICE}"
                ) from error
            cause = error.with_traceback(None)  # its frames hold the tensors that did not fit
        if self.over_ranks(int(cause is not None), local):
            del result
            release_memory()
            raise RetryStep(cause)
        return result  # type: ignore[return-value]

    def shrink(
        self,
        tokens: Sequence[int],
        example_ids: Sequence[str],
        *,
        scoring: bool,
        cause: BaseException | None,
        local: bool = False,
    ) -> None:
        """Half the budget of the pass that ran out; checkpointing, where one pair is too much already.

        tokens: of each example of the batch in its rows. Raises OutOfMemory where nothing is left to try.
        """
        largest, total = self.over_ranks(max(tokens), local), self.over_ranks(sum(tokens), local)
        budget = min(self.score_tokens if scoring else self.train_tokens, total)
        if budget > largest:  # below that, the largest pair is alone already
            if scoring:
                self.score_tokens = budget // 2
            else:
                self.train_tokens = budget // 2
            kind = "scoring" if scoring else "training"
            logger.warning("out of memory: the step is repeated with %s micro-batches of %d tokens.", kind, budget // 2)
        elif not scoring and not self.checkpointing and self.args.checkpointing == "auto":
            self.checkpoint_layers()
            logger.warning("out of memory with one pair per micro-batch: the step is repeated with checkpointing.")
        else:
            own = example_ids[tokens.index(max(tokens))]
            said = str(cause).partition("\n")[0] or type(cause).__name__ if cause else "on another rank"
            raise OutOfMemory(
                f"one pair of {largest} tokens does not fit into memory ({said}); the longest of this rank's batch is "
                f"{own!r}, of {max(tokens)}. {ADVICE}"
            ) from cause

    def until_it_fits(self, work: Callable[[], T], tokens: Sequence[int], example_ids: Sequence[str]) -> T:
        """`work()`, a scoring pass on this rank alone, with smaller micro-batches each time that memory runs out.

        tokens: as `shrink`'s. What ranks compute without gradients does not depend on how they cut it.
        """
        while True:
            try:
                return self.guarded(work, local=True)
            except RetryStep as retry:
                self.shrink(tokens, example_ids, scoring=True, cause=retry.cause, local=True)

    def over_ranks(self, value: int, local: bool = False) -> int:
        """The largest of the ranks' values, so that all of them decide alike; this rank's own if `local`."""
        return value if local else self.ranks.largest(value)


def release_memory() -> None:
    """Give back what a failed attempt held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def get_rng_state(device: torch.device) -> list[torch.Tensor]:
    """Of the host, and of `device` where it is a GPU."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_rng_state(device: torch.device, states: list[torch.Tensor]) -> None:
    """The inverse of `get_rng_state`."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
