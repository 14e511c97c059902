"""What is left to do, and what becomes of work that failed. Plain data; knows no worker.

Nothing is kept about work that is finished beyond a count of rows per shard, so that the driver
does not grow with the number of units.
"""

import heapq
import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rsr.jobs.cluster.deadlines import unit_bytes
from rsr.jobs.run.events import Cause, Next
from rsr.jobs.shards.shard import Shard, Unit

MAX_ATTEMPTS = 3
"""Attempts at reading a unit's rows, or at writing a unit or a shard, before it is given up."""
MAX_LOSSES = 2
"""Workers lost to one unit before it is halved: the first may have been anything's fault."""
PAUSE_SECONDS = 2.0
"""Before the second attempt at reading or writing; doubled for each one after it."""
RANGES_LISTED = 20
"""Failures of one shard for one reason that are listed apart; the others are counted."""


@dataclass(frozen=True, slots=True)
class RunUnit:
    """Run the job on a unit.

    may_be_kept: an earlier worker may have kept it and died before it could say so.
    """

    unit: Unit
    may_be_kept: bool = False


@dataclass(frozen=True, slots=True)
class RefuseRow:
    """Keep a unit of one row, which broke its workers alone, as refused."""

    unit: Unit
    reason: str


@dataclass(frozen=True, slots=True)
class CommitShard:
    """Write the output of a shard whose rows are all kept."""

    shard: Shard


Task = RunUnit | RefuseRow | CommitShard


def shard_of(task: Task) -> Shard:
    return task.shard if isinstance(task, CommitShard) else task.unit.shard


def label(task: Task) -> str:
    """`rows.parquet rows 0 to 63`, for people."""
    if isinstance(task, CommitShard):
        return task.shard.name
    return _rows_label(task.unit.shard.name, task.unit.start, task.unit.stop)


def _rows_label(shard: str, start: int, stop: int) -> str:
    return f"{shard} row {start}" if stop - start == 1 else f"{shard} rows {start} to {stop - 1}"


@dataclass(frozen=True, slots=True)
class Failure:
    """Something that the run ends without. num_rows: that have no score for it."""

    where: str
    num_rows: int
    attempts: int
    reason: str

    def __str__(self) -> str:
        attempts = f" ({self.attempts} attempts)" if self.attempts > 1 else ""
        return f"{self.where}: {self.reason}{attempts}"


