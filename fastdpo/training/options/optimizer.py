"""The optimizers: which are accepted, what package each needs, and which one `optim="auto"` stands for."""

from __future__ import annotations

import copy
import functools
import importlib.util
import logging
from typing import Any

from transformers import Trainer
from transformers.training_args import OptimizerNames

from fastdpo.shown import shown
from fastdpo.training.options.kinds import OptionError, seen
from fastdpo.training.options.unused import without_effect

logger = logging.getLogger(__name__)

#: By transformers' names, and auto.
OPTIMIZERS = ("auto", *(each.value for each in OptimizerNames))
#: Part of a name → the module it needs, and the package that has it, where the two differ. The first that fits counts.
_PACKAGES = (
    (("galore",), "galore_torch", "galore-torch"),
    (("apollo",), "apollo_torch", "apollo-torch"),
    (("grokadamw",), "grokadamw", "grokadamw"),
    (("schedule_free",), "schedulefree", "schedulefree"),
    (("stable_adamw",), "optimi", "torch-optimi"),
    (("adamw_torch_4bit", "adamw_torch_8bit"), "torchao", "torchao"),
    (("adamw_anyprecision",), "torchdistx", "torchdistx"),
    (("_8bit", "paged_", "_bnb", "lion_", "ademamix"), "bitsandbytes", "bitsandbytes"),
)


def check_optimizer_package(optim: str) -> None:
    """Raise OptionError for an optimizer whose package is not installed."""
    for parts, module, package in _PACKAGES:
        if any(part in optim for part in parts):
            if importlib.util.find_spec(module) is None:
                raise OptionError(
                    f"optim={str(optim)!r} needs {package}, which is not installed: pip install {package}, or set "
                    "optim=auto."
                )
            return


def check_optimizer_arguments(args: Any) -> None:
    """Raise OptionError for a name in `optim_args` that transformers does not read for this optimizer; of options that
    it has read. One of which it reads nothing is an option without effect."""
    if not args.optim_args:
        return
    unset = _made_of(args, None)
    if isinstance(unset, Exception):  # it needs the model, as GaLore does: what it reads is not known before
        return
    given = dict(_pair(args.optim_args, each) for each in args.optim_args.replace(" ", "").split(","))
    optim = str(getattr(args.optim, "value", args.optim))
    advice = f"for optim={optim!r}. Drop it; learning_rate, weight_decay, adam_beta1, ... are options of their own."
    unread = [name for name in given if not _is_read(args, name, unset)]
    if len(unread) == len(given):
        without_effect(args, "optim_args", f"transformers reads none of it {advice}")
    elif unread:
        raise OptionError(
            f"optim_args={seen(args.optim_args)}: {seen(unread[0])} has no effect: transformers does not read it "
            f"{advice}"
        )
    elif isinstance(error := _made_of(args, args.optim_args), Exception):
        raise OptionError(f"optim_args={seen(args.optim_args)} cannot be used with optim={optim!r}: {shown(error)}")


def _is_read(args: Any, name: str, unset: Any) -> bool:
    """Whether one of two values that have nothing in common changes what is made, or is refused."""
    found = [_made_of(args, f"{name}={value}") for value in ("0.0123", "1")]
    return any(isinstance(each, Exception) or each != unset for each in found)


def _pair(text: str, part: str) -> tuple[str, str]:
    name, equals, value = part.partition("=")
    if not (name and equals and value) or "=" in value:
        raise OptionError(
            f"optim_args={seen(text)}: name=value, several with commas, is needed ({seen(part)} is none)."
        )
    return name, value


def _made_of(args: Any, optim_args: str | None) -> Any:
    """The optimizer's class and arguments, or the error that transformers raises instead."""
    asked = copy.copy(args)
    asked.optim_args = optim_args
    try:
        return Trainer.get_optimizer_cls_and_kwargs(asked)
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        return error


def automatic_optimizer(on_gpu: bool) -> str:
    """What `optim="auto"` stands for, by transformers' name."""
    if not on_gpu:
        return "adamw_torch"
    # Paged 8-bit states: a quarter of the memory, and spikes of it go to the host
    if importlib.util.find_spec("bitsandbytes") is not None:
        return "paged_adamw_8bit"
    _tell_of_missing_bitsandbytes()
    return "adamw_torch_fused"


@functools.cache
def _tell_of_missing_bitsandbytes() -> None:
    logger.warning(
        "optim=auto is torch's fused AdamW, as bitsandbytes is not installed: its states take four times the memory of "
        "paged 8-bit AdamW. pip install bitsandbytes, or set optim=adamw_torch_fused."
    )
