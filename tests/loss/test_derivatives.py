"""Every way to ask for a derivative of every function that has one: the right value, or the sentence; never a zero.

Truth is torch's autograd in float64 on full logits, asked the same way.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fw
import torch.nn.functional as F
from preference_inputs import BACKENDS
from torch import Tensor
from torch.autograd import functional
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import fastdpo
import fastdpo.loss
from fastdpo.formulas import LOSSES
from fastdpo.loss import (
    DynamicBeta,
    FusedLinearDPOLoss,
    linear_logprob,
    linear_preference_loss,
    preference_loss,
    selective_logprob,
    token_preference_loss,
)

pytest.importorskip("triton")

SENTENCE = (
    r"fastdpo's \w+ has a first derivative by backward, and no other: .* was asked for\. fastdpo\.formulas\.oracle"
)
Tensors = dict[str, Tensor]
H, V, TARGETS, PAIRED = 3, 7, torch.tensor([1, 6]), torch.tensor([[1, -100], [6, 2], [0, 3], [-100, 5]])
BOUNDARIES = torch.tensor([1, 2, 4, 5, 5])


def dpo(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    return -F.logsigmoid(2.0 * (chosen - rejected - ref_chosen + ref_rejected)).mean()


def scores(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    picked = F.linear(hidden, weight, bias).log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(targets == -100, 0.0, picked)


def true_sums(tokens: Tensor) -> Tensor:
    return torch.stack([tokens[i:j].sum() for i, j in itertools.pairwise(BOUNDARIES)])


def true_linear_loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return dpo(*scores(hidden, weight, bias, PAIRED).sum(1).chunk(2), torch.zeros(2), torch.zeros(2))


NO_REFERENCE = {"ref_logps": torch.zeros(4), "beta": 2.0}
HEAD = {"hidden": (2, H), "weight": (V, H), "bias": (V,)}
PAIRS = {"hidden": (4, 2, H), "weight": (V, H), "bias": (V,)}
SIDES = dict.fromkeys(("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps"), (3,))

#: Function → shapes of its differentiable inputs, (inputs, backend) → scalar, and the same in plain torch.
FUNCTIONS: dict[str, tuple[dict[str, tuple[int, ...]], Callable[[Tensors, str], Tensor], Callable[..., Tensor]]] = {
    "linear_logprob": (
        HEAD,
        lambda x, b: linear_logprob(x["hidden"], x["weight"], TARGETS, bias=x["bias"], backend=b).sum(),
        lambda hidden, weight, bias: scores(hidden, weight, bias, TARGETS).sum(),
    ),
    "selective_logprob": (
        {"logits": (2, V)},
        lambda x, b: selective_logprob(x["logits"], TARGETS, backend=b).sum(),
        lambda logits: logits.log_softmax(-1).gather(1, TARGETS[:, None]).sum(),
    ),
    "preference_loss": (
        SIDES,
        lambda x, b: preference_loss(**x, beta=2.0, backend=b).loss,
        lambda **x: dpo(*x.values()),
    ),
    "token_preference_loss": (
        {"token_logps": (6,), "ref_logps": (4,)},
        lambda x, b: token_preference_loss(**x, boundaries=BOUNDARIES, beta=2.0, backend=b).loss,
        lambda token_logps, ref_logps: dpo(*true_sums(token_logps).chunk(2), *ref_logps.chunk(2)),
    ),
    "linear_preference_loss": (
        PAIRS,
        lambda x, b: linear_preference_loss(**x, targets=PAIRED, **NO_REFERENCE, backend=b).loss,
        true_linear_loss,
    ),
    "FusedLinearDPOLoss": (
        PAIRS,
        lambda x, b: FusedLinearDPOLoss(beta=2.0, use_ref_model=False, backend=b)(
            x["weight"], x["hidden"], PAIRED, x["bias"]
        )[0],
        true_linear_loss,
    ),
}
#: What is exported beside them, and why it is in no table of derivatives.
NOT_DIFFERENTIABLE = {
    **dict.fromkeys(("BetaPlan", "BetaState", "PreferenceOutput", "LinearPreferenceOutput"), "results"),
    **dict.fromkeys(("LossOptions", "FastDPOConfig"), "options"),
    **dict.fromkeys(("__version__", "backends", "load_preferences", "tokenize_preferences"), "no tensor function"),
    "FastDPOTrainer": "a training loop",
    "DynamicBeta": "plans without gradient, see test_a_plan_is_a_constant",
}
#: The oracle itself: torch differentiates it.
BY_TORCH = {("preference_loss", "torch"), ("token_preference_loss", "torch")}
INPUTS = [(function, name) for function, (shapes, *_) in FUNCTIONS.items() for name in shapes]
Scalar = Callable[[Tensor], Tensor]


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def slope(f: Scalar, x: Tensor, **options: Any) -> Tensor:
    (gradient,) = torch.autograd.grad(f(x), x, create_graph=True, **options)
    return gradient


def slope_of(y: Tensor, x: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(y, x, allow_unused=True)
    return torch.zeros_like(x) if gradient is None else gradient


def penalty(f: Scalar, x: Tensor) -> Tensor:
    x = leaf(x)
    (f(x) + slope(f, x).pow(2).sum()).backward()
    assert x.grad is not None
    return x.grad


def with_a_graph_on_the_incoming(f: Scalar, x: Tensor) -> Tensor:
    x, factor = leaf(x), torch.ones((), dtype=x.dtype, requires_grad=True)
    return slope_of(slope(lambda y: f(y) * factor, x).pow(2).sum(), x)


def of_the_incoming(f: Scalar, x: Tensor) -> Tensor:
    """The gradient is linear in the incoming one."""
    x, factor = leaf(x), torch.ones((), dtype=x.dtype, requires_grad=True)
    return slope_of(slope(lambda y: f(y) * factor, x).pow(2).sum(), factor)


def dual(f: Scalar, x: Tensor, tracked: bool = False) -> Tensor:
    with fw.dual_level():
        tangent = fw.unpack_dual(f(fw.make_dual(leaf(x) if tracked else x, x.cos()))).tangent
    return torch.zeros((), dtype=x.dtype) if tangent is None else tangent.detach()


def dual_without_grad(f: Scalar, x: Tensor) -> Tensor:
    with torch.no_grad():
        return dual(f, x)


def stacked(x: Tensor) -> Tensor:
    return torch.stack([x, x.sin()])


def one(x: Tensor) -> Tensor:
    return torch.ones((), dtype=x.dtype)


FIRST: dict[str, Callable[[Scalar, Tensor], Tensor]] = {
    "backward": lambda f, x: slope_of(f(x := leaf(x)), x),
    "create_graph": lambda f, x: slope(f, leaf(x)).detach(),
    "create_graph without retain_graph": lambda f, x: slope(f, leaf(x), retain_graph=False).detach(),
    "vjp": lambda f, x: functional.vjp(f, x, one(x))[1],
    "strict vjp": lambda f, x: functional.vjp(f, x, one(x), strict=True)[1],
    "jacobian": lambda f, x: functional.jacobian(f, x),
    "vectorised jacobian": lambda f, x: functional.jacobian(f, x, vectorize=True),
    "vmap": lambda f, x: torch.func.vmap(f)(stacked(x)),
    "gradient of vmap": lambda f, x: slope_of(torch.func.vmap(f)(stacked(x := leaf(x))).sum(), x),
}
OTHERS: dict[str, Callable[[Scalar, Tensor], Tensor]] = {
    "penalty": penalty,
    "gradient of a constant's": lambda f, x: slope_of(slope(f, x := leaf(x)).pow(2).sum(), x),
    "and the graph kept": lambda f, x: slope_of(slope(f, x := leaf(x), retain_graph=True).pow(2).sum(), x),
    "graph on the incoming": with_a_graph_on_the_incoming,
    "of the incoming": of_the_incoming,
    "hessian": lambda f, x: functional.hessian(f, x),
    "strict hessian": lambda f, x: functional.hessian(f, x, strict=True),
    "vectorised hessian": lambda f, x: functional.hessian(f, x, vectorize=True),
    "hessian, forward over reverse": lambda f, x: functional.hessian(
        f, x, vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
    "hvp": lambda f, x: functional.hvp(f, x, x.cos())[1],
    "vhp": lambda f, x: functional.vhp(f, x, x.cos())[1],
    "jvp": lambda f, x: functional.jvp(f, x, x.cos())[1],
    "forward jacobian": lambda f, x: functional.jacobian(f, x, vectorize=True, strategy="forward-mode"),
    "dual": dual,
    "dual with a gradient": lambda f, x: dual(f, x, tracked=True),
    "dual without grad": dual_without_grad,
    "func.grad": lambda f, x: torch.func.grad(f)(x),
    "func.vjp": lambda f, x: torch.func.vjp(f, x)[1](one(x))[0],
    "func.jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "func.jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "func.jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "func.hessian": lambda f, x: torch.func.hessian(f)(x),
    "vmap of func.grad": lambda f, x: torch.func.vmap(torch.func.grad(f))(stacked(x)),
}


def inputs_of(function: str) -> Tensors:
    g = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in FUNCTIONS[function][0].items()
    }


def ours_and_truth(function: str, name: str, backend: str, trained: bool) -> tuple[Scalar, Scalar, Tensor]:
    """Both as functions of one input, and its value in float64. trained: the other inputs need a gradient too."""
    _, ours, truth = FUNCTIONS[function]
    values = inputs_of(function)
    given = {key: value.float().requires_grad_(trained) for key, value in values.items()}
    return lambda x: ours({**given, name: x}, backend), lambda x: truth(**{**values, name: x}), values[name]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("function", "name"), INPUTS)
def test_right_or_refused(function: str, name: str, backend: str) -> None:
    for trained in {False, function == "linear_logprob"}:
        ours, truth, value = ours_and_truth(function, name, backend, trained)
        x = value.float()
        for way, ask in (FIRST | OTHERS).items():
            expected = ask(truth, value)
            assert expected.abs().max() > 1e-4, f"{way}: a silent zero would pass"
            if way in FIRST or (function, backend) in BY_TORCH:
                found = ask(ours, x).detach()
                torch.testing.assert_close(
                    found.double(), expected, rtol=1e-3, atol=1e-5, msg=partial("{}: {}".format, way)
                )
            else:
                with pytest.raises(NotImplementedError, match=SENTENCE):
                    pytest.fail(f"{way}, trained={trained}: {ask(ours, x)} in the place of {expected}")
        with pytest.raises(RuntimeError, match=f"{SENTENCE}|second time"):  # truth has freed what it needs, too
            slope_of(slope(ours, x := leaf(x), retain_graph=False).pow(2).sum(), x)


def test_no_exported_function_is_forgotten() -> None:
    exported = {*fastdpo.__all__, *fastdpo.loss.__all__}
    assert not FUNCTIONS.keys() & NOT_DIFFERENTIABLE.keys()
    assert exported == FUNCTIONS.keys() | NOT_DIFFERENTIABLE.keys()


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_input_of_a_head_leads_to_the_refusal(backend: str) -> None:
    """d/dweight of the gradient by hidden, as a penalty on it asks."""
    values = {key: leaf(value.float()) for key, value in inputs_of("linear_logprob").items()}
    f = FUNCTIONS["linear_logprob"][1]
    for name, by in ((name, by) for name in values for by in values):
        (gradient,) = torch.autograd.grad(f(values, backend), values[name], create_graph=True)
        with pytest.raises(NotImplementedError, match=SENTENCE):
            torch.autograd.grad(gradient.sum(), values[by])


@pytest.mark.parametrize("loss_type", [name for name in LOSSES if name != "hinge"])
def test_torch_s_second_derivatives_of_every_loss(loss_type: str) -> None:
    """Against finite differences of first ones; forward mode against those of values."""
    g = torch.Generator().manual_seed(1)
    sides = [(torch.randn(3, generator=g, dtype=torch.float64) - 4.0).requires_grad_() for _ in range(4)]
    lengths = {"chosen_lengths": torch.tensor([3, 5, 2]), "rejected_lengths": torch.tensor([4, 1, 6])}
    smoothing = {"label_smoothing": 0.1} if LOSSES[loss_type].uses_label_smoothing else {}
    chosen = {**lengths, **smoothing, "beta": 0.7} if LOSSES[loss_type].uses_beta else lengths

    def losses(*sides: Tensor) -> Tensor:
        return preference_loss(*sides, loss_type=loss_type, **chosen, backend="torch").losses

    needed = sides if LOSSES[loss_type].needs_reference else sides[:2]
    assert torch.autograd.gradcheck(losses, needed, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(losses, needed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_that_is_zero_is_no_second_derivative(backend: str) -> None:
    """A hinge that every pair has passed; and what needs no gradient."""
    sides = [torch.full((2,), value) for value in (9.0, -9.0, 0.0, 0.0)]
    sides[0].requires_grad_()
    loss = preference_loss(*sides, loss_type="hinge", beta=1.0, backend=backend).loss
    (gradient,) = torch.autograd.grad(loss, sides[0], create_graph=True)
    assert torch.equal(gradient, torch.zeros(2))
    loss = preference_loss(*sides, loss_type="hinge", beta=1.0, backend=backend).loss
    loss.backward(create_graph=True)
    assert torch.equal(sides[0].grad, torch.zeros(2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_plan_is_a_constant(backend: str) -> None:
    module = DynamicBeta(beta=0.3, seed=2, backend=backend)
    margins = torch.tensor([0.3, -1.0, 2.0])
    plan = module(leaf(margins))
    assert not plan.beta.requires_grad
    with fw.dual_level():
        assert fw.unpack_dual(module(fw.make_dual(margins, margins.cos())).beta).tangent is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_reference_is_a_constant_in_forward_mode_too(backend: str) -> None:
    """As in backward: "scored without gradient"."""
    x = {key: value.float() for key, value in inputs_of("linear_preference_loss").items()}
    for name in ("ref_hidden", "ref_weight"):
        given = {"ref_hidden": x["hidden"].sin(), "ref_weight": x["weight"].sin()}
        with fw.dual_level():
            given[name] = fw.make_dual(given[name], given[name])
            loss = linear_preference_loss(**x, **given, targets=PAIRED, backend=backend).loss
            assert fw.unpack_dual(loss).tangent is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_inplace_backward_refuses_as_well(backend: str) -> None:
    def f(logits: Tensor) -> Tensor:
        return selective_logprob(logits * 1.0, TARGETS, backend=backend, inplace_backward=True).sum()

    x = inputs_of("selective_logprob")["logits"].float()
    for way, ask in OTHERS.items():
        with pytest.raises(RuntimeError, match=f"{SENTENCE}|inplace_backward=True overwrites the logits"):
            pytest.fail(f"{way}: {ask(f, x)}")


class Watch(TorchDispatchMode):
    """Names of the operators that ran with anything to do."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not (isinstance(result, Tensor) and result.numel() == 0):
            self.ran.append(func.__name__.split(".")[0])
        return result


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_first_backward_costs_what_it_did(backend: str) -> None:
    """It runs the one operator that it consists of, and between forward and backward no hidden state is held."""
    source, weight = torch.randn(2, H, requires_grad=True), torch.randn(V, H)
    hidden = source + 1.0
    held = StorageWeakRef(hidden.untyped_storage())
    with Watch() as forward:
        logps = linear_logprob(hidden, weight, TARGETS, ignore_index=None, backend=backend)
    del hidden
    assert held.expired()
    grad = torch.ones(2)
    with Watch() as backward:
        logps.backward(grad, retain_graph=True)
    assert [name for name in forward.ran if name != "promote_types"] == ["linear_logprob"]
    assert backward.ran == ["linear_logprob_scale"]
