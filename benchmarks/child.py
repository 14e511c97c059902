"""A process of its own for what is measured: its memory is its alone, and goes when it goes."""

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Self, TypeVar

T = TypeVar("T")


class ChildProcess:
    """A process of its own in which functions are called; what they raise is raised here.

    Its standard output goes to standard error: libraries print, and results are printed here.
    It ends when this process does, however that ends: it may hold gigabytes.
    """

    def __init__(self) -> None:
        self._executor = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), initializer=_begin_child
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._executor.shutdown(cancel_futures=True)

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """`function(*arguments)`, which must be picklable, as must be what comes back."""
        return self._executor.submit(function, *arguments).result()


def _begin_child() -> None:
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
