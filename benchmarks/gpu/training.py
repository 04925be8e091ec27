"""Stage 7: a QLoRA step at the shape of Llama-3-8B, random weights, HH-shaped pairs, beside TRL's and the estimate.

Log-probs by variable-length attention with shared, packed prompts against one padded row per completion; five steps of
DPO and of β-DPO, the memory trial ahead of them included, beside TRL's DPOTrainer; the peak that `fastdpo estimate`
predicts for the same run; and the longest pair that a 12 GB and a 24 GB card would hold, torch's allocator being held
to that (what the driver and the optimizer's states take beside it is not counted).
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.modeling import convert_file_size_to_int
from transformers import PretrainedConfig, Trainer

from benchmarks.gpu import llama
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.report import Report, Skipped
from benchmarks.gpu.sizes import MIB, Sizes
from benchmarks.training_cases import TrainingCase, preference_ids, set_lora
from benchmarks.training_run import TRAINERS, StepClock, step_arguments
from fastdpo.estimate.rows import PairShape
from fastdpo.training.memory import RetryStep
from fastdpo.training.memory.plan import release_memory
from fastdpo.training.models.loading import lora_config
from fastdpo.training.options import ModelConfig
from fastdpo.training.rows import PLAIN, Layout
from fastdpo.training.rows.attention import segments_active

#: Largest mean difference of a token's log-prob between two ways through the model: 16 bits round in every layer.
LOGPS_ALLOWED = {torch.bfloat16: 5e-2, torch.float32: 1e-4}
#: Seconds that a part needs, or it is left out.
NEEDED = {"logps": 10.0, "fastdpo": 15.0, "trl": 20.0, "longest": 20.0}
#: Seconds that the search for the longest pair leaves for the estimate's figures.
RESERVE = 8.0
#: Tokens to which the longest pair is found.
TOKEN_STEP = 64
ESTIMATE = "import sys; from fastdpo.commands.cli import main; sys.exit(main())"


class DeviceClock(StepClock):
    """Waits for the card before it looks at the time."""

    def mark(self) -> None:
        synchronize()
        super().mark()


class Bench:
    """The model's configuration, the pairs, and trainers made of them."""

    def __init__(self, sizes: Sizes, folder: Path) -> None:
        self.sizes, self.shape, self.folder = sizes, sizes.training, folder
        self.chosen: ModelConfig = llama.options(sizes.device)
        self.config: PretrainedConfig = llama.configuration(sizes.training)
        self.case = TrainingCase(self.shape.pairs, self.shape.steps, self.shape.prompt, self.shape.completion)
        self.data = preference_ids(self.case, self.config.vocab_size)

    def trainer(self, kind: str, clock: StepClock | None = None, **options: Any) -> Trainer:
        """A trainer of a fresh model with the same LoRA."""
        on_gpu = self.sizes.on_gpu
        # One folder each: a run would take the reference log-probs that another has left in its own
        arguments = step_arguments(self.case, tempfile.mkdtemp(dir=self.folder)) | {
            "max_steps": self.case.steps,
            "use_cpu": not on_gpu,
            "bf16": on_gpu,
            # Alike for all, and without the managed memory of paged states
            "optim": "adamw_torch_fused" if on_gpu else "adamw_torch",
        }
        trainer = TRAINERS[kind](
            llama.build(self.config, self.chosen, self.sizes.device),
            arguments | options,
            train_dataset=self.data,
            processing_class=llama.tokenizer(),
            peft_config=lora_config(self.chosen),
            callbacks=[clock] if clock is not None else None,
        )
        set_lora_in_place(trainer.model)
        return trainer


def set_lora_in_place(model: torch.nn.Module) -> None:
    """`set_lora` draws in float32 on the CPU; here back to each parameter's device and dtype."""
    homes = {name: (p.device, p.dtype) for name, p in model.named_parameters() if p.requires_grad}
    set_lora(model)
    for name, parameter in model.named_parameters():
        if name in homes:
            parameter.data = parameter.data.to(*homes[name])


def run(report: Report, sizes: Sizes) -> None:
    clock = Clock(sizes.device, sizes.seconds)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(sizes, Path(folder))
        tokens = 0
        with report.case("log-probs"):
            compare_layouts(report, bench, clock)
        release_memory()
        for name, options in (("DPO", {}), ("β-DPO", {"dynamic_beta": True})):
            if report.skips(name, NEEDED["fastdpo"] if sizes.on_gpu else 0.0):
                continue
            with report.case(name):
                found = train(report, bench, name, "fastdpo", **options)
                tokens = tokens or found
            release_memory()
        if not report.skips("TRL's DPOTrainer", NEEDED["trl"] if sizes.on_gpu else 0.0):
            with report.case("TRL's DPOTrainer"):
                train(report, bench, "TRL's DPOTrainer", "trl")
            release_memory()
        predicted = None
        if tokens:  # only now: it takes the CPU, and nothing that follows is timed
            with report.case("start of the estimate"):
                predicted = start_estimate(bench, tokens)
        if not report.skips("longest pair", NEEDED["longest"] if sizes.on_gpu else 0.0):
            with report.case("longest pair"):
                longest_pairs(report, bench)
        if predicted is not None:
            with report.case("estimate"):
                report_estimate(report, predicted, report.left())


