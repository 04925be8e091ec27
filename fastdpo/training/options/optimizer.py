"""The optimizer that `optim="auto"` stands for, which depends on what is installed."""

from __future__ import annotations

import functools
import importlib.util
import logging

logger = logging.getLogger(__name__)


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
