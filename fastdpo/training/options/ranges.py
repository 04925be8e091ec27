"""What numbers certainly cannot be, by option; transformers checks few of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastdpo.training.options.kinds import OptionError


@dataclass(frozen=True)
class Range:
    """From `least` on (above it where `open`), up to `most` (below it where `below`); `besides` is accepted too.
    hint: how to say what is not in it, a sentence after a space."""

    least: float
    most: float = float("inf")
    open: bool = False
    below: bool = False
    besides: float | None = None
    hint: str = ""

    def holds(self, value: float) -> bool:
        """Whether the number lies in it."""
        if value == self.besides:
            return True
        low = value > self.least if self.open else value >= self.least
        return low and (value < self.most if self.below else value <= self.most)

    def __str__(self) -> str:
        low = f"above {self.least:g}" if self.open else f"at least {self.least:g}"
        high = "" if self.most == float("inf") else f", and {'below' if self.below else 'at most'} {self.most:.10g}"
        return low + high + ("" if self.besides is None else f"; or {self.besides:g}, for none")


_COUNT, _SHARE, _POSITIVE, _FROM_ZERO = Range(1), Range(0, 1, below=True), Range(0, open=True), Range(0)
_FLOAT32 = Range(0, 3e38)  # what it holds
_SEED = Range(0, 2**32 - 1)  # numpy's
RANGES: dict[str, Range] = {
    **dict.fromkeys(
        (
            "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
            "torch_empty_cache_steps", "eval_accumulation_steps", "dataset_num_proc",
            "dataloader_prefetch_factor", "max_train_examples", "max_eval_examples", "lora_alpha", "pairs_per_step",
            "ddp_timeout",
        ),
        _COUNT,
    ),
    **dict.fromkeys(
        (
            "num_train_epochs", "max_grad_norm", "warmup_steps", "eval_steps", "eval_delay", "dataloader_num_workers",
        ),
        _FROM_ZERO,
    ),
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon"), _FLOAT32),
    **dict.fromkeys(("logging_steps", "save_steps", "minutes"), _POSITIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "lora_dropout"), _SHARE),
    **dict.fromkeys(("seed", "data_seed"), _SEED),
    "save_total_limit": Range(1, hint=" Leave it out to keep every checkpoint, save_strategy=no writes none."),
    "max_steps": Range(0, besides=-1),
}  # fmt: skip


def check_ranges(config: Any) -> None:
    """Raise OptionError for a number of a dataclass of options that certainly is none that was meant."""
    for name, accepted in RANGES.items():
        value = getattr(config, name, None)
        if isinstance(value, (int, float)) and not accepted.holds(value):
            raise OptionError(f"{name}={value}: {accepted}.{accepted.hint}")
