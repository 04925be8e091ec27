"""How the head's (N, V) logits are cut: tiles of the separate fold, and chunks of the fused product.

The separate fold has one tile of rows × vocabulary columns at a time, which a GEMM writes, the fold reads and rewrites,
and a second GEMM reads. On a CPU the tile should stay in the cache, have enough rows for the GEMM to run at full rate,
and its slice of the weight should survive in the cache between the two GEMMs. Measured on 2 cores with 32 MiB of L3,
1,024 rows, fp32, policy forward and backward and reference over three bare GEMMs of the same shapes, at H = 576, 2048,
896 (V = 49152, 32000, 151936): tiles of 1,024 × 1,024 give 0.98, 1.00, 1.01; 1,024 × 2,048 give 0.99, 1.01, 1.04; in a
sketch, 1,024 × 4,096 gave 1.03, 1.06, 1.10 and 512 × 4,096 gave 1.04, 1.12, 1.14. On a GPU the cache decides nothing
and launches do (an estimated 55 to 80 µs of host per tile): tiles are as large as workspace and a program's
registers allow. The fused product (`fused_head`) has no tiles in memory: there a chunk is what E holds.

Rows are cut into equal parts: 1,025 are 513 + 512, as a part of one row costs a sweep over the vocabulary.
`FASTDPO_TILE=rowsxcolumns` overrides the separate fold's plan.
"""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

#: Environment variable that overrides the plan, as in "1024x2048".
ENVIRONMENT = "FASTDPO_TILE"
#: More rows than this do not make a GEMM faster.
MAX_ROWS = 1024
#: A tile takes this part of the cache, and so does its slice of the weight.
TILE_SHARE, WEIGHT_SHARE = 1 / 8, 1 / 2
#: Bounds of the cache that is planned for. Above, larger tiles gain nothing; below, columns would get too few.
MIN_CACHE, MAX_CACHE = 16 * 2**20, 32 * 2**20
#: Wider tiles gain nothing: 16, 128 and 300 rows at H = 576 take 0.84, 0.91 and 0.95 of the bare GEMMs' time with 2,048
#: columns, 1.04, 1.01 and 1.01 with 7,168. (A Triton program holds up to 8,192 in registers.)
MAX_COLUMNS = 2048
#: Columns come in multiples of this: 16-byte aligned rows in every dtype, whole vectors, whole tiles of fused products.
COLUMN_STEP = 256
#: On a GPU: rows by capability, where the fastest GEMMs want more of them to hide a launch, and columns that a Triton
#: program holds in registers. Estimated from launches, never timed on a card.
GPU_ROWS, GPU_ROWS_OLDER, GPU_COLUMNS, GPU_LARGE = 8192, 4096, 8192, ((9, 0), (12, 0))
#: Bytes that a call may take for a tile, or for E: by default, and at least.
WORKSPACE, MIN_WORKSPACE = 256 * 2**20, 64 * 2**10
#: Rows of a fused product: with the gradient, where more would make chunks of E narrow; without, where only partial
#: sums grow with them.
FUSED_ROWS, FUSED_ROWS_WITHOUT_GRADIENT = 8192, 32768
#: Rows whose int32 or float32 take a multiple of 16 bytes, and those of any other type too.
ROW_STEP = 16
#: Columns of the narrowest tile in the table of fused products, for an upper bound of their partial sums.
NARROWEST_TILE = 128


@dataclass(frozen=True)
class TilePlan:
    """Rows and vocabulary columns of a tile; the last one of either kind may be smaller."""

    rows: int
    columns: int

    def bytes(self, itemsize: int = 4) -> int:
        """Size of the buffer that holds a tile."""
        return self.rows * self.columns * itemsize


