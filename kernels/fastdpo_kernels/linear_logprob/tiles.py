"""Tiles of the head's fused product: one table, searched only when asked.

A tile is chosen by the card's capability and by what the epilogue must hold beside the sums (the variant):
    plain      16-bit operands, the logits taken as they are or scaled
    adjusted   16-bit operands with a bias or a softcap, whose tanh is kept too: half as wide
    tf32       float32 operands, which a caller has allowed to be rounded to TF32
Every entry compiles without a spill, and leaves room for the stated CTAs per SM
(tests/device_kernels/test_head_gemm_compile.py). None was ever timed on a card. `FASTDPO_TUNE_HEAD=1`
times the candidates on the first product of each variant, prints the line that belongs into TILES, and takes it for the
rest of the process: runs are bitwise equal only with the same tiles.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

#: Set to 1, the tiles are searched.
ENVIRONMENT = "FASTDPO_TUNE_HEAD"


@dataclass(frozen=True)
class Tile:
    """Rows × columns × depth of a program's products, warps, stages of its copies, row tiles per group of programs."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int = 8


#: (capability, variant) → tile. A card takes the newest entry that is not newer than itself.
TILES = {
    (80, "plain"): Tile(128, 256, 64, 8, 3),
    (86, "plain"): Tile(128, 128, 32, 4, 4),
    (89, "plain"): Tile(128, 128, 32, 4, 4),
    (90, "plain"): Tile(128, 256, 64, 8, 4),
    (100, "plain"): Tile(128, 256, 64, 8, 4),
    (120, "plain"): Tile(128, 128, 32, 4, 4),
    (80, "adjusted"): Tile(128, 128, 64, 8, 3),
    (86, "adjusted"): Tile(128, 128, 32, 8, 4),
    (89, "adjusted"): Tile(128, 128, 32, 8, 4),
    (90, "adjusted"): Tile(128, 128, 64, 8, 4),
    (100, "adjusted"): Tile(128, 128, 64, 8, 4),
    (120, "adjusted"): Tile(128, 128, 32, 8, 4),
    (80, "tf32"): Tile(128, 128, 32, 8, 3),
    (86, "tf32"): Tile(128, 128, 16, 8, 4),
    (89, "tf32"): Tile(128, 128, 16, 8, 4),
    (90, "tf32"): Tile(128, 128, 32, 8, 4),
    (100, "tf32"): Tile(128, 128, 32, 8, 4),
    (120, "tf32"): Tile(128, 128, 16, 8, 4),
}
#: Where Triton interprets: small, so that small shapes have several.
INTERPRETED = Tile(32, 64, 32, 4, 1, 2)
#: What a search tries.
CANDIDATES = (
    *(Tile(128, 256, 64, 8, stages) for stages in (3, 4)),
    *(Tile(256, 128, 64, 8, stages) for stages in (3, 4)),
    *(Tile(128, 128, 64, warps, stages) for warps in (4, 8) for stages in (3, 4)),
    *(Tile(128, 128, 32, warps, stages) for warps in (4, 8) for stages in (3, 4, 5)),
    *(Tile(128, 128, 16, 8, stages) for stages in (3, 4)),
    *(Tile(64, 256, 64, 8, stages) for stages in (3, 4)),
    *(Tile(128, 256, 64, 8, 4, group) for group in (4, 16, 32)),
)
_found: dict[tuple[int, str], Tile] = {}


def variant(dtype: torch.dtype, *, adjusted: bool) -> str:
    """The variant for operands of `dtype`. adjusted: whether there is a bias or a softcap."""
    return "tf32" if dtype == torch.float32 else "adjusted" if adjusted else "plain"


def tile_for(device: torch.device, kind: str, run: Callable[[Tile], None] | None) -> Tile:
    """The tile for a card and a variant. `run` launches the product with a tile, for a search; None: no search here."""
    if device.type != "cuda":
        return INTERPRETED
    major, minor = torch.cuda.get_device_capability(device)
    key = (10 * major + minor, kind)
    choice = os.environ.get(ENVIRONMENT, "")
    if choice not in ("", "0", "1"):
        raise ValueError(f"{ENVIRONMENT}={choice!r} is unknown; accepted are 1, 0, or nothing.")
    if choice == "1" and key not in _found and run is not None:
        _found[key] = search(key, run, _milliseconds)
    return _found.get(key, listed(key)) if choice == "1" else listed(key)


def listed(key: tuple[int, str]) -> Tile:
    """The entry of the newest capability that is not newer than `key`'s."""
    known = [capability for capability, kind in TILES if kind == key[1] and capability <= key[0]]
    if not known:
        raise ValueError(f"no tile is known for sm_{key[0]}; the kernels need sm_80 or newer. Use backend='torch'.")
    return TILES[max(known), key[1]]


def search(
    key: tuple[int, str], run: Callable[[Tile], None], milliseconds: Callable[[Callable[[], None]], float]
) -> Tile:
    """The fastest of the candidates and of the table's entry; prints the line for the table.

    Candidates that need more shared memory than the card has, or do not compile, are left out by name. `milliseconds`
    times a function.
    """
    times: dict[Tile, float] = {}
    for tile in dict.fromkeys((listed(key), *CANDIDATES)):
        try:
            times[tile] = milliseconds(lambda tile=tile: run(tile))  # type: ignore[misc]
        except (OutOfResources, CompilationError, PTXASError) as error:
            print(f"    {tile} is left out: {str(error).splitlines()[0]}", file=sys.stderr)
    best = min(times, key=times.__getitem__)
    numbers = f"{best.rows}, {best.columns}, {best.depth}, {best.warps}, {best.stages}"
    group = "" if best.group == Tile.group else f", {best.group}"
    print(
        f'    ({key[0]}, "{key[1]}"): Tile({numbers}{group}),  '
        f"# {times[best]:.3f} ms; the table's {listed(key)}: {times[listed(key)]:.3f} ms",
        file=sys.stderr,
        flush=True,
    )
    return best


def _milliseconds(work: Callable[[], None]) -> float:
    return float(triton.testing.do_bench(work, warmup=20, rep=100, return_mode="median"))
