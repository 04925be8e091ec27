"""`FusedLinearDPOLoss` against Liger's own module and by definition, its state, and what it refuses."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from head_pairs import BACKENDS, SOFT, B, H, expected_by_oracle, gradients, problem, token_logps
from torch import Tensor

import fastdpo
from fastdpo import DynamicBeta, FusedLinearDPOLoss
from fastdpo.formulas import oracle


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several row chunks and vocabulary slices, with a ragged last one of each."""
    monkeypatch.setenv("FASTDPO_TILE", "8x16")
    monkeypatch.setattr("fastdpo.loss.modules._SUMMED_ROWS", 9)


OUTPUTS = (
    "chosen_logps",
    "rejected_logps",
    "chosen_mean",
    "rejected_mean",
    "nll",
    "chosen_rewards",
    "rejected_rewards",
)
LIGER_LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "hinge": {},
    "exo_pair": {"label_smoothing": 0.1},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.2},
    "bco_pair": {},
    "sppo_hard": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {"discopop_tau": 0.3},
}
LIGER_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "likelihood": {"compute_nll_loss": True, "alpha": 0.3},
    "average": {"average_log_prob": True, "compute_nll_loss": True},
    "no reference": {"use_ref_model": False, "ignore_index": 7},
}


@pytest.mark.parametrize("loss_type", LIGER_LOSSES)
@pytest.mark.parametrize("name", LIGER_OPTIONS)
def test_agrees_with_liger(name: str, loss_type: str) -> None:
    """Loss, all seven metrics and the gradients of hidden states, weight and bias."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss as liger

    options = {"beta": 0.4, "loss_type": loss_type, **LIGER_LOSSES[loss_type], **LIGER_OPTIONS[name]}
    # Liger averages logits over ignored positions too, so NaN there would be its result
    data = problem(ignore_index=options.get("ignore_index", -100), poison=False)
    for trained in (("hidden",), ("hidden", "weight", "bias"), ("weight",)):
        biased = trained != ("weight",)
        results = []
        for module in (liger(compiled=False, **options), FusedLinearDPOLoss(compiled=False, **options)):
            x = {k: v.clone().requires_grad_() if k in trained else v for k, v in data.items()}
            references = (x["ref_hidden"], x["ref_weight"], x["ref_bias"] if biased else None)
            given = references if options.get("use_ref_model", True) else ()
            loss, outputs = module(x["weight"], x["hidden"], x["targets"], x["bias"] if biased else None, *given)
            assert len(outputs) == len(OUTPUTS)
            grads = gradients(2.0 * loss, [x[name] for name in trained])
            results.append({"loss": loss, **dict(zip(OUTPUTS, outputs, strict=True)), "grads": grads})
        theirs, ours = results
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


def test_takes_ligers_arguments_by_name_and_position() -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss as liger

    for method in ("__init__", "forward"):
        ours = inspect.signature(getattr(FusedLinearDPOLoss, method)).parameters.values()
        positional = [(p.name, p.default) for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
        theirs = inspect.signature(getattr(liger, method)).parameters.values()
        assert positional == [(p.name, p.default) for p in theirs]


@pytest.mark.parametrize("average", [False, True])
def test_module_in_float64_by_definition(average: bool) -> None:
    """What Liger has not: head options, a list of losses, the policy's head as default; logits built in full."""
    data = {k: v.double() if v.is_floating_point() else v for k, v in problem(poison=False).items()}
    del data["ref_weight"], data["ref_bias"]
    data["ref_hidden"] = data["ref_hidden"][..., :H]
    module = FusedLinearDPOLoss(
        beta=0.3,
        alpha=0.5,
        compute_nll_loss=True,
        average_log_prob=average,
        loss_type=["sigmoid", "hinge"],
        loss_weights=[1.0, 2.0],
        reward_beta=1.5,
        label_smoothing=0.1,
        f_divergence="forward_kl",
        backend="torch",
        **SOFT,
    )
    loss, (_, _, chosen_mean, rejected_mean, nll, chosen_rewards, _) = module(
        data["weight"], data["hidden"], data["targets"], data["bias"], data["ref_hidden"]
    )
    options = {"average_log_prob": average, **SOFT}
    data["ref_bias"] = data["bias"]
    exact = expected_by_oracle(
        data,
        loss_options={
            "loss_type": ["sigmoid", "hinge", "sft"],
            "loss_weights": [1.0, 2.0, 0.5],
            "beta": 0.3,
            "label_smoothing": 0.1,
            "f_divergence": "forward_kl",
            "reward_beta": 1.5,
        },
        **options,
    )
    torch.testing.assert_close(loss, exact["loss"])
    torch.testing.assert_close(chosen_rewards, exact["chosen_rewards"])
    logits = data["hidden"] @ data["weight"].T + data["bias"]
    torch.testing.assert_close(torch.stack([chosen_mean, rejected_mean]), logits.view(2, -1).mean(1))
    tokens = (data["targets"][:B] != -100).sum()
    logps = token_logps(data["hidden"], data["weight"], data["bias"], data["targets"], options)
    torch.testing.assert_close(nll, -logps[:B].sum() / tokens)


