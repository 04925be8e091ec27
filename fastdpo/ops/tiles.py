"""How the head's (N, V) logits are cut into tiles of rows × vocabulary columns, one of which exists at a time.

A tile is written by a GEMM, read and rewritten by the fold, and read by a second GEMM, so it should stay in the cache;
it should have enough rows for the GEMM to run at full rate, and its slice of the weight should survive in the cache
between the two GEMMs. Measured on 2 cores with 32 MiB of L3, 1,024 rows, fp32, policy forward and backward and
reference over three bare GEMMs of the same shapes, at H = 576, 2048, 896 (V = 49152, 32000, 151936): tiles of
1,024 × 1,024 give 0.98, 1.00, 1.01; 1,024 × 2,048 give 0.99, 1.01, 1.04; in a sketch, 1,024 × 4,096 gave 1.03, 1.06,
1.10 and 512 × 4,096 gave 1.04, 1.12, 1.14. On GPUs nothing was measured.
`FASTDPO_TILE=rowsxcolumns` overrides the plan.
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
#: Columns come in multiples of this: 16-byte aligned rows in every dtype, and whole vectors.
COLUMN_STEP = 256


@dataclass(frozen=True)
class TilePlan:
    """Rows and vocabulary columns of a tile; the last one of either kind may be smaller."""

    rows: int
    columns: int

    def bytes(self, itemsize: int = 4) -> int:
        """Size of the buffer that holds a tile."""
        return self.rows * self.columns * itemsize


def plan_tiles(rows: int, vocab_size: int, hidden_size: int, device: torch.device | None = None) -> TilePlan:
    """The tile for `rows` scored rows of a (vocab_size, hidden_size) head in float32 arithmetic.

    Few rows get a small buffer: columns are bounded by the weight's slice, not stretched to fill the tile's share.

    Raises:
        ValueError: FASTDPO_TILE is set and is not two positive numbers.
    """
    if text := os.environ.get(ENVIRONMENT):
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
        if match is None:
            raise ValueError(f"{ENVIRONMENT}={text!r} must be rows x columns, as in 1024x2048.")
        return TilePlan(min(int(match[1]), max(rows, 1)), min(int(match[2]), vocab_size))
    cache = min(max(_cache_bytes(device or torch.device("cpu")), MIN_CACHE), MAX_CACHE)
    tile_rows = min(max(rows, 1), MAX_ROWS)
    share = min(cache * TILE_SHARE / (4 * tile_rows), cache * WEIGHT_SHARE / (4 * max(hidden_size, 1)))
    columns = min(max(int(share) // COLUMN_STEP, 1) * COLUMN_STEP, MAX_COLUMNS, vocab_size)
    return TilePlan(tile_rows, columns)


@functools.cache
def _cache_bytes(device: torch.device) -> int:
    """The last cache before memory: L2 of a GPU, L3 of a CPU; the lower bound where it is not known."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    if device.type != "cpu" or not size.exists():
        return MIN_CACHE
    kibibytes = re.match(r"(\d+)K", size.read_text())
    return int(kibibytes[1]) * 1024 if kibibytes else MIN_CACHE