class WorkQueue:
    """The units that are still to be done, in the order in which workers get them.

    shards: by name, those without output. todo: units of their rows that are not kept.
    """

    def __init__(self, shards: Mapping[str, Shard], todo: Sequence[Unit]) -> None:
        self._rows_missing = dict.fromkeys(shards, 0)
        for unit in todo:
            self._rows_missing[unit.shard.name] += unit.num_rows
        self._fresh = deque(long_first(todo))
        self._suspects: deque[Unit] = deque()
        self._losses: dict[Unit, int] = {}
        self._attempts: dict[Task, int] = {}
        self._chores: deque[Task] = deque()
        self._paused: list[tuple[float, int, Task]] = []
        self._order = itertools.count()
        self._failures: dict[tuple[str, str], list[Failure]] = {}
        self._num_rows_given_up = 0
        for name, missing in self._rows_missing.items():
            if not missing:
                self._chores.append(CommitShard(shards[name]))

    @property
    def num_units(self) -> int:
        """Waiting to be scored; those in a worker's hands are not counted."""
        return len(self._fresh) + len(self._suspects) + len(self._paused)

    @property
    def is_empty(self) -> bool:
        return not (self.num_units or self._chores)

    def take(self, now: float, *, num_waiting_needed: int = 0) -> RunUnit | None:
        """The next unit for a worker whose engine is free, or soon will be.

        Suspects come only to a worker with nothing in hand. num_waiting_needed: of units, lest
        one waits behind a busy worker while another has none; positive for a busy worker.
        """
        self._resume_paused(now)
        if num_waiting_needed:
            may_queue = not self._suspects and len(self._fresh) >= num_waiting_needed
            return RunUnit(self._fresh.popleft()) if may_queue else None
        if self._suspects:
            return RunUnit(self._suspects.popleft(), may_be_kept=True)
        return RunUnit(self._fresh.popleft()) if self._fresh else None

    def take_chore(self, now: float) -> Task | None:
        """The next piece of work that needs no engine."""
        self._resume_paused(now)
        return self._chores.popleft() if self._chores else None

    def is_suspect(self, task: Task) -> bool:
        """Whether the task must have its worker to itself."""
        return isinstance(task, RunUnit) and task.unit in self._losses

    def finish(self, task: Task) -> None:
        self._attempts.pop(_plain(task), None)
        if isinstance(task, CommitShard):
            del self._rows_missing[task.shard.name]
            return
        self._losses.pop(task.unit, None)
        name = task.unit.shard.name
        self._rows_missing[name] -= task.unit.num_rows
        if isinstance(task, RefuseRow):
            self._list_failure(task, f"engine_error: {task.reason}", 1)
        if not self._rows_missing[name]:
            self._chores.append(CommitShard(task.unit.shard))

    def put_back(self, task: Task) -> None:
        """Do it again: what happened was not its fault."""
        if isinstance(task, RunUnit):
            if task.unit in self._losses:
                self._suspects.appendleft(task.unit)
            else:
                self._fresh.appendleft(task.unit)
        else:
            self._chores.appendleft(task)

    def fail(self, task: Task, cause: Cause, reason: str, now: float) -> tuple[Next, int]:
        """What is done about it, and how many attempts counted against it so far."""
        if cause is Cause.NODE:
            self.put_back(task)
            return Next.AGAIN, self._attempts.get(task, 0)
        if isinstance(task, RunUnit) and cause not in (Cause.INPUT, Cause.OUTPUT):
            return self._blame(task.unit, cause, reason)
        task = _plain(task)
        attempts = self._attempts[task] = self._attempts.get(task, 0) + 1
        if attempts >= MAX_ATTEMPTS:
            del self._attempts[task]
            self._num_rows_given_up += 0 if isinstance(task, CommitShard) else task.unit.num_rows
            self._list_failure(task, reason, attempts)
            return Next.GIVEN_UP, attempts
        due = now + PAUSE_SECONDS * 2 ** (attempts - 1)
        heapq.heappush(self._paused, (due, next(self._order), task))
        return Next.AGAIN_LATER, attempts

    def abandon(self, reason: str) -> None:
        """Give up everything that is not finished, in workers' hands or not."""
        # Those that were given up before are listed already.
        missing = sum(self._rows_missing.values()) - self._num_rows_given_up
        self._fresh.clear()
        self._suspects.clear()
        self._chores.clear()
        self._paused.clear()
        where = f"{missing:,} rows" if missing else f"{len(self._rows_missing)} shards"
        self._failures[("", reason)] = [Failure(where, missing, 1, reason)]

    def failures(self) -> list[Failure]:
        """Everything that was given up or refused, in the order it happened."""
        return list(itertools.chain.from_iterable(self._failures.values()))

    def unwritten_shards(self) -> list[str]:
        """Names of the shards that have no output yet."""
        return list(self._rows_missing)

    def _blame(self, unit: Unit, cause: Cause, reason: str) -> tuple[Next, int]:
        losses = self._losses[unit] = self._losses.get(unit, 0) + 1
        if losses < MAX_LOSSES:
            self._suspects.append(unit)
            return Next.AGAIN_ALONE, losses
        del self._losses[unit]
        if unit.num_rows == 1:
            self._chores.append(RefuseRow(unit, f"{cause}: {reason}"))
            return Next.ROW_REFUSED, losses
        middle = (unit.start + unit.stop) // 2
        for half in (replace(unit, stop=middle), replace(unit, start=middle)):
            # What is known of the whole is known of its halves, but a row is refused only for
            # losses of its own.
            self._losses[half] = MAX_LOSSES - 1 if half.num_rows > 1 else 0
            self._suspects.append(half)
        return Next.HALVED, losses

    def _resume_paused(self, now: float) -> None:
        while self._paused and self._paused[0][0] <= now:
            self.put_back(heapq.heappop(self._paused)[2])

    def _list_failure(self, task: Task, reason: str, attempts: int) -> None:
        shard = shard_of(task)
        num_rows = 0 if isinstance(task, CommitShard) else task.unit.num_rows
        listed = self._failures.setdefault((shard.name, reason), [])
        if len(listed) < RANGES_LISTED:
            listed.append(Failure(label(task), num_rows, attempts, reason))
            return
        if len(listed) > RANGES_LISTED:
            num_rows += listed.pop().num_rows
        listed.append(Failure(f"{shard.name}, {num_rows} more rows", num_rows, attempts, reason))


def long_first(units: Sequence[Unit]) -> list[Unit]:
    """Long units first, so that the last to finish is a short one.

    A shard's units stay together, so that its output is written early.
    """
    longest: dict[str, float] = {}
    for unit in units:
        name = unit.shard.name
        longest[name] = max(longest.get(name, 0.0), unit_bytes(unit))
    # Stable: of shards with equal units, the one that comes first in `units` stays first.
    return sorted(units, key=lambda unit: -longest[unit.shard.name])


def _plain(task: Task) -> Task:
    """The task as a key: the same whichever attempt it is."""
    return replace(task, may_be_kept=False) if isinstance(task, RunUnit) else task
