"""One run from a loaded plan to its last shard: Ray, the dispatcher, and everybody who listens.

Knows the order of the steps. What is to be done comes in as a `UnitJob` and a `WorkQueue`.
"""

import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Generic, Self, TypeVar, cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from rsr.jobs.cluster.deadlines import Deadlines
from rsr.jobs.cluster.dispatcher import START_TIMEOUT_SECONDS, CannotStartError, Dispatcher
from rsr.jobs.cluster.job import UnitJob
from rsr.jobs.cluster.options import ClusterOptions
from rsr.jobs.cluster.pool import RayPool, hire
from rsr.jobs.cluster.ray_metrics import RunMetrics
from rsr.jobs.cluster.session import Room, ray_session, room_for_workers
from rsr.jobs.cluster.work import Failure, WorkQueue
from rsr.jobs.cluster.worker import Refused
from rsr.jobs.errors import Interrupted, UsageError
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.run.events import (
    Event,
    EventLog,
    RunEnded,
    RunStarted,
    ShardFailed,
    ShardWritten,
    Tally,
    UnitFailed,
    UnitFinished,
    WorkerLost,
    WorkerStarted,
)
from rsr.jobs.run.probe import probe_of
from rsr.jobs.run.progress import Progress

logger = logging.getLogger(__name__)

S = TypeVar("S", bound=Tally)
T = TypeVar("T")

STOP_SECONDS = 10.0
"""Seconds that units in the engine get when the run must stop; later ones are done again.

A spot machine's warning comes 30 s before the end at the least, and Ray needs some of them.
"""


FIRST_WORKER_SECONDS = 60.0
"""Seconds until the driver looks for itself: a crowded cluster has no room for a worker yet."""


@dataclass(slots=True)
class RunReport(Generic[S]):
    """What a run did.

    written: summaries of the shards written. num_rows, num_tokens: of the units kept, by this run.
    seconds: since `started`, when the first worker was ready. setbacks: how often what went
    wrong, by cause, whether or not it came right in the end. notices: what workers had to say.
    """

    written: list[S] = field(default_factory=list)
    num_rows: int = 0
    num_tokens: int = 0
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    setbacks: Counter[str] = field(default_factory=Counter)
    notices: set[str] = field(default_factory=set)
    failures: list[Failure] = field(default_factory=list)
    unwritten: list[str] = field(default_factory=list)

    def tell(self, event: Event) -> None:
        match event:
            case WorkerStarted(notice=str() as notice) if notice not in self.notices:
                self.notices.add(notice)
                logger.warning(notice)
            case UnitFinished(summary=summary):
                self.num_rows += summary.num_rows
                self.num_tokens += summary.num_tokens
            case ShardWritten(summary=summary):
                self.written.append(cast(S, summary))
            case UnitFailed() | ShardFailed() | WorkerLost():
                self.setbacks[event.cause] += isinstance(event, WorkerLost) or event.attempts > 0


@dataclass(frozen=True, slots=True)
class Cluster:
    """Ray, joined.

    verbose: show what Ray and the workers say. first: a worker that was hired before there was a
    job.
    """

    options: ClusterOptions
    room: Room
    verbose: bool = False
    first: ActorHandle | None = None

    def with_first_worker(self) -> Self:
        """Hire one before there is a job."""
        return replace(self, first=hire(self.room))

    def ask(
        self, question: Callable[[], T], then: Callable[[], object], stop: StopRequest
    ) -> T | None:
        """What the first worker answers, which then goes on with `then`.

        None if it cannot be asked now: there is no room for it yet, say. Raises `UsageError`
        where the question raises ValueError, `Interrupted` when `stop` says so.
        """
        assert self.first is not None
        asked = self.first.ask.remote(question, then)
        deadline = time.monotonic() + FIRST_WORKER_SECONDS
        while not ray.wait([asked], timeout=0.2)[0] and time.monotonic() < deadline:
            stop.check()
        try:
            answer: T | Refused = ray.get(asked, timeout=0)
        except RayError as error:
            logger.info("the first worker does not answer: %s", error)
            return None
        if isinstance(answer, Refused):
            is_here = answer.node == socket.gethostname()
            where = "" if is_here else f"the machine {answer.node}: "
            raise UsageError(where + answer.reason)
        return answer

    @property
    def has_gpus(self) -> bool:
        return "num_gpus" in self.room.resources

    @property
    def num_workers(self) -> int:
        """How many are asked for: as many as fit now, unless the user says."""
        return self.options.num_workers or self.room.num_places


