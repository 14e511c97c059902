"""The Ray actor: a process that opens a job once and runs it on the units it is given.

A unit passes three threads, each taking units in the order they came: read, engine, write. So
one unit is read or written while another is run. What goes wrong is answered, not raised, with
its cause; only unit descriptions and summaries cross the wire. Knows nothing of other workers.
"""

import asyncio
import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rsr.jobs.cluster.answers import Done, Failed, Placed, Ready
from rsr.jobs.cluster.job import OpenJob, UnitJob
from rsr.jobs.cluster.work import CommitShard, RefuseRow, RunUnit, Task
from rsr.jobs.run.events import Cause, Tally
from rsr.jobs.run.probe import told_missing

logger = logging.getLogger(__name__)

WRITE_PATIENCE_SECONDS = 30.0
"""A full disk may have room again soon; running the unit again would cost more than waiting."""
WRITE_PAUSE_SECONDS = 1.0
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Refused:
    """A value that cannot be used, as seen from a machine."""

    node: str
    reason: str


class _TaskError(Exception):
    """Carries an answer out of one of a task's steps."""

    def __init__(self, answer: Failed) -> None:
        super().__init__(answer.reason)
        self.answer = answer


class Worker:
    """Methods are coroutines: Ray starts them in the order of the calls, and none blocks.

    `introduce` comes before all but `ask`, and `load` before `do`.
    """

    def __init__(self) -> None:
        self._job: UnitJob[Tally]
        self._opened: OpenJob[Any, Any, Tally]
        # The engine has a thread of its own: CUDA and OpenMP remember which one called them first.
        self._reading, self._running, self._writing, self._committing = (
            ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
            for name in ("read", "engine", "write", "commit")
        )

    async def ask(self, question: Callable[[], T], then: Callable[[], object]) -> T | Refused:
        """The answer to a question about this machine, or the ValueError that it raises.

        Then goes on with `then`, while the job is still prepared.
        """
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._running, question)
        except ValueError as error:
            return Refused(socket.gethostname(), str(error))
        finally:
            self._running.submit(then)

    async def introduce(
        self, job: UnitJob[Tally], must_see: tuple[Path, ...], verbose: bool
    ) -> Placed | Failed:
        """Take the job on, if this machine has what it needs."""
        if not verbose:
            _redirect_output(job.folder.log_path)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
        self._job = job
        if (missing := told_missing(must_see)) is not None:
            return Failed(cause=Cause.SETUP, reason=missing)
        return Placed(node=socket.gethostname(), pid=os.getpid())

    async def load(self, max_num_batched_tokens: int | None) -> Ready | Failed:
        """Open the job."""
        try:
            self._opened, seconds = await _run(
                self._running, self._job.cause_of, partial(self._open, max_num_batched_tokens)
            )
        except _TaskError as error:
            return error.answer
        return Ready(
            seconds=seconds,
            max_num_batched_tokens=self._opened.max_num_batched_tokens,
            notice=self._opened.notice,
        )

    def _open(self, max_num_batched_tokens: int | None) -> Any:
        from rsr.jobs.cluster.session import temporary_files_with_ray

        with temporary_files_with_ray():
            return self._job.open(max_num_batched_tokens)

    async def do(self, task: Task) -> Done | Failed:
        """Run the job on a unit, refuse a row, or write a shard."""
        try:
            match task:
                case RunUnit():
                    return await self._run_unit(task)
                case RefuseRow(unit, reason):
                    refuse = partial(self._opened.refuse, unit, reason)
                    return replace(await self._write(self._writing, refuse), seconds=0.0)
                case CommitShard(shard):
                    return await self._write(self._committing, lambda: self._opened.commit(shard))
        except _TaskError as error:
            return error.answer

    async def _run_unit(self, task: RunUnit) -> Done:
        unit, opened = task.unit, self._opened

        def read() -> tuple[Tally | None, Any]:
            kept = opened.find(unit) if task.may_be_kept else None
            return (kept, None) if kept is not None else (None, opened.read(unit))

        (kept, rows), _ = await _run(self._reading, _input_cause, read)
        if kept is not None:
            return Done(summary=kept, seconds=0.0)
        results, seconds = await _run(
            self._running, self._job.cause_of, lambda: opened.run(unit, rows)
        )
        done = await self._write(self._writing, lambda: opened.keep(unit, results))
        return replace(done, seconds=seconds)

    async def _write(self, thread: ThreadPoolExecutor, write: Callable[[], Tally]) -> Done:
        summary, seconds = await _run(thread, _output_cause, lambda: _patiently(write))
        return Done(summary=summary, seconds=seconds)


async def _run(
    thread: ThreadPoolExecutor, cause_of: Callable[[Exception], Cause], step: Callable[[], T]
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


def _input_cause(_error: Exception) -> Cause:
    return Cause.INPUT


def _output_cause(_error: Exception) -> Cause:
    return Cause.OUTPUT


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
