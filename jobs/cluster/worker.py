"""The Ray actor: one student for as long as it lives.

A unit passes three threads, each taking units in the order they came: read, engine, write. So
one unit is read or written while another is scored. What goes wrong is answered, not raised, with
its cause; only unit descriptions and summaries cross the wire. Knows nothing of other workers.
"""

import asyncio
import gc
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

from rsr.engine.config import ScorerConfig, ScorerKind
from rsr.engine.errors import is_out_of_memory
from rsr.engine.facts import StudentFacts
from rsr.engine.metrics import TrajectoryScore
from rsr.engine.trajectory import Status, Trajectory
from rsr.jobs.cluster.answers import Done, Failed, Placed, Ready
from rsr.jobs.cluster.work import CommitShard, RefuseRow, ScoreUnit, Task
from rsr.jobs.run.events import Cause
from rsr.jobs.run.store import RunStore
from rsr.jobs.scoring.commit import commit_scored_shard
from rsr.jobs.shards import score_columns
from rsr.jobs.shards.columns import TrajectoryColumns
from rsr.jobs.shards.reader import TrajectoryReader
from rsr.jobs.shards.score_columns import Summary
from rsr.jobs.shards.shard import Unit

logger = logging.getLogger(__name__)

DETAILS_LOGGED = 20
"""Refused rows of one unit whose reason is logged; their status is in the output anyway."""
WRITE_PATIENCE_SECONDS = 30.0
"""A full disk may have room again soon; scoring again would cost more than waiting."""
WRITE_PAUSE_SECONDS = 1.0
T = TypeVar("T")


class Engine(Protocol):
    """What a worker needs of `rsr.engine.Scorer`."""

    @property
    def kind(self) -> ScorerKind: ...

    @property
    def max_num_batched_tokens(self) -> int | None: ...

    def score(self, trajectories: Sequence[Trajectory]) -> list[TrajectoryScore]: ...


def open_scorer(config: ScorerConfig) -> Engine:
    # vLLM takes seconds to import, and the driver never needs it.
    from rsr.engine.allocator import keep_freed_memory
    from rsr.engine.scorer import Scorer

    # This process opens one model and ends with it.
    keep_freed_memory()
    return Scorer(config)


@dataclass(frozen=True, slots=True)
class WorkerJob:
    """All that a worker must know besides its units; sent once.

    must_see: paths that every machine must have at the same place.
    """

    scorer: ScorerConfig
    columns: TrajectoryColumns
    store: RunStore
    verbose: bool = False
    must_see: tuple[Path, ...] = ()
    open_engine: Callable[[ScorerConfig], Engine] = open_scorer


@dataclass(frozen=True, slots=True)
class Refused:
    """A student that cannot be used, as seen from a machine."""

    node: str
    reason: str


class _TaskError(Exception):
    """Carries an answer out of one of a task's steps."""

    def __init__(self, answer: Failed) -> None:
        super().__init__(answer.reason)
        self.answer = answer


