"""The loss operators: three-way accuracy against float64, and laws."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from preference_inputs import BACKENDS, SIDES, cast, random_pairs, results
from torch import Tensor

from fastdpo.formulas import F_DIVERGENCES, LOSSES, oracle
from fastdpo.loss.dynamic_beta import DynamicBeta
from fastdpo.loss.preference import preference_loss

pytest.importorskip("triton")

SMOOTHING: dict[str, dict[str, float]] = {
    name: {"label_smoothing": 0.1} if loss.uses_label_smoothing else {} for name, loss in LOSSES.items()
}
COMBINATIONS = [
    (name, f_divergence)
    for name, loss in LOSSES.items()
    for f_divergence in (F_DIVERGENCES if loss.supports_f_divergence else ["reverse_kl"])
]
LOOSE = {
    # e^u of a log-ratio rounded to fp32
    "forward_kl": 1e-5,
    "alpha_divergence": 1e-5,
}


def assert_three_way(data: dict[str, Any], rtol: float = 2e-6, **options: Any) -> None:
    """The kernel errs by no more than twice torch's error in fp32, plus rtol of the largest value of the output."""
    truth = results(oracle.preference_loss, cast(data, torch.float64), **options)
    plain = results(preference_loss, cast(data, torch.float32), backend="torch", **options)
    kernel = results(preference_loss, cast(data, torch.float32), backend="triton", **options)
    for name, expected in truth.items():
        assert torch.equal(kernel[name].isfinite(), expected.isfinite()), name
        valid = expected.isfinite()
        expected, ours, theirs = (x[valid].double() for x in (expected, kernel[name], plain[name]))
        size = 1.0 + max(expected.abs().tolist(), default=0.0)
        torch_error = max((theirs - expected).abs().tolist(), default=0.0)
        # torch itself, so that the allowance means something
        assert torch_error <= 50 * rtol * size, name
        assert max((ours - expected).abs().tolist(), default=0.0) <= 2 * torch_error + rtol * size, name


# Accuracy


@pytest.mark.parametrize(("name", "f_divergence"), COMBINATIONS)
def test_three_way(name: str, f_divergence: str) -> None:
    options = {"loss_type": name, "f_divergence": f_divergence, **SMOOTHING[name]}
    rtol = LOOSE.get(f_divergence, 2e-6)
    for n in (1, 2, 3, 64):
        assert_three_way(random_pairs(n, seed=n), rtol, **options)
    assert_three_way(random_pairs(3, equal=True), rtol, **options, beta=0.5)
    if not LOSSES[name].sorts_batch:
        assert_three_way(random_pairs(3, seed=7), rtol, **options, beta=torch.tensor([0.05, 0.3, 1.0]))


@pytest.mark.parametrize(("name", "f_divergence"), COMBINATIONS)
def test_three_way_at_extreme_margins(name: str, f_divergence: str) -> None:
    """|u| = 1e4 on either or both sides, positive log-probs included: values and gradients, all finite."""
    signs = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1], [1, 0], [-1, 0], [0, 1], [0, -1], [0, 0]])
    zeros, lengths = torch.zeros(9, dtype=torch.float64), torch.tensor([1, 7, 3] * 3)
    for size in (1e4, 100.0):
        sides = (*(size * signs.T.double()), zeros, zeros.clone(), lengths, lengths)
        data = dict(zip((*SIDES, "chosen_lengths", "rejected_lengths"), sides, strict=True))
        options = {"loss_type": name, "f_divergence": f_divergence, **SMOOTHING[name]}
        assert_three_way(data, LOOSE.get(f_divergence, 2e-6), beta=0.1, **options)


@pytest.mark.parametrize("name", LOSSES)
def test_three_way_with_dropped_pairs(name: str) -> None:
    """Two of five pairs dropped, with NaN, infinity and no tokens: zero loss and gradient there, the rest untouched."""
    data, keep = random_pairs(5, seed=3), torch.tensor([True, False, True, True, False])
    data["chosen_logps"][1], data["ref_rejected_logps"][4], data["chosen_lengths"][1] = math.nan, math.inf, 0
    options: dict[str, Any] = {"loss_type": name, "keep": keep, **SMOOTHING[name]}
    if not LOSSES[name].sorts_batch:
        options |= {"pair_weights": torch.tensor([0.5, math.nan, 2.0, 1.0, math.inf])}
        options |= {"beta": torch.tensor([0.1, math.nan, 0.2, 0.3, 0.4])}
    for backend in BACKENDS:
        got = results(preference_loss, cast(data, torch.float32), backend=backend, reward_beta=0.1, **options)
        for key in ("losses", *(key for key in got if key.startswith("grad"))):
            assert got[key][~keep].tolist() == [0.0, 0.0]
            assert got[key].isfinite().all()
    assert_three_way(data, **options, reward_beta=0.1)


