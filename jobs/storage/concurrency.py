"""Many files at once: an object store answers slowly, and answers many at a time."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

FILES_AT_A_TIME = 8


@contextmanager
def in_parallel(function: Callable[[T], R], items: Iterable[T]) -> Iterator[Iterator[R]]:
    """`map`, several at a time, in the order of `items`.

    When the block ends, early or not, calls that have not begun are dropped and none is left
    running.
    """
    pool = ThreadPoolExecutor(FILES_AT_A_TIME)
    try:
        yield pool.map(function, items)
    finally:
        pool.shutdown(cancel_futures=True)
