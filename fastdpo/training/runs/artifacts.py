"""What a finished run leaves in its output folder: weights, tokenizer, options, metrics, curves and a model card."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError
from transformers import PreTrainedModel, TrainerState

from fastdpo.training.options import FastDPOConfig
from fastdpo.training.runs.curves import plot_curves
from fastdpo.training.runs.option_files import resolved_yaml, run_yaml
from fastdpo.training.runs.run_list import RunList
from fastdpo.training.runs.valid_json import valid_json
from fastdpo.version import __version__

logger = logging.getLogger(__name__)

METRICS_FILE, CURVES_FILE, CARD_FILE = "metrics.json", "curves.png", "README.md"
OPTIONS_FILE, RESOLVED_FILE = "run.yaml", "resolved.yaml"

#: Base of all that the hub's HTTP client raises, refused connections among them, whichever client it is.
_HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]

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

All logged metrics are in `metrics.json`, all options in `run.yaml`, what they came to in `resolved.yaml`.

## Sources

{{ sources }}
"""


@dataclass(frozen=True)
class Facts:
    """What a model card says of the objective.

    method: its name. settings: those that matter, by name. tags: on the hub. sources: papers as (name, arXiv id).
    """

    method: str
    settings: Mapping[str, Any]
    tags: Sequence[str] = ("fastdpo",)
    sources: Sequence[tuple[str, str]] = ()


def write_figures(folder: Path, history: list[dict[str, Any]], results: dict[str, Any]) -> None:
    """Into `folder`: metrics.json, the trainer's log `history` and the final figures beside it, with null for one that
    is no finite number; and the curves, or a warning why there are none."""
    content = {"fastdpo": __version__, "results": results, "log": history}
    (folder / METRICS_FILE).write_text(valid_json(content, indent=1, default=float), encoding="utf-8")
    with optional(CURVES_FILE):
        plot_curves(history, folder / CURVES_FILE)


def write_options(
    folder: Path, asked: FastDPOConfig, others: dict[str, Any], resolved: FastDPOConfig, found: dict[str, Any]
) -> None:
    """Into `folder`: run.yaml, the options asked for and `others`, so that it can be given to `fastdpo train`; and
    resolved.yaml, what the run made of them, with what was `found` by trial."""
    (folder / OPTIONS_FILE).write_text(run_yaml(asked, others), encoding="utf-8")
    (folder / RESOLVED_FILE).write_text(resolved_yaml(resolved, found), encoding="utf-8")


@contextmanager
def optional(what: str) -> Iterator[None]:
    """Around what a run can do without: where it fails for want of a file, a package or a connection, that is a
    warning with its cause."""
    try:
        yield
    except (OSError, ImportError, _HTTPError) as error:
        logger.warning("no %s: %s: %s", what, type(error).__name__, error)


def metrics_of(folder: Path) -> dict[str, Any]:
    """The final figures of the run in `folder`, as far as it has left them."""
    run = RunList.read(folder)
    for name in (name for name in (run.files if run else ()) if name.startswith("metrics.")):
        if (folder / name).is_file():
            return dict(json.loads((folder / name).read_text(encoding="utf-8"))["results"])
    return {}


def write_card(
    path: Path,
    model: PreTrainedModel,
    args: FastDPOConfig,
    state: TrainerState,
    facts: Facts,
    results: dict[str, Any],
    name: str | None = None,
    tags: str | list[str] | None = None,
) -> None:
    """A model card with the settings that matter and the evaluation's figures, of `results`.

    name: of the model, by default the folder's. tags: beside the facts' own.
    """
    base = str(model.config._name_or_path) or type(model).__name__
    local = Path(base).exists() or base == type(model).__name__
    adapter = hasattr(model, "peft_config")
    figures = {name: value for name, value in results.items() if isinstance(value, (int, float))}
    name = name or Path(args.output_dir).name
    data = ModelCardData(
        base_model=None if local else base,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=sorted({*facts.tags, *([tags] if isinstance(tags, str) else tags or [])}),
        model_name=name,
        eval_results=[
            EvalResult("text-generation", "preference", "evaluation pairs", metric.replace("eval_", "", 1), value)
            for metric, value in figures.items()
            if metric.startswith("eval_rewards/")
        ]
        or None,
    )
    settings = {
        **facts.settings,
        "pairs per step": args.per_device_train_batch_size * args.world_size,
        "steps": state.global_step,
        "learning rate": f"{args.learning_rate:g}, {args.lr_scheduler_type.value}",
        "seed": args.seed,
    }
    card = ModelCard.from_template(
        data,
        template_str=_CARD,
        adapter_or_model="An adapter" if adapter else "A fine-tuned version",
        method=facts.method,
        version=__version__,
        settings="\n".join(f"| {key} | {value} |" for key, value in settings.items()),
        evaluation="\n".join(f"- {key}: {value:.4g}" for key, value in figures.items())
        or "No evaluation set was given.",
        sources=", ".join(f"{paper}: [{arxiv}](https://arxiv.org/abs/{arxiv})" for paper, arxiv in facts.sources),
        title=name,
        base=Path(base).name if local else f"[{base}](https://huggingface.co/{base})",
    )
    card.save(path)
