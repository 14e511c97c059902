"""What a run can say to its user besides a result."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rsr.engine.errors import first_line

__all__ = ["Interrupted", "ShardsFailed", "UsageError", "first_line", "refusing_values"]


@contextmanager
def refusing_values() -> Iterator[None]:
    """What the engine finds wrong with a value is the user's to mend: raises `UsageError`."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


class UsageError(Exception):
    """What was asked cannot be done as asked: one line, exit code 2, nothing written.

    more: lines that show it after that one, if it takes a table.
    """

    def __init__(self, told: str, more: Iterable[str] = ()) -> None:
        super().__init__(told)
        self.more = tuple(more)


class Interrupted(Exception):
    """Stopped from outside before the end: exit code 75, the same command goes on."""


class ShardsFailed(Exception):
    """Some shards could not be written, one line each: exit code 1, the others are kept."""