# Log-probs


@torch.no_grad()
def compare_layouts(report: Report, bench: Bench, clock: Clock) -> None:
    """Token log-probs of one batch, packed and shared by segments, against one row per completion by SDPA."""
    trainer: Any = bench.trainer("fastdpo")
    policy = trainer.model.eval()
    rows = [bench.data[i] for i in range(bench.case.pairs)]
    batch = trainer.objective.batch_of(rows, trainer.args.device)
    everything = 2 * sum(trainer_tokens(row) for row in rows)

    def scored(layout: Layout) -> torch.Tensor:
        """(2P, C), chosen first, in the order of the pairs."""
        (micro,) = batch.cut(everything, None, layout)
        logps = trainer.parts.passes.forward(policy, micro).logps
        order = torch.cat([micro.indices, micro.indices + len(micro)]).to(logps.device)
        return torch.zeros_like(logps).index_copy_(0, order, logps)

    def shared() -> torch.Tensor:
        with segments_active([policy]):
            return scored(Layout(sharing=True, packing=True))

    plain = partial(scored, PLAIN)
    other, one = plain(), shared()  # the plain way first: it probes the model's head
    difference = (one - other).abs().double()
    mean = float(difference.sum() / (other != 0).sum())
    segments, rows_ = clock.measure({"segments": shared, "rows": plain}).values()
    dtype = torch.bfloat16 if bench.sizes.on_gpu else torch.float32
    report.add(
        "log-probs",
        headline=f"log-probs differ by {mean:.1e} a token: segments {segments.ms:.3g} ms, rows {rows_.ms:.3g} ms",
        mean_difference=mean,
        largest_difference=float(difference.max()),
        segments=segments.figures(),
        rows=rows_.figures(),
    )
    if not mean <= LOGPS_ALLOWED[dtype]:
        report.fail("log-probs", f"they differ by {mean:.1e} a token, {LOGPS_ALLOWED[dtype]:.0e} is allowed")


def trainer_tokens(row: dict[str, Any]) -> int:
    """Tokens of a pair's two rows, without padding; twice that holds any padding of HH's lengths."""
    return 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])


# Steps


def train(report: Report, bench: Bench, name: str, kind: str, **options: Any) -> int:
    """All steps of one trainer; `micro_batch_tokens` that its memory trial found, 0 for TRL's."""
    clock = DeviceClock()
    trainer: Any = bench.trainer(kind, clock, **options)
    reset_peak()
    start = time.perf_counter()
    clock.mark()
    trainer.train()
    whole, seconds, (peak, allocated) = time.perf_counter() - start, clock.spent(0), peaks()
    later = sum(seconds[1:]) / max(len(seconds) - 1, 1)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    tokens = trainer.parts.memory.train_tokens if kind == "fastdpo" else 0
    found = f", micro-batches of {tokens:,} tokens" * bool(tokens)
    report.add(
        name,
        headline=f"{name}: {later:.3g} s a step, first {seconds[0]:.3g} s, peak {peak / MIB:,.0f} MiB{found}",
        seconds=seconds,
        seconds_per_later_step=later,
        seconds_in_all=whole,
        peak_mib=peak / MIB,
        allocated_mib=allocated / MIB,
        micro_batch_tokens=tokens,
        losses=losses,
    )
    if len(seconds) != bench.case.steps:
        report.fail(name, f"{len(seconds)} steps were taken, {bench.case.steps} were expected")
    if not torch.tensor(losses).isfinite().all():
        report.fail(name, f"losses {losses}: not finite")
    return tokens


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peaks() -> tuple[int, int]:
    """Bytes that torch's allocator held at most, and of those handed out; 0 on a CPU."""
    if not torch.cuda.is_available():
        return 0, 0
    return torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()


# What was predicted


def start_estimate(bench: Bench, tokens: int) -> subprocess.Popen[str]:
    """`fastdpo estimate` for the DPO run, beside what comes next: it needs CPUs only."""
    longest = max(bench.data.to_list(), key=trainer_tokens)
    prompt = len(longest["prompt_ids"])
    completion = max(len(longest["chosen_ids"]), len(longest["rejected_ids"]))
    arguments = [
        "estimate",
        "--json",
        "--model_name_or_path",
        str(llama.save_configuration(bench.config, bench.folder)),
    ]
    arguments += ["--device", "h100", "--dtype", bench.chosen.dtype, "--lora_r", "16", "--lora_alpha", "32"]
    arguments += ["--load_in_4bit"] if bench.chosen.load_in_4bit else []
    arguments += ["--max_length", str(prompt + completion), "--max_prompt_length", str(prompt)]
    arguments += ["--micro_batch_tokens", str(tokens), "--per_device_train_batch_size", str(bench.case.pairs)]
    arguments += ["--gpu_memory", *bench.shape.cards]
    return subprocess.Popen([sys.executable, "-c", ESTIMATE, *arguments], stdout=subprocess.PIPE, text=True)


