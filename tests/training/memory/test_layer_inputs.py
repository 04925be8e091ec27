"""Layer inputs on the host: the same gradients to the bit, copies behind what they wait for, memory of a known size."""

from __future__ import annotations

import gc
import mmap
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from families import MODELS
from hypothesis import given, settings
from hypothesis import strategies as st
from late_copies import LateCopies
from same_run import CUTS
from torch import Tensor
from worker import injected, state

from fastdpo.training.memory import OutOfMemory
from fastdpo.training.memory import trial as memory_trial
from fastdpo.training.memory.arena import Arena, arena_bytes
from fastdpo.training.memory.layer_inputs import LayerInputs
from fastdpo.training.memory.pinned import CudaCopies
from fastdpo.training.memory.plan import enable_checkpointing

IDS = torch.arange(2 * 11).reshape(2, 11) % 97


def checkpointed(model: Any, every: int = 1, **torchs: Any) -> Any:
    enable_checkpointing(model, {"use_reentrant": False} | torchs, every_n_layers=every)
    return model.train()


def loss_of(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).sum()


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert torch.equal(found[name], grad), name


def compared(model: Any) -> LateCopies:
    """Gradients of a checkpointed model, with its inputs on the device and on the host, are the same numbers."""
    torch.manual_seed(0)  # GPT-2 has dropout on
    loss_of(model).backward()
    expected = gradients(model)
    copies = LateCopies()
    inputs = LayerInputs(model, copies)
    torch.manual_seed(0)
    with copies:
        loss = loss_of(model)
        assert inputs.arena.live == inputs.layers
        loss.backward()
    assert_equal(gradients(model), expected)
    assert inputs.arena.live == 0, "a graph that went backward keeps nothing"
    assert copies.faults == []
    return copies


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_inputs_on_the_device(name: str) -> None:
    copies = compared(checkpointed(MODELS[name]()))
    assert len(copies.out) == len(copies.back) == 2, "of two layers, one tensor each"
    assert copies.back == copies.out[::-1]


def test_every_so_many_layers_and_reentrant() -> None:
    deep = tiny.llama(num_hidden_layers=5, vocab_size=97)
    assert len(compared(checkpointed(deep, every=2)).out) == 3
    reentrant = tiny.llama(num_hidden_layers=3, vocab_size=97)
    reentrant.model.embed_tokens.weight.requires_grad_(False)
    reentrant.enable_input_require_grads()
    assert len(compared(checkpointed(reentrant, use_reentrant=True)).out) == 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_graph_keeps_no_input_on_the_device(reentrant: bool) -> None:
    model = checkpointed(tiny.llama(num_hidden_layers=3, vocab_size=97), use_reentrant=reentrant)
    if reentrant:
        model.enable_input_require_grads()
    LayerInputs(model, copies := LateCopies())
    seen: list[Any] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[0].untyped_storage())))
    with copies:
        loss = loss_of(model)
        assert [each() for each in seen] == [None] * 3
        loss.backward()


def test_an_input_is_on_its_way_while_the_layer_above_is_recomputed() -> None:
    model = checkpointed(tiny.llama(num_hidden_layers=4, vocab_size=97))
    copies = LateCopies()
    LayerInputs(model, copies)
    asked: list[tuple[int, int]] = []
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_pre_hook(lambda *_: asked.append((copies.done, len(copies.back))))
    with copies:
        loss = loss_of(model)
        outwards, recomputed = copies.queued, len(asked)
        loss.backward()
    assert [done for done, _ in asked[:recomputed]] == [0, 1, 2, 3], "behind each layer its copy is waited for"
    # The i-th recomputation: its own input is there, the next one is queued and not waited for
    assert asked[recomputed:] == [(outwards + 1, 2), (outwards + 2, 3), (outwards + 3, 4), (outwards + 4, 4)]
    assert copies.most_travelling == 2, "one input at work, one on its way"


# Each wait is needed


def no_wait_behind_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Arena, "stored", lambda self, ticket: None)


def no_wait_before_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("late_copies._Copying.wait_event", lambda self, event: None)


