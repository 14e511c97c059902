"""Times callables against each other, interleaved, with their peak extra memory.

Knows nothing of what it times. A shared machine is never quiet: rows take turns within every
repetition, so that what disturbs one disturbs all, and ratios mean something where times do not.
"""

import ctypes
import gc
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Measurement:
    """Times over all repetitions, and memory of one call over what was held before it."""

    time_ms_p20: float
    time_ms_p50: float
    time_ms_p80: float
    peak_extra_mib: float


def measure(
    calls: Mapping[str, Callable[[], object]], device: torch.device, num_repetitions: int
) -> dict[str, Measurement]:
    """Measure calls that have been made once before; results are dropped as they are made."""
    memory = {name: _peak_extra_mib(call, device) for name, call in calls.items()}
    times_ms: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(num_repetitions):
        for name, call in calls.items():
            times_ms[name].append(_time_ms(call, device))
    measurements = {}
    for name, times in times_ms.items():
        quantiles = torch.tensor(times, dtype=torch.float64).quantile(
            torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
        )
        p20, p50, p80 = quantiles.tolist()
        measurements[name] = Measurement(p20, p50, p80, memory[name])
    return measurements


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
    return begin.elapsed_time(end)


def _peak_extra_mib(call: Callable[[], object], device: torch.device) -> float:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    # Freed memory that the allocator keeps would hide what the next call needs.
    _release_freed_memory()
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
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def _release_freed_memory() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)
