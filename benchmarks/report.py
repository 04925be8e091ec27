"""Figures, each beside what it is compared with and its target; as tables and as JSON."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Target:
    """A bound of a ratio: "≤" or "≥", and the number."""

    sign: str
    bound: float

    def met(self, ratio: float) -> bool:
        return ratio <= self.bound if self.sign == "≤" else ratio >= self.bound

    def __str__(self) -> str:
        return f"{self.sign} {self.bound:g}"


def at_most(bound: float | None) -> Target | None:
    return None if bound is None else Target("≤", bound)


def at_least(bound: float | None) -> Target | None:
    return None if bound is None else Target("≥", bound)


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
        case: shapes.
        measured, value, unit: what it is, how much.
        against, baseline: what it is compared with, in the same unit; None for nothing.
        ratio: what the target is about.
        note: counts, spread, or why there is no number.
    """

    case: str
    measured: str
    value: float | None = None
    unit: str = ""
    against: str = ""
    baseline: float | None = None
    ratio: float | None = None
    target: Target | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        return None if self.target is None or self.ratio is None else self.target.met(self.ratio)


def table(title: str, figures: Iterable[Figure]) -> Table:
    made = Table(title=title, title_justify="left", title_style="bold")
    for name in ("case", "what", "", "compared with", "", "ratio", "target", "note"):
        made.add_column(name, justify="left" if name in ("case", "what", "compared with", "note") else "right")
    last = None
    for figure in figures:
        colour = {None: "", True: "green", False: "red"}[figure.met]
        ratio = "" if figure.ratio is None else f"{figure.ratio:.3g}"
        made.add_row(
            "" if figure.case == last else figure.case,
            figure.measured,
            _quantity(figure.value, figure.unit),
            figure.against,
            _quantity(figure.baseline, figure.unit),
            f"[{colour}]{ratio}[/]" if colour else ratio,
            "" if figure.target is None else f"{figure.target} {'met' if figure.met else 'MISSED'}",
            figure.note,
        )
        last = figure.case
    return made


def _quantity(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    return f"{value:,.0f} {unit}" if value >= 1000 else f"{value:.4g} {unit}".strip()


def print_table(title: str, figures: Iterable[Figure]) -> None:
    console = Console()
    # A pipe or a file has no width of its own
    Console(width=None if console.is_terminal else 190).print(table(title, figures))
    sys.stdout.flush()


def machine(threads: int) -> dict[str, str | int]:
    """What the figures were measured on."""
    packages = {}
    for name in ("torch", "trl", "liger-kernel"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = "not installed"
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if "model name" in line), "unknown")
    return {
        "cpu": cpu,
        "threads": threads,
        "python": platform.python_version(),
        "system": platform.system(),
        **packages,
    }


def _lines(path: str) -> Sequence[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else ()


def as_json(sections: dict[str, list[Figure]], threads: int, dtype: torch.dtype) -> str:
    figures = [
        {
            "section": section,
            **asdict(figure),
            "target": None if figure.target is None else str(figure.target),
            "met": figure.met,
        }
        for section, listed in sections.items()
        for figure in listed
    ]
    document = {"machine": machine(threads), "dtype": str(dtype).removeprefix("torch."), "figures": figures}
    return json.dumps(document, indent=1, ensure_ascii=False)
