"""The head's fused product, compiled for every GPU generation with the tiles of the table: no spills, tensor cores,
asynchronous copies, shared memory and residency as planned.

`PYTHONPATH=tests python tests/device_kernels/test_head_gemm_compile.py` prints what the machine code of every variant
holds as JSON.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from cubins import ARCHITECTURES, compile_kernel, measure, printed_by

from fastdpo_kernels.linear_logprob.tiles import TILES

#: Shared memory of a multiprocessor and the most of it that a block may have, in KiB; each block takes one more.
SHARED = {80: (164, 163), 86: (100, 99), 89: (100, 99), 90: (228, 227), 100: (228, 227), 120: (100, 99)}
#: Tensor-core instruction of each generation.
PRODUCT = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
#: Blocks of the plain tile on a multiprocessor.
RESIDENT = {80: 1, 86: 2, 89: 2, 90: 1, 100: 1, 120: 2}

PASSES = ("policy", "reference")
#: case → (variant, dtype of operands, with a bias, with a softcap, hidden size a multiple of the depth).
KINDS = {
    "plain": ("plain", "bf16", False, False, True),
    "ragged H": ("plain", "bf16", False, False, False),
    "fp16": ("plain", "fp16", False, False, True),
    "bias": ("adjusted", "bf16", True, False, True),
    "softcap": ("adjusted", "bf16", False, True, True),
    "both": ("adjusted", "bf16", True, True, False),
    "tf32": ("tf32", "fp32", False, False, True),
    "tf32, both": ("tf32", "fp32", True, True, False),
}
CASES = [(kind, way) for kind, way in itertools.product(KINDS, PASSES) if (kind, way) != ("fp16", "policy")]


def compile_case(kind: str, way: str, architecture: int) -> dict[str, int]:
    from fastdpo_kernels.linear_logprob.gemm import _head_gemm_kernel

    variant, dtype, biased, capped, even = KINDS[kind]
    tile = TILES[architecture, variant]
    constants: dict[str, Any] = {
        "CAPPED": capped,
        "PRECISION": "tf32" if variant == "tf32" else "ieee",
        "UPCAST": False,
        "UNIT": 4 if variant == "tf32" else 8,
        "EVEN_K": even,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.depth,
        "GROUP_M": tile.group,
    }
    if not biased:
        constants["bias_ptr"] = None
    if way == "reference":
        constants |= dict.fromkeys(("exps_ptr", "estimate_ptr", "flags_ptr"))
    types = {
        **dict.fromkeys(("hidden_ptr", "weight_ptr", "bias_ptr", "exps_ptr"), f"*{dtype}"),
        **dict.fromkeys(("in_scale", "out_scale", "lift_limit"), "fp32"),
        "targets_ptr": "*i64",
        "flags_ptr": "*i32",
    }
    return measure(
        compile_kernel(
            _head_gemm_kernel,
            constants,
            types,
            architecture,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    )


def name_of(kind: str, way: str, architecture: int) -> str:
    return f"{kind}, {way}, sm_{architecture}"


def compile_all() -> dict[str, dict[str, int]]:
    return {
        name_of(*case, architecture): compile_case(*case, architecture)
        for case in CASES
        for architecture in ARCHITECTURES
    }


def resident_blocks(registers: int, warps: int, shared: int, architecture: int) -> int:
    """Blocks that fit on a multiprocessor: 65,536 registers, given to warps 256 at a time; shared memory."""
    per_warp = -(-registers * 32 // 256) * 256
    return min(65536 // (per_warp * warps), SHARED[architecture][0] * 1024 // (shared + 1024))


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, int]]:
    return printed_by(__file__)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("kind", "way"), CASES, ids=lambda part: part)
def test_products_stay_within_their_budgets(
    found: dict[str, dict[str, int]], kind: str, way: str, architecture: int
) -> None:
    code = found[name_of(kind, way, architecture)]
    variant = KINDS[kind][0]
    tile = TILES[architecture, variant]
    assert code["spilled"] == 0, code
    assert code[PRODUCT[architecture]] > 0, code
    assert sum(code[each] for each in set(PRODUCT.values()) - {PRODUCT[architecture]}) == 0, code
    assert code["shared"] <= SHARED[architecture][1] * 1024, code
    # A stage holds both operands' slices; copies for the product of one are under way while others are computed
    itemsize = 4 if variant == "tf32" else 2
    stage = (tile.rows + tile.columns) * tile.depth * itemsize
    assert code["shared"] >= (tile.stages - 1) * stage, code
    blocks = resident_blocks(code["registers"], tile.warps, code["shared"], architecture)
    assert blocks == RESIDENT[architecture] if variant == "plain" else blocks >= 1, (blocks, code)
    # E leaves in whole vectors
    assert (code["wide_stores"] > 0) == (way == "policy"), code
    # 16 bytes per thread and copy; the first stages are filled before the loop, which copies one more in each turn
    copies = stage // (16 * 32 * tile.warps)
    assert code["LDGSTS"] >= tile.stages * copies, code


if __name__ == "__main__":
    print(json.dumps(compile_all(), indent=1))
