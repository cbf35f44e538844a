"""What a training step allocates and frees, it allocates again in the next: the C library is to keep it meanwhile."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's mallopt(3)."""
MB = 1 << 20


def keep_freed_memory() -> None:
    """Let glibc keep memory that is freed, except blocks over 32 MB, the most that it can be told to keep.

    By default it hands much of it back to the kernel, which clears every page before it gives it out again: 300 to 500
    page faults a step of a small ACT, a tenth of its time. Other C libraries have allocators of their own.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, 32 * MB)
    mallopt(M_TRIM_THRESHOLD, 2048 * MB - 1)
