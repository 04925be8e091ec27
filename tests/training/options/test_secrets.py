"""Tokens are used and get into no file, whichever option they came by."""

from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tiny
import yaml

from fastdpo.training.options.secrets import HIDDEN, is_secret, without_secrets

SECRET = "hf_SECRETSECRETSECRETSECRET"


def holding(folder: Path, secret: str = SECRET) -> list[str]:
    return [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and secret.encode() in path.read_bytes()
    ]


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        *((name, True) for name in ("token", "hub_token", "use_auth_token", "api_key", "wandb_api_key", "password")),
        *((name, False) for name in ("micro_batch_tokens", "max_length", "tokenizer_name_or_path", "eos_token")),
    ],
)
def test_names_of_secrets(name: str, secret: bool) -> None:
    assert is_secret(name) is secret


def test_secrets_within_options_are_hidden_and_nothing_else() -> None:
    options = {
        "token": SECRET,
        "headers": [{"Authorization": "Bearer x"}],
        "url": "https://me:pw@host/x",
        "n": 3,
        "t": (1, None),
    }
    hidden = {
        "token": HIDDEN,
        "headers": [{"Authorization": HIDDEN}],
        "url": f"https://{HIDDEN}@host/x",
        "n": 3,
        "t": (1, None),
    }
    assert without_secrets(options) == hidden
    assert without_secrets({"token": True, "eos_token": "</s>"}) == {"token": True, "eos_token": "</s>"}
    assert without_secrets(f"see {SECRET}.") == f"see {HIDDEN}."


def test_no_file_of_a_run_holds_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in a checkpoint, nor in what a tracker is given (`to_dict`), nor in run.yaml; and no pickle is left."""
    tiny.llama().save_pretrained(tmp_path / "model")
    trainer = tiny.trainer(
        tmp_path / "run",
        model=str(tmp_path / "model"),
        model_init_kwargs={"token": SECRET, "low_cpu_mem_usage": True},
        hub_token=SECRET,
        max_steps=2,
        save_steps=1,
        save_strategy="steps",
    )
    trainer.train()
    trainer.save_model()
    trainer.save_run({}, {"chat_template": f"x{SECRET[:3]} {SECRET}"})
    assert holding(tmp_path) == []
    assert not list(tmp_path.rglob("training_args.bin"))
    assert yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())["model_init_kwargs"] == {
        "token": HIDDEN,
        "low_cpu_mem_usage": True,
    }
    assert SECRET not in json.dumps(trainer.args.to_dict(), default=str)
    assert trainer.args.hub_token == SECRET


def test_a_checkpoint_is_pushed_from_a_copy_without_the_options_and_a_failure_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A later save may remove the checkpoint while it is uploaded; the upload fails here after it was read."""

    def repository(trainer: Any, **_: Any) -> None:
        trainer.hub_model_id, trainer.push_in_progress = "me/mine", None

    pushed: list[dict[str, Any]] = []

    def upload(_: Any, *, folder_path: Path, **options: Any) -> Future[Any]:
        assert folder_path != tmp_path / "run" / folder_path.name
        names = {path.name for path in folder_path.iterdir()}
        pushed.append({**options, "name": folder_path.name, "names": names, "secret": holding(folder_path)})
        job: Future[Any] = Future()
        job.set_exception(ConnectionError("no route"))
        return job

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    monkeypatch.setattr("transformers.Trainer.init_hf_repo", repository)
    options = {"max_steps": 2, "save_steps": 1, "save_strategy": "steps", "save_total_limit": 1}
    trainer = tiny.trainer(
        tmp_path / "run",
        push_to_hub=True,
        hub_token=SECRET,
        hub_strategy="checkpoint",
        hub_model_id="me/mine",
        **options,
    )
    trainer.train()
    places = [(name, place) for name in ("checkpoint-1", "checkpoint-2") for place in (None, "last-checkpoint")]
    assert [(each["name"], each.get("path_in_repo")) for each in pushed] == places
    assert {"adapter_model.safetensors", "optimizer.pt"} < pushed[0]["names"]
    assert "optimizer*" in pushed[0]["ignore_patterns"]
    assert "ignore_patterns" not in pushed[1]
    assert all(each["token"] == SECRET and not each["secret"] for each in pushed)
    assert "checkpoint-2 was not pushed to me/mine: no route" in caplog.text
    assert not list((tmp_path / "run").glob("_*"))
