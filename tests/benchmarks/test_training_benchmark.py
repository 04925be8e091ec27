"""The benchmark of the training step: its pairs, its agreement, its ratios."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import llama, tokenizer
from torch import nn

from benchmarks import process, training, training_run
from benchmarks.settings import Settings
from benchmarks.training_cases import TrainingCase, count_tokens, preference_ids, set_lora
from benchmarks.training_run import Contender, Outcome

CASE = TrainingCase(pairs=2, steps=2, prompt=(3, 5), completion=(2, 4))


def test_tokens_by_hand() -> None:
    data = preference_ids(CASE, 50)
    assert data.to_list() == preference_ids(CASE, 50).to_list()  # every process draws the same
    assert len({tuple(row["prompt_ids"]) for row in data}) == len(data) == 4
    lengths = [(len(row["prompt_ids"]), len(row["chosen_ids"]), len(row["rejected_ids"])) for row in data.to_list()]
    assert all(3 <= p <= 5 and 2 <= c <= 4 and 2 <= r <= 4 for p, c, r in lengths)
    (p, c, r), (q, d, s) = lengths[2:]
    tokens = count_tokens(data, CASE, range(1, 2))
    assert tokens.padded == 4 * max(p + c, p + r, q + d, q + s)
    assert tokens.rows == (p + c) + (p + r) + (q + d) + (q + s)
    assert tokens.shared == p + c + r + q + d + s
    assert tokens.scored == c + r + d + s


def test_every_trainer_starts_from_the_same_lora_in_float32() -> None:
    models = []
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.ModuleDict({name: nn.Linear(4, 4, dtype=dtype) for name in ("lora_A", "lora_B", "base")})
        model["base"].requires_grad_(False)
        set_lora(model)
        models.append(model)
    ours, theirs = (dict(model.named_parameters()) for model in models)
    assert ours["base.weight"].dtype != theirs["base.weight"].dtype
    for name in ("lora_A.weight", "lora_B.weight"):
        assert theirs[name].dtype == torch.float32
        assert theirs[name].any()
        assert torch.equal(ours[name], theirs[name])


def bench(folder: Path, **changes: float) -> training.Bench:
    """Outcomes of TRL as it comes and of the default plan, which is 4 times as fast in a quarter of the memory."""
    made = training.Bench(CASE, Settings(), folder)
    gib = training.GIB
    made.outcomes["TRL as it comes"] = [Outcome([99.0, 8.0, 12.0], [99.0, 16.0, 22.0], 8 * gib, gib, 0.75)]
    made.outcomes["default"] = [Outcome([9.0, 2.0, 3.0], [9.0, 4.0, 6.0], 2 * gib, gib, changes.get("loss", 0.75))]
    gradient = torch.tensor([3.0, 4.0])
    save_file({"lora_A": gradient}, made.gradients("TRL as it comes"))
    save_file({"lora_A": gradient + torch.tensor([0.0, changes.get("gap", 0.0)])}, made.gradients("default"))
    return made


def test_ratios_leave_the_first_step_out(tmp_path: Path) -> None:
    plan = training.PLANS["default"]
    agreement, step, growth = training.plan_figures("default", plan, bench(tmp_path), Settings())
    assert (step.value, step.baseline, step.ratio, step.met) == (2.5, 10.0, 4.0, True)
    assert (growth.value, growth.baseline, growth.ratio, growth.met) == (2.0, 8.0, 0.25, True)
    assert agreement.met
    assert "0.800 pairs/s, 2.00 cores busy" in step.note


@pytest.mark.parametrize("changes", [{"loss": 0.7502}, {"gap": 0.001}], ids=["loss", "gradient"])
def test_what_computes_something_else_is_not_compared(tmp_path: Path, changes: dict[str, float]) -> None:
    # Relative differences of 2.7e-4 and 2e-4
    with pytest.raises(ValueError, match="default differs from TRL as it comes"):
        training.plan_figures("default", training.PLANS["default"], bench(tmp_path, **changes), Settings())


def test_kept_outcomes_are_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def start(contender: Contender, *_: object) -> Outcome:
        started.append(contender)
        return Outcome([3.0, 2.0], [3.0, 2.0], 1, 1, 0.5)

    monkeypatch.setattr(training, "start", start)
    settings = Settings(outcomes=tmp_path / "kept.json")
    first = training.Bench(CASE, settings, tmp_path).run("default", Contender("fastdpo"))
    assert training.Bench(CASE, settings, tmp_path).run("default", Contender("fastdpo")) == first
    assert len(started) == 1
    with pytest.raises(ValueError, match="another case"):
        training.Bench(TrainingCase(), settings, tmp_path)


def test_cached_plan_has_its_references_filled_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Contender] = []
    monkeypatch.setattr(training, "start", lambda contender, *_: started.append(contender))
    contender = training.Bench(CASE, Settings(), tmp_path).filled(Contender("fastdpo", {"packing": "off"}))
    folder = contender.options["reference_cache_dir"]
    assert contender.options == {"packing": "off", "reference_cache_dir": folder}
    assert started[0].options == contender.options | {"reference": "precompute", "max_steps": 1}


def test_unknown_plans_are_named() -> None:
    with pytest.raises(ValueError, match="nonesuch: unknown; choose from default"):
        training.run(Settings(plans=("default", "nonesuch")))


def test_failure_of_a_process_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nModuleNotFoundError: No module named 'trl'\n")

    monkeypatch.setattr(process.subprocess, "run", failed)
    with pytest.raises(ModuleNotFoundError, match="No module named 'trl'"):
        training.start(Contender("trl"), CASE, 1)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[training.Bench]:
    """Both trainers on a tiny model in 4 bits, in this process."""
    model, folder = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("outcomes")
    llama(hidden_size=64, intermediate_size=128).save_pretrained(model)
    tokenizer().save_pretrained(model)
    made = training.Bench(CASE, Settings(), folder)
    contenders = {"TRL as it comes": training.PEERS["TRL as it comes"].contender, "default": Contender("fastdpo")}
    one_by_one = training.ONE_BY_ONE | {"gradient_accumulation_steps": CASE.pairs}
    contenders["TRL leanest"] = Contender("trl", one_by_one)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "prepare_model", lambda: str(model))
        for name, contender in contenders.items():
            made.outcomes[name] = [training_run.measure(contender, CASE, made.gradients(name))]
        yield made


@pytest.mark.parametrize("peer", ["TRL as it comes", "TRL leanest"])
def test_first_step_is_that_of_trl(outcomes: training.Bench, peer: str) -> None:
    figure = training.agreement("", "default", peer, outcomes)
    assert figure.value is not None
    assert 0 < figure.value < 1e-5
    assert abs(outcomes.outcomes["default"][0].loss - 0.6931) > 1e-3  # the policy is not the reference


def test_outcome_of_a_run(outcomes: training.Bench) -> None:
    outcome = outcomes.outcomes["default"][0]
    assert len(outcome.seconds) == len(outcome.cpu_seconds) == CASE.steps
    assert outcome.growth >= 0
    assert outcome.resident > 100 * 2**20
