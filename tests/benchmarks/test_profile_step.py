"""Where the profile of a step books time: on labels in fused functions, on labelled modules, and on what they made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import llama
from torch import Tensor, nn
from torch.profiler import profile, record_function

from benchmarks import profile_step
from benchmarks.profile_step import HEAD_PRODUCTS, OTHER, Product, Profile
from benchmarks.settings import Settings
from fastdpo.training.body.labels import ACTIVATION, ATTENTION, BODY, LORA, NF4, NORMS, PREFIX, part


def booked(work: Callable[[], object]) -> Profile:
    with profile(record_shapes=True) as profiler:
        work()
    return profile_step.account(profiler.events())


class FusedLinear(torch.autograd.Function):
    """x·(2·W) + (x·A)·B, its pieces labelled in both passes: LoRA on a quantised linear in one function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        with part(NF4):
            dense = 2 * w
        with part(BODY):
            y = x @ dense
        with part(LORA):
            low = x @ a
            y.addmm_(low, b)
        ctx.save_for_backward(x, w, a, b, low)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        x, w, a, b, low = ctx.saved_tensors
        with part(NF4):
            dense = 2 * w
        with part(LORA):
            of_low = gradient @ b.t()
            of_a, of_b = x.t() @ of_low, low.t() @ gradient
        with part(BODY):
            of_x = gradient @ dense.t()
        with part(LORA):
            of_x = torch.addmm(of_x, of_low, a.t(), out=torch.empty_like(of_x))
        return of_x, None, of_a, of_b


def test_a_fused_function_is_booked_by_its_own_labels() -> None:
    """Within a module that is LoRA as a whole, as peft's is: the innermost label counts."""
    n, k, m, r = 7, 5, 6, 2

    class LoRA(nn.Module):
        def forward(self, x: Tensor, *weights: Tensor) -> Tensor:
            y: Tensor = FusedLinear.apply(x, *weights)
            return y

    layer = LoRA()
    profile_step._label(layer, LORA)
    x, w, a, b = (torch.randn(shape, requires_grad=True) for shape in ((n, k), (k, m), (k, r), (r, m)))
    found = booked(lambda: layer(x, w.detach(), a, b).square().sum().backward())
    assert found.products[BODY] == Counter(
        {Product(n, k, m, transposed=True): 1, Product(n, m, k, transposed=False): 1}
    )
    assert found.products[LORA] == Counter(
        {
            Product(n, k, r, transposed=True): 1,
            Product(n, r, m, transposed=True): 1,
            Product(n, m, r, transposed=False): 1,
            Product(k, n, r, transposed=False): 1,
            Product(r, n, m, transposed=False): 1,
            Product(n, r, k, transposed=False): 1,
        }
    )
    assert not found.products.keys() - {BODY, LORA}
    assert found.spent[NF4] > 0


def test_other_operators_of_a_4_bit_linear_dequantise() -> None:
    layer = nn.Linear(4, 6, bias=False)
    profile_step._label(layer, profile_step._LINEAR4BIT)
    found = booked(lambda: layer(torch.randn(3, 4)))
    assert found.products == {BODY: Counter({Product(3, 4, 6, transposed=True): 1})}
    assert found.spent.keys() == {BODY, NF4, OTHER}  # views within aten::linear; the random input


def test_a_node_belongs_to_the_operator_that_made_it() -> None:
    """Operators that make no node bear the number of the next node, which another part may make."""
    x = torch.randn(3, 4, requires_grad=True)

    def work() -> None:
        with record_function(PREFIX + NORMS):
            x.detach().exp()
        with record_function(PREFIX + ATTENTION):
            y = x @ x.detach().t()
        y.sum().backward()

    assert booked(work).products == {
        ATTENTION: Counter({Product(3, 4, 3, transposed=True): 1, Product(3, 3, 4, transposed=False): 1})
    }


def test_products_of_the_head_are_told_from_the_body() -> None:
    x, w = torch.randn(3, 4), torch.randn(4, 6)

    def work() -> None:
        with record_function(PREFIX + BODY):
            x @ w
        with record_function("LinearLogprobBackward"):
            x @ w

    found = booked(work)
    assert {name: sum(counts.values()) for name, counts in found.products.items()} == {BODY: 1, HEAD_PRODUCTS: 1}


def test_targets_of_lora_and_of_the_whole_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a step of 10 s: 0.5 s of LoRA, products of body and head that take 4 s and 2 s alone."""
    monkeypatch.setattr(profile_step, "floor", lambda products: float(sum(products.values())))
    found = Profile({LORA: 0.5e6, BODY: 5e6, HEAD_PRODUCTS: 2e6})
    some = Product(2, 3, 4, transposed=True)
    found.products |= {BODY: Counter({some: 4}), HEAD_PRODUCTS: Counter({some: 2}), LORA: Counter({some: 1})}
    figures = {each.measured: each for each in profile_step.figures("", found, 10.0, 9.0, Settings())}
    assert (figures["LoRA's share"].ratio, figures["LoRA's share"].met) == (0.05, True)
    assert (figures["step"].ratio, figures["step"].met) == (pytest.approx(10 / 6), False)


def test_profile_books_forward_and_backward_on_the_part() -> None:
    """x W₁ᵀ in a norm, then W₂ outside of any part: one product each in the forward, one and two in the backward."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.outside = nn.Linear(4, 6, bias=False), nn.Linear(6, 2, bias=False)
            self.norm.weight.requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = self.outside(self.norm(x).exp())
            return hidden

    model = Model()
    profile_step._label(model.norm, NORMS)
    found = booked(lambda: model(torch.randn(3, 4, requires_grad=True)).sum().backward())
    assert found.products[NORMS] == Counter(
        {Product(3, 4, 6, transposed=True): 1, Product(3, 6, 4, transposed=False): 1}
    )
    # Forward, and the gradients of input and weight
    assert sum(found.products[OTHER].values()) == 3
    assert found.spent[NORMS] > 0


def test_parts_of_a_model_are_labelled() -> None:
    model = llama()
    profile_step.label_parts(model)
    with profile() as profiler:
        model(torch.arange(5)[None])
    labels = {event.name for event in profiler.events() if event.name.startswith(PREFIX)}
    expected = (NORMS, ATTENTION, ACTIVATION, OTHER)
    assert labels == {PREFIX + part for part in expected}
