"""The command line as a user meets it: help, option files, errors in one line, a run with all it leaves behind."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

from fastdpo.commands.cli import COMMANDS, main
from fastdpo.commands.options import OptionError, make_parser, parse
from fastdpo.demo.run import DemoConfig
from fastdpo.training.options import DataConfig, FastDPOConfig, ModelConfig


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A saved tiny model with its tokenizer, and training and evaluation pairs as HH-RLHF transcripts."""
    model = tmp_path / "model"
    tiny.llama().save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    data = {}
    for name, count in (("train", 12), ("eval", 6)):
        data[name] = tmp_path / f"{name}.jsonl.gz"
        with gzip.open(data[name], "wt", encoding="utf-8") as stream:
            for row in tiny.pairs(count, seed=len(name)):
                turns = f"\n\nHuman: {row['prompt']}\n\nAssistant: "
                stream.write(json.dumps({side: turns + row[side] for side in ("chosen", "rejected")}) + "\n")
    return {"model": model, "out": tmp_path / "run", **data}


def options(files: dict[str, Path], **more: object) -> dict[str, object]:
    return {
        "model_name_or_path": str(files["model"]),
        "dataset_name_or_path": str(files["train"]),
        "eval_dataset_name_or_path": str(files["eval"]),
        "output_dir": str(files["out"]),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "max_prompt_length": 64,
        "max_length": None,
        "dynamic_beta": True,
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "lr_scheduler_type": "cosine_with_restarts",
        "dtype": "float32",
        "lora_r": 4,
        "use_cpu": True,
        **more,
    }


def test_train_from_a_file_with_flags_over_it(files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(options(files, learning_rate="1e-2", logging_steps=5, keep_ratio=0.5)))
    assert main(["train", str(path), "--logging_steps", "1", "--disable_tqdm", "true"]) == 0
    out = files["out"]
    metrics = json.loads((out / "metrics.json").read_text())
    steps = [entry for entry in metrics["log"] if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3], "the flag's logging_steps=1 overrides the file's 5"
    assert steps[0]["learning_rate"] == 1e-2
    for name in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"):
        assert f"eval_{name}" in metrics["results"]
        assert name in steps[0]
    assert all(name in steps[0] for name in ("logps/chosen", "logps/rejected", "beta/value", "beta/m0", "beta/sigma"))
    assert steps[0]["beta/kept"] == 0.5
    assert load_file(out / "adapter_model.safetensors")
    _, header, card = (out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(header)["library_name"] == "peft"
    assert card.lstrip().startswith("# run\n")
    assert "An adapter of model, aligned with β-DPO by fastdpo" in card
    assert str(files["model"]) not in card, "a path of this machine means nothing to others"
    assert f"eval_rewards/accuracies: {metrics['results']['eval_rewards/accuracies']:.4g}" in card
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "tokenizer.json").is_file()
    # The written options are a run file: they name the same run again
    again = parse(make_parser("fastdpo train", "", ModelConfig, DataConfig, FastDPOConfig), [str(out / "run.yaml")])
    assert again[0].lora_r == 4
    assert again[2].keep_ratio == 0.5
    assert again[2].learning_rate == 1e-2
    assert again[2].max_length is None
    assert again[2].lr_scheduler_kwargs == {"num_cycles": 2}
    # The adapter loads onto the base model
    model = PeftModel.from_pretrained(tiny.llama(), out)
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=torch.tensor([[1, 2, 3]])).logits).all()


def test_continuing_an_adapter_and_a_second_run_into_the_folder(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(options(files, save_strategy="steps", save_steps=2)))
    assert main(["train", str(path)]) == 0
    assert main(["train", str(path)]) == 2
    assert "holds another run (adapter_model.safetensors, checkpoint-2, " in " ".join(capsys.readouterr().err.split())
    before = (files["out"] / "metrics.json").read_bytes()
    assert main(["train", str(path), "--resume_from_checkpoint", "last"]) == 0
    assert "holds the finished run, whole; nothing was changed" in " ".join(capsys.readouterr().out.split())
    assert (files["out"] / "metrics.json").read_bytes() == before
    assert main(["train", str(path), "--overwrite_output_dir"]) == 0
    written = yaml.safe_load((files["out"] / "run.yaml").read_text())
    assert not {"overwrite_output_dir", "resume_from_checkpoint"} & written.keys(), "run again, it would delete the run"
    continued = [
        "--lora_r",
        "16",
        "--adapter_name_or_path",
        str(files["out"]),
        "--output_dir",
        str(tmp_path / "second"),
    ]
    assert main(["train", str(path), *continued]) == 0
    first = json.loads((tmp_path / "second" / "metrics.json").read_text())["log"]
    assert first[0].get("rewards/margins", 0.0) == 0.0


