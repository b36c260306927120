"""glibc malloc tuning for CPU training: keep freed memory."""

import ctypes

# <malloc.h>
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Makes glibc's malloc keep up to 2 GiB of freed memory for the next step; no effect with another malloc.

    Every step on a CPU allocates activations and gradients. By default malloc returns free memory at the end of the
    heap to the system, and the next step takes tens of thousands of page faults to get it back. Setting one threshold
    turns off the automatic adjustment of both, so the mmap threshold is set too, to the maximum of that adjustment.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
