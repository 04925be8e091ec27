"""What a finished run leaves in its output folder: weights, tokenizer, options, metrics, curves and a model card."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from fastdpo.training.runs.curves import plot_curves
from fastdpo.version import __version__

if TYPE_CHECKING:
    from fastdpo.training.trainer import FastDPOTrainer

METRICS_FILE, CURVES_FILE, OPTIONS_FILE, CARD_FILE = "metrics.json", "curves.png", "run.yaml", "README.md"

_CARD = """---
{{ card_data }}
---

# {{ title }}

{{ adapter_or_model }} of {{ base }}, aligned with {{ method }} by fastdpo {{ version }}.

| setting | value |
| --- | --- |
{{ settings }}

## Evaluation

{{ evaluation }}

All logged metrics are in `metrics.json`, all options in `run.yaml`.

## Sources

DPO: [2305.18290](https://arxiv.org/abs/2305.18290){{ sources }}
"""


def save_run(trainer: FastDPOTrainer, results: dict[str, Any], options: dict[str, Any] | None = None) -> list[Path]:
    """Write what a finished run leaves besides its weights, which the caller has saved, and push all if asked to.

    results: final figures, stored in metrics.json beside the log. options: further options for run.yaml.
    Returns the files written; none on other processes than the main one.
    """
    written: list[Path] = []
    trainer.results = results
    if trainer.is_world_process_zero():
        folder = Path(trainer.args.output_dir)
        history = trainer.state.log_history
        metrics = {"fastdpo": __version__, "results": results, "log": history}
        (folder / METRICS_FILE).write_text(json.dumps(metrics, indent=1, default=float), encoding="utf-8")
        options = {**(options or {}), **training_options(trainer)}
        (folder / OPTIONS_FILE).write_text(
            yaml.safe_dump(options, sort_keys=False, allow_unicode=True), encoding="utf-8"
        )
        trainer.create_model_card()
        written = [folder / name for name in (METRICS_FILE, OPTIONS_FILE, CARD_FILE)]
        if plot_curves(history, folder / CURVES_FILE):
            written.append(folder / CURVES_FILE)
    if trainer.args.push_to_hub:
        trainer.push_to_hub(commit_message="End of training")
    return written


def training_options(trainer: FastDPOTrainer) -> dict[str, Any]:
    """Every training option that differs from its default, in plain types, so that the file can be given to `train`."""
    options = {}
    values = trainer.config.to_dict()
    for field in dataclasses.fields(trainer.config):
        default = field.default_factory() if callable(field.default_factory) else field.default
        value = values.get(field.name)
        plain = not field.name.endswith("_token") and field.name not in _DERIVED
        if field.init and plain and value != getattr(default, "value", default) and _is_plain(value):
            options[field.name] = value
    return options


#: Options that are worked out from the machine, or that say how this call met an existing run: a file that repeats the
#: latter would delete the very run it describes.
_DERIVED = (
    "accelerator_config",
    "dataloader_pin_memory",
    "local_rank",
    "overwrite_output_dir",
    "resume_from_checkpoint",
)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, dict)):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, (str, int, float, bool))


def write_card(
    trainer: FastDPOTrainer,
    results: dict[str, Any],
    path: Path,
    model_name: str | None = None,
    tags: str | list[str] | None = None,
) -> None:
    """A model card with the settings that matter and the evaluation's figures."""
    args, model = trainer.args, trainer.model
    base = str(model.config._name_or_path) or type(model).__name__
    local = Path(base).exists() or base == type(model).__name__
    method = "β-DPO" if args.dynamic_beta else "DPO"
    adapter = hasattr(model, "peft_config")
    figures = {name: value for name, value in results.items() if isinstance(value, (int, float))}
    name = model_name or Path(args.output_dir).name
    own = {"fastdpo", "dpo", *(["beta-dpo"] if args.dynamic_beta else [])}
    data = ModelCardData(
        base_model=None if local else base,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=sorted(own | set([tags] if isinstance(tags, str) else tags or [])),
        model_name=name,
        eval_results=[
            EvalResult("text-generation", "preference", "evaluation pairs", metric.replace("eval_", "", 1), value)
            for metric, value in figures.items()
            if metric.startswith("eval_rewards/")
        ]
        or None,
    )
    dynamic = f"α = {args.beta_alpha}, momentum {args.beta_momentum}, keep {args.keep_ratio}, {args.beta_variant}"
    settings = {
        "loss": ", ".join(args.loss_type),
        "β0": args.beta,
        "dynamic β": dynamic if args.dynamic_beta else "off",
        "pairs per step": args.per_device_train_batch_size * args.world_size,
        "steps": trainer.state.global_step,
        "learning rate": f"{args.learning_rate:g}, {args.lr_scheduler_type.value}",
        "seed": args.seed,
    }
    card = ModelCard.from_template(
        data,
        template_str=_CARD,
        adapter_or_model="An adapter" if adapter else "A fine-tuned version",
        method=method,
        version=__version__,
        settings="\n".join(f"| {key} | {value} |" for key, value in settings.items()),
        evaluation="\n".join(f"- {key}: {value:.4g}" for key, value in figures.items())
        or "No evaluation set was given.",
        sources=", β-DPO: [2407.08639](https://arxiv.org/abs/2407.08639)" if args.dynamic_beta else "",
        title=name,
        base=Path(base).name if local else f"[{base}](https://huggingface.co/{base})",
    )
    card.save(path)
