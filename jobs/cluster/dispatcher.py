"""The loop between the work that is left and the workers there are.

Work is pulled: a worker gets its next unit when it has finished one, and has a second in hand so
that reading and writing overlap the engine. A lost worker is replaced, and its loss is held
against the one unit that was in its engine. Knows neither Ray (`Pool` is all it needs) nor the
terminal: it yields what happened.

No run waits for ever. As long as work is left, one of these holds:

- A worker is ready. It has a task in hand, and every task has a deadline; or the work that is left
  is paused until a known time, which happens to a task at most twice.
- A worker is being started. It has `PLACE_SECONDS` until its process answers and `LOAD_SECONDS`
  until its model is loaded. Of more workers than there are places, those without a process wait for
  longer, which no run waits for.
- A start is due at a known time, because the last one at that place failed, or because the cluster
  had no place. This goes on for `start_timeout_s` without a ready worker, and no longer.

Otherwise the run ends, and what is left is listed as failed. So it does when the pool itself has
ended. Each loss of a ready worker is a
setback, and `MAX_SETBACKS` of them with nothing finished in between end the run too.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from rsr.jobs.cluster.answers import Done, Failed, Lost, Placed, Ready, Reply
from rsr.jobs.cluster.deadlines import Deadlines
from rsr.jobs.cluster.work import CommitShard, RunUnit, Task, WorkQueue, label, shard_of
from rsr.jobs.run.events import (
    BatchShrunk,
    Cause,
    Event,
    Next,
    NoWorkerReady,
    ShardFailed,
    ShardWritten,
    UnitFailed,
    UnitFinished,
    WorkerLost,
    WorkerStarted,
)

UNITS_IN_HAND = 2
"""Per worker: one in the engine, one being read or written."""
WAIT_SECONDS = 1.0
"""Most seconds between two checks of the clock and of whether the user asked to stop."""
RESIZE_SECONDS = 5.0
PLACE_SECONDS = 600.0
"""Seconds from the start of a worker to its process's first answer. One that waits for room on the
cluster loses nothing by being started again, and one that hangs is replaced."""
LOAD_SECONDS = 7200.0
"""Seconds from a worker's first answer to a loaded model, downloading it included."""
MIN_BATCHED_TOKENS = 256
"""Below this a smaller prefill step saves no memory worth having."""
START_TIMEOUT_SECONDS = 1800.0
"""The run is given up when no worker was ready for this long and none is loading. A cloud brings up
a machine, and a file server comes back, in less."""
NOTICE_SECONDS = 60.0
"""The user is told after this long without a ready or loading worker."""
MAX_START_FAILURES = 5
"""Before any worker was ever ready, the model is refused after so many failed starts in a row at
one place. Someone is watching the terminal, and what never worked will hardly begin to."""
MAX_PAUSE_SECONDS, MAX_PAUSE_IN_COMPANY_SECONDS = 60.0, 600.0
"""The longest pauses before a place is tried again, without other workers and with some: a machine
that lacks the model folder must not fill the log of a run that others carry on."""
MAX_SETBACKS, MAX_SETBACKS_PER_WORKER = 20, 3
"""Losses in a row, with no unit finished in between, before the run is given up: narrowing down
one bad row among 4,096 takes 15, and an engine that fails on every row must not refuse them all."""


class Pool(Protocol):
    """Where workers live."""

    @property
    def num_places(self) -> int:
        """How many workers fit at the moment. To be asked of a pool that answers."""

    @property
    def is_answering(self) -> bool:
        """Whether workers can be counted and started now: the head of a cluster may be away."""

    def start(self, worker: int, max_num_batched_tokens: int | None) -> None:
        """Begin to start a worker under a number never used before; replies follow."""

    def send(self, worker: int, task: Task) -> None:
        """Give a worker a task; it does those that need the engine in the order sent."""

    def kill(self, worker: int) -> None:
        """End a worker, hanging or not; no reply of its comes after this."""

    def wait(self, seconds: float) -> list[Reply]:
        """Replies since the last call; waits that long for a first one.

        Raises `PoolEndedError` when no worker will ever answer again.
        """


