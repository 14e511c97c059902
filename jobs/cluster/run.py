"""One run from a loaded plan to its last shard: Ray, the dispatcher, and everybody who listens.

Knows the order of the steps. What is to be done comes in as a `WorkerJob` and a `WorkQueue`.
"""

import logging
import os
import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from rsr.jobs.cluster.deadlines import Deadlines
from rsr.jobs.cluster.dispatcher import CannotStartError, Dispatcher
from rsr.jobs.cluster.metrics import RunMetrics
from rsr.jobs.cluster.pool import RayPool
from rsr.jobs.cluster.session import ray_session, room_for_workers
from rsr.jobs.cluster.work import Failure, WorkQueue
from rsr.jobs.cluster.worker import WorkerJob
from rsr.jobs.errors import Interrupted, UsageError
from rsr.jobs.events import (
    Event,
    EventLog,
    RunEnded,
    RunStarted,
    ShardFailed,
    ShardWritten,
    UnitFailed,
    UnitFinished,
    WorkerLost,
)
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.progress import Progress
from rsr.jobs.score_columns import Summary
from rsr.jobs.storage import is_remote

logger = logging.getLogger(__name__)

STOP_SECONDS = 10.0
"""For the units in hand when the run is told to stop; what is not done by then is done again.

A spot machine's warning comes 30 s before the end at the least, and Ray needs some of them.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions:
    """address: of the Ray cluster to join; None is RAY_ADDRESS, or this machine alone.
    num_workers: None is as many as fit. unit_timeout_s: None is learned from finished units.
    """

    address: str | None = None
    num_workers: int | None = None
    unit_timeout_s: float | None = None


@dataclass(slots=True)
class RunReport:
    """written: rows of the shards written. finished: rows of the units kept, by this run.

    seconds: since `started`, when the first worker was ready. setbacks: how often what went
    wrong, by cause, whether or not it came right in the end.
    """

    written: Summary = field(default_factory=Summary)
    finished: Summary = field(default_factory=Summary)
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    setbacks: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    unwritten: list[str] = field(default_factory=list)

    def tell(self, event: Event) -> None:
        match event:
            case UnitFinished():
                self.finished.merge(event.summary)
            case ShardWritten():
                self.written.merge(event.summary)
            case UnitFailed() | ShardFailed() | WorkerLost():
                self.setbacks[event.cause] += isinstance(event, WorkerLost) or event.attempts > 0


def run_on_cluster(
    job: WorkerJob,
    queue: WorkQueue,
    options: ClusterOptions,
    *,
    num_rows: int,
    kept: Summary,
    progress: Progress,
    stop: StopRequest,
) -> RunReport:
    """Do everything in `queue`; what was given up is in the report.

    num_rows: of the shards without output; kept: of these, what an earlier start finished.
    Raises `UsageError` if no worker can be started, `Interrupted` when `stop` says so, with what
    is finished kept.
    """
    report = RunReport()
    with (
        EventLog(job.output.events_path) as log,
        _probe(job) as job,
        ray_session(options.address, verbose=job.verbose),
    ):
        room = room_for_workers(options.num_workers, job.scorer.tensor_parallel_size)
        dispatcher = Dispatcher(
            RayPool(job, room),
            queue,
            num_workers=options.num_workers,
            max_num_batched_tokens=job.scorer.max_num_batched_tokens,
            deadlines=Deadlines(options.unit_timeout_s),
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

        num_workers = options.num_workers or room.num_places
        progress.loading(job.scorer.model, num_workers)
        tell(_started(job, num_rows - kept.num_rows, queue, num_workers))
        with _ending(report, queue, tell):
            _start(dispatcher, job, tell, stop)
            report.started = time.monotonic()
            with progress.scoring(num_rows, kept):
                _run(dispatcher, tell, progress, stop)
    return report


def _start(
    dispatcher: Dispatcher, job: WorkerJob, tell: Callable[[Event | None], None], stop: StopRequest
) -> None:
    try:
        for event in dispatcher.until_ready():
            tell(event)
            stop.check()
    except CannotStartError as error:
        raise UsageError(
            f"{job.scorer.model} cannot be run: {error} (more in {job.output.log_path})"
        ) from error
    if dispatcher.scorers - {job.scorer.scorer}:
        logger.warning(
            "the LM head of %s is not a plain matrix: scoring with vLLM's prompt_logprobs, "
            "which counts ties against the target and gives no entropy",
            job.scorer.model,
        )


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
    report: RunReport, queue: WorkQueue, tell: Callable[[Event | None], None]
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
                num_rows=report.finished.num_rows,
                num_tokens=report.finished.num_tokens,
                seconds=report.seconds,
                num_failures=len(report.failures),
            )
        )


def _started(job: WorkerJob, num_rows: int, queue: WorkQueue, num_workers: int) -> RunStarted:
    return RunStarted(
        model=job.scorer.model,
        num_rows=num_rows,
        num_units=queue.num_units,
        num_workers=num_workers,
        host=socket.gethostname(),
        pid=os.getpid(),
    )


@contextmanager
def _probe(job: WorkerJob) -> Iterator[WorkerJob]:
    """The job with a file to look for that no folder has but this run's OUTPUT."""
    if is_remote(str(job.output.root)):
        yield job
        return
    path = job.output.state.resolve() / f"probe-{uuid.uuid4().hex}"
    path.touch()
    try:
        yield replace(job, must_see=(*job.must_see, path))
    finally:
        path.unlink(missing_ok=True)
