"""One function called on many items, anywhere in a Ray cluster: for passes that only look.

A call may be made again, on another machine, when its worker or node is lost: what it does must be
a function of its item, or safe to do twice. Files that a call writes are the caller's to vouch for.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from rsr.jobs.cluster.address import cluster_to_join
from rsr.jobs.cluster.session import ray_session
from rsr.jobs.cluster.token import show_token_where_wanted
from rsr.jobs.cluster.vitals import RayEndedError, Vitals
from rsr.jobs.errors import ShardsFailed, first_line
from rsr.jobs.interrupt import StopRequest

WAIT_SECONDS = 0.2
"""Most seconds between two checks whether the user asked to stop."""
CALLS_PER_CPU = 2
"""One runs and one waits; more would only hold their answers."""

MAX_RETRIES = 3
"""Retries of a call whose worker or node is lost."""

LATE_FACTOR = 20
MIN_LATE_SECONDS = 120.0
"""A call is late after that many times what the longest has taken, and at least so long. Then it is
made once more beside, for its worker may be frozen."""

MOST_SECONDS = 3600.0
"""Until a call is late where none has answered yet, and until one that was made twice is given up:
a cluster may be busy with other work, or wait for machines."""

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class CallsLost(ShardsFailed):
    """One call took its worker with it as often as it was made, or Ray is gone; the text says."""


@dataclass(slots=True)
class _Call:
    """A call that has not answered. others: its other references. is_second: whether the call of
    this number was made before, and was late.
    """

    number: int
    others: list[ray.ObjectRef]
    is_second: bool = False
    began_s: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Since it was made: waiting for a core counts."""
        return time.monotonic() - self.began_s


@contextmanager
def calls_on_cluster(address: str, stop: StopRequest) -> Iterator["ClusterCalls"]:
    """Join the cluster at `address`, or start Ray here; leave or end it after.

    Raises `UsageError` if no cluster answers.
    """
    if joined := cluster_to_join(address):
        show_token_where_wanted(joined)
    # Pieces of parts go through its memory: as much of it as Ray takes by itself.
    with ray_session(address, verbose=False, object_store_bytes=None):
        yield ClusterCalls(stop)


class ClusterCalls:
    """The calls of one run; a call takes one CPU."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop
        self._vitals = Vitals()
        self._num_cpus = 1

    def __call__(
        self, function: Callable[[Item], Answer], items: Sequence[Item]
    ) -> Iterator[tuple[Item, Answer]]:
        """Each item with its answer, in the order in which they come.

        Raises what the function raises; `CallsLost` if a call's worker is lost each time, as of a
        process that takes more memory than there is, or if the cluster's head is gone;
        `Interrupted` when told to stop.
        """
        remote = ray.remote(_apply).options(num_cpus=1, max_retries=MAX_RETRIES)
        shared = ray.put(function)
        for number, answer, _ in self._run(items, lambda n: [remote.remote(shared, items[n])]):
            yield items[number], answer

    def scatter(
        self,
        function: Callable[..., Any],
        items: Sequence[Any],
        given: Sequence[Sequence[ray.ObjectRef]],
        num_pieces: int,
    ) -> Iterator[tuple[int, Any, list[ray.ObjectRef]]]:
        """Number, answer and pieces of each item, in the order in which they come; raises as above.

        function: takes an item and the values of its `given` pieces; returns a tuple of the answer
        and `num_pieces` pieces. These stay in Ray's object store until the last reference is gone;
        Ray makes those of a lost machine again, and puts on disks what does not fit its memory.
        """
        remote = ray.remote(_apply).options(
            num_cpus=1, max_retries=MAX_RETRIES, num_returns=1 + num_pieces
        )
        shared = ray.put(function)

        def start(number: int) -> list[ray.ObjectRef]:
            made = remote.remote(shared, items[number], *given[number])
            # Of one value Ray takes the tuple itself for it.
            return [made] if not num_pieces else list(made)

        for number, answer, pieces in self._run(items, start):
            yield number, answer if num_pieces else answer[0], pieces

    def _run(
        self, items: Sequence[Any], start: Callable[[int], list[ray.ObjectRef]]
    ) -> Iterator[tuple[int, Any, list[ray.ObjectRef]]]:
        """Number of each item, with the value of the first reference of its call, and the others.

        start: makes the call of that number. Calls that are left running when an error ends the
        run end with the session: Ray ends the driver's process where it cancels a call whose
        answer comes in the same moment ("Tried to complete task that was not pending").
        """
        waiting = iter(range(len(items)))
        running: dict[ray.ObjectRef, _Call] = {}
        longest_s = 0.0

        def make(number: int, *, is_second: bool = False) -> None:
            first, *others = start(number)
            running[first] = _Call(number, others, is_second)

        try:
            while True:
                room = self._room()
                while len(running) < room and (number := next(waiting, None)) is not None:
                    make(number)
                if not running:
                    return
                done, _ = ray.wait(list(running), num_returns=1, timeout=WAIT_SECONDS)
                self._stop.check()
                for reference in done:
                    call = running.pop(reference)
                    answer = self._answer(reference, items[call.number])
                    longest_s = max(longest_s, call.seconds)
                    # One that was late may still answer; nobody waits for it.
                    for other in [r for r, c in running.items() if c.number == call.number]:
                        del running[other]
                    yield call.number, answer, call.others
                if not done:
                    for call in _late(list(running.values()), longest_s, items):
                        make(call.number, is_second=True)
        except RayEndedError as error:
            raise CallsLost(str(error)) from error

    def _answer(self, reference: ray.ObjectRef, item: Any) -> Any:
        try:
            return _answer(reference)
        except RayError as error:
            raise CallsLost(
                f"a worker was lost {MAX_RETRIES + 1} times over {_told(item)}: {first_line(error)}"
            ) from error

    def _room(self) -> int:
        """How many calls the cluster is given at a time."""
        self._vitals.check()
        if self._vitals.is_answering():
            self._num_cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
        return CALLS_PER_CPU * self._num_cpus


def _late(calls: Sequence[_Call], longest_s: float, items: Sequence[Any]) -> list[_Call]:
    """The calls that are to be made once more; raises `CallsLost` if one that was is given up.

    calls: none of which has an answer.
    """
    patience_s = max(LATE_FACTOR * longest_s, MIN_LATE_SECONDS) if longest_s else MOST_SECONDS
    made_again = [call for call in calls if call.is_second]
    for call in made_again:
        if call.seconds > max(patience_s, MOST_SECONDS):
            raise CallsLost(
                f"{_told(items[call.number])}: no worker has answered for {call.seconds:,.0f} s, "
                "nor has the one that was asked before: the cluster is busy or frozen, or its "
                "storage hangs"
            )
    numbers = {call.number for call in made_again}
    return [c for c in calls if c.seconds > patience_s and c.number not in numbers]


def _told(item: Any) -> str:
    return str(getattr(item, "path", item))


def _apply(function: Callable[..., Any], item: Any, *pieces: Any) -> Any:
    return function(item, *pieces)


def _answer(reference: ray.ObjectRef) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from error
