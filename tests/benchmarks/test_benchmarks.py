"""The benchmarks run, and measure what they say: turns, lines, memory, counts, and peers that compute the same."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import cases, contenders, linear_preference_loss, report, timing
from benchmarks.cases import HeadCase, HeadInputs, PairInputs
from benchmarks.linear_logprob import memory, scaling
from benchmarks.settings import Settings

ROOT = Path(__file__).parents[2]


def test_command_writes_figures_of_every_section(tmp_path: Path) -> None:
    output, plot = tmp_path / "figures.json", tmp_path / "scaling.png"
    sections = ["head", "scaling", "memory", "loss", "accuracy"]
    options = ["--tiny", "--threads", "1", "--repeats", "2", "--output", str(output), "--plot", str(plot)]
    command = [sys.executable, "-m", "benchmarks", *sections, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    document = json.loads(output.read_text(encoding="utf-8"))
    assert list(dict.fromkeys(figure["section"] for figure in document["figures"])) == sections
    assert document["machine"]["torch"] == torch.__version__
    for figure in document["figures"]:
        assert math.isfinite(figure["value"])
        assert figure["against"]
        assert figure["baseline"] is not None
    assert plot.stat().st_size > 1000


def test_peers_agree_with_float64_on_a_tiny_batch() -> None:
    figures = linear_preference_loss.run(Settings(threads=1, repeats=2, tiny=True))
    errors = [figure for figure in figures if figure.measured.endswith(": error")]
    assert {"fastdpo: error", "full logits: error"} <= {figure.measured for figure in errors}
    assert all(figure.met for figure in errors)


def test_a_peer_that_computes_something_else_is_not_timed_against(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_reference(x: PairInputs) -> contenders.Outcome:
        return contenders.full_logits_pairs(PairInputs(x.hidden, x.hidden.detach(), x.weight, x.targets, x.beta))

    monkeypatch.setattr(
        linear_preference_loss, "PEERS", {"other": linear_preference_loss.Peer(without_reference, 3, True)}
    )
    with pytest.raises(ValueError, match="other differs from float64"):
        linear_preference_loss.run(Settings(repeats=2, tiny=True))


def test_contenders_take_turns_until_their_seconds_are_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    now, ran = [0.0], []

    def contender(name: str, seconds: list[float]) -> None:
        ran.append(name)
        now[0] += seconds[ran.count(name) - 1]

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    seconds = {"long": [20.0], "slow": [10.0, 9.0], "quick": [3.0, 1.0, 2.0]}
    timings = timing.interleave(
        {name: lambda name=name, each=each: contender(name, each) for name, each in seconds.items()},
        repeats=3,
        budget=15.0,
    )
    assert ran == ["long", "slow", "quick", "slow", "quick", "quick"]
    assert {name: timing.seconds for name, timing in timings.items()} == seconds
    assert (timings["quick"].best, timings["quick"].median) == (1.0, 2.0)


def test_line_by_hand() -> None:
    # slope 5/2, intercept 13/3 − 5; residuals 1/6, −1/3, 1/6; Σ(y − 13/3)² = 38/3
    line = scaling.fit([1, 2, 3], [2.0, 4.0, 7.0])
    assert (line.slope, line.intercept) == pytest.approx((2.5, -2 / 3))
    assert line.r_squared == pytest.approx(1 - (1 / 6) / (38 / 3))
    assert line.largest_deviation == pytest.approx((1 / 6) / (11 / 6))


def test_memory_sees_what_is_freed_before_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def holds_64_mib(x: HeadInputs) -> torch.Tensor:
        torch.ones(16 * 2**20)
        return x.hidden.detach()

    monkeypatch.setitem(memory.POLICY_HEADS, "other", holds_64_mib)
    # Linux counts resident pages in batches per core
    assert 63 <= memory.growth(HeadCase(16, 32, 64), "other", torch.float32) / memory.MIB < 72


def test_counts_by_hand() -> None:
    case = HeadCase(2, 3, 5)
    assert case.flops == 3 * 2 * 2 * 3 * 5
    assert case.bytes() == 4 * (2 * 15 + 3 * 6)  # W twice; two hidden states and a gradient


def test_batch_is_shaped_as_it_says() -> None:
    case = cases.PairCase(pairs=6, hidden=4, vocab=50, prompt=(3, 9), completion=(2, 6))
    inputs = cases.pair_inputs(case)
    first, rows = inputs.mask.int().argmax(1), inputs.mask.sum(1)
    assert torch.equal(first[:6], first[6:])  # a pair shares its prompt
    assert 2 <= int(first.min()) <= int(first.max()) <= 8
    assert 2 <= int(rows.min()) <= int(rows.max()) <= 6
    assert inputs.targets.shape[1] == int((first + rows).max())  # nothing but padding beyond
    assert not inputs.weight.requires_grad
    # Five prompt tokens, of which the last predicts the first of three
    exact = cases.pair_inputs(cases.PairCase(pairs=1, hidden=4, vocab=50, prompt=(5, 5), completion=(3, 3)))
    assert exact.mask.tolist() == 2 * [4 * [False] + 3 * [True]]
    wide = cases.pair_inputs(cases.PairCase(pairs=2, hidden=64, vocab=500))
    logits = wide.hidden.detach() @ wide.weight.t()
    assert float(logits.std()) == pytest.approx(cases.LOGIT_STD, rel=0.05)


def test_targets() -> None:
    assert report.Figure("", "", ratio=1.07, target=report.at_most(1.08)).met is True
    assert report.Figure("", "", ratio=6.4, target=report.at_least(6.5)).met is False
    assert report.Figure("", "", ratio=6.4).met is None