@contextmanager
def join_cluster(
    options: ClusterOptions, *, tensor_parallel_size: int = 1, verbose: bool = False
) -> Iterator[Cluster]:
    """Join or start Ray; leave or end it after.

    Raises `UsageError` if no cluster answers or no worker fits.
    """
    with ray_session(options.address, verbose=verbose):
        room = room_for_workers(options.num_workers, tensor_parallel_size)
        yield Cluster(options, room, verbose)


def run_on_cluster(
    job: UnitJob[S],
    queue: WorkQueue,
    cluster: Cluster,
    *,
    num_rows: int,
    kept: Tally,
    progress: Progress,
    stop: StopRequest,
) -> RunReport[S]:
    """Do everything in `queue`; what was given up is in the report.

    num_rows: of the shards without output; kept: of these, what an earlier start finished.
    Raises `UsageError` if no worker can be started, `Interrupted` when `stop` says so, with what
    is finished kept.
    """
    report: RunReport[S] = RunReport()
    options = cluster.options
    with EventLog(job.folder.events_path) as log, probe_of(job.folder) as probe:
        must_see = (*job.must_see, *probe)
        dispatcher = Dispatcher(
            RayPool(job, cluster.room, cluster.first, must_see=must_see, verbose=cluster.verbose),
            queue,
            num_workers=options.num_workers,
            max_num_batched_tokens=job.max_num_batched_tokens,
            deadlines=Deadlines(options.unit_timeout_s),
            start_timeout_s=options.start_timeout_s or START_TIMEOUT_SECONDS,
        )
        metrics = RunMetrics()
        listeners = (report.tell, log.write, metrics.tell, progress.tell)

        def tell(event: Event | None) -> None:
            metrics.set_waiting(queue.num_units)
            if event is None:
                progress.tick()
                return
            for listener in listeners:
                listener(event)

        progress.loading(job.name, cluster.num_workers, cluster.room.num_places)
        tell(_started(job, num_rows - kept.num_rows, queue, cluster.num_workers))
        with _ending(report, queue, tell):
            _start(dispatcher, job, tell, stop)
            report.started = time.monotonic()
            with progress.scoring(num_rows, kept):
                _run(dispatcher, tell, progress, stop)
    return report


def _start(
    dispatcher: Dispatcher,
    job: UnitJob[Tally],
    tell: Callable[[Event | None], None],
    stop: StopRequest,
) -> None:
    try:
        for event in dispatcher.until_ready():
            tell(event)
            stop.check()
    except CannotStartError as error:
        raise UsageError(
            f"{job.name} cannot be run: {error} (more in {job.folder.log_path})"
        ) from error


def _run(
    dispatcher: Dispatcher,
    tell: Callable[[Event | None], None],
    progress: Progress,
    stop: StopRequest,
) -> None:
    for event in dispatcher.run():
        tell(event)
        if stop.is_set:
            progress.stopping(STOP_SECONDS)
            for last_event in dispatcher.drain(STOP_SECONDS):
                tell(last_event)
            stop.check()


@contextmanager
def _ending(
    report: RunReport[S], queue: WorkQueue, tell: Callable[[Event | None], None]
) -> Iterator[None]:
    """Complete the report and tell how the run ended, whichever way it does."""
    outcome = "failed"
    try:
        yield
        report.failures = queue.failures()
        report.unwritten = queue.unwritten_shards()
        outcome = "failed" if report.failures else "done"
    except Interrupted:
        outcome = "interrupted"
        raise
    finally:
        report.seconds = time.monotonic() - report.started
        tell(
            RunEnded(
                outcome=outcome,
                num_rows=report.num_rows,
                num_tokens=report.num_tokens,
                seconds=report.seconds,
                num_failures=len(report.failures),
            )
        )


def _started(job: UnitJob[Tally], num_rows: int, queue: WorkQueue, num_workers: int) -> RunStarted:
    return RunStarted(
        model=job.name,
        num_rows=num_rows,
        num_units=queue.num_units,
        num_workers=num_workers,
        host=socket.gethostname(),
        pid=os.getpid(),
    )
