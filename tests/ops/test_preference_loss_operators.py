"""The loss operators under torch's subsystems, and what they refuse by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from preference_inputs import BACKENDS, DEFAULTS, SIDES, cast, ragged, random_pairs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdpo.formulas.checks import MAX_TRITON_PAIRS
from fastdpo.loss.dynamic_beta import DynamicBeta
from fastdpo.loss.preference import preference_loss, token_preference_loss
from fastdpo.ops.preference_loss import operators as ops

pytest.importorskip("triton")


def test_opcheck() -> None:
    backend = "triton"
    data = cast(random_pairs(3), torch.float32)
    options = ops.PackedLoss(["sigmoid", "sft"], [1.0, 0.5], DEFAULTS, 0.0, "reverse_kl", True, False, "mean", None)
    tokens, _, boundaries = ragged([2, 3, 1, 2, 4, 2])
    leaf = tokens.float().requires_grad_()
    sequences = ops.PairTensors(*(data[key] for key in SIDES), None, None, None, None, None)
    per_token = ops.PairTensors(leaf, None, torch.zeros(3), torch.zeros(3), boundaries, None, None, None, None)
    module = DynamicBeta(scope="instance", backend=backend)
    for pairs in (sequences, per_token):
        given_beta = (torch.tensor(0.1), 0.0, torch.tensor([True, False, True]))
        torch.library.opcheck(ops.preference_loss, (*pairs, *given_beta, *options.packed(), backend))
        planned = (None, 0, *module.state, *ops.packed_together(module.plan_options(), options))
        torch.library.opcheck(ops.planned_preference_loss, (*pairs, *planned, backend))
        torch.library.opcheck(
            ops.preference_margins, (*ops.PairTensors(*map(_detach, pairs))[:7], True, False, backend)
        )
    torch.library.opcheck(ops.row_sums, (leaf, boundaries, backend))
    torch.library.opcheck(ops.plan_batch, (torch.randn(5), *module.state, *module.plan_options().packed(), backend))


def _detach(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph(backend: str) -> None:
    data = cast(random_pairs(6), torch.float32)
    leaves = [value for value in data.values() if value.requires_grad]
    eager, traced = DynamicBeta(seed=5), DynamicBeta(seed=5)

    def step(module: DynamicBeta, loss_type: str) -> tuple[Tensor, ...]:
        output = preference_loss(**data, beta=module, loss_type=loss_type, backend=backend)
        return output.loss, output.margins, output.plan.keep

    for loss_type in ("sigmoid", "aot"):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            mine, theirs = compiled(traced, loss_type), step(eager, loss_type)
            for a, b in zip(mine, theirs, strict=True):
                assert torch.equal(a, b)
            for a, b in zip(torch.autograd.grad(mine[0], leaves), torch.autograd.grad(theirs[0], leaves), strict=True):
                assert torch.equal(a, b)
    assert traced.step == eager.step == 4
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_without_gradient_in_inference_and_on_strided_inputs(backend: str) -> None:
    data = {key: value.float() for key, value in random_pairs(4).items()}
    expected = preference_loss(**data, backend=backend)
    strided = {key: torch.stack([value, value], dim=1)[:, 0] for key, value in data.items()}
    assert torch.equal(preference_loss(**strided, backend=backend).losses, expected.losses)
    with torch.inference_mode():
        inside = {key: value.clone() for key, value in data.items()}
        assert torch.equal(preference_loss(**inside, backend=backend).loss, expected.loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(preference_loss(**data, backend=backend).loss, expected.loss)
    with FakeTensorMode() as mode:
        fake = {key: mode.from_tensor(value) for key, value in data.items()}
        output = preference_loss(**fake, backend=backend)
        assert (output.loss.shape, output.losses.shape, output.margins.shape) == ((), (4,), (4,))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"keep": torch.ones(2, dtype=torch.bool), "beta": DynamicBeta()}, ValueError, "keep and a DynamicBeta"),
        ({"chosen_logps": torch.zeros(3)}, ValueError, r"rejected_logps has shape \(2,\)"),
        ({"keep": torch.ones(3, dtype=torch.bool)}, ValueError, r"keep has shape \(3,\)"),
        ({"beta": torch.ones(3)}, ValueError, r"beta has shape \(3,\)"),
        ({"ref_chosen_logps": None}, ValueError, "go together"),
        ({"reduction": "batchmean"}, ValueError, "reduction='batchmean'"),
        ({"process_group": object()}, ValueError, "process_group has no effect"),
        ({"loss_type": "aot", "beta": torch.ones(2)}, ValueError, "aot.*rank"),
        ({"loss_type": "aot", "pair_weights": torch.ones(2)}, ValueError, "pair_weights"),
        ({"loss_type": "ipo"}, ValueError, "needs chosen_lengths"),
        ({"backend": "cuda"}, ValueError, "backend='cuda'"),
        ({"sft_logps": torch.zeros(2, dtype=torch.int64)}, TypeError, "sft_logps has dtype torch.int64"),
        ({"pair_weights": torch.zeros(2, device="meta")}, ValueError, "pair_weights is on meta"),
    ],
)
def test_refused_inputs_are_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    zeros = torch.zeros(2)
    data = {**dict.fromkeys(SIDES, zeros), **changes}
    with pytest.raises(error, match=message):
        preference_loss(**data)


def test_what_triton_cannot_serve_is_named() -> None:
    many, double = torch.zeros(MAX_TRITON_PAIRS + 1), torch.zeros(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"4097 pairs.*4096"):
        preference_loss(many, many, many, many, backend="triton")
    with pytest.raises(TypeError, match="float64"):
        preference_loss(double, double, double, double, backend="triton")
    with pytest.raises(TypeError, match="float64"):
        DynamicBeta(backend="triton")(double)
    from fastdpo_kernels.preference_loss.dynamic_beta import MAX_PAIRS

    assert MAX_PAIRS == MAX_TRITON_PAIRS


def test_refused_tokens_are_named() -> None:
    tokens, boundaries = torch.zeros(6), torch.tensor([0, 2, 6])
    with pytest.raises(ValueError, match=r"boundaries has shape \(2,\)"):
        token_preference_loss(tokens, boundaries[:2], tokens)
    with pytest.raises(TypeError, match=r"boundaries has dtype torch\.int32"):
        token_preference_loss(tokens, boundaries.int(), tokens)
    with pytest.raises(ValueError, match="twice"):
        token_preference_loss(tokens, boundaries, tokens, ref_logps=torch.zeros(2))
    with pytest.raises(ValueError, match=r"ref_logps has shape \(3,\)"):
        token_preference_loss(tokens, boundaries, ref_logps=torch.zeros(3))
    with pytest.raises(ValueError, match=r"ref_token_logps has shape \(5,\)"):
        token_preference_loss(tokens, boundaries, tokens[:5])
