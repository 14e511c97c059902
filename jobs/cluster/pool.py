"""The workers as Ray sees them: actors that start, answer and die.

Turns Ray's many errors into the few causes that `dispatcher.py` knows.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import (
    ActorUnavailableError,
    NodeDiedError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
)

from rsr.jobs.cluster.answers import Answer, Lost, Placed, Reply
from rsr.jobs.cluster.dispatcher import PoolEndedError
from rsr.jobs.cluster.job import UnitJob
from rsr.jobs.cluster.session import Room
from rsr.jobs.cluster.vitals import RayEndedError, Vitals
from rsr.jobs.cluster.work import Task
from rsr.jobs.cluster.worker import Worker
from rsr.jobs.run.events import Cause, Tally


def hire(room: Room) -> ActorHandle:
    """Ask Ray for a worker's process; returns at once, whether or not there is room yet."""
    return ray.remote(Worker).options(**room.resources).remote()


@dataclass(frozen=True, slots=True)
class _Call:
    """What a reference stands for. max_num_batched_tokens: to load with, once introduced."""

    worker: int
    task: Task | None = None
    max_num_batched_tokens: int | None = None


class RayPool:
    """A `Pool` of Ray actors."""

    def __init__(
        self,
        job: UnitJob[Tally],
        room: Room,
        first: ActorHandle | None = None,
        *,
        must_see: tuple[Path, ...] = (),
        verbose: bool = False,
    ) -> None:
        """first: a worker hired before the job was known. must_see, verbose: see `Worker`."""
        self._introduction = (ray.put(job), must_see, verbose)
        self._room = room
        self._vitals = Vitals()
        self._first = first
        self._has_ended = False
        self._actors: dict[int, ActorHandle] = {}
        self._calls: dict[Any, _Call] = {}

    @property
    def num_places(self) -> int:
        return self._room.num_places

    @property
    def is_answering(self) -> bool:
        return self._vitals.is_answering()

    def start(self, worker: int, max_num_batched_tokens: int | None) -> None:
        actor = self._actors[worker] = self._hire(worker)
        self._calls[actor.introduce.remote(*self._introduction)] = _Call(
            worker, max_num_batched_tokens=max_num_batched_tokens
        )

    def _hire(self, _worker: int) -> ActorHandle:
        first, self._first = self._first, None
        return first or hire(self._room)

    def send(self, worker: int, task: Task) -> None:
        self._calls[self._actors[worker].do.remote(task)] = _Call(worker, task)

    def kill(self, worker: int) -> None:
        self._calls = {ref: call for ref, call in self._calls.items() if call.worker != worker}
        actor = self._actors.pop(worker)
        if not self._has_ended:
            ray.kill(actor)

    def wait(self, seconds: float) -> list[Reply]:
        try:
            self._vitals.check()
        except RayEndedError as error:
            self._has_ended = True
            raise PoolEndedError(str(error)) from error
        references = list(self._calls)
        if not references:
            time.sleep(seconds)
            return []
        done, _ = ray.wait(references, num_returns=1, timeout=seconds)
        if done:
            done, _ = ray.wait(references, num_returns=len(references), timeout=0)
        return [self._reply(reference, self._calls.pop(reference)) for reference in done]

    def _reply(self, reference: Any, call: _Call) -> Reply:
        try:
            answer: Answer = ray.get(reference)
        except RayError as error:
            answer = Lost(cause=_cause(error), reason=_reason(error))
        if isinstance(answer, Placed):
            loading = self._actors[call.worker].load.remote(call.max_num_batched_tokens)
            self._calls[loading] = _Call(call.worker)
        return Reply(call.worker, call.task, answer)


def _cause(error: RayError) -> Cause:
    """A dead worker has many names."""
    text = str(error)
    if isinstance(error, OutOfMemoryError) or "running low on memory" in text:
        return Cause.MEMORY
    if isinstance(error, NodeDiedError) or "node has died" in text or _is_preempted(error):
        return Cause.NODE
    return Cause.CRASH


def _is_preempted(error: RayError) -> bool:
    return bool(getattr(error, "preempted", False))


def _reason(error: RayError) -> str:
    """The telling line of Ray's explanation, which begins with ids and ends with advice."""
    if isinstance(error, ActorUnavailableError):
        return "it does not answer"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, RayTaskError):
        # A traceback: the modules that a worker's machine lacks, say, are in its last line.
        return lines[-1]
    telling = [line for line in lines if line.startswith("The actor is dead because")]
    line = (telling or lines or [repr(error)])[0]
    return line.split(" Some common causes")[0].removeprefix("The actor is dead because ")
