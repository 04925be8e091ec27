"""The options of training: `FastDPOConfig`, from flags or YAML. Those of the model and of the data are beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments

from fastdpo.formulas.checks import check_loss_options
from fastdpo.formulas.losses import LOSSES
from fastdpo.loss.dynamic_beta import DynamicBeta
from fastdpo.training.options.checks import (
    automatic_optimizer,
    bytes_of,
    check_conditions,
    check_fields,
    head_workspace_bytes,
)
from fastdpo.training.options.model_config import DataConfig, ModelConfig
from fastdpo.version import __version__

__all__ = ["DataConfig", "FastDPOConfig", "ModelConfig"]

#: Tokens per micro-batch when `micro_batch_tokens` is "auto" on a CPU without a stated `memory_limit`: more of them
#: make no product faster there.
DEFAULT_MICRO_BATCH_TOKENS = 640
#: A scoring pass keeps no activations, so its micro-batches are this many times larger.
SCORING_BUDGET_FACTOR = 4

_ADAPTER_HELP = "`{}` acts on how transformers' Trainer {}, which this trainer replaces. Leave it unset."
#: TrainingArguments that cannot be honoured: name -> (accepted values, reason and next step).
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "auto_find_batch_size": (
        (False,),
        "It changes the batch that β is computed on. Lower `micro_batch_tokens` instead.",
    ),
    "average_tokens_across_devices": ((True,), "Losses are always averaged over the global batch of pairs."),
    "batch_eval_metrics": ((False,), "Preference metrics need the whole evaluation set."),
    "bf16_full_eval": ((False,), "It would cast the reference too. Load the model in that dtype with `--dtype`."),
    "fp16_full_eval": ((False,), "It would cast the reference too. Load the model in that dtype with `--dtype`."),
    "ddp_bucket_cap_mb": ((None,), _ADAPTER_HELP.format("ddp_bucket_cap_mb", "reduces gradients")),
    "ddp_find_unused_parameters": ((None,), _ADAPTER_HELP.format("ddp_find_unused_parameters", "reduces gradients")),
    "ddp_static_graph": ((None,), _ADAPTER_HELP.format("ddp_static_graph", "reduces gradients")),
    "deepspeed": ((None,), "Run with plain data parallelism (torchrun, accelerate launch)."),
    "do_predict": ((False,), "Use `trainer.predict(dataset)`."),
    "enable_jit_checkpoint": ((False,), "SIGTERM and SIGINT save a checkpoint already."),
    "eval_do_concat_batches": ((True,), "Preference metrics need the whole evaluation set."),
    "include_for_metrics": (([],), "The metrics are computed from log-probabilities only."),
    "label_names": ((None,), "Pairs have no labels."),
    "label_smoothing_factor": ((0.0,), "It smooths token labels. For noisy preferences set `label_smoothing`."),
    "length_column_name": (("length",), "Batches are not grouped by length; micro-batches are sorted by it."),
    "liger_kernel_config": ((None,), "It patches the loss that this trainer computes itself."),
    "logging_nan_inf_filter": ((False,), "It would hide a non-finite loss, which stops the run here."),
    "neftune_noise_alpha": ((None,), "Noise on the embeddings would differ between the scored and the trained pass."),
    "parallelism_config": ((None,), "Run with plain data parallelism (torchrun, accelerate launch)."),
    "prediction_loss_only": ((False,), "Evaluation always reports the preference metrics."),
    "torch_compile": ((False,), "Micro-batches vary in shape from step to step, so every step would recompile."),
    "use_liger_kernel": ((False,), "It patches the loss that this trainer computes itself."),
}
#: Options that act only under a condition: (names, condition, advice).
_CONDITIONS = (
    (
        ("beta_alpha", "beta_momentum", "keep_ratio", "min_beta", "beta_scope", "beta_variant"),
        "dynamic_beta",
        "it belongs to β-DPO; set dynamic_beta=True or drop it.",
    ),
    (
        ("discopop_tau", "simpo_gamma", "cpo_alpha", "f_alpha_divergence_coef"),
        "",
        "no loss in loss_type, and no f-divergence chosen, takes it.",
    ),
)
_OPTION_NAMES = {
    "alpha": "beta_alpha",
    "momentum": "beta_momentum",
    "scope": "beta_scope",
    "variant": "beta_variant",
    "f_divergence": "f_divergence_type",
}
REFUSED_OPTIMIZERS = ("lomo", "adalomo")


def _with_option_name(message: str) -> str:
    """The loss functions' argument names, at the start of an error, as this config spells them."""
    name, equals, rest = message.partition("=")
    return f"{_OPTION_NAMES.get(name, name)}{equals}{rest}"


