"""Memory of the process on the host: told to the C library's allocator, so that what is freed is given back.

glibc maps blocks above a threshold one by one and gives them back when they are freed, but every such free raises the
threshold, up to 32 MiB. Activations then live in the heap, which can only shrink at its end: a training process on a
CPU keeps a multiple of what its tensors ever take at once. A fixed threshold keeps the peak at the tensors' own, and
every block then costs its page faults: a step of SmolLM2-135M took 1.7 times as long with 0.4 of the growth (26.9 s for
15.8 s, 0.85 GiB for 2.12). So it is for runs that state a `memory_limit`.
"""

from __future__ import annotations

import ctypes
import os

#: Bytes that glibc's heap keeps per byte of what comes and goes, where its thresholds are not fixed. Measured once, on
#: three trainings of SmolLM2-135M with 384 tokens (0.9 to 1.1); it differs from run to run.
HEAP_SHARE = 1.0
#: Blocks of this many bytes and more are mapped one by one.
MAPPED_FROM = 64 * 2**10
#: Free bytes at the end of the heap above which it shrinks.
TRIMMED_FROM = 128 * 2**10
#: glibc's names for the two, in malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
#: Where users set glibc's thresholds themselves, theirs stay.
_OWN_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def map_large_blocks() -> bool:
    """Fix glibc's thresholds for this process. False where its user has set them, or where the C library has none."""
    if any(name in os.environ for name in _OWN_SETTINGS):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # no shared C library, or not glibc
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, MAPPED_FROM) and mallopt(_M_TRIM_THRESHOLD, TRIMMED_FROM))