def report_estimate(report: Report, process: subprocess.Popen[str], seconds: float) -> None:
    """Its figures. Raises RuntimeError where it failed, subprocess.TimeoutExpired where it takes too long."""
    try:
        text, _ = process.communicate(timeout=max(seconds, 1.0))
    finally:
        process.kill()
    if process.returncode:
        raise RuntimeError(f"fastdpo estimate ended with status {process.returncode}; its message is in the log")
    document = json.loads(text)
    fits = {fit["gpu_memory"]: fit for fit in document["fits"] if not fit["checkpointing"]}
    longest_pairs = {
        card: fit["longest_pair"] and fit["longest_pair"]["prompt"] + 2 * fit["longest_pair"]["completion"]
        for card, fit in fits.items()
    }
    report.add(
        "estimate",
        headline=f"estimate of the DPO run, with 8-bit AdamW: peak {document['peak_bytes'] / MIB:,.0f} MiB; "
        + "longest pair in tokens: "
        + ", ".join(f"{card} {tokens}" for card, tokens in longest_pairs.items()),
        peak_mib=document["peak_bytes"] / MIB,
        parts=document["parts"],
        fits=fits,
    )


# The longest pair


def longest_pairs(report: Report, bench: Bench) -> None:
    """For each card, without checkpointing: the longest pair, half prompt, that goes forward and backward alone."""
    trainer: Any = bench.trainer("fastdpo", gradient_checkpointing="false")
    first = trainer.objective.batch_of([bench.data[0]], trainer.args.device)
    trainer.parts.layouts.settle(first)
    for card in bench.shape.cards:
        name = f"longest pair on {card}"
        if report.skips(name, NEEDED["longest"] / 2 if bench.sizes.on_gpu else 0.0):
            continue
        with report.case(name):
            limit = convert_file_size_to_int(card)
            release_memory()
            if bench.sizes.on_gpu:
                total = torch.cuda.get_device_properties(0).total_memory
                if limit > total:
                    raise Skipped(f"this card has {total / 1e9:.0f} GB")
                torch.cuda.set_per_process_memory_fraction(limit / total)
            try:
                in_time = partial(_in_time, report)
                tokens = longest(fits(trainer), bench.shape.longest, in_time)
            finally:
                if bench.sizes.on_gpu:
                    torch.cuda.set_per_process_memory_fraction(1.0)
            pair = of_tokens(tokens)
            text = f"{tokens:,} tokens, prompt and completion {pair.prompt + pair.completion:,}"
            ended = tokens == bench.shape.longest or not in_time()
            more = " at least (the search ends there)" if ended else ""
            report.add(name, headline=f"{name}: {text}{more}", tokens=tokens, length=pair.prompt + pair.completion)


def of_tokens(tokens: int) -> PairShape:
    """A pair of so many tokens in a shared row: as many of the prompt as of each completion."""
    return PairShape(tokens // 3, (tokens - tokens // 3) // 2)


def _in_time(report: Report) -> bool:
    """Whether the stage has time for one more try, and for what is reported after the last one."""
    return report.left() > RESERVE


def longest(attempt: Callable[[int], bool], cap: int, in_time: Callable[[], bool] = lambda: True) -> int:
    """The most tokens up to `cap` for which `attempt` is true, to TOKEN_STEP, or as far as `in_time` lets it come; 0
    where not even that many are."""
    fit, fail = 0, TOKEN_STEP
    while fail <= cap and in_time() and attempt(fail):
        fit, fail = fail, min(2 * fail, cap) if fail < cap else cap + 1
    while fit and fail - fit > TOKEN_STEP and fit < cap and in_time():
        middle = (fit + fail) // 2
        fit, fail = (middle, fail) if attempt(middle) else (fit, middle)
    return fit


def fits(trainer: Any) -> Callable[[int], bool]:
    """Whether a pair of so many tokens goes forward and backward."""

    def attempt(tokens: int) -> bool:
        pair = of_tokens(tokens)
        draw = partial(torch.randint, 0, trainer.model.config.vocab_size)
        ids = {"prompt_ids": draw((pair.prompt,)), "chosen_ids": draw((pair.completion,))}
        row = ids | {"rejected_ids": draw((pair.completion,)), "example_id": "longest"}
        batch = trainer.objective.batch_of([row], trainer.args.device)

        def work() -> None:
            (micro,) = trainer.parts.passes.cut(batch, 1, range(1))
            trainer.accelerator.backward(0.0 * trainer.parts.passes.forward(trainer.model, micro).logps.sum())

        try:
            with trainer.parts.layouts.active():
                trainer.parts.memory.guarded(work)
        except RetryStep:
            return False
        finally:
            trainer.model.zero_grad()
            release_memory()
        return True

    return attempt
