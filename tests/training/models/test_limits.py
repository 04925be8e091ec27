"""Token ids and lengths are held against the models' tables right after tokenisation, with the data set and the row."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import tiny
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from single_answers import MeanLikelihood
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from fastdpo.training.datasets import Tokenization
from fastdpo.training.models.limits import ModelLimits
from fastdpo.training.objectives import PreferenceObjective


def gpt2() -> Any:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=257, n_embd=32, n_layer=1, n_head=4, n_positions=64, eos_token_id=0, bos_token_id=0)
    )


def opt() -> Any:
    return OPTForCausalLM(
        OPTConfig(vocab_size=257, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, ffn_dim=32,
                  word_embed_proj_dim=32, max_position_embeddings=64, eos_token_id=0, bos_token_id=0)
    )  # fmt: skip


def test_limits_of_models() -> None:
    """Padded vocabularies count as they are; adapters on embedding and head change nothing."""
    assert ModelLimits.of(tiny.llama()) == ModelLimits("model", 257, 257, trained_positions=256)
    for adapter in (
        tiny.lora(target_modules=["embed_tokens", "lm_head"]),
        tiny.lora(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    ):
        found = ModelLimits.of(get_peft_model(tiny.llama(vocab_size=320), adapter))
        assert found == ModelLimits("model", 320, 320, trained_positions=256)
    assert ModelLimits.of(gpt2(), "ref_model") == ModelLimits("ref_model", 257, 257, 64, "transformer.wpe")
    assert ModelLimits.of(opt()).positions == 64  # of 66 rows, two are before the first


def rows(*ids: list[int], where: str = "rejected_ids") -> Dataset:
    plain = {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]}
    return Dataset.from_list(
        [plain | {where: each, "example_id": f"pairs.jsonl:{n + 1}"} for n, each in enumerate(ids)]
    )


def test_ids_out_of_range_are_refused_with_the_row(tmp_path: Path) -> None:
    def build(**given: Any) -> Any:
        return tiny.trainer(tmp_path, **given)

    build(data=rows([0, 256]))  # the last of 257
    message = r"train_dataset: example 'pairs\.jsonl:2', rejected_ids: token id {}, but model has the ids 0 to 256"
    for wrong in (257, 2**31 - 1):
        with pytest.raises(ValueError, match=message.format(wrong)):
            build(data=rows([1], [2, wrong]))
    for impossible in (-1, 2**31):
        with pytest.raises(ValueError, match=f"'rejected_ids' has the token id {impossible} in row 1"):
            build(data=rows([1], [2, impossible]))
    with pytest.raises(ValueError, match=r"train_dataset: example 'pairs\.jsonl:1', prompt_ids: token id 300"):
        build(data=rows([300], where="prompt_ids"))
    with pytest.raises(ValueError, match=r"eval_hard_dataset: example 'pairs\.jsonl:1', rejected_ids: token id 300"):
        build(eval_dataset={"easy": rows([1]), "hard": rows([300])})
    trainer = build()
    with pytest.raises(ValueError, match=r"test_dataset: .*token id 300"):
        trainer.predict(rows([300]))
    with pytest.raises(ValueError, match=r"eval_dataset: .*token id 300"):
        trainer.evaluate(rows([300]))
    answers = Dataset.from_list([{"prompt_ids": [1], "answer_ids": [257], "example_id": "pairs.jsonl:1"}])
    with pytest.raises(ValueError, match=r"'pairs\.jsonl:1', answer_ids: token id 257"):
        build(objective=MeanLikelihood(), data=answers, beta=0.1)


def test_a_token_that_the_tokenizer_alone_has_is_named(tmp_path: Path) -> None:
    own = tiny.tokenizer()
    own.add_tokens(["<tool>"])
    data = Dataset.from_list([{"prompt": "abc", "chosen": "a<tool>b", "rejected": "c"}])
    with pytest.raises(ValueError, match=r"chosen_ids: token id 257, .* It is '<tool>', .*resize_token_embeddings"):
        tiny.trainer(tmp_path, data=data, processing_class=own)
    tiny.trainer(tmp_path, processing_class=own)  # no pair has it
    model = tiny.llama()
    model.resize_token_embeddings(258)
    tiny.trainer(tmp_path, model=model, data=data, processing_class=own)


@pytest.mark.parametrize("make", [gpt2, opt])
def test_pairs_longer_than_a_table_of_positions_are_refused(make: Any, tmp_path: Path) -> None:
    """Prompt and one answer, the longer: 63 + 1 tokens are trained on 64 positions, 64 + 1 are not."""
    lora = tiny.lora(target_modules=["c_attn"] if make is gpt2 else ["q_proj"])

    def build(longest: int, **given: Any) -> Any:
        data = rows([1], [1] * longest, [1] * 60)
        return tiny.trainer(tmp_path, model=make(), peft_config=lora, data=data, max_steps=1, **given)

    build(63, per_device_train_batch_size=3).train()
    with pytest.raises(
        ValueError, match=r"example 'pairs.jsonl:2' has 65 tokens .*has 64 positions \(its table .*max_length=64"
    ):
        build(64)
    with pytest.raises(ValueError, match="but ref_model has 64 positions"):
        tiny.trainer(tmp_path, ref_model=make(), data=rows([1] * 64))


def test_pairs_beyond_what_rotary_positions_were_made_for_are_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny.llama(max_position_embeddings=32)
    tiny.trainer(tmp_path, model=model, data=rows([1] * 31), eval_dataset=rows([2] * 31))
    assert "max_position_embeddings" not in caplog.text
    tiny.trainer(tmp_path, model=model, data=rows([1], [1] * 32), eval_dataset=rows([2] * 40))
    (said,) = [r.getMessage() for r in caplog.records if "max_position_embeddings" in r.getMessage()]
    assert said.startswith("train_dataset: example 'pairs.jsonl:2' has 33 tokens, more than the 32")


def test_a_data_set_that_cannot_be_tokenised_is_named(tmp_path: Path) -> None:
    data = {"train": rows([1]), "hard": Dataset.from_list([{"prompt": "q", "chosen": "a", "rejected": "a"}])}
    with pytest.raises(ValueError, match=r"^eval_hard_dataset: no pair is left: kept 0 of 1 pairs, dropped identical"):
        tiny.trainer(tmp_path, data=data["train"], eval_dataset=data)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(*[st.lists(st.integers(0, 99), min_size=1, max_size=5)] * 3), min_size=1, max_size=8),
    st.sampled_from([None, 100, 2**31 - 1]),
    st.randoms(),
)
def test_any_wrong_id_anywhere(pairs: list[Any], wrong: int | None, rng: random.Random) -> None:
    """One wrong id in a shuffled data set is found with its own row and column; without one, nothing is said."""
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    data = [dict(zip(columns, map(list, pair), strict=True)) | {"example_id": str(n)} for n, pair in enumerate(pairs)]
    row, column = rng.randrange(len(data)), rng.choice(columns)
    if wrong is not None:
        data[row][column][rng.randrange(len(data[row][column]))] = wrong
    shuffled = Dataset.from_list(data).select(rng.sample(range(len(data)), len(data)))
    check = Tokenization(
        PreferenceObjective(tiny.config("unused")),
        tiny.tokenizer(),
        tiny.config("unused"),
        [ModelLimits("model", 100, 100)],
    )
    if wrong is None:
        assert check(shuffled, "train") is not None
        return
    with pytest.raises(ValueError, match=f"example '{row}', {column}: token id {wrong}, "):
        check(shuffled, "train")


def test_answers_are_held_against_the_head_and_prompts_are_not() -> None:
    """A head of 50 rows on an embedding of 100: id 60 can be read, and cannot be predicted."""
    check = Tokenization(
        PreferenceObjective(tiny.config("unused")),
        tiny.tokenizer(),
        tiny.config("unused"),
        [ModelLimits("model", 100, 50)],
    )
    assert check(rows([60], where="prompt_ids"), "train") is not None
    with pytest.raises(ValueError, match="rejected_ids: token id 60, but model has the ids 0 to 49"):
        check(rows([60]), "eval")
