"""The functions that a lean body computes norms, activations and rotary positions with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from fastdpo.training.body.activation import ACTIVATIONS, Activation
from fastdpo.training.body.norm import NormKind, rms_norm
from fastdpo.training.body.rotary import rotate


@dataclass(frozen=True)
class Functions:
    """Attributes:
    norm: as `norm.rms_norm`. rotate: as `rotary.rotate`. activations: name in a configuration → the activation.
    served: what functions that are not ours have computed so far. left: reason → what was left to ours.
    """

    norm: Callable[[Tensor, nn.Module, NormKind], Tensor] = rms_norm
    rotate: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = rotate
    activations: Mapping[str, Activation] = field(default_factory=lambda: ACTIVATIONS)
    source: str = ""
    served: set[str] = field(default_factory=set)
    left: dict[str, str] = field(default_factory=dict)

    def told(self) -> str:
        """Whose functions computed what; "" where all are ours."""
        if not self.source:
            return ""
        others = "; ".join(f"{what} by ours: {reason}" for what, reason in sorted(self.left.items()))
        served = f"{self.source} computes {', '.join(sorted(self.served)) or 'nothing'}"
        return f"{served}; {others}" if others else served


def own_functions(elements: int) -> Functions:
    """Ours, for all devices. elements: of a slice of what they compute at a time."""
    return Functions(partial(rms_norm, elements=elements), partial(rotate, elements=elements))
