"""Page faults of a training step on a CPU, and how to have fewer of them.

glibc gives every block above a threshold (at most 32 MiB by itself) a mapping of its own and
returns it to the system when it is freed, so that a training step faults in all the pages of its
activations anew. Asked to keep what is freed, it reuses pages that are there already.
"""

import ctypes
import resource
import sys

M_TRIM_THRESHOLD = -1  # glibc's malloc.h
M_MMAP_THRESHOLD = -3
LARGEST = 2**31 - 1  # bytes, what mallopt's int can hold


def keep_freed_pages() -> bool:
    """Ask the C allocator to keep freed memory; False where it cannot be asked.

    The process then holds on to the most it ever used. Blocks above 2 GiB are still mapped.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library than glibc
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST)) and bool(mallopt(M_TRIM_THRESHOLD, LARGEST))


def page_faults() -> int:
    """Minor page faults of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
