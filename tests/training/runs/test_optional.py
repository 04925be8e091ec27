"""What a run can do without costs it nothing: the adapter is there first, and what fails is a warning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from safetensors.torch import load_file

from fastdpo import FastDPOTrainer
from fastdpo.commands.cli import main
from fastdpo.training.runs import artifacts


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    tiny.llama().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    rows = [json.dumps(row) for row in tiny.pairs(8)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows) + "\n")
    return {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset_name_or_path": str(tmp_path / "pairs.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "save_steps": 1,
        "use_cpu": True,
        "max_length": 128,
        "max_prompt_length": 64,
        "disable_tqdm": True,
    }


def train(options: dict[str, Any], folder: Path) -> int:
    path = folder / "options.yaml"
    path.write_text(yaml.safe_dump(options))
    return main(["train", str(path)])


def test_card_curves_and_cache_that_cannot_be_written(
    files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(what: str) -> Any:
        def write(*_: Any, **__: Any) -> None:
            raise OSError(28, f"No space left for the {what}")

        return write

    monkeypatch.setattr(artifacts, "plot_curves", fails("curves"))
    monkeypatch.setattr(artifacts, "write_card", fails("card"))
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert train(files | {"reference_cache_dir": str(tmp_path / "cache")}, tmp_path) == 0
    for said in ("No space left for the curves", "No space left for the card", "not kept for later runs in"):
        assert said in caplog.text
    run = tmp_path / "run"
    assert load_file(run / "adapter_model.safetensors").keys()
    assert json.loads((run / "metrics.json").read_text())["results"]["train_loss"] > 0
    assert main(["verify", str(run)]) == 0


def test_the_adapter_is_there_before_the_evaluation(
    files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FastDPOTrainer, "evaluate", stopped)
    evaluated = {"eval_dataset_name_or_path": files["dataset_name_or_path"]}
    assert train(files | evaluated, tmp_path) == 130
    run = tmp_path / "run"
    expected = load_file(run / "checkpoint-2" / "adapter_model.safetensors")
    assert load_file(run / "adapter_model.safetensors").keys() == expected.keys()
    monkeypatch.undo()
    assert train(files | evaluated | {"resume_from_checkpoint": "last"}, tmp_path) == 0
    assert "eval_loss" in json.loads((run / "metrics.json").read_text())["results"]
