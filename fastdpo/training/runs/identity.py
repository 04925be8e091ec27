"""What the result of a run depends on, part by part: a resumed run must share it, or is told what it does not.

`fixed` parts decide the result: data by content and order, tokenisation, lengths, weights, quantisation, adapter,
objective, optimizer, schedule, seeds, batch. A resume with another value is refused. `noted` parts have a meaning for
a resumed run (more steps, another interval of saves) or change sums by rounding (micro-batches, ranks, versions): they
are honoured, and said.

Cost: BLAKE2b over the token ids once, about 1 GB/s; nothing of it is kept by a file's size or time.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastdpo.training.options import FastDPOConfig
from fastdpo.training.reference import ReferencePolicy, adapter_settings
from fastdpo.training.reference.fingerprint import as_json, json_digest, tokenizer_digest
from fastdpo.training.runs.checkpoint import CheckpointError
from fastdpo.training.runs.valid_json import replaced
from fastdpo.version import __version__

#: Options that decide which examples come next and what a step makes of them, whatever the objective.
_FIXED_OPTIONS = (
    "max_length", "max_prompt_length", "seed", "data_seed", "train_sampling_strategy", "dataloader_drop_last",
    "deterministic_attention", "head_workspace_bytes", "disable_dropout", "max_grad_norm", "bf16", "fp16",
)  # fmt: skip
#: Read where the optimizer, or the scheduler, is made from options.
_OPTIMIZER_OPTIONS = (
    "optim", "optim_args", "optim_target_modules", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon",
)  # fmt: skip
_SCHEDULE_OPTIONS = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
#: Read where an evaluation decides something.
_SELECTION_OPTIONS = (
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
    "eval_strategy",
    "eval_steps",
)
_NOTED_OPTIONS = (
    "max_steps", "num_train_epochs", "save_strategy", "save_steps", "save_total_limit", "eval_strategy", "eval_steps",
    "logging_steps", "micro_batch_tokens", "memory_limit", "checkpointing", "activation_offloading",
    "offload_embeddings", "prefix_sharing", "packing", "lean_body", "liger", "reference", "backend", "fsdp",
)  # fmt: skip
#: Of a scheduler's state, what training moves.
_MOVING = ("last_epoch", "verbose", "best", "num_bad_epochs", "cooldown_counter")
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "triton")
#: Rows whose token ids are in memory at a time.
_ROWS = 20_000
#: Rows in a row, on average, from which on they are read so.
_RUN = 8
_TAKEN_BYTES = 1 << 30


@dataclass(frozen=True)
class Identity:
    """Name → value in plain types."""

    fixed: Mapping[str, Any]
    noted: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Of all that is fixed: two runs of one digest train the same."""
        return json_digest(self.fixed)

    def as_entries(self) -> dict[str, Any]:
        """For a manifest."""
        return {"digest": self.digest, "fixed": dict(self.fixed), "noted": dict(self.noted)}

    def check(self, folder: str, saved: Mapping[str, Any]) -> str | None:
        """Compare with what the checkpoint `folder` was saved with; what is honoured, in a sentence.

        Raises CheckpointError with every fixed part that differs, and both values.
        """
        if differ := _different(saved["fixed"], self.fixed):
            if "reference weights" in differ:
                raise CheckpointError(
                    f"{folder} was trained against another reference than this trainer has. Give the model, the "
                    "adapter and the ref_model that the run was started with."
                )
            raise CheckpointError(
                f"{folder} was trained with {_listed(saved['fixed'], differ)}, this run has "
                f"{_listed(self.fixed, differ)}. Resume with the run's own options and data, or start a new run from "
                "its weights."
            )
        if differ := _different(saved["noted"], self.noted):
            return (
                f"{folder} was saved with {_listed(saved['noted'], differ)}; this run has "
                f"{_listed(self.noted, differ)}, which is honoured."
            )
        return None


def run_identity(
    args: FastDPOConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reference: ReferencePolicy,
    settings: Mapping[str, str],
    objective: Mapping[str, Any],
    *,
    train: Dataset,
    evaluation: Dataset | Mapping[str, Dataset] | None,
    columns: Sequence[str],
    given: Sequence[Any] = (None, None),
) -> Identity:
    """Of a run that is about to start, before a checkpoint is loaded.

    settings: the model's, see `model_identity`. objective: its fixed options. columns: of the tokenised data sets, that
    are read. given: the optimizer and the scheduler that the user has made, each or None.
    """
    optimizer, scheduler = given
    fixed: dict[str, Any] = {
        "training data": data_digest(train, columns),
        "reference weights": reference.fingerprint(),
        "model weights": reference.base_fingerprint(),
        **settings,
        "tokenizer": tokenizer_digest(tokenizer),
        **_adapters(model),
        "trained parameters": _trained(model),
        **objective,
        **{name: getattr(args, name) for name in _FIXED_OPTIONS},
        "pairs per step": args.train_batch_size * args.world_size,
        **_made("optimizer", optimizer, _OPTIMIZER_OPTIONS, args),
        **_made("scheduler", scheduler, _SCHEDULE_OPTIONS, args),
    }
    if args.metric_for_best_model is not None:  # evaluations decide what is kept, when it stops, or the learning rate
        fixed |= {name: getattr(args, name) for name in _SELECTION_OPTIONS}
        sets = evaluation if isinstance(evaluation, Mapping) else {"": evaluation}
        fixed["evaluation data"] = [data_digest(each, columns) for each in sets.values() if each is not None]
    noted = {
        **{name: getattr(args, name) for name in _NOTED_OPTIONS if name not in fixed},
        "ranks": args.world_size,
        "device": args.device.type if args.device.type == "cpu" else torch.cuda.get_device_name(args.device),
        "fastdpo": __version__,
        "python": platform.python_version(),
        **{name: _installed(name) for name in _PACKAGES},
    }
    return Identity(replaced(_plain(fixed), repr), replaced(_plain(noted), repr))


