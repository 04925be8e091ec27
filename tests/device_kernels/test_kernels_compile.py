"""Every kernel compiles for every GPU generation without a GPU, within budgets: no spills, shared memory, wide loads.

Triton decides when it decorates whether kernels are interpreted, so the compiling happens in one process of its own:
`PYTHONPATH=tests python tests/device_kernels/test_kernels_compile.py` prints what it found as JSON.
Compiled kernels are cached by Triton.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from cubins import ARCHITECTURES, compile_kernel, measure, printed_by

import fastdpo_kernels


@dataclass(frozen=True)
class Spec:
    """One specialisation of a kernel, and what it may cost.

    Attributes:
        kernel: "module:function" in fastdpo_kernels.
        constants: compile-time arguments; None for a pointer that is left out.
        types: of other arguments, where they are not float32 pointers (`*_ptr`) or 32-bit integers (the rest).
        warps: as the launcher chooses them for this block.
        wide_loads, wide_stores: least number of 128-bit accesses to global memory in the code of one thread.
        shared: most bytes of shared memory.
    """

    kernel: str
    constants: Mapping[str, Any]
    types: Mapping[str, Any] = field(default_factory=dict)
    warps: int = 4
    wide_loads: int = 0
    wide_stores: int = 0
    shared: int = 0


HEAD_TYPES = {
    "targets_ptr": "*i64",
    "bias_ptr": "*bf16",
    "best_index_ptr": "*i64",
    "weight_ptr": "*bf16",
    "in_scale": "fp32",
    "out_scale": "fp32",
    "scale": "fp32",
    "threshold": "fp32",
}
NO_STATS = dict.fromkeys(("weighted_sum_ptr", "logit_sum_ptr", "square_sum_ptr", "best_logit_ptr", "best_index_ptr"))
SELECTIVE_TYPES = {"targets_ptr": "*i64", "scale_high": "fp32", "scale_low": "fp32"}

#: With budgets of its own, by tile: test_head_gemm_compile.py.
ELSEWHERE = {"linear_logprob.gemm:_head_gemm_kernel"}

LOSS_TYPES = {
    **dict.fromkeys(("boundaries_ptr", "chosen_lengths_ptr", "rejected_lengths_ptr"), "*i64"),
    **dict.fromkeys(("step_ptr", "step_out_ptr"), "*i64"),
    **dict.fromkeys(("keep_ptr", "keep_out_ptr"), "*i1"),
    **dict.fromkeys(
        ("beta", "alpha", "momentum", "rest", "min_beta", "reward_beta", "epsilon", "tau", "gamma"), "fp32"
    ),
    **dict.fromkeys(("log_right", "log_flipped", "likelihood", "alpha_minus_1"), "fp32"),
    "loss_weights": ("fp32",),
    "seed": "i64",
}
#: The recipe's batch: β planned and the loss taken in one launch, over log-probs per token.
PLANNED = {
    **dict.fromkeys(("rejected_ptr", "ref_rejected_ptr", "beta_ptr", "keep_ptr", "all_margins_ptr")),
    **dict.fromkeys(("pair_weights_ptr", "sft_logps_ptr", "chosen_lengths_ptr", "rejected_lengths_ptr")),
    "LOSSES": ("sigmoid",),
    "INPUTS": ("scores",),
    "SMOOTHED": False,
    "F_DIVERGENCE": "reverse_kl",
    "REFERENCE_GAP": True,
    "MEAN_GAP": False,
    "MEAN": True,
    "BETA_PER_PAIR": False,
    "SCOPE": "batch",
    "VARIANT": "released",
    "TRAINING": True,
}

#: Tiles of float32 with 16-byte aligned rows. A thread holds 16 of their elements, so it loads four times 128 bits.
SPECS = {
    "fold, policy": Spec(
        "linear_logprob.fold:_fold_kernel",
        {"CAPPED": False, "BLOCK": 4096, "bias_ptr": None, **NO_STATS},
        HEAD_TYPES,
        warps=8,
        wide_loads=4,
        wide_stores=4,
        shared=64,
    ),
    "fold, reference": Spec(
        "linear_logprob.fold:_fold_kernel",
        {"CAPPED": False, "BLOCK": 4096, "bias_ptr": None, "probs_ptr": None, **NO_STATS},
        HEAD_TYPES,
        warps=8,
        wide_loads=4,
        shared=64,
    ),
    # Everything at once, at the widest tile
    "fold, all": Spec(
        "linear_logprob.fold:_fold_kernel",
        {"CAPPED": True, "BLOCK": 8192},
        {**HEAD_TYPES, "probs_ptr": "*bf16"},
        warps=16,
        wide_loads=6,
        wide_stores=2,
        shared=64,
    ),
    "rescale": Spec(
        "linear_logprob.unit_gradient:_rescale_rows_kernel", {"BLOCK": 1024}, HEAD_TYPES, wide_loads=2, wide_stores=2
    ),
    "finish": Spec(
        "linear_logprob.unit_gradient:_finish_unit_gradient_kernel",
        {"BLOCK": 1024, "stride_weight_column": 1},  # as Triton specialises the argument for a contiguous weight
        HEAD_TYPES,
        wide_loads=3,
        wide_stores=2,
        shared=4 * 1024,
    ),
    "logit gradient": Spec(
        "linear_logprob.logit_gradient:_logit_gradient_kernel",
        {"CAPPED": True, "BLOCK": 1024, "bias_ptr": None},
        {**HEAD_TYPES, "out_ptr": "*bf16"},
        wide_loads=2,
        wide_stores=1,
        shared=64,
    ),
    "targets' logits": Spec(
        "linear_logprob.gemm:_target_logits_kernel",
        {"CAPPED": True, "BLOCK": 1024, "bias_ptr": None},
        {**HEAD_TYPES, "hidden_ptr": "*bf16", "flags_ptr": "*i32"},
        wide_loads=2,
        shared=64,
    ),
    "merge, policy": Spec(
        "linear_logprob.merge:_merge_kernel",
        {"CAPPED": True, "ROWS": 8, "TILES": 64, "BLOCK": 512},
        {**HEAD_TYPES, "gradient_ptr": "*bf16"},
        warps=8,
        wide_loads=6,
        wide_stores=2,
        shared=1024,
    ),
    "merge, reference": Spec(
        "linear_logprob.merge:_merge_kernel",
        {
            **dict.fromkeys(("estimate_ptr", "accumulator_ptr", "weight_ptr", "gradient_ptr")),
            **{"CAPPED": False, "ROWS": 8, "TILES": 64, "BLOCK": 512},
        },
        HEAD_TYPES,
        warps=8,
        shared=1024,
    ),
    "rescue": Spec(
        "linear_logprob.merge:_rescue_kernel",
        {"CAPPED": True, "TOKENS": 32, "BLOCK": 1024, "bias_ptr": None},
        {**HEAD_TYPES, "hidden_ptr": "*bf16", "gradient_ptr": "*bf16", "flags_ptr": "*i32"},
        warps=16,
        wide_loads=8,
        shared=16 * 1024,
    ),
    "selective": Spec(
        "selective_logprob:_selective_logprob_fwd_kernel",
        {"HAS_IGNORED": True, "BLOCK": 4096, "stride_v": 1},
        {**SELECTIVE_TYPES, "logits_ptr": "*bf16"},
        warps=8,
        wide_loads=2,
        shared=64,
    ),
    "selective, backward": Spec(
        "selective_logprob:_selective_logprob_bwd_kernel",
        {"HAS_IGNORED": True, "BLOCK": 4096, "stride_v": 1, "stride_out_v": 1},
        {**SELECTIVE_TYPES, "logits_ptr": "*bf16", "out_ptr": "*bf16"},
        warps=8,
        wide_loads=2,
        wide_stores=2,
    ),
    "preference loss": Spec(
        "preference_loss.loss:_preference_loss_fwd_kernel",
        {**PLANNED, "BLOCK": 64, "TOKENS": 16},
        LOSS_TYPES,
        shared=8 * 1024,
    ),
    "dynamic beta": Spec(
        "preference_loss.dynamic_beta:_dynamic_beta_kernel",
        {"SCOPE": "instance", "VARIANT": "paper", "TRAINING": True, "BLOCK": 1024},
        LOSS_TYPES,
        warps=8,
        shared=8 * 1024,
    ),
    "top k": Spec(
        "preference_loss.dynamic_beta:_top_k_kernel", {"BLOCK": 1024}, {"out_ptr": "*i1"}, warps=8, shared=8 * 1024
    ),
    "margins": Spec(
        "preference_loss.sequence_logps:_margins_kernel",
        {
            "REFERENCE_GAP": True,
            "MEAN_GAP": False,
            "rejected_ptr": None,
            "ref_rejected_ptr": None,
            "BLOCK": 32,
            "TOKENS": 32,
        },
        LOSS_TYPES,
        shared=4 * 1024,
    ),
    "row sums": Spec(
        "preference_loss.sequence_logps:_row_sums_kernel", {"BLOCK": 32, "TOKENS": 32}, LOSS_TYPES, shared=4 * 1024
    ),
    "row values": Spec(
        "preference_loss.sequence_logps:_expand_rows_kernel", {"BLOCK": 32, "TOKENS": 32}, LOSS_TYPES, shared=4 * 1024
    ),
    "noise": Spec("rng:_noise_kernel", {"GUMBEL": True, "BLOCK": 256}, {"step_ptr": "*i64", "seed": "i64"}),
}


def compile_all() -> dict[str, dict[str, int]]:
    """ "name, architecture" → what the code uses. In a process without TRITON_INTERPRET."""
    found = {}
    for name, spec in SPECS.items():
        module, _, function = spec.kernel.partition(":")
        kernel = getattr(importlib.import_module(f"fastdpo_kernels.{module}"), function)
        for architecture in ARCHITECTURES:
            compiled = compile_kernel(kernel, spec.constants, spec.types, architecture, num_warps=spec.warps)
            found[f"{name}, {architecture}"] = measure(compiled)
    return found


# Tests


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, int]]:
    return printed_by(__file__)


def test_every_kernel_is_listed() -> None:
    kernels = set()
    for module in pkgutil.walk_packages(fastdpo_kernels.__path__, "fastdpo_kernels."):
        for name in vars(importlib.import_module(module.name)):
            if name.startswith("_") and name.endswith("_kernel"):
                kernels.add(f"{module.name.removeprefix('fastdpo_kernels.')}:{name}")
    assert kernels - ELSEWHERE == {spec.kernel for spec in SPECS.values()}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", SPECS)
def test_kernels_stay_within_their_budgets(found: dict[str, dict[str, int]], name: str, architecture: int) -> None:
    spec, code = SPECS[name], found[f"{name}, {architecture}"]
    assert code["spilled"] == 0, code
    assert code["shared"] <= spec.shared, code
    assert code["wide_loads"] >= spec.wide_loads, code
    assert code["wide_stores"] >= spec.wide_stores, code


if __name__ == "__main__":
    print(json.dumps(compile_all(), indent=1))
