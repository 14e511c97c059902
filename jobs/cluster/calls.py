"""One function called on many items, anywhere in a Ray cluster: for passes that only look.

A call may be made again, on another machine, when its worker or node is lost: what it does must be
a function of its item, or safe to do twice. Files that a call writes are the caller's to vouch for.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

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

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class CallsLost(ShardsFailed):
    """One call took its worker with it as often as it was made, or Ray is gone; the text says."""


@contextmanager
def calls_on_cluster(address: str, stop: StopRequest) -> Iterator["ClusterCalls"]:
    """Join the cluster at `address`; leave it after. Raises `UsageError` if none answers."""
    show_token_where_wanted(address)
    with ray_session(address, verbose=False):
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
        running: dict[ray.ObjectRef, tuple[int, list[ray.ObjectRef]]] = {}
        try:
            while True:
                room = self._room()
                while len(running) < room and (number := next(waiting, None)) is not None:
                    first, *others = start(number)
                    running[first] = number, others
                if not running:
                    return
                done, _ = ray.wait(list(running), num_returns=1, timeout=WAIT_SECONDS)
                self._stop.check()
                for reference in done:
                    number, others = running.pop(reference)
                    try:
                        answer = _answer(reference)
                    except RayError as error:
                        what = getattr(items[number], "path", items[number])
                        raise CallsLost(
                            f"a worker was lost {MAX_RETRIES + 1} times over {what}: "
                            f"{first_line(error)}"
                        ) from error
                    yield number, answer, others
        except RayEndedError as error:
            raise CallsLost(str(error)) from error

    def _room(self) -> int:
        """How many calls the cluster is given at a time."""
        self._vitals.check()
        if self._vitals.is_answering():
            self._num_cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
        return CALLS_PER_CPU * self._num_cpus


def _apply(function: Callable[..., Any], item: Any, *pieces: Any) -> Any:
    return function(item, *pieces)


def _answer(reference: ray.ObjectRef) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from error