@pytest.mark.parametrize("backend", BACKENDS)
def test_module_saves_and_resumes_dynamic_beta(backend: str) -> None:
    """Stopped after a step and resumed from its state_dict, the second step is the same; nll is of the kept pairs."""
    settings = {"beta": 0.3, "keep_ratio": 0.5, "seed": 1}

    def call(module: FusedLinearDPOLoss, step: int) -> tuple[Tensor, Any]:
        x = problem(pairs=4, seed=step)
        return module(x["weight"], x["hidden"], x["targets"], x["bias"], x["ref_hidden"], x["ref_weight"])

    straight = FusedLinearDPOLoss(beta=DynamicBeta(**settings), compute_nll_loss=True, alpha=0.7, backend=backend)
    first = call(straight, 0)[0]
    assert set(straight.state_dict()) == {"beta.m0", "beta.sigma", "beta.step"}
    resumed = FusedLinearDPOLoss(beta=DynamicBeta(**settings), compute_nll_loss=True, alpha=0.7, backend=backend)
    resumed.load_state_dict({name: value.clone() for name, value in straight.state_dict().items()})
    second = call(straight, 1)
    assert torch.equal(call(resumed, 1)[0], second[0])
    assert int(resumed.state_dict()["beta.step"]) == 2
    assert not torch.equal(first, second[0])
    resumed.eval()
    call(resumed, 2)
    assert int(resumed.state_dict()["beta.step"]) == 2

    data = problem(pairs=4, seed=0)
    del data["ref_bias"]
    raw = expected_by_oracle(data, loss_options={})
    nothing = oracle.BetaState(torch.zeros(()), torch.zeros(()), torch.zeros((), dtype=torch.int64))
    plan = oracle.dynamic_beta(raw["margins"], nothing, **settings)
    assert int(plan.keep.sum()) == 2
    exact = expected_by_oracle(data, loss_options={"beta": plan.beta, "keep": plan.keep})["loss"]
    tokens = (data["targets"][:4] != -100).sum(1)
    nll = -raw["chosen_logps"][plan.keep].sum() / tokens[plan.keep].sum()
    torch.testing.assert_close(first.double(), exact + 0.7 * nll, rtol=1e-5, atol=1e-5)
    again = FusedLinearDPOLoss(beta=DynamicBeta(**settings), compute_nll_loss=True, alpha=0.7, backend=backend)
    torch.testing.assert_close(call(again, 0)[1][4].double(), nll, rtol=1e-5, atol=1e-5)


