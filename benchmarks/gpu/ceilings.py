"""Stage 1: versions, the compiler, and two ceilings: bytes per second of a large copy, FLOP/s of a large product."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement

from benchmarks.gpu.clock import Clock
from benchmarks.gpu.report import NO_BITSANDBYTES, Report, Skipped
from benchmarks.gpu.sizes import Sizes

#: Where the kit is installed, and its manifest there: written by gpu/install.py.
MANIFEST = "kit.json"


def run(report: Report, sizes: Sizes) -> None:
    report.add("environment", **{name: os.environ[name] for name in sorted(os.environ) if name.startswith("FASTDPO_")})
    with report.case("nvcc"):
        report.add("nvcc", version=nvcc())
    with report.case("bitsandbytes"):  # stage 7 cannot run without it, so it is said here, minutes ahead
        report.add("bitsandbytes", version=bitsandbytes())
    with report.case("what the kit's packages ask for"):
        unmet = unmet_requirements()
        report.add("what the kit's packages ask for", unmet=unmet, **({"headline": "; ".join(unmet)} if unmet else {}))
    clock = Clock(sizes.device, sizes.seconds)
    with report.case("copy"):
        times = clock.time(copy(sizes.copy, sizes.device))
        rate = 2 * sizes.copy / times.ms / 1e6  # bytes read and written
        report.add("copy", headline=f"copy {rate:,.0f} GB/s", gigabytes_per_second=rate, **times.figures())
    with report.case("product"):
        n = sizes.square
        a, b = (torch.randn(n, n, device=sizes.device, dtype=sizes.dtype) for _ in range(2))
        out = torch.empty_like(a)
        times = clock.time(lambda: torch.mm(a, b, out=out))
        rate = 2 * n**3 / times.ms / 1e9
        name = f"{n}³ {str(sizes.dtype).removeprefix('torch.')}"
        report.add("product", headline=f"product of {name}: {rate:,.3g} TFLOP/s", teraflops=rate, **times.figures())


def copy(size: int, device: str) -> Callable[[], torch.Tensor]:
    """A copy of `size` bytes of random numbers."""
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    return partial(torch.empty_like(source).copy_, source)


def nvcc() -> str:
    """nvcc's release. Raises Skipped where there is none: nothing that is measured here needs it."""
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        raise Skipped(
            "nvcc is not on the PATH nor in /usr/local/cuda/bin: Triton brings its own assembler, so the kernels run, "
            "and nothing can be built with nvcc. Install CUDA's compiler or set PATH."
        )
    text = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release ([\d.]+)", text)
    return release[1] if release else text.strip().splitlines()[-1]


def bitsandbytes() -> str:
    """Its version. Raises Skipped, with the next step, where it is not there."""
    try:
        return metadata.version("bitsandbytes")
    except metadata.PackageNotFoundError:
        raise Skipped(NO_BITSANDBYTES) from None


def unmet_requirements() -> list[str]:
    """What packages of the installed kit ask of others and do not find, as sentences; they may work all the same."""
    unmet = []
    for folder in filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        manifest = Path(folder) / MANIFEST
        for wheel in json.loads(manifest.read_text(encoding="utf-8"))["wheels"] if manifest.is_file() else ():
            for line in wheel["requires"]:
                needed = Requirement(line)
                if needed.marker is not None and not needed.marker.evaluate():
                    continue
                try:
                    found = metadata.version(needed.name)
                except metadata.PackageNotFoundError:
                    found = "none"
                if found == "none" or not needed.specifier.contains(found, prereleases=True):
                    unmet.append(f"{wheel['name']} {wheel['version']} asks for {line}, and {found} is there")
    return unmet
