"""`LossOptions`: what a preference loss is told beside its log-probs; each option named, explained and checked once.

In: keyword arguments of a loss function, or the fields themselves. Out: the checked losses with their weights and their
parameters filled in. `fastdpo.loss`, the oracle and the trainer's options take it. A new option is a field here and a
line of `LossKeywords`; a new parameter of a loss is an entry of `parameters.PARAMETERS` and a line there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol, TypedDict, TypeVar

from torch import Tensor

from fastdpo.formulas.losses import F_DIVERGENCES, LOSSES, Loss, LossTerm
from fastdpo.formulas.parameters import PARAMETERS
from fastdpo.formulas.signatures import about, options_of, shows_options

_Function = TypeVar("_Function", bound=Callable[..., Any])
Reduction = Literal["mean", "sum", "none"]
REDUCTIONS = ("mean", "sum", "none")


class ChoosesBeta(Protocol):
    """What chooses β batch by batch (`fastdpo.DynamicBeta`); of it only β0 is looked at here."""

    @property
    def beta(self) -> float: ...


class LossKeywords(TypedDict, total=False):
    """The options by keyword, for type checkers: the fields of `LossOptions` and the losses' parameters."""

    loss_type: str | Sequence[str]
    loss_weights: Sequence[float] | None
    beta: float | Tensor | ChoosesBeta
    label_smoothing: float
    f_divergence: str
    reduction: Reduction
    reward_beta: float | None
    discopop_tau: float
    simpo_gamma: float
    cpo_alpha: float
    f_alpha_divergence_coef: float


@dataclass(frozen=True)
class LossOptions:
    """The options of a preference loss, or of a weighted sum of several. An instance is checked.

    A tensor β is not checked, as that would wait for the device. Label smoothing must be read by at least one loss of a
    list; an f-divergence by every loss with a reference.

    Attributes:
        parameters: of the losses and of the f-divergence, by name; the others have their defaults (`PARAMETERS`).
        terms: the losses with their weights and parameters.

    Raises:
        ValueError: an option is unknown, out of range, or would be ignored by the losses chosen.
    """

    loss_type: str | Sequence[str] = field(
        default="sigmoid", metadata=about(f"One loss, or several to be added: {', '.join(LOSSES)}.")
    )
    loss_weights: Sequence[float] | None = field(
        default=None, metadata=about("Weights of the losses. Default: 1 each.")
    )
    beta: float | Tensor | ChoosesBeta = field(
        default=0.1,
        metadata=about(
            "β0: how strongly the policy is held to the reference.",
            "A float, or a 0-D or (B,) tensor, without gradient; or a `DynamicBeta` (not in the oracle), which plans "
            "the batch in the same call and, in training mode, commits its statistics.",
        ),
    )
    label_smoothing: float = field(
        default=0.0, metadata=about("ε in [0, 0.5): assumed share of flipped labels (cDPO, robust, EXO, AOT).")
    )
    f_divergence: str = field(
        default="reverse_kl",
        metadata=about(
            "f-divergence that holds the policy to the reference.",
            "alpha_divergence takes f_alpha_divergence_coef.",
            choices=F_DIVERGENCES,
        ),
    )
    reduction: Reduction = field(
        default="mean",
        metadata=about(
            "What becomes of the pairs' losses.",
            "A mean or a sum is over kept pairs (of this rank); no pair at all is a loss of 0.",
            choices=REDUCTIONS,
        ),
    )
    reward_beta: float | None = field(
        default=None,
        metadata=about("β0 of the rewards reward_beta·(log-ratio).", "Default: `beta`, or the β0 of a `DynamicBeta`."),
    )
    parameters: Mapping[str, float] = field(default_factory=dict)
    terms: tuple[LossTerm, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "terms", _checked_terms(self))
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction={self.reduction!r} is unknown; choose mean, sum or none.")

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies and pickles hold what was asked for; `terms` lead into the table of losses
        return _rebuilt, ({each.name: getattr(self, each.name) for each in fields(self) if each.init},)

    @classmethod
    def of(cls, options: LossOptions | None, named: Mapping[str, Any]) -> LossOptions:
        """Those of a call: `options`, or the ones `named`, where what is no field is a parameter.

        Raises:
            ValueError: both are given; and as the class.
            TypeError: `options` are none.
        """
        if options is None:
            own = {name: value for name, value in named.items() if name in _FIELDS}
            return cls(**own, parameters={name: value for name, value in named.items() if name not in _FIELDS})
        if not isinstance(options, LossOptions):
            raise TypeError(f"options is a {type(options).__name__}; pass a fastdpo.loss.LossOptions.")
        if named:
            raise ValueError(
                f"options and {sorted(named)} say the same thing twice; pass one, or dataclasses.replace(options, ...)."
            )
        return options

    def only(self, names: Collection[str]) -> LossOptions:
        """Of the losses those with these names, with their weights, and with the other options as far as they act."""
        terms = [term for term in self.terms if term.loss.name in names]
        losses = [term.loss for term in terms]
        divergence = self.f_divergence if any(loss.supports_f_divergence for loss in losses) else "reverse_kl"
        taken = {name for loss in losses for name in loss.parameters} | set(F_DIVERGENCES[divergence])
        return replace(
            self,
            loss_type=[loss.name for loss in losses],
            loss_weights=[term.weight for term in terms],
            label_smoothing=self.label_smoothing if any(loss.uses_label_smoothing for loss in losses) else 0.0,
            f_divergence=divergence,
            parameters={name: value for name, value in self.parameters.items() if name in taken},
        )


