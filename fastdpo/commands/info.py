"""`fastdpo info`: versions, devices, and which backends can run here and why not the others."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform

import torch
from rich.console import Console
from rich.table import Table

from fastdpo.ops.backends import backends, resolve_backend
from fastdpo.shown import markup, terminal
from fastdpo.version import __version__

_PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "trl", "liger-kernel")
_USAGE = """usage: fastdpo info

Prints versions, devices, and which backends can run here and why not the others."""


def main(argv: list[str]) -> int:
    """Print what is here. Returns 0, or 2 for an argument: there are none but --help."""
    if argv:
        print(_USAGE)
        return 0 if argv[0] in ("-h", "--help") else 2
    print_info()
    return 0


def versions() -> dict[str, str]:
    """Package → version, or "not installed"."""
    found = {"fastdpo": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def devices() -> dict[str, str]:
    """Device → what it is."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads, {memory:.1f} GiB"}
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{card.name}, sm_{card.major}{card.minor}, {card.total_memory / 2**30:.1f} GiB"
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        found["cuda"] = f"none: torch is {built}" + (", and sees no GPU" if torch.version.cuda else "")
    return found


def quantisation() -> dict[str, str]:
    """Whether 4-bit training can run here."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return {"4-bit (bitsandbytes)": "no: bitsandbytes is not installed (pip install bitsandbytes)"}
    return {"4-bit (bitsandbytes)": "yes"}


def print_info(console: Console | None = None) -> None:
    """Print everything as one table."""
    console = console or terminal()
    table = Table(show_header=False, box=None, pad_edge=False)
    sections = {"versions": versions(), "devices": devices(), "quantisation": quantisation()}
    auto = resolve_backend("auto")
    sections["backends"] = {
        name: (f"no: {reason}" if reason else "yes" + (", chosen by auto" if name == auto else ""))
        for name, reason in backends().items()
    }
    for title, rows in sections.items():
        table.add_row(f"[bold]{title}[/bold]", "")
        for name, value in rows.items():
            table.add_row(f"  {name}", markup(value))
    console.print(table)
