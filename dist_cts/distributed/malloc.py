"""glibc malloc tuning for CPU training: keep freed memory."""

import ctypes

# <malloc.h>
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Makes glibc's malloc keep up to 2 GiB of freed memory for the next step; no effect with another malloc.

    Every step on a CPU allocates activations and gradients. By default malloc returns free memory at the heap's end to
    the system, and the next step takes tens of thousands of page faults to get it back. Setting one threshold freezes
    the other at its initial value, so the size from which an allocation gets a mapping of its own is set too, to the
    value that malloc reaches by itself.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
