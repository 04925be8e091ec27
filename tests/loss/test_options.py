"""Options said once: every way to give them is the same call, every place that shows them shows the same."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import tiny
import torch
from torch import Tensor

from fastdpo import (
    DynamicBeta,
    FusedLinearDPOLoss,
    linear_preference_loss,
    preference_loss,
    token_preference_loss,
)
from fastdpo.formulas import PARAMETERS, BetaOptions, oracle
from fastdpo.formulas.options import LossKeywords
from fastdpo.loss import LossOptions
from fastdpo.ops.preference_loss.operators import PackedPlan

#: The public contract, written out.
LOSS_DEFAULTS = {
    "loss_type": "sigmoid", "loss_weights": None, "beta": 0.1, "label_smoothing": 0.0, "f_divergence": "reverse_kl",
    "reduction": "mean", "reward_beta": None,
}  # fmt: skip
PARAMETER_DEFAULTS = {"discopop_tau": 0.05, "simpo_gamma": 0.5, "cpo_alpha": 1.0, "f_alpha_divergence_coef": 0.5}
BETA_DEFAULTS = {
    "beta": 0.1, "alpha": 0.6, "momentum": 0.9, "keep_ratio": 0.8, "min_beta": 1e-3, "scope": "batch",
    "variant": "released", "seed": 0,
}  # fmt: skip
#: None at its default.
MIX: dict[str, Any] = {
    "loss_type": ["cpo_simpo", "sigmoid"], "loss_weights": [0.5, 2.0], "beta": 0.3, "label_smoothing": 0.1,
    "f_divergence": "alpha_divergence", "reduction": "sum", "reward_beta": 0.7, "simpo_gamma": 0.2, "cpo_alpha": 0.4,
    "f_alpha_divergence_coef": 0.6,
}  # fmt: skip


def together(named: dict[str, Any]) -> LossOptions:
    parameters = {name: value for name, value in named.items() if name in PARAMETER_DEFAULTS}
    return LossOptions(**{k: v for k, v in named.items() if k not in parameters}, parameters=parameters)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


SIDES, TOKENS, BOUNDARIES = random(4, 3), -random(9).abs(), torch.tensor([0, 2, 4, 7, 9])
LENGTHS = {"chosen_lengths": torch.tensor([2, 5, 3]), "rejected_lengths": torch.tensor([3, 6, 4])}
HIDDEN, WEIGHT, TARGETS = random(4, 3, 5), random(7, 5), torch.tensor([[1, 2, 3], [4, 5, 6], [0, 1, 2], [3, 4, 5]])


def by_module(**options: Any) -> Callable[[], Tensor]:
    module = FusedLinearDPOLoss(compute_nll_loss=True, alpha=0.5, **options)
    return lambda: module(WEIGHT, HIDDEN, TARGETS, None, HIDDEN + 0.1)[0]


#: Options → a call with them.
CALLS: dict[str, Callable[..., Callable[[], Tensor]]] = {
    "preference_loss": lambda **options: lambda: preference_loss(*SIDES, **LENGTHS, **options).loss,
    "token_preference_loss": lambda **options: (
        lambda: token_preference_loss(TOKENS, BOUNDARIES, 2 * TOKENS, **options).loss
    ),
    "linear_preference_loss": lambda **options: (
        lambda: linear_preference_loss(HIDDEN, WEIGHT, TARGETS, ref_hidden=HIDDEN + 0.1, **options).loss
    ),
    "FusedLinearDPOLoss": by_module,
    "oracle": lambda **options: lambda: oracle.preference_loss(*SIDES, **LENGTHS, **options).loss,
}
SHOWN = {
    "preference_loss": preference_loss,
    "token_preference_loss": token_preference_loss,
    "linear_preference_loss": linear_preference_loss,
    "FusedLinearDPOLoss": FusedLinearDPOLoss.__init__,
    "oracle": oracle.preference_loss,
}


def test_keywords_fields_and_parameters_agree() -> None:
    """What type checkers see is what there is, with the same types."""
    types = {name: kind for name, kind in get_type_hints(LossOptions).items() if name in LOSS_DEFAULTS}
    assert list(types) == list(LOSS_DEFAULTS)
    assert get_type_hints(LossKeywords) == types | dict.fromkeys(PARAMETER_DEFAULTS, float)
    assert {name: each.default for name, each in PARAMETERS.items()} == PARAMETER_DEFAULTS


@pytest.mark.parametrize("name", SHOWN)
def test_signature_and_docs_show_every_option(name: str) -> None:
    parameters = inspect.signature(SHOWN[name]).parameters
    expected = {
        key: value for key, value in LOSS_DEFAULTS.items() if (name, key) != ("FusedLinearDPOLoss", "reduction")
    }
    assert {key: each.default for key, each in parameters.items() if key in LOSS_DEFAULTS} == expected
    assert [(key, each.kind) for key, each in parameters.items()][-1] == ("loss_parameters", inspect._VAR_KEYWORD)
    assert parameters["options"].default is None
    for key, value in (expected | PARAMETER_DEFAULTS).items():
        assert f"{key}={value!r}: " in (SHOWN[name].__doc__ or "")
    get_type_hints(SHOWN[name])  # the name that only type checkers know is gone


@pytest.mark.parametrize("name", CALLS)
def test_options_together_are_options_by_keyword(name: str) -> None:
    named = {key: value for key, value in MIX.items() if (name, key) != ("FusedLinearDPOLoss", "reduction")}
    expected = CALLS[name](**named)()
    assert torch.equal(CALLS[name](options=together(named))(), expected)
    assert not torch.equal(CALLS[name](options=together(named | {"simpo_gamma": 0.25}))(), expected)
    for options in (named, {"options": together(named)}):
        traced = torch.compile(CALLS[name](**options), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(traced(), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"gamma": 1.0}, ValueError, r"loss parameter \['gamma'\] is not used by .*'sigmoid'.*they take: none"),
        ({"parameters": {}}, ValueError, r"loss parameter \['parameters'\] is not used by"),
        ({"options": LossOptions(), "beta": 0.2}, ValueError, r"options and \['beta'\] say the same thing twice"),
        ({"options": LossOptions(), "simpo_gamma": 0.5}, ValueError, r"options and \['simpo_gamma'\] say the same"),
        ({"options": {"beta": 0.2}}, TypeError, r"options is a dict; pass a fastdpo\.loss\.LossOptions"),
    ],
)
def test_what_is_no_option_or_said_twice_is_refused(
    name: str, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        CALLS[name](**arguments)()


def test_who_cannot_take_an_option_says_so() -> None:
    with pytest.raises(ValueError, match="reduction='sum'"):
        FusedLinearDPOLoss(reduction="sum")
    with pytest.raises(ValueError, match="options has reduction='sum'"):
        FusedLinearDPOLoss(options=LossOptions(reduction="sum"))
    with pytest.raises(TypeError, match="beta is a DynamicBeta; the oracle takes a float or a tensor"):
        CALLS["oracle"](beta=DynamicBeta())()


def test_copies_and_pickles_are_the_same_options() -> None:
    options = together(MIX)
    for other in (copy.deepcopy(options), pickle.loads(pickle.dumps(options)), replace(options)):
        assert other == options
        assert other.terms == options.terms
    module = copy.deepcopy(FusedLinearDPOLoss(beta=DynamicBeta(seed=3), loss_type="hinge"))
    assert module.beta.options == BetaOptions(seed=3)
    assert module.options.loss_type == ["hinge"]
    with pytest.raises(ValueError, match=r"beta=0\.0"):
        replace(options, beta=0.0)


def test_part_of_the_losses_keeps_what_acts_on_it() -> None:
    options = LossOptions(
        ["exo_pair", "cpo", "sft"], [0.5, 2.0, 3.0], label_smoothing=0.1, f_divergence="alpha_divergence",
        parameters={"cpo_alpha": 0.4, "f_alpha_divergence_coef": 0.6},
    )  # fmt: skip
    assert options.only(["sft"]) == LossOptions(["sft"], [3.0])
    assert options.only(["sft", "cpo"]) == LossOptions(
        ["cpo", "sft"], [2.0, 3.0], label_smoothing=0.1, parameters={"cpo_alpha": 0.4}
    )
    assert options.only(["exo_pair"]) == LossOptions(
        ["exo_pair"], [0.5], label_smoothing=0.1, f_divergence="alpha_divergence",
        parameters={"f_alpha_divergence_coef": 0.6},
    )  # fmt: skip


def test_dynamic_beta_has_one_list_of_settings() -> None:
    signature = inspect.signature(DynamicBeta).parameters
    assert {name: each.default for name, each in signature.items()} == BETA_DEFAULTS | {"backend": "auto"}
    assert vars(BetaOptions()) == BETA_DEFAULTS
    for name in BETA_DEFAULTS:
        assert f"    {name}: " in DynamicBeta.__doc__
    options = BetaOptions(0.2, 0.5, 0.7, 0.6, 1e-2, "instance", "paper", 2**62 + 1)
    for packed in (PackedPlan(options, True), PackedPlan(options, False)):
        assert PackedPlan.unpacked(*packed.packed()) == packed


def test_the_trainers_options_are_these(tmp_path: Path) -> None:
    """Each under its own name, with values that differ from each other and from the defaults."""
    config = tiny.config(
        tmp_path, loss_type=["cpo_simpo", "sigmoid"], loss_weights=[0.5, 2.0], beta=0.3, label_smoothing=0.1,
        f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.6, simpo_gamma=0.2, cpo_alpha=0.4,
        dynamic_beta=True, beta_alpha=0.45, beta_momentum=0.7, keep_ratio=0.55, min_beta=0.01, beta_scope="instance",
        beta_variant="paper", seed=11,
    )  # fmt: skip
    assert config.loss_options() == replace(together(MIX), reduction="mean", reward_beta=0.3)
    assert config.make_dynamic_beta().options == BetaOptions(0.3, 0.45, 0.7, 0.55, 0.01, "instance", "paper", 11)
    plain = tiny.config(tmp_path, seed=0, beta=0.1)
    assert plain.loss_options() == LossOptions(["sigmoid"], reward_beta=0.1)
    assert vars(plain.make_dynamic_beta().options) == BETA_DEFAULTS
    assert {name: getattr(plain, name) for name in PARAMETER_DEFAULTS} == PARAMETER_DEFAULTS
