"""The stages that a card is asked: run, ended, reported, and what can go wrong, without a card."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cases, contenders, timing
from benchmarks.gpu import NO_CARD, ceilings, probe, runner, training
from benchmarks.gpu import __main__ as command
from benchmarks.gpu.linear_logprob import peers
from benchmarks.gpu.report import Report, Skipped
from benchmarks.gpu.runner import STAGES, Runner, Stage
from benchmarks.gpu.sizes import REAL, TOY

ROOT = Path(__file__).resolve().parents[2]
Usage = namedtuple("Usage", "total used free")


# Without a card


def without_card(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    values = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable, **environment}
    return subprocess.run(command, cwd=ROOT, env=values, capture_output=True, text=True, timeout=600)


def test_without_a_card_the_command_says_so_with_a_status_of_its_own(tmp_path: Path) -> None:
    done = without_card(sys.executable, "-m", "benchmarks.gpu", "--stages", "1-4", OUT=str(tmp_path / "out"))
    assert done.returncode == NO_CARD == 3, done.stderr
    assert re.fullmatch(r"no card: .*\. .*\. Without a card, --dry runs every stage at toy size\.\n", done.stdout)
    assert not (tmp_path / "out").exists()


def test_without_a_card_prove_sh_says_so_with_the_same_status(tmp_path: Path) -> None:
    done = without_card("bash", "gpu/prove.sh", KIT=str(tmp_path / "none"), KIT_SITE=str(tmp_path / "site"))
    assert done.returncode == 3, done.stderr
    kit_line, card_line = done.stdout.splitlines()
    assert kit_line.startswith("no kit: there is no kit in")
    assert card_line.startswith("no card: ")


def test_an_interpreter_without_anything_says_so_with_the_same_status(tmp_path: Path) -> None:
    """No rich, no torch: `-S` leaves the packages out."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n', "utf-8")
    bare.chmod(0o755)
    lines = "import sys; sys.path.insert(0, sys.argv.pop(1)); sys.executable = sys.argv.pop(1)\n"
    lines += "from benchmarks.gpu.__main__ import main; sys.exit(main([]))"
    done = without_card(str(bare), "-c", lines, str(ROOT), str(bare))
    assert done.returncode == 3, done.stderr
    assert re.match(r"no card: torch could not look for a card|no card: torch cannot be imported", done.stdout)


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        ({"card": None, "reason": "no card is visible."}, "no card is visible. Without a card, --dry"),
        ({"card": {"name": "x"}}, "TRITON_INTERPRET=1 would run the kernels on the CPU beside a card. Unset it"),
    ],
)
def test_refusals(found: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert command.refusal(found).startswith(sentence)


def test_gpu_tests_are_deselected_aloud_and_asked_for_in_vain_end_with_the_status() -> None:
    options = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", "tests/benchmarks/test_gpu.py")
    done = without_card(sys.executable, *options)
    assert done.returncode == 0, done.stdout
    assert re.search(r"\d+ GPU tests were deselected; they run on a card: make test-gpu\.", done.stdout)
    assert re.search(r"\d+/\d+ tests collected \(\d+ deselected\)", done.stdout)  # pytest's own line counts them too
    assert "cuda" not in done.stdout
    done = without_card(sys.executable, *options, FASTDPO_TEST_DEVICE="cuda", TRITON_INTERPRET="")
    assert done.returncode == 3
    assert "sees no card" in done.stdout + done.stderr


# The stages


def test_limits_and_choice_of_stages(capsys: pytest.CaptureFixture[str]) -> None:
    assert [stage.number for stage in STAGES] == list(range(1, 9))
    for half, seconds in ((STAGES[:4], 240), (STAGES[4:], 300)):
        assert 10 <= seconds - sum(stage.seconds for stage in half) <= 15  # for what is no stage's
    assert [stage.number for stage in command.stage_numbers("2,4-6")] == [2, 4, 5, 6]
    for text in ("0-4", "4-2", "9", "all"):
        with pytest.raises(SystemExit, match="2"):
            command.parse(["--stages", text])
        assert "numbers from 1 to 8" in capsys.readouterr().err


STAGE_MODULES = {
    "hangs": """
        import pathlib, subprocess, sys, time
        def run(report, sizes):
            report.add("before", value=1.5)
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            with report.case("the slow one"):
                pathlib.Path(r"{folder}", "starting").write_text(str(child.pid))
                pathlib.Path(r"{folder}", "starting").rename(r"{folder}/child")
                time.sleep(60)
    """,
    "raises": """
        def run(report, sizes):
            report.add("before", value=1)
            raise ZeroDivisionError("a stage\\nwith two lines")
    """,
    "crashes": """
        import os, signal
        def run(report, sizes):
            with report.case("the last one"):
                os.kill(os.getpid(), signal.SIGSEGV)
    """,
    "fails": """
        def run(report, sizes):
            with report.case("first"):
                raise KeyError("x")
            with report.case("second"):
                report.add("second", headline="seen", value=2)
    """,
    "fits": """
        def run(report, sizes):
            report.add("all", headline=f"on {sizes.device}", seconds=report.left())
    """,
}


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Stage]:
    """Stages that do what they are called, in modules of their own."""
    import textwrap

    made = {}
    for number, (name, text) in enumerate(STAGE_MODULES.items(), start=1):
        source = textwrap.dedent(text.replace("{folder}", str(tmp_path)))
        (tmp_path / f"stage_{name}.py").write_text(source, "utf-8")
        made[name] = Stage(number, name, 0.5 if name == "hangs" else 60, module=f"stage_{name}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    return made


def alive(pid: int) -> bool:
    """Whether a process runs; a dead one whose parent has not looked yet does not."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_stages_that_hang_crash_or_fail_say_why_and_the_next_one_runs(
    stages: dict[str, Stage], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Patient(subprocess.Popen[bytes]):
        """The hanging stage's time begins when it has begun its case, however long its imports take."""

        def wait(self, timeout: float | None = None) -> int:
            while timeout == 2.0 and self.poll() is None and not (tmp_path / "child").exists():
                time.sleep(0.05)
            return super().wait(timeout)

    monkeypatch.setattr(runner.subprocess, "Popen", Patient)
    document: dict[str, Any] = {"card": None, "date": "today"}
    assert Runner(tmp_path, document, dry=True).run(list(stages.values())) is False
    monkeypatch.undo()
    results = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert results == document
    assert {name: results[name]["ok"] for name in stages} == {name: name == "fits" for name in stages}
    assert {name: results[name].get("reason") for name in stages} == {
        "hangs": "it took more than its 2 s, at 'the slow one', and was ended; log.txt has its output.",
        "raises": "with two lines",
        "crashes": "it was ended by signal 11, at 'the last one'; log.txt has its output.",
        "fails": "first: KeyError: 'x'",
        "fits": None,
    }
    assert results["hangs"]["figures"] == {"before": {"value": 1.5}}  # what was measured is kept
    assert results["hangs"]["seconds"] >= 2
    assert results["fails"]["headlines"] == ["seen"]
    assert 200 < results["fits"]["figures"]["all"]["seconds"] <= 235  # five less than its limit
    assert not alive(int((tmp_path / "child").read_text()))
    log = (tmp_path / "log.txt").read_text("utf-8")
    assert [line for line in log.splitlines() if line.startswith("==")] == [
        f"== stage {i} {name}" for i, name in enumerate(stages, start=1)
    ]
    assert "ZeroDivisionError" in log
    assert "1 hangs: not ok: it took more" in capsys.readouterr().out
    shown = "\n".join(str(cell) for column in command.table(document, list(stages.values())).columns
                      for cell in column.cells)  # fmt: skip
    assert "first: KeyError" in shown
    assert "on cpu" in shown


def test_brackets_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """In what a stage says, in reasons, and in the card's name: none is markup."""
    failed = {"a [bold]": "no such file [/tmp/x]"}
    outcome = {"ok": False, "seconds": 1.0, "headlines": ["[red]"], "failed": failed, "skipped": {"b": "[cuda-bf16]"}}
    document = {"card": {"name": "a card [x]"}, "date": "today", "ceilings": outcome}
    document["loss"] = {"ok": False, "seconds": 0.0, "reason": "ended [/]"}
    command.show(document, [stage for stage in STAGES if stage.name in document])
    shown = capsys.readouterr().out
    for text in ("a card [x], today", "[red]", "a [bold]: no such file [/tmp/x]", "b: [cuda-bf16]", "ended [/]"):
        assert text in shown


def test_no_table_without_rich_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    command.show({}, [])
    assert re.match(r"no table: .* cannot import rich .*; install it, or read results\.json", capsys.readouterr().out)


def test_an_old_card_runs_what_needs_no_kernel(stages: dict[str, Stage], tmp_path: Path) -> None:
    card = {"name": "Tesla T4", "capability": [7, 5]}
    document: dict[str, Any] = {"card": card, "date": "today"}
    runs = Runner(tmp_path, document, dry=False)
    chosen = [Stage(1, "fits", 60, module=stages["fits"].module), Stage(2, "raises", 60, kernels=True)]
    assert runs.run(chosen) is False
    assert document["fits"]["ok"]
    assert document["raises"]["reason"] == (
        "the card (Tesla T4) is sm_75 and the kernels need sm_80. Use an Ampere card or newer."
    )
    assert {stage.name for stage in STAGES if not stage.kernels} == {"ceilings", "products", "peers"}


def test_results_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    runner.write_atomically(path, "old")
    seen: list[str] = []

    def interrupted(source: str, target: Path) -> None:
        seen.extend((Path(source).read_text("utf-8"), Path(target).read_text("utf-8")))
        raise KeyboardInterrupt

    monkeypatch.setattr(runner.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.write_atomically(path, "new")
    assert seen == ["new", "old"]  # all of the new text was there before the old one went
    assert [each.name for each in tmp_path.iterdir()] == ["results.json"]
    assert path.read_text("utf-8") == "old"


def test_no_disk_space_is_said_and_the_stages_run(
    stages: dict[str, Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner.shutil, "disk_usage", lambda _: Usage(10, 9, 2**20))
    assert "has 1 MiB free" in runner.check_space(tmp_path)
    assert "another disk" in runner.check_space(tmp_path)

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runner, "write_atomically", full)
    document: dict[str, Any] = {"card": None, "date": "today"}
    assert Runner(tmp_path, document, dry=True).run([stages["fits"]]) is False
    assert document["fits"]["ok"]
    assert "cannot be written ([Errno 28] No space left on device). Set OUT to a folder" in capsys.readouterr().out


def test_earlier_results_are_kept(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("earlier", "utf-8")
    os.utime(tmp_path / "results.json", (0, 0))
    command.keep_earlier(tmp_path)
    assert (tmp_path / "results-19700101T000000.json").read_text("utf-8") == "earlier"


def test_time_that_is_over_is_said(tmp_path: Path) -> None:
    report = Report(tmp_path / "lines", 10.0)
    assert not report.skips("short", 5.0)
    assert report.skips("long", 15.0)
    assert json.loads((tmp_path / "lines").read_text("utf-8")) == {
        "skipped": "long",
        "reason": "10 s of the stage's time are left",
    }


# What a machine lacks


def test_what_is_missing_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ceilings.shutil, "which", lambda *_, **__: None)
    with pytest.raises(Skipped, match=r"nvcc is not on the PATH.*Install CUDA's compiler or set PATH\."):
        ceilings.nvcc()

    def missing(name: str) -> str:
        raise ceilings.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(ceilings.metadata, "version", missing)
    with pytest.raises(Skipped, match="Run `make gpu-kit`"):
        ceilings.bitsandbytes()
    wheels = [{"name": "a", "version": "1", "requires": ["b>=2", 'c; python_version < "3"']}]
    (tmp_path / "kit.json").write_text(json.dumps({"wheels": wheels}), "utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert ceilings.unmet_requirements() == ["a 1 asks for b>=2, and none is there"]
    monkeypatch.setattr(ceilings.metadata, "version", lambda _: "1.9")
    assert ceilings.unmet_requirements() == ["a 1 asks for b>=2, and 1.9 is there"]
    monkeypatch.setattr(ceilings.metadata, "version", lambda _: "2.0")
    assert ceilings.unmet_requirements() == []


def test_peers_and_quantisation_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = peers.Peer(contenders.cce_policy_head, "no_such_module")
    with pytest.raises(Skipped, match=r"cannot be imported \(No module named 'no_such_module'\); the kit"):
        peers.check_available("x", peer, on_gpu=True)
    with pytest.raises(Skipped, match="x's kernels need a GPU"):
        peers.check_available("x", peers.Peer(contenders.cce_policy_head, on_gpu=True), on_gpu=False)
    monkeypatch.setattr(training.llama.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match="Run `make gpu-kit`"):
        training.llama.options("cuda")
    assert training.llama.options("cpu").load_in_4bit is False


# What is measured


def test_liger_coefficients_by_hand() -> None:
    """Eight sequences of one row: the gaps are 1, 0, 0, 0, and dL/dlogp = ∓β·σ(−β·gap)/4."""
    logps = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0], dtype=torch.float64)
    found = peers.liger_coefficients(logps)
    first = -0.1 / 4 / (1 + math.exp(0.1))
    assert found.tolist() == pytest.approx([first, -0.0125, -0.0125, -0.0125, -first, 0.0125, 0.0125, 0.0125])


def test_longest_is_found_to_its_step() -> None:
    for most, expected in ((63, 0), (64, 64), (1000, 960), (1023, 960), (5000, 2048)):
        tried: list[int] = []
        found = training.longest(lambda tokens, most=most, tried=tried: tried.append(tokens) or tokens <= most, 2048)
        assert found <= most or found == 0
        assert found == expected or most - found < training.TOKEN_STEP, (most, found)
        assert len(tried) < 12


def test_the_search_for_the_longest_ends_in_time() -> None:
    """Three tries: 64, 128, 256 fit; what was found by then stands."""
    left = iter([True, True, True])
    assert training.longest(lambda tokens: True, 2048, lambda: next(left, False)) == 256


def test_turns_wait_for_the_device() -> None:
    events: list[str] = []
    timing.interleave(
        {"a": lambda: events.append("a"), "b": lambda: events.append("b")},
        repeats=2,
        budget=1.0,
        synchronize=lambda: events.append("wait"),
    )
    assert events == ["wait", "a", "wait", "wait", "b", "wait"] * 2
    assert timing.synchronizer("cpu") is timing.nothing_to_wait_for


def test_inputs_are_made_on_the_device() -> None:
    """On the meta device, the only other one that is everywhere; the CPU's numbers are what they were."""
    pair = cases.pair_inputs(cases.TINY_PAIR, device="meta")
    assert {x.device.type for x in (pair.hidden, pair.ref_hidden, pair.weight, pair.targets)} == {"meta"}
    assert {x.device.type for x in cases.loss_inputs(cases.LossCase(2), device="meta")} == {"meta"}
    x = cases.head_inputs(cases.HeadCase(3, 2, 5), seed=0)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(x.hidden.detach(), torch.randn(3, 2, generator=generator))


@pytest.mark.slow
def test_every_stage_runs_dry(tmp_path: Path) -> None:
    """The code of a card's run at toy size: only what needs a GPU, or a package that is not here, is left out."""
    done = without_card(sys.executable, "-m", "benchmarks.gpu", "--dry", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:]
    results = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert results["dry"] is True
    assert results["card"] is None
    assert results["versions"]["torch"] == torch.__version__
    for stage in STAGES:
        assert results[stage.name]["ok"]
        assert results[stage.name]["headlines"]
        assert f"{stage.number} {stage.name}: ok" in done.stdout
        for name, reason in results[stage.name]["skipped"].items():
            assert name in ("nvcc", "bitsandbytes") or "cut-cross-entropy" in name, (name, reason)
    checked = results["correctness"]["figures"]
    assert {f"head: {check.name}" for check in TOY.checks} <= checked.keys()
    assert {f"loss: {name}" for name in (*REAL.losses, "per token")} | {"selective_logprob"} <= checked.keys()
    assert {"DPO", "β-DPO", "TRL's DPOTrainer", "estimate", "longest pair on 12GB"} <= results["training"][
        "figures"
    ].keys()
    assert results["training"]["figures"]["DPO"]["losses"] == pytest.approx(
        results["training"]["figures"]["TRL's DPOTrainer"]["losses"], rel=1e-3
    )


@pytest.mark.parametrize(("cuda", "step"), [("13.0", "See what `nvidia-smi -L` lists"), (None, "Install a CUDA build")])
def test_probe_names_versions_and_the_next_step(cuda: str | None, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    found = probe.probe()
    assert found["card"] is None
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["cuda"] == cuda
    assert step in found["reason"]