def data_digest(dataset: Dataset, columns: Sequence[str]) -> str:
    """How many rows, and a digest of what they hold in these columns, in their order. Lists of token ids have one
    digest in whatever integers they are kept, and however the table is cut."""
    digests = [hashlib.blake2b(digest_size=16) for _ in columns]
    for table in _tables(dataset.select_columns(list(columns))):
        for name, digest in zip(columns, digests, strict=True):
            for part in _bytes_of(table[name]):
                digest.update(part)
    whole = json_digest(
        [len(dataset), *((name, each.hexdigest()) for name, each in zip(columns, digests, strict=True))]
    )
    return f"{len(dataset)} rows, {whole}"


def _tables(dataset: Dataset) -> Iterator[pa.Table]:
    """The rows in their order, in parts. Where a few rows were left out, what lies between them is taken as it lies;
    `datasets` would look each row up, which takes four times as long as reading them."""
    mapping, table = dataset._indices, dataset.data.table
    if mapping is not None:
        order = mapping.column(0).to_numpy()
        starts = np.flatnonzero(np.diff(order, prepend=-2) != 1)
        if len(order) < _RUN * len(starts):
            small = table.nbytes < _TAKEN_BYTES  # arrow lays what it takes from side by side
            parts = (table.take(mapping.column(0).slice(at, _ROWS)) for at in range(0, len(order), _ROWS))
            yield from parts if small else dataset.with_format("arrow").iter(batch_size=_ROWS)
            return
        lengths = np.diff(starts, append=len(order))
        table = pa.concat_tables([table.slice(order[at], length) for at, length in zip(starts, lengths, strict=True)])
    for start in range(0, len(table), _ROWS):
        yield table.slice(start, _ROWS)


def _bytes_of(column: pa.ChunkedArray) -> list[Any]:
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_integer(kind.value_type):
        return [as_json(column.to_pylist()).encode()]
    lengths = pc.list_value_length(column).to_numpy().astype(np.int64)
    return [lengths, pc.list_flatten(column).to_numpy().astype(np.int32)]


def _made(what: str, given: Any, options: Sequence[str], args: FastDPOConfig) -> dict[str, Any]:
    """An optimizer or scheduler by its options, or by its class and defaults where the user has made it."""
    if given is None:
        return {name: getattr(args, name) for name in options}
    found: dict[str, Any] = {what: f"{type(given).__module__}.{type(given).__qualname__}"}
    if isinstance(given, torch.optim.Optimizer):
        groups = [{**group, "lr": group.get("initial_lr", group["lr"])} for group in given.param_groups]
        return found | {f"{what} groups": [_plain_entries(group, ("params", "initial_lr")) for group in groups]}
    return found | {f"{what} {key}": value for key, value in _plain_entries(given.state_dict(), _MOVING).items()}


def _adapters(model: PreTrainedModel) -> dict[str, Any]:
    if not isinstance(model, PeftModel):
        return {"adapters": None}
    named = adapter_settings(model)
    found: dict[str, Any] = {"adapters": sorted(named), "active adapters": list(model.base_model.active_adapters)}
    for adapter, settings in named.items():
        prefix = "adapter" if len(named) == 1 else f"adapter {adapter!r}"
        found |= {f"{prefix} {name}": value for name, value in settings.items()}
    return found


def _trained(model: PreTrainedModel) -> str:
    tensors = [(name, list(p.shape), str(p.dtype)) for name, p in model.named_parameters() if p.requires_grad]
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{count} in {len(tensors)} tensors, {json_digest(sorted(tensors))}"


def _different(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """The names whose values differ. What one side does not know, as another version's, is off there."""
    names = [*own, *(name for name in saved if name not in own)]
    return [name for name in names if not _is_same(name, saved, own)]


def _is_same(name: str, saved: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    if name in saved and name in own:
        return bool(saved[name] == own[name])
    return not (saved.get(name) or own.get(name))


def _listed(values: Mapping[str, Any], names: Sequence[str]) -> str:
    return ", ".join(f"{name}={values.get(name)!r}" for name in names)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives them back."""
    return dict(json.loads(as_json({name: getattr(value, "value", value) for name, value in values.items()})))


def _plain_entries(values: Mapping[str, Any], without: Sequence[str]) -> dict[str, Any]:
    plain = (str, int, float, bool, tuple, list)
    used = {name: value for name, value in values.items() if name not in without and not name.startswith("_")}
    return {name: value for name, value in used.items() if value is None or isinstance(value, plain)}


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