def _rebuilt(given: dict[str, Any]) -> LossOptions:
    return LossOptions(**given)


_FIELDS = frozenset(options_of(LossOptions))


def takes_loss_options(*, without: Collection[str] = ()) -> Callable[[_Function], _Function]:
    """Decorates a function that takes a loss' options as `**named`: they are shown as its own."""
    taken = {name: loss.parameters for name, loss in LOSSES.items()} | F_DIVERGENCES
    users = {name: ", ".join(each for each in taken if name in taken[each]) for name in PARAMETERS}
    documented = {f"{name}={each.default!r}": f"{each.help} Of {users[name]}." for name, each in PARAMETERS.items()}
    return shows_options(LossOptions, documented, without=without)


def _checked_terms(options: LossOptions) -> tuple[LossTerm, ...]:
    names = [options.loss_type] if isinstance(options.loss_type, str) else list(options.loss_type)
    unknown = [name for name in names if name not in LOSSES]
    if unknown or not names:
        raise ValueError(f"loss_type={unknown or names!r} is unknown; choose among {', '.join(LOSSES)}.")
    losses = [LOSSES[name] for name in names]
    given = options.loss_weights
    weights = [1.0] * len(losses) if given is None else [float(weight) for weight in given]
    if len(weights) != len(losses):
        raise ValueError(
            f"loss_weights has {len(weights)} entries for {len(losses)} losses {names}; give one for each."
        )
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"loss_weights={weights}: every weight must be finite.")
    _check_beta(options.beta)
    _check_label_smoothing(losses, options.label_smoothing)
    _check_f_divergence(losses, options.f_divergence)
    parameters = options.parameters
    known = {name for loss in losses for name in loss.parameters} | set(F_DIVERGENCES[options.f_divergence])
    if stray := sorted(set(parameters) - known):
        accepted = ", ".join(sorted(known)) or "none"
        raise ValueError(
            f"loss parameter {stray} is not used by {names} with {options.f_divergence}; they take: {accepted}."
        )
    for name, value in parameters.items():
        PARAMETERS[name].check(name, value)
    return tuple(
        LossTerm(loss, weight, {name: parameters.get(name, default) for name, default in loss.parameters.items()})
        for loss, weight in zip(losses, weights, strict=True)
    )


def _check_beta(beta: Any) -> None:
    if isinstance(beta, Tensor):
        return
    base = getattr(beta, "beta", beta)
    if not 1e-37 < base < 3e38:
        raise ValueError(f"beta={base} must be positive and finite, in float32; 0.1 is the usual choice.")


def _check_label_smoothing(losses: Sequence[Loss], label_smoothing: float) -> None:
    names = [loss.name for loss in losses]
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing} must be in [0, 0.5), as a share of flipped labels.")
    if label_smoothing > 0.0 and not any(loss.uses_label_smoothing for loss in losses):
        users = ", ".join(loss.name for loss in LOSSES.values() if loss.uses_label_smoothing)
        raise ValueError(f"label_smoothing={label_smoothing} has no effect on {names}; set 0, or use one of {users}.")
    if "exo_pair" in names and label_smoothing == 0.0:
        raise ValueError("loss_type='exo_pair' takes log(label_smoothing), so 0 is infinite; 1e-3 is recommended.")


def _check_f_divergence(losses: Sequence[Loss], f_divergence: str) -> None:
    if f_divergence not in F_DIVERGENCES:
        raise ValueError(f"f_divergence={f_divergence!r} is unknown; choose one of {', '.join(F_DIVERGENCES)}.")
    if f_divergence == "reverse_kl":
        return
    stray = [loss.name for loss in losses if loss.needs_reference and not loss.supports_f_divergence]
    if stray or not any(loss.supports_f_divergence for loss in losses):
        users = ", ".join(loss.name for loss in LOSSES.values() if loss.supports_f_divergence)
        names = stray or [loss.name for loss in losses]
        raise ValueError(f"f_divergence={f_divergence!r} does not act on {names}; use reverse_kl, or one of {users}.")
