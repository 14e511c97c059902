"""The loop between the work that is left and the workers there are.

Work is pulled: a worker gets its next unit when it has finished one, and has a second in hand so
that reading and writing overlap the engine. A lost worker is replaced, and its loss is held
against the one unit that was in its engine. Knows neither Ray (`Pool` is all it needs) nor the
terminal: it yields what happened.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from rsr.engine.config import ScorerKind
from rsr.jobs.cluster.deadlines import Deadlines
from rsr.jobs.cluster.work import CommitShard, ScoreUnit, Task, WorkQueue, label
from rsr.jobs.run.events import (
    BatchShrunk,
    Cause,
    Event,
    Next,
    ShardFailed,
    ShardWritten,
    UnitFailed,
    UnitFinished,
    WorkerLost,
    WorkerStarted,
)
from rsr.jobs.shards.score_columns import Summary

UNITS_IN_HAND = 2
"""Per worker: one in the engine, one being read or written."""
WAIT_SECONDS = 1.0
"""At most, between two looks at the clock and at whether somebody asked to stop."""
RESIZE_SECONDS = 5.0
LOAD_SECONDS = 1800.0
"""From a worker's first words to a loaded model; a download of the model counts."""
MIN_BATCHED_TOKENS = 256
"""Below this a smaller prefill step saves no memory worth having."""
MAX_START_FAILURES = 5
"""In a row, before no further worker is tried."""
MAX_SETBACKS, MAX_SETBACKS_PER_WORKER = 20, 3
"""Losses in a row, with no unit finished in between, before the run is given up: narrowing down
one bad row among 4,096 takes 15, and an engine that fails on every row must not refuse them all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A worker's process runs and loads its model."""

    worker: int
    node: str
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A worker's model is loaded. max_num_batched_tokens: of its prefill steps, if known."""

    worker: int
    seconds: float
    scorer: ScorerKind
    max_num_batched_tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """seconds: in the engine, or for writing a shard."""

    worker: int
    task: Task
    summary: Summary
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The worker lives; its task did not work. task: None if it is the start."""

    worker: int
    task: Task | None
    cause: Cause
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """The worker is gone, and with it what it had in hand."""

    worker: int
    cause: Cause
    reason: str


Answer = Placed | Ready | Done | Failed | Lost


class Pool(Protocol):
    """Where workers live."""

    @property
    def num_places(self) -> int:
        """How many workers fit at the moment."""

    def start(self, worker: int, max_num_batched_tokens: int | None) -> None:
        """Begin to start a worker under a number never used before; answers follow."""

    def send(self, worker: int, task: Task) -> None:
        """Give a worker a task; it does those that need the engine in the order sent."""

    def kill(self, worker: int) -> None:
        """End a worker, hanging or not; no answer of its comes after this."""

    def wait(self, seconds: float) -> list[Answer]:
        """Answers since the last call; waits that long for a first one."""


class CannotStartError(Exception):
    """No worker has ever become ready, and none will: the reason is the message."""


@dataclass(slots=True)
class _Worker:
    number: int
    node: str = "?"
    pid: int = 0
    placed_at: float | None = None
    is_ready: bool = False
    max_num_batched_tokens: int | None = None
    units: deque[ScoreUnit] = field(default_factory=deque)
    """In hand; the first is in the engine."""
    engine_since: float = 0.0
    chore: Task | None = None
    chore_since: float = 0.0

    @property
    def in_hand(self) -> list[Task]:
        return [*self.units, *([self.chore] if self.chore else [])]


class Dispatcher:
    """Runs a queue of work on a pool of workers.

    num_workers: how many there should be; None is as many as fit, which may change while the run
    goes on. max_num_batched_tokens: that workers start with; None is vLLM's choice. scorers: how
    the workers that are ready score.
    """

    def __init__(
        self,
        pool: Pool,
        queue: WorkQueue,
        *,
        num_workers: int | None = None,
        max_num_batched_tokens: int | None = None,
        deadlines: Deadlines | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.scorers: set[ScorerKind] = set()
        self._pool = pool
        self._queue = queue
        self._num_workers = num_workers
        self._max_num_batched_tokens = max_num_batched_tokens
        self._deadlines = deadlines or Deadlines()
        self._clock = clock
        self._workers: dict[int, _Worker] = {}
        self._num_started = 0
        self._num_unusable = 0
        self._resize_at = 0.0
        self._start_failures = 0
        self._setbacks = 0

    @property
    def num_waiting(self) -> int:
        """Units that no worker has in hand."""
        return self._queue.num_units

    @property
    def is_busy(self) -> bool:
        return any(worker.in_hand for worker in self._workers.values())

    @property
    def _num_ready(self) -> int:
        return sum(worker.is_ready for worker in self._workers.values())

    def until_ready(self, num_ready: int = 1) -> Iterator[Event | None]:
        """Start workers, until so many are ready; raises `CannotStartError` if none can be."""
        while self._num_ready < num_ready and not self._queue.is_empty:
            self._resize()
            yield from self._step()

    def run(self) -> Iterator[Event | None]:
        """Until everything is done, refused or given up; None where a second brought nothing."""
        while self.is_busy or not self._queue.is_empty:
            self._resize()
            self._hand_out()
            yield from self._overdue()
            yield from self._step()

    def drain(self, seconds: float) -> Iterator[Event | None]:
        """Start nothing more; wait that long for what is in hand."""
        end = self._clock() + seconds
        while self.is_busy and self._clock() < end:
            yield from self._step()

    def _step(self) -> Iterator[Event | None]:
        answers = self._pool.wait(WAIT_SECONDS)
        for answer in answers:
            # A worker that was killed for another answer of the same batch.
            if answer.worker in self._workers:
                yield from self._take_note(answer, self._workers[answer.worker])
        if not answers:
            yield None

    def _resize(self) -> None:
        """Start workers where there is room and work for them."""
        now = self._clock()
        if now < self._resize_at:
            return
        self._resize_at = now + RESIZE_SECONDS
        wanted = (self._num_workers or self._pool.num_places) - self._num_unusable
        busy = sum(1 for worker in self._workers.values() if worker.in_hand)
        useful = max(1, busy + self._queue.num_units)
        for _ in range(min(wanted, useful) - len(self._workers)):
            number = self._num_started
            self._num_started += 1
            self._workers[number] = _Worker(number)
            self._pool.start(number, self._max_num_batched_tokens)

    def _hand_out(self) -> None:
        now = self._clock()
        ready = sorted(
            (worker for worker in self._workers.values() if worker.is_ready),
            key=lambda worker: len(worker.units),
        )
        for worker in ready:
            if worker.chore is None and (chore := self._queue.take_chore(now)):
                worker.chore, worker.chore_since = chore, now
                self._pool.send(worker.number, chore)
        for worker in ready:
            while len(worker.units) < UNITS_IN_HAND:
                if any(self._queue.is_suspect(task) for task in worker.units):
                    break
                needed = len(ready) if worker.units else 0
                unit = self._queue.take(now, num_waiting_needed=needed)
                if unit is None:
                    break
                if not worker.units:
                    worker.engine_since = now
                worker.units.append(unit)
                self._pool.send(worker.number, unit)

    def _overdue(self) -> Iterator[Event]:
        """Kill workers that hang."""
        now = self._clock()
        for worker in list(self._workers.values()):
            if worker.placed_at is not None and not worker.is_ready:
                what, since, limit = "loading the model", worker.placed_at, LOAD_SECONDS
            elif worker.units:
                unit = worker.units[0]
                what, since = label(unit), worker.engine_since
                limit = self._deadlines.seconds(unit.unit)
            elif isinstance(worker.chore, CommitShard):
                what, since = label(worker.chore), worker.chore_since
                limit = self._deadlines.shard_seconds(worker.chore.shard)
            else:
                continue
            if now - since > limit:
                reason = f"{what}: not finished after {limit:.0f} s"
                yield from self._lose(worker, Cause.TIMEOUT, reason)

    def _take_note(self, answer: Answer, worker: _Worker) -> Iterator[Event]:
        match answer:
            case Placed():
                worker.node, worker.pid, worker.placed_at = answer.node, answer.pid, self._clock()
            case Ready():
                yield self._welcome(worker, answer)
            case Done():
                yield self._finish(worker, answer)
            case Failed(task=None):
                yield from self._lose(worker, answer.cause, answer.reason)
            case Failed(cause=Cause.ENGINE | Cause.MEMORY, task=task) if task is not worker.chore:
                # Whatever state its engine is in now, nothing more should be scored with it.
                yield from self._lose(worker, answer.cause, answer.reason, task)
            case Failed(task=task):
                assert task is not None
                self._forget(worker, task)
                yield self._fail(worker, task, answer.cause, answer.reason)
                # Rows that cannot be read cost little and say nothing about the others.
                if answer.cause is not Cause.INPUT:
                    self._count_setback(answer.reason)
            case Lost():
                yield from self._lose(worker, answer.cause, answer.reason)

    def _welcome(self, worker: _Worker, ready: Ready) -> WorkerStarted:
        worker.is_ready = True
        worker.max_num_batched_tokens = ready.max_num_batched_tokens
        self.scorers.add(ready.scorer)
        self._start_failures = 0
        return WorkerStarted(
            worker=worker.number,
            node=worker.node,
            pid=worker.pid,
            seconds=ready.seconds,
            max_num_batched_tokens=ready.max_num_batched_tokens,
        )

    def _finish(self, worker: _Worker, done: Done) -> Event:
        self._forget(worker, done.task)
        self._queue.finish(done.task)
        self._setbacks = 0
        if isinstance(done.task, CommitShard):
            return ShardWritten(
                shard=done.task.shard.name,
                worker=worker.number,
                node=worker.node,
                seconds=done.seconds,
                summary=done.summary,
            )
        unit = done.task.unit
        if isinstance(done.task, ScoreUnit):
            self._deadlines.observe(unit, done.seconds)
        return UnitFinished(
            shard=unit.shard.name,
            start=unit.start,
            stop=unit.stop,
            worker=worker.number,
            node=worker.node,
            seconds=done.seconds,
            summary=done.summary,
        )

    def _lose(
        self, worker: _Worker, cause: Cause, reason: str, culprit: Task | None = None
    ) -> Iterator[Event]:
        """Part with a worker. culprit: if not the unit in its engine."""
        self._pool.kill(worker.number)
        del self._workers[worker.number]
        self._resize_at = min(self._resize_at, self._clock())
        yield WorkerLost(worker=worker.number, node=worker.node, cause=cause, reason=reason)
        shrunk = self._shrink_batch(worker, reason) if cause is Cause.MEMORY else None
        if shrunk is not None:
            yield shrunk
        yield from self._return_tasks(worker, cause, reason, culprit, blame=shrunk is None)
        if cause is Cause.NODE or shrunk is not None:
            return
        if worker.is_ready:
            self._count_setback(reason)
        else:
            self._count_start_failure(cause, reason)

    def _return_tasks(
        self, worker: _Worker, cause: Cause, reason: str, culprit: Task | None, *, blame: bool
    ) -> Iterator[Event]:
        in_engine = culprit or (worker.units[0] if worker.units else None)
        # From the last to the first, since each goes back to the front of its queue.
        for task in reversed(worker.in_hand):
            if task is in_engine and not blame:
                self._queue.put_back(task)
                yield self._failure_event(worker, task, cause, reason, Next.AGAIN, 0)
            elif task is in_engine or task is worker.chore:
                yield self._fail(worker, task, cause, reason)
            else:
                self._queue.put_back(task)

    def _fail(self, worker: _Worker, task: Task, cause: Cause, reason: str) -> Event:
        step, attempts = self._queue.fail(task, cause, reason, self._clock())
        return self._failure_event(worker, task, cause, reason, step, attempts)

    def _failure_event(
        self, worker: _Worker, task: Task, cause: Cause, reason: str, step: Next, attempts: int
    ) -> Event:
        if isinstance(task, CommitShard):
            return ShardFailed(
                shard=task.shard.name,
                worker=worker.number,
                node=worker.node,
                cause=cause,
                reason=reason,
                attempts=attempts,
                next=step,
            )
        return UnitFailed(
            shard=task.unit.shard.name,
            start=task.unit.start,
            stop=task.unit.stop,
            worker=worker.number,
            node=worker.node,
            cause=cause,
            reason=reason,
            attempts=attempts,
            next=step,
        )

    def _forget(self, worker: _Worker, task: Task) -> None:
        """The task is no longer in the worker's hands."""
        if task is worker.chore:
            worker.chore = None
            return
        assert isinstance(task, ScoreUnit), "chores are in hand as such"
        worker.units.remove(task)
        worker.engine_since = self._clock()

    def _shrink_batch(self, worker: _Worker, reason: str) -> BatchShrunk | None:
        """Have workers take smaller prefill steps from now on; None if that is used up."""
        before = worker.max_num_batched_tokens or self._max_num_batched_tokens
        if before is None or before <= MIN_BATCHED_TOKENS:
            return None
        now = max(MIN_BATCHED_TOKENS, min(before // 2, self._max_num_batched_tokens or before))
        self._max_num_batched_tokens = now
        return BatchShrunk(
            worker=worker.number, tokens_before=before, tokens_now=now, reason=reason
        )

    def _count_start_failure(self, cause: Cause, reason: str) -> None:
        has_ever_worked = bool(self.scorers)
        # A model that cannot be loaded cannot be loaded again; memory may be free soon.
        if not has_ever_worked and cause in (Cause.ENGINE, Cause.SETUP):
            raise CannotStartError(reason)
        self._start_failures += 1
        self._resize_at = self._clock() + min(60.0, 2.0**self._start_failures)
        if cause is Cause.SETUP:
            self._num_unusable += 1
        elif self._start_failures >= MAX_START_FAILURES:
            if not has_ever_worked:
                raise CannotStartError(reason)
            if not self._num_ready:
                self._abandon(f"{self._start_failures} workers in a row did not start: {reason}")

    def _count_setback(self, reason: str) -> None:
        self._setbacks += 1
        limit = max(MAX_SETBACKS, MAX_SETBACKS_PER_WORKER * len(self._workers))
        if self._setbacks >= limit:
            self._abandon(f"{limit} failures in a row and nothing finished; the last: {reason}")

    def _abandon(self, reason: str) -> None:
        for worker in self._workers.values():
            self._pool.kill(worker.number)
        self._workers.clear()
        self._queue.abandon(reason)
