"""The demo's before/after figures: measured on the evaluation pairs, printed as tables."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastdpo.training.objectives import PairScores
from fastdpo.training.trainer import FastDPOTrainer

MAX_NEW_TOKENS = 40
#: Kinds of preference that one generated answer each is shown for.
SHOWN_KINDS = ("polite", "safe")


@dataclass(frozen=True)
class Snapshot:
    """The model at one time.

    metrics: as the trainer computes them over all evaluation pairs.
    ranked, rewarded: (N,) whether log π(chosen) > log π(rejected), and whether the same holds for rewards.
    kinds: kind of preference of each pair.
    answers: prompt → generated answer.
    """

    metrics: dict[str, float]
    ranked: Tensor
    rewarded: Tensor
    kinds: list[str]
    answers: dict[str, str]
    scoring_seconds: float
    generation_seconds: float

    @property
    def pairs(self) -> int:
        """Evaluation pairs."""
        return len(self.kinds)

    def share(self, correct: Tensor, kind: str | None = None) -> float:
        """Share of pairs that `correct` (N,) marks, of one kind or of all."""
        chosen = torch.tensor([kind in (None, each) for each in self.kinds])
        return float(correct[chosen].float().mean())


def take_snapshot(trainer: FastDPOTrainer, meta: Path) -> Snapshot:
    """Score all evaluation pairs and generate the answers that are shown."""
    kinds = [json.loads(line)["kind"] for line in meta.read_text(encoding="utf-8").splitlines()]
    begun = time.time()
    prediction = trainer.predict(trainer.eval_dataset, metric_key_prefix="eval")
    scored = time.time()
    scores = PairScores.unstack(torch.as_tensor(prediction.predictions))
    margins = (scores.chosen_logps - scores.ref_chosen_logps) - (scores.rejected_logps - scores.ref_rejected_logps)
    answers = generate(trainer, [kinds.index(kind) for kind in SHOWN_KINDS if kind in kinds])
    return Snapshot(
        metrics=prediction.metrics,
        ranked=scores.chosen_logps > scores.rejected_logps,
        rewarded=margins > 0,
        kinds=kinds,
        answers=answers,
        scoring_seconds=scored - begun,
        generation_seconds=time.time() - scored,
    )


@torch.no_grad()
def generate(trainer: FastDPOTrainer, rows: Sequence[int]) -> dict[str, str]:
    """Greedy answers to the prompts of these evaluation pairs."""
    tokenizer, model = trainer.processing_class, trainer.model
    prompts = [torch.tensor(trainer.eval_dataset[row]["prompt_ids"]) for row in rows]
    width = max(map(len, prompts))
    input_ids = torch.stack([torch.nn.functional.pad(p, (width - len(p), 0)) for p in prompts])
    mask = torch.stack([torch.arange(width) >= width - len(p) for p in prompts]).long()
    training = model.training
    model.eval()
    output = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.eos_token_id,
    )
    model.train(training)
    texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    questions = [_question(tokenizer.decode(prompt)) for prompt in prompts]
    return dict(zip(questions, (" ".join(text.split()) for text in texts), strict=True))


def _question(rendered: str) -> str:
    """The last user turn of a rendered prompt."""
    return rendered.rpartition("user\n")[2].partition("<|im_end|>")[0].strip()


def peak_memory_gib() -> float:
    """Peak resident memory of this process, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def results_of(
    before: Snapshot, after: Snapshot, words: dict[str, float], pairs: int, training: dict[str, float]
) -> dict[str, Any]:
    """All figures of the report, for metrics.json. `training`: transformers' metrics, of this call where it resumed,
    none where no step was left to train."""
    kinds = sorted(set(after.kinds))
    return {
        **{
            name: value
            for name, value in after.metrics.items()
            if name.startswith(("eval_rewards", "eval_logps", "eval_loss"))
        },
        "before": before.metrics,
        "before_ranking_accuracy": before.share(before.ranked),
        "after_ranking_accuracy": after.share(after.ranked),
        "accuracy_by_kind": {kind: after.share(after.rewarded, kind) for kind in kinds},
        "before_ranking_by_kind": {kind: before.share(before.ranked, kind) for kind in kinds},
        "bag_of_words": words,
        "training_pairs": pairs,
        "evaluation_pairs": after.pairs,
        "train_seconds": training.get("train_runtime", 0.0),
        "pairs_per_second": training.get("train_samples_per_second", 0.0),
        "peak_memory_gib": peak_memory_gib(),
        "answers": {"before": before.answers, "after": after.answers},
    }


def print_report(console: Console, before: Snapshot, after: Snapshot, results: dict[str, Any]) -> None:
    """The before/after tables, the answers, and what the run cost."""
    table = Table(title=f"{after.pairs} evaluation pairs", title_justify="left")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_row(
        "log-prob of chosen above rejected", f"{before.share(before.ranked):.1%}", f"{after.share(after.ranked):.1%}"
    )
    table.add_row(
        "reward accuracy", "- (margins are 0)", f"[bold]{after.metrics['eval_rewards/accuracies']:.1%}[/bold]"
    )
    for name, label in (
        ("rewards/margins", "reward margin"),
        ("logps/chosen", "mean log-prob, chosen"),
        ("logps/rejected", "mean log-prob, rejected"),
    ):
        table.add_row(label, *(f"{each.metrics[f'eval_{name}']:+.3f}" for each in (before, after)))
    console.print(table)

    table = Table(title="accuracy by kind of preference", title_justify="left")
    columns = ("kind", "pairs", "model's own ranking before", "reward accuracy after", "bag of words, same pairs")
    for column in columns:
        table.add_column(column, justify="left" if column == "kind" else "right")
    words = results["bag_of_words"]
    for kind in (*sorted(set(after.kinds)), None):
        table.add_row(
            kind or "all",
            str(after.pairs if kind is None else after.kinds.count(kind)),
            f"{before.share(before.ranked, kind):.1%}",
            f"{after.share(after.rewarded, kind):.1%}",
            f"{words[kind or 'overall']:.1%}",
        )
    console.print(table)
    for question, answer in after.answers.items():
        console.print(
            f"\n[bold]{question}[/bold]\n  before: {before.answers[question]}\n  after:  {answer}", markup=True
        )
    console.print(
        f"\n{results['training_pairs']} pairs at {results['pairs_per_second']:.2f} pairs/s, "
        f"peak memory {results['peak_memory_gib']:.2f} GiB, {results['seconds']:.0f} s in all"
    )