@dataclass(frozen=True)
class FusedPlan:
    """Rows of a fused product, and columns of the chunks of E, where there is one."""

    rows: int
    columns: int

    def chunks(self, vocab_size: int) -> int:
        """How often the vocabulary is gone on with."""
        return -(-vocab_size // self.columns)

    def bytes(self, vocab_size: int, hidden_size: int, itemsize: int, *, unit_gradient: bool) -> int:
        """Upper bound of what `fused_head` holds beside inputs and outputs."""
        partials = 8 * self.rows * -(-vocab_size // NARROWEST_TILE)
        exps = self.rows * self.columns * itemsize + 4 * self.rows * hidden_size if unit_gradient else 0
        return partials + exps + 16 * self.rows + 4096


def plan_tiles(
    rows: int,
    vocab_size: int,
    hidden_size: int,
    device: torch.device | None = None,
    *,
    itemsize: int = 4,
    workspace: int = WORKSPACE,
) -> TilePlan:
    """The tile of the separate fold for `rows` scored rows of a (vocab_size, hidden_size) head in float32 arithmetic.

    Few rows get a small buffer: columns are bounded by the weight's slice, not stretched to fill the tile's share.

    Args:
        itemsize: of the GEMMs' operands. On a GPU a tile of 16-bit operands is copied into them.
        workspace: bytes that a GPU's tile and its copy may take.

    Raises:
        ValueError: FASTDPO_TILE is set and is not two positive numbers.
    """
    if text := os.environ.get(ENVIRONMENT):
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
        if match is None:
            raise ValueError(f"{ENVIRONMENT}={text!r} must be rows x columns, as in 1024x2048.")
        return TilePlan(min(int(match[1]), max(rows, 1)), min(int(match[2]), vocab_size))
    if device is not None and device.type == "cuda":
        newer = GPU_LARGE[0] <= torch.cuda.get_device_capability(device) < GPU_LARGE[1]
        return plan_gpu_tiles(rows, vocab_size, newer=newer, itemsize=itemsize, workspace=workspace)
    cache = min(max(_cache_bytes(), MIN_CACHE), MAX_CACHE)
    tile_rows = balanced(rows, MAX_ROWS)
    share = min(cache * TILE_SHARE / (4 * tile_rows), cache * WEIGHT_SHARE / (4 * max(hidden_size, 1)))
    return TilePlan(tile_rows, min(_whole_steps(share), MAX_COLUMNS, vocab_size))


def plan_gpu_tiles(rows: int, vocab_size: int, *, newer: bool, itemsize: int, workspace: int) -> TilePlan:
    """`plan_tiles` on a GPU. newer: whether its GEMMs want the most rows."""
    per_element = 4 if itemsize == 4 else 4 + itemsize
    most = min(GPU_ROWS if newer else GPU_ROWS_OLDER, workspace // (COLUMN_STEP * per_element))
    tile_rows = balanced(rows, max(1, most))
    return TilePlan(tile_rows, min(_whole_steps(workspace / (tile_rows * per_element)), GPU_COLUMNS, vocab_size))


def plan_fused(rows: int, vocab_size: int, itemsize: int, workspace: int, *, unit_gradient: bool) -> FusedPlan:
    """The chunks of a fused product for `rows` scored rows: E within `workspace` bytes, all chunks alike.

    It depends on nothing but its arguments, so that a resumed run adds up in the same order.
    """
    if not unit_gradient:
        return FusedPlan(_aligned(rows, FUSED_ROWS_WITHOUT_GRADIENT), vocab_size)
    part = _aligned(rows, max(1, min(FUSED_ROWS, workspace // (COLUMN_STEP * itemsize))))
    widest = min(_whole_steps(workspace / (part * itemsize)), -(-vocab_size // COLUMN_STEP) * COLUMN_STEP)
    chunks = -(-vocab_size // widest)
    return FusedPlan(part, -(-vocab_size // (chunks * COLUMN_STEP)) * COLUMN_STEP)


def balanced(rows: int, most: int) -> int:
    """The size of equal parts of at most `most` rows; the last one may be smaller."""
    rows = max(rows, 1)
    return -(-rows // -(-rows // most))


def _aligned(rows: int, most: int) -> int:
    """`balanced`, but parts begin at multiples of ROW_STEP: elsewhere Triton would compile every kernel once more."""
    part = balanced(rows, most)
    return part if part >= rows else min(-(-part // ROW_STEP) * ROW_STEP, most)


def _whole_steps(columns: float) -> int:
    return max(int(columns) // COLUMN_STEP, 1) * COLUMN_STEP


@functools.cache
def _cache_bytes() -> int:
    """The last cache before memory, a CPU's L3; the lower bound where it is not known."""
    size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    if not size.exists():
        return MIN_CACHE
    kibibytes = re.match(r"(\d+)K", size.read_text())
    return int(kibibytes[1]) * 1024 if kibibytes else MIN_CACHE
