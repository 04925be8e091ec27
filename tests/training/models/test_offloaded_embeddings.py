"""Frozen embeddings on the host: the same numbers, nothing moved, nothing waited for; trained or tied ones are refused.

The other device is torch's "meta", which knows shapes and no values: what reads ids from it fails.
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from families import MODELS, SIZES
from peft import get_peft_model
from same_run import CUTS
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig
from worker import state

from fastdpo.training.models.offloaded_embeddings import obstacle, offload_embeddings
from fastdpo.training.models.unwrapped import base_model
from fastdpo.training.options.refused import refuse_sharded_embeddings
from fastdpo.training.rows.layout import Layout, lay_out, moved
from fastdpo.training.scoring.scorer import model_inputs

CPU, META = torch.device("cpu"), torch.device("meta")
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])


def frozen(model: Any) -> Any:
    return model.requires_grad_(False)


def gemma3() -> Any:
    """Rows scaled by √32, and a head of its own."""
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=8, query_pre_attn_scalar=8, tie_word_embeddings=False))
    assert float(model.model.embed_tokens.embed_scale) == pytest.approx(32**0.5, rel=1e-3)
    return model


UNTIED = {name: MODELS[name] for name in ("Llama", "Qwen3", "Phi, biased head", "GPT-NeoX", "Granite")}


@pytest.mark.parametrize("name", [*UNTIED, "Gemma3"])
def test_logits_and_gradients_are_those_of_rows_on_the_device(name: str) -> None:
    model = get_peft_model(gemma3() if name == "Gemma3" else UNTIED[name](), tiny.lora()).train()
    model.enable_input_require_grads()

    def found() -> tuple[torch.Tensor, list[torch.Tensor]]:
        torch.manual_seed(0)
        logits = model(input_ids=IDS, use_cache=False).logits
        logits.logsumexp(-1).sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return logits, grads

    before = found()
    offload_embeddings(model, CPU)
    after = found()
    assert torch.equal(before[0], after[0])
    assert len(after[1]) == len(before[1]) > 0
    assert all(map(torch.equal, before[1], after[1]))


def test_the_model_is_moved_and_its_embedding_stays() -> None:
    model = get_peft_model(gemma3(), tiny.lora())
    before = {name: (each.dtype, each.shape) for name, each in model.state_dict().items()}
    embedding = base_model(model).get_input_embeddings()
    kept = embedding.weight.clone()
    offload_embeddings(model, META)
    for move in (lambda: model.to(META), lambda: model.to(device="meta"), lambda: model.to_empty(device="meta")):
        move()
        assert torch.equal(embedding.weight, kept)
        assert embedding.embed_scale.device == CPU
    elsewhere = {name for name, each in model.state_dict().items() if not each.is_meta}
    assert len(elsewhere) == 1
    assert {name: (each.dtype, each.shape) for name, each in model.state_dict().items()} == before
    assert embedding(IDS).is_meta, "rows follow the model, whatever device ids are on"
    model.to(torch.bfloat16)
    assert embedding.weight.dtype == torch.bfloat16 == embedding(IDS).dtype
    assert torch.equal(embedding.weight, kept.bfloat16())
    model._apply(lambda each: torch.zeros_like(each, device="cpu"))
    assert embedding(IDS).device == CPU
    assert torch.equal(embedding(IDS), (kept.bfloat16()[IDS] * embedding.embed_scale.bfloat16())), "by hand"


def test_nobody_waits_for_the_ids_of_a_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are known on the host; others are read from the device, which "meta" refuses."""
    model = frozen(tiny.llama())
    embedding = model.get_input_embeddings()
    kept = embedding.weight.clone()
    offload_embeddings(model, META)
    looked_up: list[torch.Tensor] = []
    forward = nn.Embedding.forward
    monkeypatch.setattr(nn.Embedding, "forward", lambda self, ids: looked_up.append(ids) or forward(self, ids))
    examples = tiny.batch_of(([1, 2, 3], [4, 5], [6, 7, 8]), ([9, 10], [11, 12], [13, 14])).examples
    for layout in (Layout(), Layout(sharing=True), Layout(sharing=True, packing=True)):
        (here,) = made = [lay_out(examples, (0, 1), layout)]
        (there,) = moved(made, META)
        assert there.input_ids.is_meta
        assert embedding(there.input_ids).shape == (*here.input_ids.shape, 32)
        assert torch.equal(looked_up[-1], here.input_ids)
    with pytest.raises(NotImplementedError, match="meta"):
        embedding(torch.zeros(1, 3, dtype=torch.int64, device="meta"))
    assert torch.equal(embedding.weight, kept)


