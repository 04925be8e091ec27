"""Checkpoints on the hub while a run trains: copies are uploaded in the background, and a failure is a warning."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy

from fastdpo.training.options import FastDPOConfig

logger = logging.getLogger(__name__)

#: Of a checkpoint, what a user of the model has no use for.
_FOR_RESUME = (
    "optimizer*", "scheduler*", "scaler*", "rng_state*", "pytorch_model_fsdp*", "trainer_state.json", "dynamic_beta*",
    "reference_logps*", "fastdpo_*",
)  # fmt: skip


def push_checkpoint(
    args: FastDPOConfig, checkpoint: Path, repository: str, stage: Callable[[str], Path]
) -> list[Future[Any]]:
    """Start the uploads that `args.hub_strategy` asks for, of a copy that no later save touches: the model's files as
    the repository's, and the whole checkpoint in a folder of it. stage: gives an empty folder. Returns the uploads.

    Raises OSError, and what the hub's client raises, where none can be started.
    """
    copy = stage(f"push-{checkpoint.name}") / checkpoint.name
    shutil.copytree(checkpoint, copy)
    common: dict[str, Any] = {
        "repo_id": repository,
        "folder_path": copy,
        "token": args.hub_token,
        "run_as_future": True,
        "revision": args.hub_revision,
    }
    message = f"Training in progress, {checkpoint.name}"
    jobs = [HfApi().upload_folder(commit_message=message, ignore_patterns=list(_FOR_RESUME), **common)]
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        inside = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
        jobs.append(HfApi().upload_folder(commit_message=f"{message}, whole", path_in_repo=inside, **common))
    left = len(jobs)

    def done(job: Future[Any]) -> None:
        nonlocal left
        left -= 1
        if (error := job.exception()) is not None:
            logger.warning("%s was not pushed to %s: %s", checkpoint.name, repository, error)
        if not left:
            shutil.rmtree(copy.parent, ignore_errors=True)

    for job in jobs:
        job.add_done_callback(done)
    return jobs
