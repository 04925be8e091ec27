"""What is trained and on which pairs: `ModelConfig` and `DataConfig`, read from flags or YAML."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from fastdpo.training.options.fields import is_set
from fastdpo.training.options.kinds import OptionError, check_fields, seen
from fastdpo.training.options.paths import check_paths
from fastdpo.training.options.ranges import check_ranges
from fastdpo.training.options.unused import check_conditions, without_effect

_LORA_OPTIONS = (
    "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save", "use_rslora", "use_dora",
)  # fmt: skip
_MODEL_CONDITIONS = (
    (
        _LORA_OPTIONS,
        "fresh LoRA",
        "a continued adapter keeps its own settings, and use_lora=False has none.",
    ),
    (
        ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_quant_storage"),
        "load_in_4bit",
        "set load_in_4bit=True or drop it.",
    ),
)


@dataclass
class ModelConfig:
    """What is trained: the model, its quantisation and its adapter."""

    _argument_group_name: ClassVar = "model"

    model_name_or_path: str | None = field(default=None, metadata={"help": "Local folder or hub name of a causal LM."})
    model_revision: str | None = field(default=None, metadata={"help": "Hub revision of the model and tokenizer."})
    adapter_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Existing PEFT adapter to train further. The reference is the model with this adapter."},
    )
    tokenizer_name_or_path: str | None = field(default=None, metadata={"help": "Default: the model's own tokenizer."})
    chat_template: str | None = field(
        default=None, metadata={"help": "File with a Jinja chat template that replaces the tokenizer's own."}
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Dtype of the weights that are not quantised, and of 4-bit compute: auto (bfloat16 on a GPU that "
            "has it, float32 elsewhere), float32, bfloat16 or float16.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "As in transformers, e.g. sdpa or eager."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow models that ship their own Python code."})
    load_in_4bit: bool = field(default=False, metadata={"help": "QLoRA: quantise the linear layers with bitsandbytes."})
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "nf4 or fp4.", "choices": ["nf4", "fp4"]})
    bnb_4bit_use_double_quant: bool = field(default=True, metadata={"help": "Quantise the quantisation constants."})
    bnb_4bit_quant_storage: str = field(
        default="uint8",
        metadata={
            "help": "Dtype that 4-bit weights are stored in, which changes no value. FSDP shards only floating-point "
            "ones: set it to that of the other weights there.",
            "choices": ["uint8", "float32", "bfloat16", "float16"],
        },
    )
    use_lora: bool = field(default=True, metadata={"help": "Train a LoRA. False trains every weight."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the LoRA matrices."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the LoRA: its update is multiplied by alpha / r."})
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Dropout before the LoRA. Needs `--disable_dropout false` to act."}
    )
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Names of the modules that get a LoRA, one regular expression, or all-linear."},
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained in full and saved with the adapter."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale the LoRA by alpha / sqrt(r)."})
    use_dora: bool = field(default=False, metadata={"help": "Weight-decomposed LoRA."})

    def __post_init__(self) -> None:
        check_fields(self)
        check_paths(self)
        met = {"load_in_4bit"} if self.load_in_4bit else set()
        met |= {"fresh LoRA"} if self.use_lora and not self.adapter_name_or_path else set()
        check_conditions(self, met, _MODEL_CONDITIONS)
        if self.load_in_4bit and not self.use_lora and self.adapter_name_or_path is None:
            raise ValueError(
                "use_lora=False trains every weight, but load_in_4bit=True quantises them, and quantised weights "
                "cannot be trained. Leave one of the two out."
            )
        check_ranges(self)
        if self.lora_r < 1:
            raise OptionError(f"lora_r={self.lora_r}: the rank of a LoRA is at least 1; 8 to 64 are usual.")
        if not self.lora_target_modules:
            raise OptionError("lora_target_modules=[]: names of modules, or all-linear. use_lora=False trains all.")
        patterns = [each for each in self.lora_target_modules if is_pattern(each)]
        if patterns and len(self.lora_target_modules) > 1:
            raise OptionError(
                f"lora_target_modules={seen(self.lora_target_modules)}: a regular expression stands alone, and "
                f"{seen(patterns[0])} is one. Join them to one, as in '.*(q_proj|v_proj)', or give names only."
            )
        if self.model_revision is not None and _is_local(self.model_name_or_path):
            without_effect(self, "model_revision", "model_name_or_path is a local folder; drop it.")


@dataclass
class DataConfig:
    """Where the pairs come from."""

    _argument_group_name: ClassVar = "data"

    dataset_name_or_path: str | None = field(
        default=None, metadata={"help": "Local .jsonl, .jsonl.gz, .json or .parquet file, local folder, or hub name."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Hub revision of the data set."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_dataset_name_or_path: str | None = field(
        default=None, metadata={"help": "Default: the training data set, if --eval_split is given."}
    )
    eval_split: str | None = field(default=None, metadata={"help": "Split to evaluate on."})
    data_format: str = field(
        default="auto",
        metadata={
            "help": "auto (from the columns), trl, hh-rlhf, beavertails-helpful or beavertails-harmless.",
            "choices": ["auto", "trl", "hh-rlhf", "beavertails-helpful", "beavertails-harmless"],
        },
    )
    max_train_examples: int | None = field(default=None, metadata={"help": "Use only the first N training pairs."})
    max_eval_examples: int | None = field(default=None, metadata={"help": "Use only the first N evaluation pairs."})

    def __post_init__(self) -> None:
        check_fields(self)
        check_paths(self)
        check_ranges(self)
        data = self.dataset_name_or_path
        if self.dataset_revision is not None and _is_local(data):
            without_effect(self, "dataset_revision", "dataset_name_or_path is local; drop it.")
        if self.dataset_config is not None and _is_local(data) and Path(str(data)).expanduser().is_file():
            without_effect(
                self, "dataset_config", "dataset_name_or_path is a file, which has no configurations; drop it."
            )
        evaluates = self.eval_split is not None or self.eval_dataset_name_or_path is not None
        if is_set(self, "max_eval_examples") and not evaluates:
            without_effect(self, "max_eval_examples", "set eval_split or eval_dataset_name_or_path, or drop it.")


def is_pattern(module: str) -> bool:
    """Whether the name of a module is a regular expression: it holds what no name does. peft matches it in full."""
    return re.escape(module).replace("\\-", "-").replace("\\.", ".") != module


def _is_local(name: str | None) -> bool:
    try:
        return name is not None and Path(name).expanduser().exists()
    except (OSError, RuntimeError):  # links in a circle, no home: whoever opens it says so
        return False