def test_three_way_of_mixtures_and_reductions() -> None:
    data = random_pairs(6, seed=5)
    data["sft_logps"] = data["chosen_logps"] - 1.0
    mixes: list[dict[str, Any]] = [
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"loss_type": ["cpo", "sigmoid", "sigmoid"], "loss_weights": [0.5, 1.0, -0.25], "label_smoothing": 0.1},
        {"loss_type": ["aot", "ipo", "aot_unpaired"], "loss_weights": [0.5, 2.0, 1.0], "label_smoothing": 0.2},
        {"loss_type": ["exo_pair", "orpo"], "label_smoothing": 1e-3, "f_divergence": "js_divergence"},
        {"loss_type": "discopop", "discopop_tau": 1.0},
        {"loss_type": "cpo_simpo", "simpo_gamma": 1.5, "cpo_alpha": 0.3},
        {"loss_type": "sigmoid", "f_divergence": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
        {"loss_type": "sigmoid", "f_divergence": "alpha_divergence", "f_alpha_divergence_coef": -0.5},
    ]
    for mix, reduction in itertools.product(mixes, ("mean", "sum", "none")):
        assert_three_way(data, rtol=1e-5, reduction=reduction, **mix)
    no_reference = {key: value for key, value in data.items() if not key.startswith("ref")}
    assert_three_way(no_reference, loss_type=["simpo", "sft"])


def test_three_way_of_a_large_batch() -> None:
    assert_three_way(random_pairs(1024, seed=9), 1e-5, loss_type=["sigmoid", "ipo"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_16_bit_inputs_are_computed_in_float32(backend: str, dtype: torch.dtype) -> None:
    data = {key: x.to(dtype) if x.is_floating_point() else x for key, x in random_pairs(4).items()}
    low = results(
        preference_loss,
        {k: x.requires_grad_() if x.is_floating_point() else x for k, x in data.items()},
        backend=backend,
    )
    high = results(preference_loss, cast(data, torch.float32), backend=backend)
    assert low["losses"].dtype == torch.float32
    assert low["grad 0"].dtype == dtype
    for name, value in high.items():
        assert torch.equal(low[name].to(dtype), value.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_pair_is_a_zero_loss(backend: str) -> None:
    empty = torch.zeros(0, requires_grad=True)
    output = preference_loss(empty, empty, empty, empty, backend=backend)
    output.loss.backward()
    assert output.loss.item() == 0.0
    assert (output.margins.shape, empty.grad.shape) == ((0,), (0,))
    with pytest.raises(ValueError, match="at least one pair"):
        preference_loss(empty, empty, empty, empty, beta=DynamicBeta(), backend=backend)


# Laws


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "exo_pair", "robust", "discopop", "aot", "cpo"])
@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=st.integers(0, 2**16))
@settings(max_examples=4, deadline=None)
def test_margin_losses_pull_chosen_and_rejected_apart_equally(backend: str, name: str, seed: int) -> None:
    data = cast(random_pairs(4, seed), torch.float32)
    alone = {"cpo_alpha": 0.0} if name == "cpo" else {}
    output = preference_loss(**data, loss_type=name, beta=0.05, backend=backend, **SMOOTHING[name], **alone)
    chosen, rejected = torch.autograd.grad(output.loss, [data["chosen_logps"], data["rejected_logps"]])
    assert chosen.abs().max() > 0
    torch.testing.assert_close(chosen, -rejected)


@pytest.mark.parametrize(("name", "f_divergence"), COMBINATIONS)
def test_torch_gradients_by_finite_differences(name: str, f_divergence: str) -> None:
    data = random_pairs(4, seed=1)
    data["sft_logps"] = data["chosen_logps"] - 2.0
    leaves = {key: value.requires_grad_() for key, value in data.items() if value.is_floating_point()}

    def loss(*values: Tensor) -> tuple[Tensor, Tensor]:
        replaced = {**data, **dict(zip(leaves, values, strict=True))}
        keep = torch.tensor([True, True, False, True])
        options = {"loss_type": name, "f_divergence": f_divergence, "keep": keep, "beta": 0.3, **SMOOTHING[name]}
        return preference_loss(**replaced, **options, backend="torch")[:2]

    assert torch.autograd.gradcheck(loss, list(leaves.values()))


# torch's subsystems


def test_gap_of_the_kernel_formulas_covers_the_table() -> None:
    from fastdpo_kernels.preference_loss.formulas import PAIR_INPUTS

    assert set(PAIR_INPUTS) == set(LOSSES)
    assert {name for name, kind in PAIR_INPUTS.items() if kind == "logps"} == {
        name for name, loss in LOSSES.items() if not loss.needs_reference
    }
    assert {name for name, loss in LOSSES.items() if loss.supports_f_divergence} == {
        name for name, kind in PAIR_INPUTS.items() if kind == "scores"
    }
