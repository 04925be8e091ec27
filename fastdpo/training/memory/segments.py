"""Expandable segments of CUDA's allocator, by default: blocks that grow in place lose less memory to fragments.

Micro-batches differ in length from step to step, which leaves torch's fixed blocks with gaps that nothing fits into.
The setting belongs to the process, and acts on what is allocated from then on; so it is made before a run loads its
model. Whoever sets PYTORCH_ALLOC_CONF, or PYTORCH_CUDA_ALLOC_CONF, has decided: torch reads all of its settings anew
each time, so one more would undo theirs.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping

import torch

from fastdpo.training.options import FastDPOConfig

logger = logging.getLogger(__name__)

#: Where users configure torch's allocator: its name from torch 2.10 on, and before.
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
SETTING = "expandable_segments:True"


def use_expandable_segments(
    args: FastDPOConfig,
    environment: Mapping[str, str] = os.environ,
    apply: Callable[[str], object] | None = None,
) -> bool:
    """Have CUDA's allocator use expandable segments, where the run is on a GPU and nobody has decided otherwise.

    Returns whether it was done.

    apply: gives torch a setting; torch's own by default.
    """
    if args.device.type != "cuda" or not args.expandable_segments:
        return False
    for name in VARIABLES:
        if name in environment:
            logger.info("CUDA's allocator is as %s=%r says", name, environment[name])
            return False
    (torch._C._accelerator_setAllocatorSettings if apply is None else apply)(SETTING)
    return True
