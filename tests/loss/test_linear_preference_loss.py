"""`linear_preference_loss` against its composition in float64: values, gradients, references, and what it refuses."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from head_pairs import BACKENDS, HEAD, SOFT, B, H, T, V, expected_by_oracle, gradients, problem, sums, token_logps
from sync_watch import SyncWatch
from torch import Tensor

from fastdpo import DynamicBeta, linear_preference_loss
from fastdpo.formulas import oracle

FIELDS = ("loss", "losses", "chosen_rewards", "rejected_rewards", "margins", "chosen_logps", "rejected_logps")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several row chunks and vocabulary slices, with a ragged last one of each."""
    monkeypatch.setenv("FASTDPO_TILE", "8x16")
    monkeypatch.setattr("fastdpo.loss.modules._SUMMED_ROWS", 9)


# Against float64

CASES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "reference of per-token gaps": {"loss_type": "ipo", "beta": 0.3},
    "smoothing, divergence": {"label_smoothing": 0.2, "f_divergence": "js_divergence"},
    "kept pairs, their weights": {
        "loss_type": "hinge",
        "keep": torch.tensor([True, False, True]),
        "pair_weights": torch.tensor([0.5, 2.0, 3.0]),
        "reward_beta": 0.7,
    },
    "β per pair, summed": {"loss_type": "apo_zero", "beta": torch.tensor([0.1, 0.5, 2.0]), "reduction": "sum"},
    "no reduction": {"loss_type": "sppo_hard", "reduction": "none"},
    "without a reference": {"loss_type": "simpo", "simpo_gamma": 0.9, "beta": 2.0},
    "weighted list": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
    "sorted": {"loss_type": "aot", "beta": 0.5},
    "LD-DPO and likelihood": {"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.3, "beta": 0.5},
    "average": {"loss_type": ["discopop", "sft"], "average_log_prob": True, "discopop_tau": 0.2},
    "average, LD-DPO": {"ld_alpha": 0.0, "average_log_prob": True, "beta": 1.0},
    "head": {**SOFT, "ignore_index": 7},
    "nothing ignored": {"ignore_index": None},
}
OF_TOKENS = (*HEAD, "ld_alpha", "average_log_prob")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("trained", ["hidden", "hidden weight bias"])
def test_values_and_gradients(case: str, backend: str, trained: str) -> None:
    options = CASES[case]
    ignore_index = options.get("ignore_index", -100)
    data = problem(ignore_index=7 if ignore_index == 7 else -100, poison=ignore_index is not None)
    expected_options = dict(options)
    if ignore_index is None:
        data["targets"] = data["targets"].clamp(min=0)
        expected_options["ignore_index"] = -100
    if options.get("loss_type") == "simpo":
        data = {name: value for name, value in data.items() if not name.startswith("ref_")}
    names = trained.split()
    truth = {**data, **{name: data[name].double().requires_grad_() for name in names}}
    of_tokens = {name: value for name, value in expected_options.items() if name in OF_TOKENS}
    expected = expected_by_oracle(
        truth, loss_options={k: v for k, v in options.items() if k not in OF_TOKENS}, **of_tokens
    )
    leaves = {name: data[name].clone().requires_grad_() for name in names}
    found = linear_preference_loss(**{**data, **leaves}, backend=backend, **options)
    for name in FIELDS:
        torch.testing.assert_close(getattr(found, name).double(), expected[name], rtol=1e-5, atol=1e-5, msg=name)
    assert found.plan is None
    assert not any(x.requires_grad for x in found[2:] if isinstance(x, Tensor))
    theirs = gradients(expected["loss"], [truth[name] for name in names])
    for mine, exact in zip(gradients(found.loss, list(leaves.values())), theirs, strict=True):
        assert exact.abs().max() > 1e-3
        torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_three_forms_of_one_reference(backend: str) -> None:
    """Hidden states, log-probs per token (NaN where ignored) and per sequence; none of them gets a gradient."""
    data = problem()
    policy = {name: data[name] for name in ("hidden", "weight", "bias", "targets")}
    ref = {name: data[name].clone().requires_grad_() for name in ("ref_hidden", "ref_weight", "ref_bias")}
    head = {name.removeprefix("ref_"): value for name, value in ref.items()}
    per_token = oracle.linear_logprob(**head, targets=data["targets"])
    assert isinstance(per_token, Tensor)
    poisoned = per_token.masked_fill(data["targets"] == -100, math.nan)
    for options in ({}, {"ld_alpha": 0.5}, {"average_log_prob": True}):
        per_sequence = sums(per_token, data["targets"], options)
        outputs = [
            linear_preference_loss(**policy, **form, backend=backend, beta=0.5, **options)
            for form in (ref, {"ref_logps": poisoned}, {"ref_logps": per_sequence})
        ]
        for output in outputs:
            assert not output.loss.requires_grad
            torch.testing.assert_close(output.losses, outputs[0].losses, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(output.chosen_rewards, outputs[0].chosen_rewards, rtol=1e-5, atol=1e-5)


def test_head_of_the_reference() -> None:
    """The policy's by default, with its bias; a head of its own has its own bias or none. A trained default warns."""
    data = problem()
    data["ref_hidden"] = problem(seed=1)["hidden"].where(data["hidden"].isfinite(), math.nan).nan_to_num(0.3)
    weight, bias, other = data["weight"], data["bias"], data["ref_bias"]
    policy = {name: data[name] for name in ("hidden", "weight", "bias", "targets", "ref_hidden")}
    own = data["weight"].flip(0)
    for given, expected in (
        ({}, (weight, bias)),
        ({"ref_bias": other}, (weight, other)),
        ({"ref_weight": own}, (own, None)),
        ({"ref_weight": own, "ref_bias": other}, (own, other)),
    ):
        logps = token_logps(data["ref_hidden"], *expected, data["targets"], {})
        exact = linear_preference_loss(**{k: v for k, v in policy.items() if k != "ref_hidden"}, ref_logps=logps)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = linear_preference_loss(**policy, **given)
        torch.testing.assert_close(found.losses, exact.losses.float(), rtol=1e-5, atol=1e-6)
    policy["weight"] = weight.clone().requires_grad_()
    with pytest.warns(UserWarning, match="the reference is scored with the policy's head and changes with it"):
        linear_preference_loss(**policy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear_preference_loss(**policy, ref_weight=weight)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("loss_type", "settings"),
    [("sigmoid", {}), ("ipo", {"scope": "instance", "variant": "paper"}), ("aot", {"momentum": 0.5})],
)
def test_dynamic_beta_over_three_steps(loss_type: str, settings: dict[str, Any], backend: str) -> None:
    """β, kept pairs and gradient of every step follow the statistics in float64; in eval mode nothing moves."""
    settings = {"beta": 0.2, "alpha": 0.5, "keep_ratio": 0.7, "seed": 3, **settings}
    module = DynamicBeta(**settings)
    zero = torch.zeros((), dtype=torch.float64)
    state, trace = oracle.BetaState(zero, zero, torch.zeros((), dtype=torch.int64)), []
    for step in range(3):
        data = problem(pairs=5, seed=step)
        truth = {**data, "hidden": data["hidden"].double().requires_grad_()}
        margins = expected_by_oracle(truth, loss_options={"loss_type": loss_type})["margins"]
        plan = oracle.dynamic_beta(margins.detach(), state, **settings)
        state = plan.state
        loss_options = {"loss_type": loss_type, "beta": plan.beta, "keep": plan.keep, "reward_beta": 0.2}
        expected = expected_by_oracle(truth, loss_options=loss_options)
        hidden = data["hidden"].clone().requires_grad_()
        found = linear_preference_loss(**{**data, "hidden": hidden}, loss_type=loss_type, beta=module, backend=backend)
        assert found.plan is not None
        assert torch.equal(found.plan.keep, plan.keep)
        torch.testing.assert_close(found.plan.beta.double(), plan.beta, rtol=1e-5, atol=1e-6)
        for name in FIELDS:
            torch.testing.assert_close(getattr(found, name).double(), expected[name], rtol=1e-4, atol=1e-5, msg=name)
        (mine,), (exact,) = gradients(found.loss, [hidden]), gradients(expected["loss"], [truth["hidden"]])
        torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-5)
        trace.append(plan.beta.mean().item())
        assert int(module.step) == step + 1
    torch.testing.assert_close(module.m0.double(), state.m0, rtol=1e-5, atol=1e-6)
    assert len({round(beta, 6) for beta in trace}) == 3, "β never moved, so the trace shows nothing"
    before = module.m0.clone()
    frozen = linear_preference_loss(**problem(seed=9), loss_type=loss_type, beta=module.eval(), backend=backend)
    assert frozen.plan is not None
    assert frozen.plan.keep.all()
    assert torch.equal(module.m0, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_pair_and_completions_without_targets(backend: str) -> None:
    data = problem(pairs=1)
    output = linear_preference_loss(**data, beta=DynamicBeta(), backend=backend)
    exact = expected_by_oracle(data, loss_options={"beta": 0.1})
    torch.testing.assert_close(output.loss.double(), exact["loss"], rtol=1e-5, atol=1e-6)
    data["targets"][1] = -100
    for options in ({"loss_type": "ipo"}, {"average_log_prob": True}, {"ld_alpha": 0.5}):
        hidden = data["hidden"].clone().requires_grad_()
        output = linear_preference_loss(**{**data, "hidden": hidden}, backend=backend, **options)
        assert output.rejected_logps.item() == 0.0
        assert output.chosen_logps.item() != 0.0
        (grad,) = gradients(output.loss, [hidden])
        assert grad.isfinite().all()
        assert grad[0].any()
        assert not grad[1].any()
    nothing = {"hidden": torch.zeros(0, T, H), "targets": torch.zeros(0, T, dtype=torch.int64)}
    empty = linear_preference_loss(**nothing, weight=data["weight"], ref_logps=torch.zeros(0), backend=backend)
    assert empty.loss.item() == 0.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_sixteen_bits_round_the_inputs_and_the_gradient_alone(backend: str) -> None:
    data = {k: v.bfloat16() if v.is_floating_point() else v for k, v in problem().items()}
    truth = {**data, "hidden": data["hidden"].double().requires_grad_()}
    exact = expected_by_oracle(truth, loss_options={})
    hidden = data["hidden"].clone().requires_grad_()
    found = linear_preference_loss(**{**data, "hidden": hidden}, backend=backend)
    assert found.loss.dtype == torch.float32
    for name in FIELDS:
        torch.testing.assert_close(getattr(found, name).double(), exact[name], rtol=1e-5, atol=1e-5, msg=name)
    (mine,), (theirs,) = gradients(found.loss, [hidden]), gradients(exact["loss"], [truth["hidden"]])
    assert mine.dtype == torch.bfloat16
    # Two roundings of the result, one of the saved unit gradient
    torch.testing.assert_close(mine.double(), theirs, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_and_no_grad(backend: str) -> None:
    data = problem()
    plain = linear_preference_loss(**data, backend=backend, ld_alpha=0.5)
    with torch.no_grad():
        leaf = data["hidden"].clone().requires_grad_()
        quiet = linear_preference_loss(**{**data, "hidden": leaf}, backend=backend, ld_alpha=0.5)
    assert not quiet.loss.requires_grad
    assert torch.equal(quiet.losses, plain.losses)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_preference_loss(**data, backend=backend, ld_alpha=0.5)
    rounded = {k: v.bfloat16() if k.endswith(("hidden", "weight")) else v for k, v in data.items()}
    exact = expected_by_oracle(rounded, loss_options={}, ld_alpha=0.5)
    assert found.loss.dtype == torch.float32
    torch.testing.assert_close(found.losses.double(), exact["losses"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight")])
def test_compiles_as_one_graph(trained: tuple[str, ...], backend: str) -> None:
    """With the plan and the commit of β-DPO inside, on the sliced hidden states of a causal model."""
    data = problem()
    longer = torch.nn.functional.pad(data["hidden"], (0, 0, 0, 1))
    data = {k: v.requires_grad_(k in trained) if v.is_floating_point() else v for k, v in data.items()}
    leaves = [longer.requires_grad_(), *(data[name] for name in trained[1:])]
    eager, traced = DynamicBeta(seed=5, keep_ratio=0.7), DynamicBeta(seed=5, keep_ratio=0.7)

    def step(module: DynamicBeta, hidden: Tensor, options: dict[str, Any]) -> tuple[Tensor, ...]:
        output = linear_preference_loss(**{**data, "hidden": hidden[:, :-1]}, beta=module, backend=backend, **options)
        assert output.plan is not None
        return output.loss, output.margins, output.plan.keep, output.chosen_logps

    for options in ({}, {"ld_alpha": 0.5, "loss_type": ["sigmoid", "sft"]}):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            mine, theirs = compiled(traced, longer, options), step(eager, longer, options)
            for a, b in zip(mine, theirs, strict=True):
                torch.testing.assert_close(a, b)
            for a, b in zip(gradients(mine[0], leaves), gradients(theirs[0], leaves), strict=True):
                torch.testing.assert_close(a, b)
    assert traced.step == eager.step == 4
    torch._dynamo.reset()


def changed(**changes: Any) -> dict[str, Any]:
    """The arguments of a good call, with changes; None leaves one out."""
    return {name: value for name, value in {**problem(), **changes}.items() if value is not None}


NO_REFERENCE: dict[str, Any] = {"ref_hidden": None, "ref_weight": None, "ref_bias": None}
ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "odd": ({"hidden": torch.zeros(5, T, H)}, ValueError, r"hidden has shape \(5, 6, 5\); pass \(2B, T, H\)"),
    "flat": ({"hidden": torch.zeros(6, H)}, ValueError, r"hidden has shape \(6, 5\)"),
    "targets": ({"targets": torch.zeros(6, 5, dtype=torch.long)}, ValueError, r"\(6, 6, 5\), \(23, 5\), \(6, 5\)"),
    "dtype of targets": ({"targets": torch.zeros(6, T, dtype=torch.int32)}, TypeError, "targets has dtype torch.int32"),
    "packed head": ({"weight": torch.zeros(V, H, dtype=torch.uint8)}, TypeError, "weight has dtype torch.uint8"),
    "device": ({"ref_hidden": torch.zeros(6, T, H + 1, device="meta")}, ValueError, "ref_hidden is on meta, targets"),
    "both references": ({"ref_logps": torch.zeros(6)}, ValueError, "ref_hidden and ref_logps are two references"),
    "no reference": (
        NO_REFERENCE,
        ValueError,
        r"loss_type=\['sigmoid'\] needs a reference; pass ref_hidden, or ref_lo",
    ),
    "head alone": (
        {"ref_hidden": None, "ref_bias": None, "ref_logps": torch.zeros(6)},
        ValueError,
        "ref_weight has no effect without ref_hidden",
    ),
    "bias alone": (
        {"ref_hidden": None, "ref_weight": None, "loss_type": "simpo"},
        ValueError,
        "ref_bias has no effect without ref_hidden",
    ),
    "width": ({"ref_weight": None}, ValueError, r"do not fit: \(6, 6, 6\), \(6, 6\), \(23, 5\)"),
    "length of reference": ({"ref_hidden": torch.zeros(6, 5, H + 1)}, ValueError, r"do not fit: \(6, 5, 6\), \(6, 6\)"),
    "ref_bias": ({"ref_bias": torch.zeros(5)}, ValueError, r"ref_bias has shape \(5,\); a weight of \(23, 6\)"),
    "ref_logps": (
        {**NO_REFERENCE, "ref_logps": torch.zeros(3)},
        ValueError,
        r"ref_logps has shape \(3,\); pass \(6, 6\) per token, or \(6,\)",
    ),
    "integer reference": (
        {**NO_REFERENCE, "ref_logps": torch.zeros(6, dtype=torch.long)},
        TypeError,
        "ref_logps has dtype torch.int64",
    ),
    "loss": ({"loss_type": "dpo"}, ValueError, r"loss_type=\['dpo'\] is unknown; choose among sigmoid"),
    "parameter": ({"simpo_gamma": 1.0}, ValueError, r"loss parameter \['simpo_gamma'\] is not used by"),
    "β": ({"beta": -0.1}, ValueError, "beta=-0.1 must be positive"),
    "two filters": (
        {"beta": DynamicBeta(), "keep": torch.ones(B, dtype=torch.bool)},
        ValueError,
        "keep and a DynamicB",
    ),
    "group": ({"process_group": object()}, ValueError, "process_group has no effect without a DynamicBeta"),
    "reduction": ({"reduction": "max"}, ValueError, "reduction='max' is unknown"),
    "ld_alpha": ({"ld_alpha": 1.5}, ValueError, r"ld_alpha=1.5 must be in \[0, 1\]"),
    "twice averaged": ({"loss_type": "ipo", "average_log_prob": True}, ValueError, r"would divide twice: \['ipo'\]"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature=0.0 must be positive"),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap=-1.0 must be positive"),
    "backend": ({"backend": "cuda"}, ValueError, "backend='cuda' is unknown"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_does_not_fit_is_refused_by_name(name: str) -> None:
    changes, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        linear_preference_loss(**changed(**changes))


# The module


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ignore_index", [-100, None])
def test_a_gpu_s_host_waits_once_for_the_count_of_rows(backend: str, ignore_index: int | None) -> None:
    """For policy and reference together, and not at all where nothing is ignored; the loss itself never waits."""
    data = problem(poison=False)
    if ignore_index is None:
        data["targets"].clamp_(min=0)
    leaf = data.pop("hidden").requires_grad_()
    dynamic_beta = DynamicBeta(backend=backend)
    with SyncWatch([leaf, *data.values(), *dynamic_beta.buffers()]) as watch:
        output = linear_preference_loss(leaf, **data, beta=dynamic_beta, ignore_index=ignore_index, backend=backend)
        output.loss.backward()
    assert [sync.kind for sync in watch.syncs] == ([] if ignore_index is None else ["nonzero"])
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
