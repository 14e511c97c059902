"""Threads that run torch on one core each and take work as it comes.

An operation that torch spreads over all cores ends when the slowest core is done. Hundreds of them
in a row wait hundreds of times for a core that another program uses as well. Here a thread takes
the next piece of work when it is done with the last one, so that such a core gets fewer pieces.
Knows nothing of what is computed.
"""

import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")


def share_out(pieces: Iterable[T], start: Callable[[], Callable[[T], None]]) -> None:
    """Have every piece worked on by one of `torch.get_num_threads()` threads.

    `start` is called in each thread; what it returns is called with one piece after another. Which
    thread gets which piece differs from call to call, so results must not depend on it. An
    exception is raised here as soon as no thread works any more.
    """
    queue = deque(pieces)
    num_threads = torch.get_num_threads()
    is_inference = torch.is_inference_mode_enabled()

    def work() -> None:
        # Both modes are a thread's own.
        with torch.inference_mode(is_inference), torch.no_grad():
            work_on = start()
            while queue:
                try:
                    piece = queue.popleft()
                except IndexError:  # another thread was faster
                    return
                work_on(piece)

    if num_threads == 1:
        work()
        return
    pool = _pool(num_threads, _allowed_cpus())
    futures = [pool.submit(work) for _ in range(min(num_threads, len(queue)))]
    try:
        for future in futures:
            future.result()
    finally:
        queue.clear()
        wait(futures)


@functools.cache
def _pool(num_threads: int, callers_cpus: frozenset[int]) -> ThreadPoolExecutor:
    """Threads in which a torch operation uses one core; in all others it uses as many as before."""
    cpus = _cpus_of_team(num_threads, callers_cpus)
    pool = ThreadPoolExecutor(num_threads, "rsr-cores")
    all_started = threading.Barrier(num_threads)

    def begin() -> None:
        if cpus != callers_cpus:
            os.sched_setaffinity(0, cpus)
        torch.get_num_threads()  # has torch meet this thread, which would undo the next line later
        torch.set_num_threads(1)
        all_started.wait()

    for future in [pool.submit(begin) for _ in range(num_threads)]:
        future.result()
    # The number is each thread's own, but threads that torch has yet to meet begin with the last
    # one that was set anywhere.
    torch.set_num_threads(num_threads)
    return pool


# A fork has none of its parent's threads.
os.register_at_fork(after_in_child=_pool.cache_clear)


def _allowed_cpus() -> frozenset[int]:
    """Cores that the calling thread may run on; empty where the system does not say."""
    return frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()


def _cpus_of_team(num_threads: int, callers_cpus: frozenset[int]) -> frozenset[int]:
    """Cores for `num_threads` threads: the caller's, or those that OpenMP's threads are bound to.

    OpenMP binds each thread to a core of its own where it is told to, as vLLM does on a CPU. The
    caller is then one of them, and a thread that it starts would have to share its core.
    """
    if len(callers_cpus) >= num_threads or not callers_cpus:
        return callers_cpus
    torch.ones(1 << 20).add_(1)  # starts OpenMP's threads, if nothing has yet
    masks = [
        frozenset(os.sched_getaffinity(int(task.name)))
        for task in Path("/proc/self/task").iterdir()
    ]
    # Threads that are bound no less than the caller is; others belong to somebody else.
    return frozenset().union(*(mask for mask in masks if len(mask) <= len(callers_cpus)))