def no_wait_for_what_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    wait = LateCopies.run

    def only_outwards(self: LateCopies, behind: int) -> None:
        wait(self, min(behind, len(self.out)))

    monkeypatch.setattr(LateCopies, "run", only_outwards)


@pytest.mark.parametrize("sabotage", [no_wait_behind_the_layer, no_wait_before_a_copy, no_wait_for_what_comes_back])
def test_a_missing_wait_is_seen(sabotage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = checkpointed(tiny.llama(num_hidden_layers=3, vocab_size=97))
    sabotage(monkeypatch)
    with pytest.raises(AssertionError):
        compared(model)


@pytest.mark.parametrize("waits", [True, False])
def test_memory_of_an_input_on_its_way_is_given_back_behind_its_copy(
    waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backward that ends in the middle: the layer below has its input on its way, and nobody asks for it."""
    model = checkpointed(tiny.llama(num_hidden_layers=3, vocab_size=97))
    copies = LateCopies()
    inputs = LayerInputs(model, copies)

    def fail(grad: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("injected")

    def attempt() -> None:
        loss = loss_of(model)
        with pytest.raises(torch.OutOfMemoryError):
            loss.backward()
        if not waits:  # from here on, while the graph is still there
            monkeypatch.setattr("late_copies._Computing.wait_event", lambda self, event: None)

    def fail_behind(module: Any, args: Any, output: Tensor) -> None:
        output.register_hook(fail)

    model.model.layers[0].register_forward_hook(fail_behind)
    with copies:
        attempt()
        gc.collect()
        assert inputs.arena.live == 0
        assert copies.done == copies.queued - (not waits)
        copies.run(copies.queued)
    assert bool(copies.faults) is not waits


@pytest.mark.gpu
def test_gradients_on_a_card_are_those_of_inputs_on_it() -> None:
    """To the bit, with an attention and an embedding whose backwards add up in one order."""
    device = torch.device("cuda")
    model = tiny.llama(num_hidden_layers=6, vocab_size=97, hidden_size=256, attn_implementation="eager")
    model.model.embed_tokens.weight.requires_grad_(False)
    model = checkpointed(model.to(device))
    ids = IDS.repeat(8, 8).to(device)
    loss_of(model, ids).backward()
    expected = gradients(model)
    inputs = LayerInputs(model, copies := CudaCopies(device))
    assert copies.buffer(mmap.PAGESIZE).tensor.is_pinned()
    for _ in range(3):
        loss_of(model, ids).backward()
        assert_equal(gradients(model), expected)
    assert inputs.arena.size == inputs.bytes(ids.numel())


# The buffer


def test_one_buffer_of_the_size_that_is_known_before() -> None:
    """As many bytes as `arena_bytes` says, taken once, grown for a longer micro-batch and kept for shorter ones."""
    model = checkpointed(tiny.llama(num_hidden_layers=3, vocab_size=97))
    copies = LateCopies()
    inputs = LayerInputs(model, copies)
    sizes = []
    for tokens in (40, 25, 40, 64, 7):
        with copies:
            loss_of(model, torch.zeros(1, tokens, dtype=torch.int64)).backward()
        sizes.append(inputs.arena.size)
    by_hand = [-(-3 * tokens * 32 * 4 // 4096) * 4096 for tokens in (40, 40, 40, 64, 64)]
    assert sizes == by_hand
    assert [inputs.bytes(tokens) for tokens in (40, 64)] == [by_hand[0], by_hand[3]]
    assert [each.tensor.numel() for each in copies.buffers] == [by_hand[0], by_hand[3]]
    assert [each.closed for each in copies.buffers] == [True, False]
    inputs.arena.reserve(10**6)
    assert inputs.arena.size == -(-(10**6) // mmap.PAGESIZE) * mmap.PAGESIZE
    assert copies.faults == []


def test_two_graphs_at_once_and_one_graph_twice() -> None:
    model = checkpointed(tiny.llama(num_hidden_layers=3, vocab_size=97))
    longer = torch.arange(40)[None] % 97
    expected = []
    for ids in (IDS, longer, longer):
        loss_of(model, ids).backward()
        expected.append(gradients(model))
    copies = LateCopies()
    inputs = LayerInputs(model, copies)
    with copies:
        held, other = loss_of(model, IDS), loss_of(model, longer)
        with torch.no_grad():
            loss_of(model, longer)  # scoring keeps nothing
        assert inputs.arena.live == 6
        other.backward(retain_graph=True)
        assert_equal(gradients(model), expected[1])
        held.backward()
        assert_equal(gradients(model), expected[0])
        other.backward()
        assert_equal(gradients(model), expected[2])
        assert inputs.arena.live == 0
        assert len([each for each in copies.buffers if not each.closed]) == 2
        loss_of(model, longer).backward()
    assert len([each for each in copies.buffers if not each.closed]) == 1, "the next micro-batch finds one buffer"
    assert copies.faults == []


@settings(max_examples=200, deadline=None)
@given(
    layers=st.integers(1, 5),
    widths=st.lists(st.integers(1, 300), min_size=1, max_size=12),
    order=st.randoms(use_true_random=False),
)
def test_inputs_that_are_kept_never_share_memory(layers: int, widths: list[int], order: Any) -> None:
    """Of any sizes, given back in any order, while others come."""
    copies = LateCopies()
    arena = Arena(copies, layers)
    kept: list[tuple[Any, Tensor]] = []
    for index, width in enumerate(widths):
        with copies:
            tensor = torch.full((width,), float(index))
            ticket = arena.store(tensor)
            arena.stored(ticket)
            kept.append((ticket, tensor))
            del ticket
            while kept and order.random() < 0.3:
                del kept[order.randrange(len(kept))]
            for ticket, tensor in kept:
                assert torch.equal(arena.fetch(ticket), tensor)
                del ticket
    assert arena.live == len(kept)
    assert copies.faults == []


@given(st.integers(1, 100), st.integers(1, 10**6), st.integers(1, 20_000), st.sampled_from([2, 4]))
def test_bytes_are_the_inputs_own_to_a_page_and_their_alignment(
    layers: int, tokens: int, hidden: int, itemsize: int
) -> None:
    found = arena_bytes(layers, tokens, hidden, itemsize)
    assert 0 <= found - layers * tokens * hidden * itemsize < layers * 256 + mmap.PAGESIZE
    assert found % mmap.PAGESIZE == 0


# In a run


@pytest.mark.parametrize(
    "kind",
    # Where hardly a pair is kept, there are graphs that never go backward
    [{}, CUTS["dynamic"], {"dynamic_beta": True, "keep_ratio": 0.15}],
    ids=["plain", "dynamic", "filtered"],
)
def test_a_run_is_the_same_to_the_bit(kind: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches, a graph that is kept while others pass without gradients, evaluation, and memory that runs out in
    the middle of a forward."""
    kept, store = [], Arena.store

    def counted(self: Arena, tensor: Tensor) -> Any:
        kept.append(self.live)
        return store(self, tensor)

    monkeypatch.setattr(Arena, "store", counted)
    options: dict[str, Any] = kind | {
        "data": tiny.pairs(16), "eval_dataset": tiny.pairs(5, seed=1), "eval_strategy": "epoch", "num_train_epochs": 2,
        "micro_batch_tokens": 100, "gradient_checkpointing": True, "per_device_train_batch_size": 8,
    }  # fmt: skip
    outcomes, copies = [], LateCopies()
    for offloaded in (False, True):
        trainer = tiny.trainer(tmp_path / str(offloaded), model=tiny.llama(num_hidden_layers=3), **options)
        budgets = [trainer.parts.memory.train_tokens]
        trainer = injected(trainer, RunsOut(budgets))
        if offloaded:
            trainer.parts.memory.layer_inputs = LayerInputs(trainer.model, copies)
        with copies if offloaded else nullcontext():
            trainer.train()
        assert budgets[-1] < budgets[0], "memory ran out"
        history = trainer.state.log_history
        logs = [{k: v for k, v in e.items() if "runtime" not in k and "per_second" not in k} for e in history]
        outcomes.append((state(trainer), logs))
    assert_equal(outcomes[1][0], outcomes[0][0])
    assert outcomes[1][1] == outcomes[0][1]
    assert copies.faults == []
    assert len(copies.out) > len(copies.back) > 0
    assert trainer.parts.memory.layer_inputs.arena.live == 0
    assert sum(not each.closed for each in copies.buffers) == 1
    assert max(kept) == 2, "never those of two graphs"


class RunsOut:
    """Once, in the third forward with gradients, once a layer's input is on the host."""

    def __init__(self, budgets: list[int]) -> None:
        self.budgets, self.seen = budgets, 0

    def __call__(self, trainer: Any, model: Any, micro: Any) -> bool:
        self.budgets.append(trainer.parts.memory.train_tokens)
        self.seen += torch.is_grad_enabled()
        if torch.is_grad_enabled() and self.seen == 3:
            base = model.get_base_model()

            def fail(*_: Any) -> None:
                handle.remove()
                raise torch.OutOfMemoryError("injected")

            handle = base.model.layers[1].mlp.register_forward_pre_hook(fail)
        return False


@pytest.mark.parametrize("micro_batch_tokens", [100, 1])
def test_the_host_s_memory_is_taken_before_the_first_step(micro_batch_tokens: int, tmp_path: Path) -> None:
    """By hand: 2 layers, 32 numbers of 4 bytes, for the largest micro-batch that there will be."""
    trainer = tiny.trainer(
        tmp_path, micro_batch_tokens=micro_batch_tokens, max_steps=1, gradient_checkpointing=True, lean_body="off"
    )
    copies = LateCopies()
    trainer.parts.memory.layer_inputs = LayerInputs(trainer.model, copies)
    with copies:
        trainer.train()
    batch = trainer.objective.batch_of(list(trainer.train_dataset), trainer.args.device)
    tokens = max(*batch.tokens(trainer.parts.layouts.layout), micro_batch_tokens)
    assert [each.tensor.numel() for each in copies.buffers] == [-(-2 * tokens * 32 * 4 // 4096) * 4096]


def test_too_little_memory_on_the_host_ends_a_run_before_it_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_trial, "free_host_memory", lambda: 2 * 30 * 32 * 4)
    trainer = tiny.trainer(tmp_path, gradient_checkpointing=True, lean_body="off")
    trainer.parts.memory.layer_inputs = LayerInputs(trainer.model, copies := LateCopies())
    with pytest.raises(OutOfMemory, match=r"keeps the inputs of 2 layers on the host.*for the longest pair of "):
        trainer.train()
    assert copies.buffers == []
    assert all(p.grad is None for p in trainer.model.parameters())


# What is moved, and what cannot be


def test_what_layers_share_stays_on_the_device() -> None:
    """Positions, whole numbers, before the hidden states, and a mask, of floats, behind them."""
    model = checkpointed(tiny.llama(vocab_size=97))
    LayerInputs(model, copies := LateCopies())
    call = model.model.layers[0]._gradient_checkpointing_func
    positions, hidden, mask = torch.arange(5), torch.rand(5, requires_grad=True), torch.rand(5)
    with copies:
        call(lambda at, x, shared: (x * x + shared)[at].sum(), positions, hidden, mask).backward()
    assert len(copies.out) == len(copies.back) == 1
    assert torch.equal(hidden.grad, 2 * hidden), "by hand"
    with pytest.raises(ValueError, match="a layer is not given its hidden states by position"):
        call(lambda at: at, positions)


def test_a_layer_that_writes_into_its_input_is_refused() -> None:
    model = checkpointed(tiny.llama(vocab_size=97))
    copies = LateCopies()
    LayerInputs(model, copies)

    def write(module: Any, args: tuple[Tensor, ...]) -> None:
        args[0].detach().add_(1.0)

    model.model.layers[1].input_layernorm.register_forward_pre_hook(write)
    with copies, pytest.raises(RuntimeError, match="LlamaDecoderLayer has written into its own input"):
        loss_of(model)


def test_models_without_checkpointed_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="activation_offloading=True: the layers of LlamaForCausalLM are not checkp"):
        LayerInputs(tiny.llama(), LateCopies())