@pytest.mark.parametrize("name", [*UNTIED, "Gemma3"])
def test_models_hand_on_the_ids_that_they_are_given(name: str) -> None:
    """The tensor itself, by which the host's ids are known."""
    model = frozen(gemma3() if name == "Gemma3" else UNTIED[name]())
    seen: list[torch.Tensor] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    (micro,) = moved([lay_out(tiny.batch_of(([1, 2, 3], [4, 5], [6, 7, 8])).examples, (0,), Layout())], CPU)
    model(**model_inputs(model, micro))
    assert [each is micro.input_ids for each in seen] == [True]


def test_a_copy_looks_up_in_its_own_weight() -> None:
    model = frozen(tiny.llama())
    offload_embeddings(model, CPU)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_input_embeddings().weight.zero_()
    assert not other.get_input_embeddings()(IDS).any()
    assert model.get_input_embeddings()(IDS).any()


def test_data_parallel_leaves_it_alone() -> None:
    model = get_peft_model(gemma3(), tiny.lora())
    offload_embeddings(model, CPU)
    weight = base_model(model).get_input_embeddings().weight
    ignored = set(model._ddp_params_and_buffers_to_ignore)
    assert {name for name, each in model.named_parameters() if each is weight} == ignored & dict(
        model.named_parameters()
    ).keys()
    assert len(ignored & dict(model.named_buffers()).keys()) == 1, "the scale"


@pytest.mark.parametrize("own_reference", [False, True])
def test_a_run_is_the_same(own_reference: bool, tmp_path: Path) -> None:
    """Scoring, reference and evaluation go through the same rows; what is saved has the names of before."""
    outcomes = []
    for offloaded in (False, True):
        model, reference = tiny.llama(), tiny.llama(seed=1) if own_reference else None
        for each in (model, reference) if offloaded else ():
            if each is not None:
                each.requires_grad_(False)
                offload_embeddings(each, CPU)
        trainer = tiny.trainer(
            tmp_path / str(offloaded), model=model, ref_model=reference, eval_dataset=tiny.pairs(5, seed=1),
            eval_strategy="epoch", num_train_epochs=2, micro_batch_tokens=200, gradient_checkpointing=True,
            **CUTS["dynamic"],
        )  # fmt: skip
        trainer.train()
        trainer.save_model(str(tmp_path / "saved" / str(offloaded)))
        history = trainer.state.log_history
        logs = [{k: v for k, v in e.items() if "runtime" not in k and "per_second" not in k} for e in history]
        outcomes.append((state(trainer), logs))
    assert outcomes[1][1] == outcomes[0][1]
    for name, value in outcomes[0][0].items():
        assert torch.equal(outcomes[1][0][name], value), name
    saved = [sorted(path.name for path in (tmp_path / "saved" / str(each)).iterdir()) for each in (False, True)]
    assert saved[0] == saved[1]


# Refused


REFUSED: dict[str, tuple[Any, str]] = {
    "full training": (tiny.llama, "it is trained"),
    "modules_to_save": (
        lambda: get_peft_model(tiny.llama(), tiny.lora(modules_to_save=["embed_tokens"])),
        "ModulesToSaveWrapper, not a frozen embedding",
    ),
    "LoRA": (
        lambda: get_peft_model(tiny.llama(), tiny.lora(target_modules=["embed_tokens"])),
        r"lora\.layer\.Embedding, not a frozen embedding",
    ),
    "trained tokens": (
        lambda: get_peft_model(tiny.llama(), tiny.lora(trainable_token_indices=[3])),
        "TrainableTokensWrapper, not a frozen embedding",
    ),
    "tied": (
        lambda: get_peft_model(tiny.llama(tie_word_embeddings=True), tiny.lora()),
        r"tied: model\.embed_tokens\.weight and lm_head\.weight are one tensor",
    ),
    "tied below a LoRA": (
        lambda: get_peft_model(tiny.llama(tie_word_embeddings=True), tiny.lora(target_modules=["lm_head"])),
        r"model\.embed_tokens\.weight and lm_head\.base_layer\.weight",
    ),
    "placed elsewhere": (lambda: frozen(tiny.llama().to("meta")), "a device_map has placed it elsewhere"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_stay_on_the_host_is_refused(name: str) -> None:
    make, reason = REFUSED[name]
    with pytest.raises(ValueError, match=f"offload_embeddings=True: the input embedding of ref_model.*{reason}"):
        offload_embeddings(make(), CPU, "ref_model")


def test_a_frozen_embedding_is_not(tmp_path: Path) -> None:
    assert obstacle(frozen(tiny.llama())) == ""
    with pytest.raises(ValueError, match="offload_embeddings=True: FSDP shards the embedding"):
        refuse_sharded_embeddings(SimpleNamespace(offload_embeddings=True))
    refuse_sharded_embeddings(SimpleNamespace(offload_embeddings=False))
