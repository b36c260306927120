"""Host memory that a step has freed, for the next step to use."""

import ctypes

# <malloc.h>
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Makes glibc's malloc keep up to 2 GiB of freed memory for the next step; with another malloc it does nothing.

    A step on a CPU allocates activations and gradients anew. As shipped, malloc returns what is free at its heap's end,
    and the step takes tens of thousands of page faults to get it back. The other threshold, from which an allocation is
    a mapping of its own, is the one that malloc ends up at by itself, and would stay where it starts if not set too.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