class PoolEndedError(Exception):
    """What all workers depend on is gone: the reason is the message."""


class CannotStartError(Exception):
    """No worker has ever become ready, and none will: the reason is the message."""


@dataclass(slots=True)
class _Worker:
    """A worker from the call that starts it until it is lost.

    waiting_since: for its process, not counting the time in which there was no room for it.
    num_start_failures: starts in a row that failed at its place before this one.
    max_num_batched_tokens: what it was told to start with; if nothing, what it chose.
    """

    number: int
    waiting_since: float
    num_start_failures: int
    max_num_batched_tokens: int | None
    node: str = "?"
    pid: int = 0
    placed_at: float | None = None
    is_ready: bool = False
    units: deque[RunUnit] = field(default_factory=deque)
    """The worker's units; the first is in the engine."""
    engine_since: float = 0.0
    chore: Task | None = None
    chore_since: float = 0.0

    @property
    def in_hand(self) -> list[Task]:
        return [*self.units, *([self.chore] if self.chore else [])]

    @property
    def is_loading(self) -> bool:
        return self.placed_at is not None and not self.is_ready


@dataclass(frozen=True, slots=True)
class _RestingPlace:
    """A place for a worker at which the last `num_failures` starts failed."""

    since: float
    num_failures: int

    def is_due(self, now: float, longest_seconds: float) -> bool:
        return now - self.since >= min(longest_seconds, 2.0 ** min(self.num_failures, 16))


