"""The options of a trainer as it was built with them, and what was changed in its `args` since."""

from __future__ import annotations

import copy
from typing import Any

from transformers import TrainingArguments

from fastdpo.training.options.config import FastDPOConfig
from fastdpo.training.options.kinds import OptionError, kinds_of, seen

#: Options of fastdpo that are read when training starts; all others of its own are bound when the trainer is built.
_LIVE = ("overwrite_output_dir", "resume_from_checkpoint", "ignore_unused_options")
#: Options of transformers that are bound then too, by its accelerator or by this trainer.
_BOUND = (
    "bf16", "fp16", "use_cpu", "fsdp", "fsdp_config", "gradient_accumulation_steps", "gradient_checkpointing",
    "activation_checkpointing", "full_determinism", "accelerator_config", "use_liger_kernel",
)  # fmt: skip


class BuiltOptions:
    """asked: as they were given. resolved: `asked.resolved()`. args: the copy that the trainer has, which its user may
    change."""

    def __init__(self, asked: FastDPOConfig, resolved: FastDPOConfig, args: FastDPOConfig) -> None:
        self._asked, self._resolved, self._args = copy.copy(asked), copy.copy(resolved), args
        self._built = {name: copy.deepcopy(getattr(args, name)) for name in kinds_of(type(args))}

    def changes(self) -> dict[str, Any]:
        """Option → its value now, of those that were changed in the trainer's `args`."""
        return {name: now for name, was in self._built.items() if (now := getattr(self._args, name)) != was}

    def check(self) -> None:
        """Raise OptionError for one that was bound when the trainer was built, so that its change does nothing."""
        own = set(self._built) - set(TrainingArguments.__dataclass_fields__) - set(_LIVE)
        for name, value in self.changes().items():
            if name in own or name in _BOUND:
                raise OptionError(
                    f"{name}={seen(value)} was set in trainer.args after the trainer was built with "
                    f"{seen(self._built[name])}, and would have no effect. Build one with FastDPOConfig({name}=...)."
                )

    @property
    def asked(self) -> FastDPOConfig:
        """What would repeat the run."""
        return self._with_changes(self._asked)

    @property
    def resolved(self) -> FastDPOConfig:
        """What these options came to."""
        return self._with_changes(self._resolved)

    def _with_changes(self, config: FastDPOConfig) -> FastDPOConfig:
        found = copy.copy(config)
        for name, value in self.changes().items():
            setattr(found, name, value)
        return found
