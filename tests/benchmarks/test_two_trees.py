"""Plans on another checkout's library: whose code runs, whose turn it is, and what is compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import __main__ as command
from benchmarks import training
from benchmarks.process import ROOT, outcome_of
from benchmarks.settings import Settings
from benchmarks.training_cases import TrainingCase
from benchmarks.training_run import Contender, Outcome

DRIVER = """
import json, benchmarks, fastdpo
def main(arguments):
    print(json.dumps([fastdpo.NAME, benchmarks.__file__, arguments]))
"""
OWN_DRIVER = """
import json, sys, fastdpo, fastdpo_kernels
print(json.dumps([fastdpo.NAME, "own driver", sys.argv[1:]]))
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout with its own library and benchmarks."""
    made = tmp_path / "before"
    files = {
        "fastdpo/__init__.py": "NAME = 'before'",
        "kernels/fastdpo_kernels/__init__.py": "",
        "benchmarks/__init__.py": "",
        "benchmarks/own.py": OWN_DRIVER,
    }
    for name, text in files.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text(text, encoding="utf-8")
    (tmp_path / "driver.py").write_text(DRIVER, encoding="utf-8")
    return made


def test_our_driver_runs_the_other_trees_library(tree: Path) -> None:
    found = outcome_of("driver", ["a", "b"], {"PYTHONPATH": str(tree.parent)}, tree=str(tree))
    assert found == ["before", str(ROOT / "benchmarks" / "__init__.py"), ["a", "b"]]


def test_its_own_driver_runs_where_ours_cannot(tree: Path) -> None:
    assert outcome_of("benchmarks.own", ["a"], {}, tree=str(tree), own_driver=True) == ["before", "own driver", ["a"]]


def test_a_library_from_elsewhere_is_not_measured(tree: Path) -> None:
    (tree / "kernels" / "fastdpo_kernels" / "__init__.py").unlink()
    (tree / "kernels" / "fastdpo_kernels").rmdir()
    (tree.parent / "fastdpo_kernels.py").write_text("", encoding="utf-8")
    with pytest.raises(ImportError, match="fastdpo_kernels comes from"):
        outcome_of("driver", [], {"PYTHONPATH": str(tree.parent)}, tree=str(tree))


def test_an_older_tree_drives_itself(monkeypatch: pytest.MonkeyPatch, tree: Path) -> None:
    calls = []

    def run(module: str, arguments: list[str], environment: dict[str, str], **options: object) -> dict[str, object]:
        calls.append((json.loads(arguments[0]), json.loads(arguments[2]), options))
        if "own_driver" not in options:
            raise ImportError("cannot import name 'lora_config'")
        return {"seconds": [1.0, 1.0], "cpu_seconds": [1.0, 1.0], "growth": 7, "resident": 1, "loss": 0.5}

    monkeypatch.setattr(training, "outcome_of", run)
    contender = Contender("fastdpo", {"beta": 0.2}, tree=str(tree))
    assert training.start(contender, TrainingCase(pairs=2), 1).growth == 7
    # Nothing that an older driver would not know
    plain = {"trainer": "fastdpo", "options": {"beta": 0.2}}, {"pairs": 2}
    assert calls == [(*plain, {"tree": str(tree)}), (*plain, {"tree": str(tree), "own_driver": True})]
    with pytest.raises(ImportError, match="lora_config"):
        training.start(Contender("fastdpo"), TrainingCase(), 1)


def test_trees_take_turns_and_are_compared(monkeypatch: pytest.MonkeyPatch, tree: Path) -> None:
    """The other takes 6 s, then 5 s per step, this one 4 s."""
    started, others = [], iter((6.0, 5.0))

    def start(contender: Contender, case: TrainingCase, threads: int, gradients: Path | None = None) -> Outcome:
        started.append((contender.options, contender.tree and Path(contender.tree).name))
        assert gradients is not None
        save_file({"lora_A": torch.ones(2)}, gradients)
        seconds = next(others) if contender.tree else 4.0
        return Outcome([99.0, seconds], [99.0, seconds], 3, 1, 0.5)

    monkeypatch.setattr(training, "start", start)
    settings = Settings(plans=("leanest",), steps=2, rounds=2, tiny=True, against=tree)
    figures = training.run(settings)
    ours, trl = {"micro_batch_tokens": "1"}, training.ONE_BY_ONE
    assert started == [(trl, ""), (ours, ""), (ours, "before"), (trl, ""), (ours, "before"), (ours, "")]
    found = {each.measured: each for each in figures if each.case == "leanest, this tree"}
    assert found["step"].against == "leanest of before"
    assert (found["step"].value, found["step"].baseline, found["step"].ratio) == (4.0, 5.0, 1.25)
    assert found["growth of memory"].ratio == 1.0
    assert found["same step: difference"].value == 0


def test_bounds_beside_the_other_tree(tmp_path: Path) -> None:
    settings = Settings(against=tmp_path / "before")
    bench = training.Bench(TrainingCase(), settings, tmp_path)
    for name, seconds, growth in (("default", 4.0, 2**30 + 2**20), ("default of before", 4.4, 2**30)):
        bench.outcomes[name] = [Outcome([9.0, seconds], [9.0, seconds], growth, 1, 0.5)]
        save_file({"lora_A": torch.ones(2)}, bench.gradients(name))
    agreement, step, growth_ratio = training.tree_figures("default", bench, settings)
    assert (agreement.met, step.met, growth_ratio.met) == (True, False, False)
    assert (str(step.target), str(growth_ratio.target)) == ("≥ 1.12", "≤ 1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["head", "--against", "TREE"], "only training and long_pair compare two trees"),
        (["training", "--against", "TREE/kernels"], "no checkout of fastdpo"),
        (["long_pair", "--outcomes", "kept.json"], "only training and ablation keep"),
    ],
    ids=["section", "folder", "outcomes"],
)
def test_options_that_would_be_ignored_are_refused(
    arguments: list[str], message: str, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.parse([each.replace("TREE", str(tree)) for each in arguments])
    assert message in capsys.readouterr().err