def test_module_in_bfloat16_and_compiled() -> None:
    data = {k: v.bfloat16() if v.is_floating_point() else v for k, v in problem(poison=False).items()}
    hidden = data["hidden"].requires_grad_()
    arguments = (data["weight"], hidden, data["targets"], data["bias"], data["ref_hidden"], data["ref_weight"])
    module = FusedLinearDPOLoss(compute_nll_loss=True, beta=DynamicBeta())
    loss, metrics = module(*arguments)
    logits = hidden.double() @ data["weight"].double().T + data["bias"].double()
    torch.testing.assert_close(torch.stack(metrics[2:4]).double(), logits.view(2, -1).mean(1), rtol=1e-5, atol=1e-6)
    assert not any(metric.requires_grad for metric in metrics)
    traced = FusedLinearDPOLoss(compute_nll_loss=True, beta=DynamicBeta())
    traced_loss, traced_metrics = torch.compile(traced, fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(traced_loss, loss)
    torch.testing.assert_close(traced_metrics, metrics)
    torch.testing.assert_close(gradients(traced_loss, [hidden]), gradients(loss, [hidden]))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": 0.5}, ValueError, "alpha=0.5 weighs the likelihood term; it needs compute_nll_loss=True"),
        ({"chunk_size": 0}, ValueError, "chunk_size=0 must be at least 1"),
        ({"beta": torch.tensor(0.1)}, TypeError, "beta is a Tensor; pass a float or a DynamicBeta"),
        ({"loss_type": "ipo", "average_log_prob": True}, ValueError, "would divide twice"),
        ({"loss_type": "kto"}, ValueError, r"loss_type=\['kto'\] is unknown"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, ValueError, "label_smoothing=0.1 has no effect"),
        ({"discopop_tau": 0.1}, ValueError, r"\['discopop_tau'\] is not used"),
        ({"softcap": 0.0}, ValueError, "softcap=0.0 must be positive"),
    ],
)
def test_module_refuses_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FusedLinearDPOLoss(**options)


def test_module_refuses_a_missing_and_an_unread_reference() -> None:
    x = problem()
    with pytest.raises(ValueError, match="ref_input is missing; pass the reference's hidden states, or set use_ref"):
        FusedLinearDPOLoss()(x["weight"], x["hidden"], x["targets"])
    with pytest.raises(ValueError, match=r"\['ref_input'\] would not be read, as use_ref_model=False"):
        FusedLinearDPOLoss(use_ref_model=False)(x["weight"], x["hidden"], x["targets"], ref_input=x["ref_hidden"])


def test_options_may_be_set_after_construction() -> None:
    """As Liger's, which reads its attributes in every call."""
    data = problem(poison=False)
    arguments = (data["weight"], data["hidden"], data["targets"], data["bias"])
    references = (data["ref_hidden"], data["ref_weight"], data["ref_bias"])
    changes: dict[str, Any] = {
        "compute_nll_loss": True,
        "alpha": 0.25,
        "label_smoothing": 0.3,
        "beta": 0.7,
        "reward_beta": 0.2,
        "loss_type": ["robust", "cpo"],
        "loss_weights": [2.0, 0.5],
        "loss_parameters": {"cpo_alpha": 0.4},
    }
    changed = FusedLinearDPOLoss()
    for count, (name, value) in enumerate(changes.items(), 1):
        setattr(changed, name, value)
        given = dict(list(changes.items())[:count])
        parameters = given.pop("loss_parameters", {})
        expected = FusedLinearDPOLoss(**given, **parameters)
        ours, theirs = (module(*arguments, *references) for module in (changed, expected))
        assert torch.equal(ours[0], theirs[0]), name
        assert torch.equal(ours[1][5], theirs[1][5]), name  # chosen rewards
        assert getattr(changed, name) == getattr(expected, name) == value


def test_exported() -> None:
    assert {"linear_preference_loss", "FusedLinearDPOLoss", "token_preference_loss"} <= set(fastdpo.__all__)
    assert fastdpo.token_preference_loss.__name__ == "token_preference_loss"
