"""The options of training: `FastDPOConfig`, from flags or YAML. Those of the model and of the data are beside it."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments

from fastdpo.formulas import BetaOptions, LossOptions
from fastdpo.loss import DynamicBeta
from fastdpo.training.options.effects import check_effects
from fastdpo.training.options.fields import default_of, like, metadata_of, parameter
from fastdpo.training.options.kinds import OptionError, check_fields, kinds_of, seen
from fastdpo.training.options.liger import check_liger
from fastdpo.training.options.losses import check_losses, loss_options, loss_parameters, make_dynamic_beta
from fastdpo.training.options.optimizer import (
    OPTIMIZERS,
    automatic_optimizer,
    check_optimizer_arguments,
    check_optimizer_package,
)
from fastdpo.training.options.paths import check_paths
from fastdpo.training.options.ranges import check_ranges
from fastdpo.training.options.refused import (
    check_checkpointing_arguments,
    check_debug,
    read_accelerator_config,
    refuse_optimizer,
    refuse_unsupported,
    refuse_unsupported_sharing,
)
from fastdpo.training.options.secrets import without_secrets
from fastdpo.training.options.sizes import (
    DEFAULT_MICRO_BATCH_TOKENS,
    HEAD_WORKSPACE,
    bytes_of,
    check_lengths,
    check_memory_limit,
    check_micro_batch_tokens,
    check_offloading,
    head_workspace_bytes,
)
from fastdpo.training.options.trackers import check_trackers
from fastdpo.training.options.unused import effective, ignored_in, is_collecting, warn_of_ignored


@dataclass
class FastDPOConfig(TrainingArguments):
    """TrainingArguments plus the options of DPO and β-DPO.

    Names follow TRL's DPOConfig where it has the option. Differences from TrainingArguments' defaults: `bf16` is on
    where the GPU has it, `optim` is paged 8-bit AdamW on a GPU with bitsandbytes, checkpointing is "auto",
    `logging_steps` is 10, `logging_nan_inf_filter` is off and stays off. The batch that β, the filter and the loss see
    is `per_device_train_batch_size × gradient_accumulation_steps` pairs per rank; how many of them share a forward is
    `micro_batch_tokens` and changes nothing but memory and speed.

    Its fields hold what was asked: `optim` stays "auto", `bf16` None, `eval_steps` open, so that
    `dataclasses.replace(config, beta=0.2)` changes β alone. What they come to on this machine is in `resolved()`, which
    a trainer has as its `args`.
    """

    bf16: bool | None = field(
        default=None, metadata={"help": "bfloat16 autocast. Default: on where the GPU supports it and fp16 is off."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps; below 1, a share of them."})
    optim: str = field(
        default="auto",
        metadata={
            "help": "Optimizer. auto: on a GPU bitsandbytes' paged 8-bit AdamW, where that is installed; else torch's.",
            "choices": OPTIMIZERS,
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Must stay off: a non-finite loss stops the run and is never averaged away."}
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "Continue a run exactly: last, or a checkpoint folder."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the run that `output_dir` holds. Its checkpoints are deleted."}
    )

    beta: float = like(LossOptions, "beta")
    loss_type: list[str] = field(
        default_factory=lambda: [str(LossOptions.loss_type)], metadata=metadata_of(LossOptions, "loss_type")
    )
    loss_weights: list[float] | None = field(default=None, metadata=metadata_of(LossOptions, "loss_weights"))
    label_smoothing: float = like(LossOptions, "label_smoothing")
    f_divergence_type: str = like(LossOptions, "f_divergence")
    f_alpha_divergence_coef: float = parameter("f_alpha_divergence_coef")
    discopop_tau: float = parameter("discopop_tau")
    simpo_gamma: float = parameter("simpo_gamma")
    cpo_alpha: float = parameter("cpo_alpha")
    ld_alpha: float | None = field(
        default=None, metadata={"help": "LD-DPO: weight in [0, 1] of the tokens beyond the shorter answer's length."}
    )
    use_weighting: bool = field(
        default=False, metadata={"help": "WPO: weight pairs by the policy's likelihood of them."}
    )

    dynamic_beta: bool = field(default=False, metadata={"help": "β-DPO: one β per batch, and the filter of pairs."})
    beta_alpha: float = like(BetaOptions, "alpha", prefix="β-DPO: ")
    beta_momentum: float = like(BetaOptions, "momentum", prefix="β-DPO: ")
    keep_ratio: float = like(BetaOptions, "keep_ratio", prefix="β-DPO: ")
    min_beta: float = like(BetaOptions, "min_beta", prefix="β-DPO: ")
    beta_scope: str = like(BetaOptions, "scope", prefix="β-DPO: ")
    beta_variant: str = like(BetaOptions, "variant", prefix="β-DPO: ")

    max_length: int | None = field(default=1024, metadata={"help": "Longest prompt + completion, in tokens."})
    max_prompt_length: int | None = field(default=512, metadata={"help": "Prompts are cut from the left to this."})
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenise."})
    disable_dropout: bool = field(
        default=True, metadata={"help": "Switch dropout off, so that scored and trained log-probs agree."}
    )
    micro_batch_tokens: str = field(
        default="auto",
        metadata={
            "help": "Tokens per forward with gradients, padding included; a longer pair goes alone. auto: the most "
            f"that memory holds, found by trial on a GPU, from memory_limit on a CPU, and {DEFAULT_MICRO_BATCH_TOKENS} "
            "there without one."
        },
    )
    memory_limit: str | None = field(
        default=None,
        metadata={
            "help": "Memory that this process may use, such as 12GB; default: the GPU's own. Read by auto. On a CPU "
            "freed memory is then given back at once, which takes time."
        },
    )
    head_workspace: str = field(
        default=HEAD_WORKSPACE,
        metadata={
            "help": "On a GPU, what the head's exponentials of a chunk of the vocabulary may take; at least 64KiB. It "
            "decides the order of sums, so a resumed run keeps it."
        },
    )
    gradient_checkpointing: str = field(
        default="auto",
        metadata={
            "help": "Keep the inputs of the layers only, and compute the rest again in the backward: true, false, or "
            "auto: where not even one pair fits otherwise.",
            "choices": ["auto", "true", "false"],
        },
    )
    activation_offloading: bool = field(
        default=False, metadata={"help": "Keep what checkpointed layers need in the host's memory. Needs a GPU."}
    )
    offload_embeddings: bool = field(
        default=False,
        metadata={
            "help": "Keep the frozen input embedding in the host's memory and look its rows up there. Not where it is "
            "trained or tied to the head. Needs a GPU."
        },
    )
    expandable_segments: bool = field(
        default=True,
        metadata={
            "help": "On a GPU, have torch's allocator grow its blocks, which loses less memory to fragments. The "
            "environment's PYTORCH_ALLOC_CONF or PYTORCH_CUDA_ALLOC_CONF decides where one is set."
        },
    )
    prefix_sharing: str = field(
        default="auto",
        metadata={
            "help": "Compute a prompt once for both answers. auto: where the model allows it and a check on the first "
            "batch agrees.",
            "choices": ["auto", "on", "off"],
        },
    )
    lean_body: str = field(
        default="auto",
        metadata={
            "help": "Compute the layers of known architectures with less memory: MLPs in tiles of tokens, LoRA in one "
            "function with its layer, norms that keep their input only. auto: where a check on the first batch agrees.",
            "choices": ["auto", "on", "off"],
        },
    )
    use_liger_kernel: bool = field(
        default=False,
        metadata={
            "help": "On a GPU, liger-kernel's functions compute the lean body's norms, activations and positions. "
            "They patch nothing. Needs liger-kernel: pip install 'fastdpo[liger]'."
        },
    )
    deterministic_attention: bool = field(
        default=False,
        metadata={
            "help": "Deterministic algorithms in training steps: on a GPU attention's backward then adds up in one "
            "order, slower, and a resumed run is bitwise the same. On with full_determinism."
        },
    )
    packing: str = field(
        default="auto",
        metadata={"help": "Several sequences in a row instead of padding.", "choices": ["auto", "on", "off"]},
    )
    reference: str = field(
        default="lazy",
        metadata={
            "help": "Reference log-probs: lazy (each pair's once, when it is first seen, and kept), precompute (all "
            "ahead of training), or online (in every step).",
            "choices": ["online", "lazy", "precompute"],
        },
    )
    reference_cache_dir: str | None = field(
        default=None, metadata={"help": "Folder of the kept reference log-probs. Default: output_dir."}
    )
    backend: str = field(
        default="auto", metadata={"help": "Loss backend; see `fastdpo info`.", "choices": ["auto", "torch", "triton"]}
    )
    ignore_unused_options: bool = field(
        default=False,
        metadata={
            "help": "For sweeps: options without effect, of the model and the data too, are named in one warning and "
            "left at their defaults, instead of refused."
        },
    )
    router_aux_loss_coef: float | None = field(
        default=None, metadata={"help": "Only 0: the auxiliary loss of a mixture of experts is not supported."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of from_pretrained, where the trainer loads the model by name."}
    )

    _VALID_DICT_FIELDS: ClassVar = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    def __post_init__(self) -> None:
        self._normalise()
        asked = {name: copy.deepcopy(getattr(self, name)) for name in kinds_of(type(self))}
        self._resolve()
        for name, value in asked.items():
            if getattr(self, name) != value:
                setattr(self, name, value)
        if not is_collecting():
            warn_of_ignored(ignored_in(self))

    def resolved(self) -> FastDPOConfig:
        """A copy whose options are what transformers reads, and this trainer: nothing is "auto" or open that is decided
        by the machine or by other options, and what is ignored is at its default. The trainer's `args`.

        Raises ValueError for options that were changed since to what they do not accept.
        """
        found = effective(self)
        found._normalise()
        found._resolve()
        return found

    def _normalise(self) -> None:
        """Each option as its kind holds it, in one spelling. Depends on no other option, and on no machine."""
        check_fields(self)
        check_paths(self)
        check_ranges(self)
        self._join_checkpointing()
        check_debug(self.debug)
        self.accelerator_config = read_accelerator_config(self.accelerator_config)  # type: ignore[has-type]
        self.report_to = "none" if self.report_to is None else self.report_to  # type: ignore[has-type]
        folder: str | None = self.output_dir  # type: ignore[has-type]
        self.output_dir = os.path.expanduser("trainer_output" if folder is None else folder)

    def _resolve(self) -> None:
        """Decide what is open, by the machine and by other options, and refuse what cannot be honoured."""
        refuse_unsupported(self)
        refuse_optimizer(self.optim)
        check_trackers(self.report_to)
        check_losses(self)
        check_lengths(self, least="at least 1 token, or None for no limit.")
        check_micro_batch_tokens(self.micro_batch_tokens)
        head_workspace_bytes(self.head_workspace)
        check_memory_limit(self)
        check_effects(self, torch.cuda.is_available() and not self.use_cpu)
        for option in ignored_in(self):
            name = option.partition("=")[0]
            setattr(self, name, default_of(self, name))
        check_offloading(self)
        check_liger(self.liger)
        if self.optim == "auto":
            self.optim = automatic_optimizer(torch.cuda.is_available() and not self.use_cpu)
        check_optimizer_package(self.optim)
        if self.bf16 is None:
            self.bf16 = (
                not self.fp16 and not self.use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
            )
        settings: dict[str, Any] | None = self.fsdp_config  # type: ignore[has-type]
        self.fsdp_config = None if settings is None else dict(settings)  # transformers writes into it
        checkpointing, self.gradient_checkpointing = self.gradient_checkpointing, None  # type: ignore[assignment]
        super().__post_init__()
        self.gradient_checkpointing = checkpointing
        if hasattr(self, "activation_checkpointing"):
            self.activation_checkpointing = None  # transformers' False would contradict what was asked, when read again
        check_optimizer_arguments(self)
        self.deterministic_attention |= self.full_determinism
        self.dataloader_pin_memory &= torch.accelerator.is_available()  # there is nothing to pin for
        refuse_unsupported_sharing(self)

    def _process_fsdp_args(self) -> Any:
        """As transformers', with errors that name the option."""
        try:
            return super()._process_fsdp_args()
        except (ValueError, TypeError, AttributeError) as error:
            raise OptionError(f"fsdp_config={seen(self.fsdp_config)} cannot be used: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """As transformers', which trackers and our files get: without secrets in options that hold further ones."""
        return {name: without_secrets(value) for name, value in super().to_dict().items()}

    def _join_checkpointing(self) -> None:
        """One option out of its two names, gradient_checkpointing and activation_checkpointing, and so its kwargs."""
        old, new = "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"
        for name in (old, new):
            check_checkpointing_arguments(name, getattr(self, name, None))
        if hasattr(self, new) and (given := getattr(self, old)) is not None:
            if getattr(self, new) not in (None, given):
                raise OptionError(f"{old} contradicts {new}; they are one option. Set one of them.")
            setattr(self, new, given)
            setattr(self, old, None)
        asked = getattr(self, "activation_checkpointing", None)  # its name from transformers 5.21 on
        if asked is not None:
            asked = str(asked).lower()
            if self.gradient_checkpointing not in ("auto", asked):
                raise OptionError(
                    f"activation_checkpointing={asked} contradicts gradient_checkpointing="
                    f"{self.gradient_checkpointing!r}; they are one option. Set one of them."
                )
            self.gradient_checkpointing = asked
            self.activation_checkpointing = None

    @property
    def liger(self) -> bool:
        """Whether liger-kernel's functions serve in the lean body; also where transformers reads `use_liger_kernel` as
        off."""
        return str(self.use_liger_kernel).lower() == "true"

    @property
    def memory_limit_bytes(self) -> int | None:
        """`memory_limit` in bytes."""
        return None if self.memory_limit is None else bytes_of("memory_limit", self.memory_limit)

    @property
    def head_workspace_bytes(self) -> int:
        """`head_workspace` in bytes."""
        return head_workspace_bytes(self.head_workspace)

    @property
    def train_token_budget(self) -> int:
        """Tokens per micro-batch of a pass that keeps activations; `MemoryPlan` may find another."""
        return DEFAULT_MICRO_BATCH_TOKENS if self.micro_batch_tokens == "auto" else int(self.micro_batch_tokens)

    def loss_parameters(self) -> dict[str, float]:
        """The parameters that the losses in `loss_type`, or the f-divergence, take."""
        return loss_parameters(self)

    def loss_options(self) -> LossOptions:
        """The run's losses with their options, at β0."""
        return loss_options(self)

    def make_dynamic_beta(self) -> DynamicBeta:
        """A fresh `DynamicBeta` with this run's settings; its draws follow `seed`."""
        return make_dynamic_beta(self)
