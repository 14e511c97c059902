"""How this process's C library treats memory that was freed.

Knows glibc's two knobs; does nothing where there is another library.
"""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_NEVER = 2**31 - 1
_SETTINGS = {
    "MALLOC_MMAP_MAX_": (_M_MMAP_MAX, 0),
    "MALLOC_TRIM_THRESHOLD_": (_M_TRIM_THRESHOLD, _NEVER),
}


def keep_freed_memory() -> None:
    """Have glibc keep freed blocks for the next prefill step, here and in child processes.

    As it comes, it gives the megabytes of every activation back to the kernel and gets them again,
    zeroed, page by page: 15 % of a CPU's scoring speed. For processes that open one model: nothing
    is ever given back, so that one that opens several grows by each. Variables that are set have
    their say.
    """
    libc = ctypes.CDLL(None)
    for variable, (option, value) in _SETTINGS.items():
        if variable not in os.environ and hasattr(libc, "mallopt"):
            libc.mallopt(option, value)
            os.environ[variable] = str(value)
