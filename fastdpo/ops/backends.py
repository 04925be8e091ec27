"""Which backends can run here, and why the others cannot."""

from __future__ import annotations

import importlib.util
import os

import torch

#: Environment variable that replaces "auto".
ENVIRONMENT = "FASTDPO_BACKEND"
#: Triton's own: its kernels then run on the host, in NumPy. It must be set before the kernels are imported.
INTERPRET = "TRITON_INTERPRET"
#: The oldest GPUs that the kernels are compiled for.
MIN_CAPABILITY = (8, 0)


def interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter."""
    return os.environ.get(INTERPRET, "").lower() in ("1", "true", "on", "yes", "y")


def backends() -> dict[str, str]:
    """Backend → "" where it can run here, else the reason why it cannot."""
    return {"torch": "", "triton": _why_no_triton()}


def _why_no_triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton, on Linux)"
    if interpreting():
        return ""
    if not torch.cuda.is_available():
        return f"no GPU is visible to torch; {INTERPRET}=1 runs the kernels on the CPU, slowly, for tests"
    capability = torch.cuda.get_device_capability()
    if torch.version.cuda and capability < MIN_CAPABILITY:
        return f"the GPU is sm_{capability[0]}{capability[1]}; the kernels need sm_80 or newer"
    return ""


def check_backend_name(backend: str) -> None:
    """Raise ValueError for a backend that does not exist."""
    if backend not in (accepted := ("auto", *backends())):
        raise ValueError(f"backend={backend!r} is unknown; accepted are {', '.join(accepted)}.")


@torch.compiler.assume_constant_result
def resolve_backend(backend: str = "auto", device: torch.device | None = None, dtype: torch.dtype | None = None) -> str:
    """The backend that serves `backend` for tensors on `device` (default: the GPU if there is one, else the CPU).

    "auto" is `FASTDPO_BACKEND` if that is set, else triton for tensors on a GPU that it supports, else torch. Triton's
    kernels compute in float32, so float64 is torch's.

    Raises:
        ValueError: the backend is unknown, cannot run here, or cannot serve tensors on `device` or of `dtype`.
    """
    reasons = backends()
    on_gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    named = "backend"
    if backend == "auto":
        if ENVIRONMENT not in os.environ:
            return "triton" if on_gpu and dtype != torch.float64 and not reasons["triton"] else "torch"
        backend, named = os.environ[ENVIRONMENT], ENVIRONMENT
    if backend not in reasons:
        raise ValueError(f"{named}={backend!r} is unknown; accepted are auto, {', '.join(reasons)}.")
    if reasons[backend]:
        raise ValueError(f"{named}={backend!r} cannot run here: {reasons[backend]}. Use backend='auto'.")
    if backend == "triton" and not on_gpu and not interpreting():
        raise ValueError(
            f"{named}='triton' cannot serve tensors on {device or 'cpu'}: it needs them on a GPU, or {INTERPRET}=1 set "
            "before the kernels are imported. Use backend='auto'."
        )
    if backend == "triton" and dtype == torch.float64:
        raise ValueError(f"{named}='triton' computes in float32 and cannot serve float64 tensors; use backend='torch'.")
    return backend