class Worker:
    """Methods are coroutines: Ray starts them in the order of the calls, and none blocks.

    `introduce` comes before all but `open_student`.
    """

    def __init__(self) -> None:
        self._job: WorkerJob
        self._reader: TrajectoryReader
        self._engine: Engine
        # The engine has a thread of its own: CUDA and OpenMP remember which one called them first.
        self._reading, self._scoring, self._writing, self._committing = (
            ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
            for name in ("read", "engine", "write", "commit")
        )

    async def open_student(self, config: ScorerConfig) -> StudentFacts | Refused:
        """What `config` makes of the model, or why it is refused.

        Then goes on to import what `load` will need, while the job is still prepared.
        """
        loop = asyncio.get_running_loop()
        facts = await loop.run_in_executor(self._scoring, lambda: _open_student(config))
        self._scoring.submit(_import_engine)
        return facts

    async def introduce(self, job: WorkerJob) -> Placed | Failed:
        """Take the job on, if this machine has what it needs."""
        if not job.verbose:
            _redirect_output(job.store.folder.log_path)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
        self._job = job
        self._reader = TrajectoryReader(job.columns)
        if missing := [str(path) for path in job.must_see if not path.exists()]:
            reason = (
                f"the machine {socket.gethostname()} has no {', '.join(missing)}: every machine "
                "of the cluster must see the same files there"
            )
            return Failed(cause=Cause.SETUP, reason=reason)
        return Placed(node=socket.gethostname(), pid=os.getpid())

    async def load(self, max_num_batched_tokens: int | None) -> Ready | Failed:
        """Load the model; `max_num_batched_tokens` overrides the configured one."""
        config = self._job.scorer
        if max_num_batched_tokens is not None:
            config = replace(config, max_num_batched_tokens=max_num_batched_tokens)
        try:
            self._engine, seconds = await _run(
                self._scoring, _engine_cause, lambda: self._job.open_engine(config)
            )
        except _TaskError as error:
            return error.answer
        return Ready(
            seconds=seconds,
            scorer=self._engine.kind,
            max_num_batched_tokens=self._engine.max_num_batched_tokens,
        )

    async def do(self, task: Task) -> Done | Failed:
        try:
            match task:
                case ScoreUnit():
                    return await self._score(task)
                case RefuseRow():
                    return await self._refuse(task)
                case CommitShard():
                    summary, seconds = await _run(
                        self._committing, _output_cause, lambda: self._commit(task)
                    )
                    return Done(summary=summary, seconds=seconds)
        except _TaskError as error:
            return error.answer

    async def _score(self, task: ScoreUnit) -> Done:
        rows, _ = await _run(self._reading, _input_cause, lambda: self._read(task))
        if isinstance(rows, Summary):
            return Done(summary=rows, seconds=0.0)
        scores, seconds = await _run(self._scoring, _engine_cause, lambda: self._engine.score(rows))
        summary, _ = await _run(self._writing, _output_cause, lambda: self._keep(task.unit, scores))
        return Done(summary=summary, seconds=seconds)

    def _read(self, task: ScoreUnit) -> list[Trajectory] | Summary:
        """The unit's rows, or what is known of them if an earlier worker kept them."""
        if task.may_be_kept and (kept := self._job.store.unit_summary(task.unit)) is not None:
            return kept
        return self._reader.read(task.unit)

    async def _refuse(self, task: RefuseRow) -> Done:
        score = TrajectoryScore(
            Status.ENGINE_ERROR, rank_clip=self._job.scorer.rank_clip, detail=task.reason
        )
        summary, _ = await _run(
            self._writing, _output_cause, lambda: self._keep(task.unit, [score])
        )
        return Done(summary=summary, seconds=0.0)

    def _keep(self, unit: Unit, scores: list[TrajectoryScore]) -> Summary:
        refused = [(i, s) for i, s in enumerate(scores, unit.start) if not s.status.is_scored]
        for row, score in refused[:DETAILS_LOGGED]:
            logger.info("%s row %d: %s: %s", unit.shard.name, row, score.status, score.detail)
        frame = score_columns.to_frame(scores, token_columns=self._job.scorer.token_scores)
        summary = Summary.of(frame)
        _patiently(lambda: self._job.store.commit_unit(unit, frame, summary))
        return summary

    def _commit(self, task: CommitShard) -> Summary:
        return _patiently(lambda: commit_scored_shard(self._job.store, task.shard))


def _open_student(config: ScorerConfig) -> StudentFacts | Refused:
    with _quick_imports():
        from rsr.engine.student import open_student

        try:
            return open_student(config).facts
        except ValueError as error:
            return Refused(socket.gethostname(), str(error))


def _import_engine() -> None:
    # If this raises, so will `open_scorer`, whose caller listens.
    with suppress(Exception), _quick_imports():
        from rsr.engine.prefill import import_vllm

        import_vllm()
        # Whatever vLLM has of models hangs on this.
        import rsr.engine.pooler  # noqa: F401


@contextmanager
def _quick_imports() -> Iterator[None]:
    """Without the garbage collector, which finds nothing in modules and takes a fifth of the time.

    What is imported stays: nor is it looked through later.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


async def _run(
    thread: ThreadPoolExecutor, cause_of: Callable[[BaseException], Cause], step: Callable[[], T]
) -> tuple[T, float]:
    """The step's result and its seconds; raises `_TaskError` whatever the step raises.

    This is the edge at which one unit's misfortune must not become its neighbours'.
    """

    def timed() -> tuple[T, float]:
        started = time.perf_counter()
        return step(), time.perf_counter() - started

    try:
        return await asyncio.get_running_loop().run_in_executor(thread, timed)
    except Exception as error:
        logger.exception("a step of the worker failed")
        failure = Failed(cause=cause_of(error), reason=_one_line(error))
        raise _TaskError(failure) from error


def _input_cause(_error: BaseException) -> Cause:
    return Cause.INPUT


def _output_cause(_error: BaseException) -> Cause:
    return Cause.OUTPUT


def _engine_cause(error: BaseException) -> Cause:
    return Cause.MEMORY if is_out_of_memory(error) else Cause.ENGINE


def _patiently(write: Callable[[], T]) -> T:
    """Try again for a while what the file system refuses."""
    end = time.monotonic() + WRITE_PATIENCE_SECONDS
    while True:
        try:
            return write()
        except OSError as error:
            if time.monotonic() > end:
                raise
            logger.warning("cannot write, trying again: %s", error)
            time.sleep(WRITE_PAUSE_SECONDS)


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else repr(error)


def _redirect_output(log_path: Path) -> None:
    """Send this process's and its children's chatter to the run's log."""
    try:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        # Ray's own log has it then; a worker that cannot write will say so about a unit.
        logger.warning("%s cannot be written: %s", log_path, error)
        return
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(descriptor, stream.fileno())
    os.close(descriptor)
