"""The optimizers: which are accepted, what package each needs, and which one `optim="auto"` stands for."""

from __future__ import annotations

import functools
import importlib.util
import logging

from transformers.training_args import OptimizerNames

from fastdpo.training.options.kinds import OptionError

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