@dataclass
class FastDPOConfig(TrainingArguments):
    """TrainingArguments plus the options of DPO and β-DPO.

    Names follow TRL's DPOConfig where it has the option. Differences from TrainingArguments' defaults: `bf16` is on
    where the GPU has it, `optim` is paged 8-bit AdamW on a GPU with bitsandbytes, checkpointing is "auto",
    `logging_steps` is 10, `logging_nan_inf_filter` is off and stays off. The batch that β, the filter and the loss see
    is `per_device_train_batch_size × gradient_accumulation_steps` pairs per rank; how many of them share a forward is
    `micro_batch_tokens` and changes nothing but memory and speed.
    """

    bf16: bool | None = field(
        default=None, metadata={"help": "bfloat16 autocast. Default: on where the GPU supports it and fp16 is off."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps; below 1, a share of them."})
    optim: str = field(
        default="auto",
        metadata={
            "help": "Optimizer. auto: on a GPU bitsandbytes' paged 8-bit AdamW, where that is installed; else torch's."
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

    beta: float = field(default=0.1, metadata={"help": "β0: how strongly the policy is held to the reference."})
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": f"One loss, or several to be added: {', '.join(LOSSES)}."},
    )
    loss_weights: list[float] | None = field(default=None, metadata={"help": "Weights of the losses. Default: 1 each."})
    label_smoothing: float = field(
        default=0.0, metadata={"help": "ε in [0, 0.5): assumed share of flipped labels (cDPO, robust, EXO, AOT)."}
    )
    f_divergence_type: str = field(
        default="reverse_kl",
        metadata={
            "help": "f-divergence that holds the policy to the reference.",
            "choices": ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"],
        },
    )
    f_alpha_divergence_coef: float = field(default=0.5, metadata={"help": "α of the α-divergence."})
    discopop_tau: float = field(default=0.05, metadata={"help": "Temperature of DiscoPOP."})
    simpo_gamma: float = field(default=0.5, metadata={"help": "Target margin γ of SimPO."})
    cpo_alpha: float = field(default=1.0, metadata={"help": "Weight of CPO's likelihood term on the chosen answer."})
    ld_alpha: float | None = field(
        default=None, metadata={"help": "LD-DPO: weight in [0, 1] of the tokens beyond the shorter answer's length."}
    )
    use_weighting: bool = field(
        default=False, metadata={"help": "WPO: weight pairs by the policy's likelihood of them."}
    )

    dynamic_beta: bool = field(default=False, metadata={"help": "β-DPO: one β per batch, and the filter of pairs."})
    beta_alpha: float = field(default=0.6, metadata={"help": "β-DPO: how strongly β follows the batch's gap."})
    beta_momentum: float = field(default=0.9, metadata={"help": "β-DPO: momentum of the running mean and spread."})
    keep_ratio: float = field(default=0.8, metadata={"help": "β-DPO: share of pairs the filter keeps, in (0, 1]."})
    min_beta: float = field(default=1e-3, metadata={"help": "β-DPO: lower bound of β."})
    beta_scope: str = field(
        default="batch", metadata={"help": "One β per batch or per pair.", "choices": ["batch", "instance"]}
    )
    beta_variant: str = field(
        default="released",
        metadata={"help": "As the authors' code or as the paper's formulas.", "choices": ["released", "paper"]},
    )

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
        default="256MiB",
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
    prefix_sharing: str = field(
        default="auto",
        metadata={
            "help": "Compute a prompt once for both answers. auto: where the model allows it and a check on the first "
            "batch agrees.",
            "choices": ["auto", "on", "off"],
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
    router_aux_loss_coef: float | None = field(
        default=None, metadata={"help": "Only 0: the auxiliary loss of a mixture of experts is not supported."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of from_pretrained, where the trainer loads the model by name."}
    )

    _VALID_DICT_FIELDS: ClassVar = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    def __post_init__(self) -> None:
        self._resolve_checkpointing()
        if self.optim == "auto":
            self.optim = automatic_optimizer(torch.cuda.is_available() and not self.use_cpu)
        if self.bf16 is None:
            self.bf16 = (
                not self.fp16 and not self.use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
            )
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        if isinstance(self.loss_weights, (int, float)):
            self.loss_weights = [self.loss_weights]
        check_fields(self)
        checkpointing, self.gradient_checkpointing = self.gradient_checkpointing, None  # type: ignore[assignment]
        super().__post_init__()
        self.gradient_checkpointing = checkpointing
        self.deterministic_attention |= self.full_determinism
        self.dataloader_pin_memory &= torch.accelerator.is_available()  # there is nothing to pin for
        self._refuse_unsupported()
        try:
            check_loss_options(
                self.loss_type,
                loss_weights=self.loss_weights,
                beta=self.beta,
                label_smoothing=self.label_smoothing,
                f_divergence=self.f_divergence_type,
                **self.loss_parameters(),
            )
        except ValueError as error:
            raise ValueError(_with_option_name(str(error))) from error
        self._check_objective()
        self._check_lengths()
        self._check_memory()

    def _resolve_checkpointing(self) -> None:
        """One option out of its three spellings: gradient_checkpointing, activation_checkpointing, true and false."""
        if isinstance(self.gradient_checkpointing, bool):
            self.gradient_checkpointing = str(self.gradient_checkpointing).lower()
        asked = getattr(self, "activation_checkpointing", None)  # its name from transformers 5.21 on
        if asked is not None:
            asked = str(bool(asked)).lower()
            if self.gradient_checkpointing not in ("auto", asked):
                raise ValueError(
                    f"activation_checkpointing={asked} contradicts gradient_checkpointing="
                    f"{self.gradient_checkpointing!r}; they are one option. Set one of them."
                )
            self.gradient_checkpointing = asked
            self.activation_checkpointing = None

    def _refuse_unsupported(self) -> None:
        for name, (accepted, reason) in REFUSED.items():
            value = getattr(self, name, accepted[0])
            if value not in accepted:
                raise ValueError(f"{name}={value!r} is not supported by fastdpo {__version__}. {reason}")
        version = (self.fsdp_config or {}).get("version", 2)
        if self.fsdp and int(version) != 2:
            raise ValueError(
                f"fsdp_config: version={version!r} is not supported by fastdpo {__version__}: FSDP1 flattens the "
                "parameters of a layer into one. Leave version out, or set it to 2."
            )
        optimizer = str(getattr(self.optim, "value", self.optim))
        if optimizer in REFUSED_OPTIMIZERS or optimizer.endswith("_layerwise"):
            raise ValueError(f"optim={optimizer!r} steps inside the backward pass, before gradients are summed.")
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f"train_sampling_strategy={self.train_sampling_strategy!r} cannot be resumed exactly, and "
                "micro-batches are sorted by length anyway. Accepted are 'random' and 'sequential'."
            )
        if (self.accelerator_config.gradient_accumulation_kwargs or {}).get("num_steps", 1) != 1:
            raise ValueError("accelerator_config: set gradient_accumulation_steps instead of num_steps.")
        if self.accelerator_config.split_batches or self.accelerator_config.dispatch_batches:
            raise ValueError(
                "accelerator_config: split_batches and dispatch_batches are not supported; leave them off."
            )
        if not self.accelerator_config.even_batches:
            raise ValueError("accelerator_config: even_batches must stay on; wrapped pairs get zero weight here.")
        if self.router_aux_loss_coef not in (None, 0.0):
            raise ValueError(f"router_aux_loss_coef={self.router_aux_loss_coef}: only 0.0 is supported.")

    def _check_objective(self) -> None:
        if self.ld_alpha is not None and not 0.0 <= self.ld_alpha <= 1.0:
            raise ValueError(f"ld_alpha={self.ld_alpha}: a weight in [0, 1]; 1 is plain DPO.")
        if self.use_weighting and any(LOSSES[name].sorts_batch for name in self.loss_type):
            raise ValueError(f"use_weighting=True needs losses of single pairs, but loss_type={self.loss_type} sorts.")
        met = {"dynamic_beta"} if self.dynamic_beta else set()
        check_conditions(self, met | set(self.loss_parameters()), _CONDITIONS)
        if (
            self.dynamic_beta
            and self.beta_scope == "instance"
            and any(LOSSES[name].sorts_batch for name in self.loss_type)
        ):
            raise ValueError(
                f"beta_scope='instance' needs losses of single pairs, but loss_type={self.loss_type} sorts."
            )
        if self.dynamic_beta:
            self.make_dynamic_beta()
            if not any(LOSSES[name].uses_beta for name in self.loss_type):
                raise ValueError(f"dynamic_beta=True has no effect on loss_type={self.loss_type}, which has no β.")

    def _check_lengths(self) -> None:
        for name in ("max_length", "max_prompt_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value}: at least 1 token, or None for no limit.")
        if self.max_length and self.max_prompt_length and self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length={self.max_prompt_length} leaves no room for a completion within "
                f"max_length={self.max_length}; lower the first or raise the second."
            )
        if self.micro_batch_tokens != "auto":
            tokens = str(self.micro_batch_tokens)
            if not tokens.isdigit() or int(tokens) < 1:
                raise ValueError(f"micro_batch_tokens={self.micro_batch_tokens!r}: 'auto' or a number of at least 1.")

    def _check_memory(self) -> None:
        head_workspace_bytes(self.head_workspace)
        if self.memory_limit is not None:
            limit = bytes_of("memory_limit", self.memory_limit)
            if self.micro_batch_tokens != "auto":
                raise ValueError(
                    f"memory_limit={self.memory_limit!r} has no effect with micro_batch_tokens="
                    f"{self.micro_batch_tokens}; set that to auto."
                )
            if limit <= 0:
                raise ValueError(f"memory_limit={self.memory_limit!r}: a positive size such as 12GB.")
        if self.activation_offloading and self.gradient_checkpointing == "false":
            raise ValueError(
                "activation_offloading=True moves what checkpointed layers keep, but gradient_checkpointing='false'. "
                "Leave that at auto, or drop the offloading."
            )
        if self.reference == "online" and self.reference_cache_dir is not None:
            raise ValueError(
                f"reference_cache_dir={self.reference_cache_dir!r} has no effect with reference='online', which keeps "
                "nothing. Choose lazy or precompute."
            )

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
        wanted = {name for loss in self.loss_type if loss in LOSSES for name in LOSSES[loss].parameters}
        if self.f_divergence_type == "alpha_divergence":
            wanted.add("f_alpha_divergence_coef")
        return {name: getattr(self, name) for name in sorted(wanted)}

    def make_dynamic_beta(self) -> DynamicBeta:
        """A fresh `DynamicBeta` with this run's settings; its draws follow `seed`."""
        try:
            return DynamicBeta(
                beta=self.beta,
                alpha=self.beta_alpha,
                momentum=self.beta_momentum,
                keep_ratio=self.keep_ratio,
                min_beta=self.min_beta,
                scope=self.beta_scope,
                variant=self.beta_variant,
                seed=self.seed,
                backend=self.backend,
            )
        except ValueError as error:
            raise ValueError(_with_option_name(str(error))) from error
