"""Compiles kernels for GPUs that are not here, and reads their machine code. In processes without TRITON_INTERPRET."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Compute capabilities: A100, RTX 30, RTX 40, H100, B200, RTX 50.
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
#: Instructions that are counted: local memory, tensor cores of each generation, asynchronous copies.
_COUNTED = ("LDL", "STL", "HMMA", "HGMMA", "UTCHMMA", "LDGSTS")


def compile_kernel(
    kernel: Any,
    constants: Mapping[str, Any],
    types: Mapping[str, Any],
    architecture: int,
    **options: int,
) -> Any:
    """`kernel` for one architecture.

    Args:
        constants: compile-time arguments; None for a pointer that is left out.
        types: of other arguments, where they are not float32 pointers (`*_ptr`) or 32-bit integers (the rest).
        options: num_warps, num_stages.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {}
    for argument in kernel.arg_names:
        default = "*fp32" if argument.endswith("_ptr") else "i32"
        signature[argument] = "constexpr" if argument in constants else types.get(argument, default)
    values = {
        (kernel.arg_names.index(argument),): value for argument, value in constants.items() if argument in signature
    }
    # As at run time for aligned pointers, and for sizes and strides that are multiples of 16
    aligned = {
        (parameter.num,): [["tt.divisibility", 16]]
        for parameter in kernel.params
        if str(signature[parameter.name]).startswith(("*", "i")) and not parameter.do_not_specialize
    }
    source = ASTSource(kernel, signature, values, aligned)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def measure(compiled: Any) -> dict[str, int]:
    """Of a cubin: registers, bytes of stack with accesses to local memory ("spilled"), shared bytes, 128-bit accesses
    to global memory, and how often the counted instructions stand in the code."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _run(tools / "cuobjdump", "-res-usage", cubin.name)
        code = _run(tools / "nvdisasm", "-c", cubin.name)
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    counts = {name: len(re.findall(rf"\b{name}\b", code)) for name in _COUNTED}
    return {
        "registers": int(numbers["REG"]),
        "spilled": int(numbers["STACK"]) + int(numbers["LOCAL"]) + counts["LDL"] + counts["STL"],
        "shared": compiled.metadata.shared,
        "wide_loads": len(re.findall(r"\bLDG\.\S*128\b", code)),
        "wide_stores": len(re.findall(r"\bSTG\.\S*128\b", code)),
        **counts,
    }


def printed_by(file: str) -> Any:
    """The JSON that a test module prints as a command, in a process whose kernels are compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, file], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
