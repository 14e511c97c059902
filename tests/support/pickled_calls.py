"""Calls as a cluster makes them, in this process: all is sent, the last item first."""

import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any


def sent(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


class PickledCalls:
    """`rsr.jobs.run.calls.Calls` whose functions, items, pieces and answers are all pickled."""

    def __call__(
        self, function: Callable[[Any], Any], items: Sequence[Any]
    ) -> Iterator[tuple[Any, Any]]:
        for item in reversed(items):
            yield item, sent(sent(function)(sent(item)))

    def scatter(
        self,
        function: Callable[..., Any],
        items: Sequence[Any],
        given: Sequence[Sequence[Any]],
        num_pieces: int,
    ) -> Iterator[tuple[int, Any, list[Any]]]:
        for number in reversed(range(len(items))):
            pieces = [pickle.loads(piece) for piece in given[number]]
            answer, *made = sent(function)(sent(items[number]), *pieces)
            assert len(made) == num_pieces
            yield number, sent(answer), [pickle.dumps(piece) for piece in made]
