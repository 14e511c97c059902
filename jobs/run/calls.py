"""How a function is called on many items, wherever there is a core: here, or on a cluster.

Passes over shards are written against `Calls` and do not know where they run. What a call answers
comes to the caller; pieces stay where they are made until another call is given them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rsr.jobs.errors import UsageError
from rsr.jobs.run.probe import told_missing

Item = TypeVar("Item")
Answer = TypeVar("Answer")
Piece = Any
"""A value that a call has made and no caller has seen."""


class Calls(Protocol):
    """Calls a function on items, in any order, anywhere; one that is lost is made again."""

    def __call__(
        self, function: Callable[[Item], Answer], items: Sequence[Item]
    ) -> Iterator[tuple[Item, Answer]]:
        """Each item with its answer, in the order in which they come."""
        ...

    def scatter(
        self,
        function: Callable[..., Any],
        items: Sequence[Any],
        given: Sequence[Sequence[Piece]],
        num_pieces: int,
    ) -> Iterator[tuple[int, Any, list[Piece]]]:
        """Number, answer and pieces of each item, in the order in which they come.

        function: takes an item and the values of the pieces `given` with it, and returns a tuple:
        the answer, then `num_pieces` values.
        """
        ...


class CallsHere:
    """Calls in this process, one after another."""

    def __call__(
        self, function: Callable[[Item], Answer], items: Sequence[Item]
    ) -> Iterator[tuple[Item, Answer]]:
        for item in items:
            yield item, function(item)

    def scatter(
        self,
        function: Callable[..., Any],
        items: Sequence[Any],
        given: Sequence[Sequence[Piece]],
        num_pieces: int,
    ) -> Iterator[tuple[int, Any, list[Piece]]]:
        for number, (item, pieces) in enumerate(zip(items, given, strict=True)):
            answer, *made = function(item, *pieces)
            assert len(made) == num_pieces
            yield number, answer, made


@dataclass(frozen=True, slots=True)
class CallsWhereSeen:
    """Calls that raise `UsageError` on a machine that does not see these files."""

    must_see: tuple[Path, ...]
    calls: Calls

    def __call__(
        self, function: Callable[[Item], Answer], items: Sequence[Item]
    ) -> Iterator[tuple[Item, Answer]]:
        return self.calls(partial(_require_seen, self.must_see, function), items)

    def scatter(
        self,
        function: Callable[..., Any],
        items: Sequence[Any],
        given: Sequence[Sequence[Piece]],
        num_pieces: int,
    ) -> Iterator[tuple[int, Any, list[Piece]]]:
        seeing = partial(_require_seen, self.must_see, function)
        return self.calls.scatter(seeing, items, given, num_pieces)


def answers_in_order(
    calls: Calls, function: Callable[[Item], Answer], items: Sequence[Item]
) -> list[Answer]:
    """The answer of each of these items, which can be keys of a dictionary, in their order."""
    answers = dict(calls(function, items))
    return [answers[item] for item in items]


def _require_seen(
    must_see: tuple[Path, ...], function: Callable[..., Any], item: Any, *pieces: Any
) -> Any:
    if (missing := told_missing(must_see)) is not None:
        raise UsageError(missing)
    return function(item, *pieces)
