"""What a worker answers. One vocabulary for the worker, the pool and the dispatcher.

A worker returns these, and the pool adds whose answer to which task it is. What the dispatcher
makes of them it tells in the words of `run/events.py`.
"""

from dataclasses import dataclass

from rsr.jobs.cluster.work import Task
from rsr.jobs.run.events import Cause, Tally


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A worker's process runs and begins to open the job."""

    node: str
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A worker has opened the job. The other fields are `OpenJob`'s."""

    seconds: float
    max_num_batched_tokens: int | None
    notice: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A task is done. seconds: of `OpenJob.run`, or for writing a shard."""

    summary: Tally
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The worker lives, but its task or its start did not work. reason: one line."""

    cause: Cause
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """The worker is gone, and with it what it had in hand. reason: one line."""

    cause: Cause
    reason: str


Answer = Placed | Ready | Done | Failed | Lost


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, and whose it is. task: what it answers; None if it is about the start."""

    worker: int
    task: Task | None
    answer: Answer