def test_shortest_run_leaves_everything_but_curves(files: dict[str, Path], tmp_path: Path) -> None:
    """One step and nothing logged: there is nothing to draw, and that is no error."""
    path = tmp_path / "run.yaml"
    settings = options(files, max_steps=1, logging_steps=10)
    path.write_text(yaml.safe_dump({k: v for k, v in settings.items() if not k.startswith("eval_")}))
    assert main(["train", str(path)]) == 0
    assert (files["out"] / "metrics.json").is_file()
    assert not (files["out"] / "curves.png").exists()


def test_model_folder_is_not_overwritten(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(options(files, output_dir=str(files["model"]), overwrite_output_dir=True)))
    assert main(["train", str(path)]) == 2
    assert "is also model_name_or_path" in " ".join(capsys.readouterr().err.split())
    assert (files["model"] / "model.safetensors").is_file()


ERRORS = {
    "no model": (["--dataset_name_or_path", "x.jsonl"], "model_name_or_path is required"),
    "no data": (["--model_name_or_path", "m"], "dataset_name_or_path is required"),
    "no file": (["--model_name_or_path", "m", "--dataset_name_or_path", "nowhere.jsonl"], "nowhere.jsonl"),
    "bad loss": (["--loss_type", "dpo"], "loss_type=['dpo'] is unknown"),
    "bad β": (["--beta", "-1"], "beta=-1.0 must be positive"),
    "no option file": (["missing.yaml"], "option file 'missing.yaml': no such file"),
    "no template": (
        ["--model_name_or_path", "{model}", "--dataset_name_or_path", "{train}", "--chat_template", "t.jinja"],
        "chat_template='t.jinja': no such file",
    ),
    "no checkpoint": (
        ["--model_name_or_path", "m", "--dataset_name_or_path", "d", "--resume_from_checkpoint", "last"],
        "holds no checkpoint",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error_in_one_message(
    name: str, files: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files["out"].parent)
    argv, message = ERRORS[name]
    argv = [word.format(model=files["model"], train=files["train"]) for word in argv]
    assert main(["train", *argv]) == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert message in printed
    assert "Traceback" not in printed


def test_option_file_with_an_unknown_name(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("lerning_rate: 1e-4\n")
    parser = make_parser("fastdpo train", "", ModelConfig, DataConfig, FastDPOConfig)
    with pytest.raises(OptionError, match=r"'lerning_rate' is no option\. Did you mean learning_rate"):
        parse(parser, [str(path)])
    with pytest.raises(OptionError, match="must be the first argument"):
        parse(parser, ["--beta", "0.2", str(path)])
    path.write_text("- a\n- b\n")
    with pytest.raises(OptionError, match="holds a list"):
        parse(parser, [str(path)])


@pytest.mark.parametrize("argv", [["--help"], ["info"], ["--version"], ["info", "--help"]])
def test_commands_that_only_print(
    argv: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "fastdpo" in printed
    if argv == ["info"]:
        assert "torch" in printed
        assert "triton" in printed
        assert "no: " in printed


@pytest.mark.parametrize("argv", [["train", "--help"], ["train", "--help_all"], ["demo", "--help"]])
def test_help_of_a_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "--output_dir" in printed
    assert ("--dataloader_num_workers" in printed) == (argv[-1] == "--help_all")


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "is no command; there are " + ", ".join(COMMANDS) in capsys.readouterr().err


def test_info_takes_no_argument(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "everything"]) == 2
    assert capsys.readouterr().out.startswith("usage: fastdpo info")


def test_demo_runs_with_the_options_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[DemoConfig] = []
    monkeypatch.setattr("fastdpo.commands.demo.run", seen.append)
    assert main(["demo", "--pairs", "3", "--minutes", "1.5"]) == 0
    assert seen == [DemoConfig(pairs="3", minutes=1.5)]
