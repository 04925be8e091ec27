"""The trainer's options of losses and β-DPO as `LossOptions` and `DynamicBeta` take them, and their checks.

`args` is a `FastDPOConfig` throughout. An error names an option as the config spells it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from fastdpo.formulas import F_DIVERGENCES, LOSSES, PARAMETERS, BetaOptions, LossOptions
from fastdpo.loss import DynamicBeta
from fastdpo.training.options.kinds import OptionError
from fastdpo.training.options.unused import check_conditions, effective, without_effect

#: Fields of `LossOptions` and `BetaOptions` → options of the trainer, where the two differ. Most are TRL's names.
OPTION_NAMES = {
    "alpha": "beta_alpha",
    "momentum": "beta_momentum",
    "scope": "beta_scope",
    "variant": "beta_variant",
    "f_divergence": "f_divergence_type",
}
#: The fields of `LossOptions` that are options of the trainer. Its loss is a mean, and its rewards are at β0.
_LOSS_FIELDS = ("loss_type", "loss_weights", "beta", "label_smoothing", "f_divergence")
#: The fields of `BetaOptions` that act without β-DPO too.
_WITHOUT_PLAN = ("beta", "seed")
#: Options that act only under a condition: (names, condition, advice).
_CONDITIONS = (
    (
        tuple(OPTION_NAMES.get(each.name, each.name) for each in fields(BetaOptions) if each.name not in _WITHOUT_PLAN),
        "dynamic_beta",
        "it belongs to β-DPO; set dynamic_beta=True or drop it.",
    ),
    (tuple(PARAMETERS), "", "no loss in loss_type, and no f-divergence chosen, takes it."),
)


def _of(args: Any, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(args, OPTION_NAMES.get(name, name)) for name in names}


@contextmanager
def _by_option_names() -> Iterator[None]:
    """An error begins with the name of an option where it would begin with that of a field."""
    try:
        yield
    except ValueError as error:
        name, equals, rest = str(error).partition("=")
        raise ValueError(f"{OPTION_NAMES.get(name, name)}{equals}{rest}") from error


def loss_parameters(args: Any) -> dict[str, float]:
    """The parameters that the losses in `loss_type`, or the f-divergence, take."""
    wanted = {name for loss in args.loss_type if loss in LOSSES for name in LOSSES[loss].parameters}
    wanted |= set(F_DIVERGENCES.get(args.f_divergence_type, ()))
    return {name: getattr(args, name) for name in sorted(wanted)}


def loss_options(args: Any) -> LossOptions:
    """The run's losses with β0, checked."""
    with _by_option_names():
        return LossOptions(**_of(args, _LOSS_FIELDS), reward_beta=args.beta, parameters=loss_parameters(args))


def make_dynamic_beta(args: Any) -> DynamicBeta:
    """A fresh `DynamicBeta` with the run's settings; its draws follow `seed`."""
    with _by_option_names():
        return DynamicBeta(**_of(args, [each.name for each in fields(BetaOptions)]), backend=args.backend)


def check_losses(args: Any) -> None:
    """Raise ValueError for an option that is out of range; refuse or note one that the losses chosen do not read."""
    _check_read_by_losses(args)
    args = effective(args)
    loss_options(args)
    if args.ld_alpha is not None and not 0.0 <= args.ld_alpha <= 1.0:
        raise OptionError(f"ld_alpha={args.ld_alpha}: a weight in [0, 1]; 1 is plain DPO.")
    sorts = any(LOSSES[name].sorts_batch for name in args.loss_type)
    if args.use_weighting and sorts:
        raise OptionError(f"use_weighting=True needs losses of single pairs, but loss_type={args.loss_type} sorts.")
    if args.dynamic_beta and args.beta_scope == "instance" and sorts:
        raise OptionError(f"beta_scope='instance' needs losses of single pairs, but loss_type={args.loss_type} sorts.")
    if args.dynamic_beta:
        make_dynamic_beta(args)


def _check_read_by_losses(args: Any) -> None:
    losses = [LOSSES[name] for name in args.loss_type if name in LOSSES]
    if len(losses) != len(args.loss_type):
        return  # `loss_options` says which is unknown
    names = args.loss_type
    if args.label_smoothing and not any(loss.uses_label_smoothing for loss in losses):
        without_effect(
            args, "label_smoothing", f"it does not act on {names}; set 0, or use {_users('label_smoothing')}."
        )
    if args.f_divergence_type != "reverse_kl" and not any(loss.supports_f_divergence for loss in losses):
        reason = f"it does not act on {names}; use reverse_kl, or {_users('f_divergence')}."
        without_effect(args, "f_divergence_type", reason)
    scales = any(loss.uses_beta for loss in losses)
    if args.dynamic_beta and not scales:
        without_effect(args, "dynamic_beta", f"loss_type={names} has no β.")
    met = {"dynamic_beta"} if args.dynamic_beta and scales else set()
    check_conditions(args, met | set(loss_parameters(effective(args))), _CONDITIONS)


def _users(option: str) -> str:
    attribute = {"label_smoothing": "uses_label_smoothing", "f_divergence": "supports_f_divergence"}[option]
    return f"one of {', '.join(loss.name for loss in LOSSES.values() if getattr(loss, attribute))}"
