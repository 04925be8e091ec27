"""What stands between a head's raw logits and the z that its softmax takes: scale, cap, temperature, as every launcher
of this folder hands them to its kernel (`device_math.final_logit`)."""

from __future__ import annotations

from typing import NamedTuple


class LogitScales(NamedTuple):
    """What happens to raw logits x: z = softcap·tanh(x·logit_scale/softcap)/temperature, or without a cap
    x·logit_scale/temperature."""

    logit_scale: float = 1.0
    temperature: float = 1.0
    softcap: float | None = None

    @property
    def slope(self) -> float:
        """dz/dx, less the cap's 1 − tanh²."""
        return self.logit_scale / self.temperature

    def arguments(self, unit: float = 1.0) -> tuple[float, float]:
        """(in_scale, out_scale) of kernels: z/unit is in_scale·x, or with a cap out_scale·tanh(in_scale·x)."""
        if self.softcap is None:
            return self.slope / unit, 1.0
        return self.logit_scale / self.softcap, self.softcap / self.temperature / unit


PLAIN = LogitScales()
