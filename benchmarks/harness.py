"""Times callables against each other, interleaved, and finds the peak memory of each.

Knows nothing of what it times. A shared machine is never quiet: rows take turns within every
repetition, so that what disturbs one disturbs all, and ratios mean something where times do not.
"""

import ctypes
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Timing:
    """Over all repetitions."""

    time_ms_p20: float
    time_ms_p50: float
    time_ms_p80: float


def time_calls(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    num_repetitions: int,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Timing]:
    """Time calls that have been made once before; results are dropped as they are made.

    tell: is told each round before it begins.
    """
    times_ms: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(num_repetitions):
        tell(f"timing, round {repetition + 1} of {num_repetitions}")
        for name, call in calls.items():
            times_ms[name].append(_time_ms(call, device))
    quantiles = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return {
        name: Timing(*torch.tensor(times, dtype=torch.float64).quantile(quantiles).tolist())
        for name, times in times_ms.items()
    }


def _time_ms(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


@contextmanager
def busy_loops(num_cores: int) -> Iterator[None]:
    """Other programs that use the last of this process's cores meanwhile, one pinned to each."""
    cores = sorted(os.sched_getaffinity(0))[-num_cores:] if num_cores else []
    loops = [subprocess.Popen([sys.executable, "-c", _BUSY_LOOP, str(core)]) for core in cores]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


# Ends with its parent, however that ends.
_BUSY_LOOP = """
import os, sys
os.sched_setaffinity(0, [int(sys.argv[1])])
parent = os.getppid()
while os.getppid() == parent:
    sum(range(100_000))
"""


def keep_no_freed_memory() -> None:
    """Have glibc give back what is freed, at once; best before anything is allocated.

    Kept, it hides what the next call needs, and piles up to what the last one did not.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc's alone
        libc.mallopt(_M_MMAP_THRESHOLD, 128 << 10)


_M_MMAP_THRESHOLD = -3  # malloc.h


def peak_extra_mib(call: Callable[[], object], device: torch.device) -> float:
    """The most that a call, made once before, holds over what was held before it.

    On a CPU to be had right only in a process that began with `keep_no_freed_memory`.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with _ResidentPeak() as resident:
        call()
    return resident.extra_bytes / 2**20


class _ResidentPeak:
    """Samples this process's resident memory a thousand times a second, for want of a counter."""

    def __enter__(self) -> "_ResidentPeak":
        self._before = self._peak = resident_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.001):
            self._peak = max(self._peak, resident_bytes())

    @property
    def extra_bytes(self) -> int:
        return self._peak - self._before


def resident_bytes() -> int:
    """Anonymous memory only: pages of libraries come and go as the kernel pleases."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024