class Dispatcher:
    """Runs a queue of work on a pool of workers.

    num_workers: how many there should be; None is as many as fit, which may change while the run
    goes on. max_num_batched_tokens: that workers start with; None is vLLM's choice.
    start_timeout_s: how long starts are tried while no worker is ready.
    """

    def __init__(
        self,
        pool: Pool,
        queue: WorkQueue,
        *,
        num_workers: int | None = None,
        max_num_batched_tokens: int | None = None,
        deadlines: Deadlines | None = None,
        start_timeout_s: float = START_TIMEOUT_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._queue = queue
        self._num_workers = num_workers
        self._max_num_batched_tokens = max_num_batched_tokens
        self._deadlines = deadlines or Deadlines()
        self._start_timeout_s = start_timeout_s
        self._clock = clock
        self._workers: dict[int, _Worker] = {}
        self._resting: list[_RestingPlace] = []
        self._num_started = self._most_workers = 0
        self._was_ever_ready = False
        self._resize_at = 0.0
        self._none_ready_since: float | None = None
        self._why_none_ready = ""
        self._has_given_notice = False
        self._setbacks = 0

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
            yield from self._overdue()
            yield from self._watch_for_none_ready()
            yield from self._step()

    def run(self) -> Iterator[Event | None]:
        """Run until everything is done, refused or given up; yield None after an idle second."""
        while self.is_busy or not self._queue.is_empty:
            self._resize()
            self._hand_out()
            yield from self._overdue()
            yield from self._watch_for_none_ready()
            yield from self._step()

    def drain(self, seconds: float) -> Iterator[Event | None]:
        """Start nothing more; wait that long for what is in hand."""
        end = self._clock() + seconds
        while self.is_busy and self._clock() < end:
            yield from self._step()

    def _step(self) -> Iterator[Event | None]:
        try:
            replies = self._pool.wait(WAIT_SECONDS)
        except PoolEndedError as error:
            self._give_up_starting(str(error))
            return
        for reply in replies:
            # A worker that was killed for another reply of the same batch.
            if reply.worker in self._workers:
                yield from self._take_note(reply, self._workers[reply.worker])
        if not replies:
            yield None

    def _resize(self) -> None:
        """Start workers where there is room and work for them."""
        now = self._clock()
        if now < self._resize_at or self._is_out_of_patience(now) or not self._pool.is_answering:
            return
        self._resize_at = now + RESIZE_SECONDS
        num_places = self._num_workers or self._pool.num_places
        self._excuse_those_without_room(now)
        busy = sum(1 for worker in self._workers.values() if worker.in_hand)
        useful = max(1, busy + self._queue.num_units)
        # Places that the cluster lost are forgotten, the ones that failed last before others.
        del self._resting[max(0, num_places - len(self._workers)) :]
        longest = MAX_PAUSE_IN_COMPANY_SECONDS if self._num_ready else MAX_PAUSE_SECONDS
        due = [place for place in self._resting if place.is_due(now, longest)]
        num_untried = num_places - len(self._workers) - len(self._resting)
        num_starts = max(0, min(num_places, useful) - len(self._workers))
        for _ in range(min(num_starts, num_untried)):
            self._start(now, 0)
        for place in due[: max(0, num_starts - num_untried)]:
            self._resting.remove(place)
            self._start(now, place.num_failures)

    def _excuse_those_without_room(self, now: float) -> None:
        """Some of more workers than fit wait for room, which an autoscaler may bring."""
        if self._num_workers and len(self._workers) > self._pool.num_places:
            for worker in self._workers.values():
                if worker.placed_at is None:
                    worker.waiting_since = now

    def _start(self, now: float, num_start_failures: int) -> None:
        number = self._num_started
        self._num_started += 1
        self._workers[number] = _Worker(
            number, now, num_start_failures, self._max_num_batched_tokens
        )
        self._most_workers = max(self._most_workers, len(self._workers))
        self._pool.start(number, self._max_num_batched_tokens)

    def _is_out_of_patience(self, now: float) -> bool:
        since = self._none_ready_since
        return since is not None and now - since >= self._start_timeout_s

    def _watch_for_none_ready(self) -> Iterator[Event]:
        """Give up when no worker was ready for too long; say so well before."""
        now = self._clock()
        if self._num_ready:
            self._none_ready_since = None
            return
        if self._none_ready_since is None:
            self._none_ready_since, self._has_given_notice = now, False
            self._why_none_ready = "the cluster has no place for a worker"
        if any(worker.is_loading for worker in self._workers.values()):
            return
        seconds = now - self._none_ready_since
        if self._is_out_of_patience(now):
            self._give_up_starting(f"no worker for {seconds:,.0f} s: {self._why_none_ready}")
        elif seconds >= NOTICE_SECONDS and not self._has_given_notice:
            self._has_given_notice = True
            left = self._start_timeout_s - seconds
            yield NoWorkerReady(seconds=seconds, seconds_left=left, reason=self._why_none_ready)

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
            late = [
                f"{what}: not finished after {limit:,.0f} s"
                for what, since, limit in self._expected(worker)
                if now - since > limit
            ]
            # Giving up, for the loss of one, kills them all.
            if late and worker.number in self._workers:
                yield from self._lose(worker, Cause.TIMEOUT, late[0])

    def _expected(self, worker: _Worker) -> Iterator[tuple[str, float, float]]:
        """What the worker is to bring to an end: a name, since when, and the seconds allowed."""
        if worker.placed_at is None:
            what = "start of a process, for which the cluster may have no room"
            yield what, worker.waiting_since, PLACE_SECONDS
        elif not worker.is_ready:
            yield "loading the model", worker.placed_at, LOAD_SECONDS
        if worker.units:
            unit = worker.units[0]
            yield label(unit), worker.engine_since, self._deadlines.seconds(unit.unit)
        if worker.chore:
            limit = self._deadlines.write_seconds(shard_of(worker.chore))
            yield label(worker.chore), worker.chore_since, limit

    def _take_note(self, reply: Reply, worker: _Worker) -> Iterator[Event]:
        match reply.answer, reply.task:
            case Placed() as placed, _:
                worker.node, worker.pid, worker.placed_at = placed.node, placed.pid, self._clock()
            case Ready() as ready, _:
                yield self._welcome(worker, ready)
            case Done() as done, task if task is not None:
                yield self._finish(worker, task, done)
            case (Failed(cause=cause, reason=reason), None) | (Lost(cause=cause, reason=reason), _):
                yield from self._lose(worker, cause, reason)
            case Failed(cause=Cause.ENGINE | Cause.MEMORY as cause, reason=reason), RunUnit():
                # Whatever state its engine is in now, nothing more should be scored with it.
                yield from self._lose(worker, cause, reason, reply.task)
            case Failed(cause=cause, reason=reason), task if task is not None:
                self._forget(worker, task)
                yield self._fail(worker, task, cause, reason)
                # Rows that cannot be read cost little and say nothing about the others.
                if cause is not Cause.INPUT:
                    self._count_setback(reason)

    def _welcome(self, worker: _Worker, ready: Ready) -> WorkerStarted:
        worker.is_ready = True
        self._none_ready_since = None
        if worker.max_num_batched_tokens is None:
            worker.max_num_batched_tokens = ready.max_num_batched_tokens
        self._was_ever_ready = True
        return WorkerStarted(
            worker=worker.number,
            node=worker.node,
            pid=worker.pid,
            seconds=ready.seconds,
            max_num_batched_tokens=ready.max_num_batched_tokens,
            notice=ready.notice,
        )

    def _finish(self, worker: _Worker, task: Task, done: Done) -> Event:
        self._forget(worker, task)
        self._queue.finish(task)
        self._setbacks = 0
        if isinstance(task, CommitShard):
            return ShardWritten(
                shard=task.shard.name,
                worker=worker.number,
                node=worker.node,
                seconds=done.seconds,
                summary=done.summary,
            )
        unit = task.unit
        if isinstance(task, RunUnit):
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
        if not worker.is_ready:
            self._count_start_failure(worker, cause, reason)
        elif shrunk is None:
            self._count_setback(reason)

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
        assert isinstance(task, RunUnit), "chores are in hand as such"
        worker.units.remove(task)
        worker.engine_since = self._clock()

    def _shrink_batch(self, worker: _Worker, reason: str) -> BatchShrunk | None:
        """Have workers take smaller prefill steps from now on; None if that is used up."""
        before = worker.max_num_batched_tokens
        if before is None or before <= MIN_BATCHED_TOKENS:
            return None
        now = max(MIN_BATCHED_TOKENS, min(before // 2, self._max_num_batched_tokens or before))
        self._max_num_batched_tokens = now
        return BatchShrunk(
            worker=worker.number, tokens_before=before, tokens_now=now, reason=reason
        )

    def _count_start_failure(self, worker: _Worker, cause: Cause, reason: str) -> None:
        self._why_none_ready = reason
        num_failures = worker.num_start_failures + 1
        self._resting.append(_RestingPlace(self._clock(), num_failures))
        if self._was_ever_ready:
            return
        # A model that cannot be loaded cannot be loaded again; memory may be free soon.
        is_final = cause in (Cause.ENGINE, Cause.SETUP)
        others_load = any(other.is_loading for other in self._workers.values())
        if is_final or (num_failures >= MAX_START_FAILURES and not others_load):
            raise CannotStartError(reason)

    def _count_setback(self, reason: str) -> None:
        self._setbacks += 1
        limit = max(MAX_SETBACKS, MAX_SETBACKS_PER_WORKER * self._most_workers)
        if self._setbacks >= limit:
            self._abandon(f"{limit} failures in a row and nothing finished; the last: {reason}")

    def _give_up_starting(self, reason: str) -> None:
        if not self._was_ever_ready:
            raise CannotStartError(reason)
        self._abandon(reason)

    def _abandon(self, reason: str) -> None:
        for worker in self._workers.values():
            self._pool.kill(worker.number)
        self._workers.clear()
        self._queue.abandon(reason)
