"""The benchmark of one long pair: the pair, its growth, what is compared, and the search for the longest."""

from __future__ import annotations

import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import llama, tokenizer

from benchmarks import long_pair, long_pair_run, training_run
from benchmarks.long_pair import GRAIN, TINY, TRL, LongBench
from benchmarks.long_pair_run import LongClock, LongStep
from benchmarks.settings import Settings
from benchmarks.training_cases import preference_ids
from benchmarks.training_run import Contender

MIB = 2**20


def test_the_pair_has_as_many_tokens_as_it_says() -> None:
    rows = preference_ids(long_pair.case_of(8192), 50).to_list()
    lengths = [[len(row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")] for row in rows]
    assert lengths == [[16, 16, 16], [2732, 2730, 2730]]


def test_growth_is_that_of_the_long_step_alone() -> None:
    clock = LongClock(steps=2, limit=None, gradients=None)
    for step, mib in enumerate((96, 48)):
        clock.on_step_begin(None, SimpleNamespace(global_step=step), None)
        torch.ones(mib * MIB // 4)
        clock.on_step_end(None, SimpleNamespace(global_step=step + 1), None)
    assert 47 <= clock.growth / MIB < 56
    assert len(clock.spent(0)) == 1


def test_refused_memory_is_told_from_other_errors() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (long_pair_run.status("VmData") + 2**30, before[1]))
        with pytest.raises(RuntimeError) as caught:
            torch.empty(2**40)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
    assert long_pair_run.was_refused_memory(caught.value)
    ours = RuntimeError("one pair does not fit")
    ours.__cause__ = caught.value
    assert long_pair_run.was_refused_memory(ours)
    assert not long_pair_run.was_refused_memory(RuntimeError("shapes (2, 3) and (4, 5)"))


@pytest.fixture
def tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(training_run, "prepare_model", lambda: str(tmp_path))


@pytest.mark.usefixtures("tiny_model")
def test_both_trainers_meet_the_long_pair_with_the_same_weights(tmp_path: Path) -> None:
    """A warm-up that moved them would show: Adam's first step is of one size, whatever the gradients' errors."""
    steps, gradients = {}, {}
    for trainer in ("fastdpo", "trl"):
        file = tmp_path / trainer
        steps[trainer] = long_pair_run.measure(Contender(trainer), long_pair.case_of(60), gradients=file)
        gradients[trainer] = load_file(file)
    assert steps["fastdpo"].loss == pytest.approx(steps["trl"].loss, rel=1e-6)
    assert abs(steps["fastdpo"].loss - 0.6931) > 1e-4
    for name, gradient in gradients["trl"].items():
        assert torch.allclose(gradients["fastdpo"][name], gradient, rtol=1e-4, atol=1e-6), name


@pytest.mark.usefixtures("tiny_model")
def test_a_step_without_memory_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    limits = []
    monkeypatch.setattr(long_pair_run.resource, "setrlimit", lambda *bounds: limits.append(bounds))
    monkeypatch.setattr(LongClock, "on_pre_optimizer_step", refused)
    case = long_pair.case_of(30)
    assert long_pair_run.measure(Contender("trl"), case, limit=123) == LongStep(held=False)
    with pytest.raises(RuntimeError, match="can't allocate"):
        long_pair_run.measure(Contender("trl"), case)


def bench(folder: Path, **growths: int) -> LongBench:
    """Steps of 10, 8 and 40 s."""
    made = LongBench(Settings(), folder, tokens=1000)
    for (name, growth), seconds in zip(growths.items(), (10.0, 8.0, 40.0), strict=False):
        made.steps[name.replace("TRL", TRL)] = [LongStep(True, seconds, 2 * seconds, growth, 1, 0.5)]
        save_file({"lora_A": torch.ones(2)}, made.gradients(name.replace("TRL", TRL)))
    return made


def test_growth_beyond_the_inputs_by_hand(tmp_path: Path) -> None:
    """1,000 tokens × 576 × 4 bytes × 30 layers = 69.12 MB; 20 MB beyond them beside 50 MB."""
    known = {name: Contender("fastdpo") for name in ("ours", "before")} | {TRL: Contender("trl")}
    made = bench(tmp_path, ours=89_120_000, before=119_120_000, TRL=178_240_000)
    found = {(each.case, each.measured): each for each in long_pair.step_figures(made, known, Settings())}
    beyond = found["ours beside before", "growth beyond layer inputs"]
    assert (beyond.value, beyond.baseline, beyond.ratio) == pytest.approx((20.0, 50.0, 0.4))
    assert beyond.met is True
    slower = found["ours beside before", "step"]
    assert (slower.ratio, slower.met) == (1.25, False)
    trl = found[f"ours beside {TRL}", "growth"]
    assert (trl.ratio, trl.target) == (pytest.approx(0.5), None)
    assert found[f"ours beside {TRL}", "step"].ratio == 0.25


def test_steps_that_differ_are_not_compared(tmp_path: Path) -> None:
    known = {name: Contender("fastdpo") for name in ("ours", "before")}
    made = bench(tmp_path, ours=1, before=1)
    save_file({"lora_A": torch.tensor([1.0, 1.001])}, made.gradients("before"))
    with pytest.raises(ValueError, match="ours differs from before"):
        long_pair.step_figures(made, known, Settings())


@given(fits=st.integers(0, 20_000), first=st.integers(TINY, 12_288), cap=st.integers(12_288, 13_000))
def test_the_search_ends_beside_the_truth(fits: int, first: int, cap: int) -> None:
    tried: list[int] = []

    def holds(tokens: int) -> bool:
        tried.append(tokens)
        return tokens <= fits

    held, refused = long_pair.longest(holds, first, cap)
    if refused is None:
        assert held == cap <= fits
    else:
        assert held <= fits < refused <= max(GRAIN * held, TINY)
        assert refused <= cap
    assert len(tried) == len(set(tried)) <= 14
