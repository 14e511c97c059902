"""`rsr grade`: whether each row's answer is the gold one, into columns beside the row.

    prepare   look at INPUT and the verifier, decide what is left to do
    execute   grade unit by unit in as many processes as there are cores, commit shards

Runs on this machine alone: grading takes a core milliseconds a row, and no accelerator.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pyarrow as pa
from rich.progress import Progress

from rsr.jobs.errors import ShardsFailed, UsageError, first_line
from rsr.jobs.grading.answers import gradable
from rsr.jobs.grading.children import GradingChild
from rsr.jobs.grading.columns import is_grade_column, summary_of, to_frame
from rsr.jobs.grading.commit import commit_graded_shard
from rsr.jobs.grading.grades import Grade
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.manifest import Identity, InputShard, Manifest, versions_of
from rsr.jobs.run.opening import HeldOutput, open_places
from rsr.jobs.run.preflight import (
    canonical,
    refusing_what_cannot_be_reached,
    require_disk_space,
)
from rsr.jobs.run.staging import as_parquet, describe_input
from rsr.jobs.run.store import ChangedInputError, RunStore
from rsr.jobs.shards.columns import TrajectoryColumns, choose_columns, require_columns
from rsr.jobs.shards.parquet import file_size_bytes, open_parquet, row_groups
from rsr.jobs.shards.reader import ShardReader, TrajectoryReader
from rsr.jobs.shards.score_columns import Summary
from rsr.jobs.shards.shard import Shard, Unit, cut_units
from rsr.jobs.storage.concurrency import in_parallel
from rsr.jobs.terminal import Console

USUAL_FINISH_REASON = "finish_reason"
DEFAULT_CPU_SECONDS = 5.0
MAX_UNIT_ROWS, UNIT_BYTES = 256, 4 << 20
"""A few seconds of one core: what an interruption may have to do again."""
GRADE_BYTES_PER_ROW = 64
VERSIONED = ("rsr-engine", "math-verify", "latex2sympy2_extended", "sympy")


@dataclass(frozen=True, slots=True, kw_only=True)
class GradeOptions:
    """What `rsr grade` is asked to do.

    input, output: local paths or URLs. answer_column: of the gold answers. verifier: `math`,
    `exact`, `mcq` or MODULE:FUNCTION. finish_reason_column: says `length` of a response that was
    cut off; None is `finish_reason`, if there is one. cpu_seconds: that one row may take of a
    processor. processes: at a time; None is one for each core. overwrite: discard an earlier run in
    OUTPUT. overwrite_columns: replace grades that INPUT already has. command: what was typed.
    """

    input: str
    output: Path | str
    answer_column: str
    verifier: str = "math"
    columns: TrajectoryColumns = field(default_factory=TrajectoryColumns)
    finish_reason_column: str | None = None
    cpu_seconds: float = DEFAULT_CPU_SECONDS
    processes: int | None = None
    overwrite: bool = False
    same_input: bool = False
    overwrite_columns: bool = False
    command: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GradeResult:
    """What a run has written, earlier starts included."""

    folder: RunFolder
    summary: Summary


@dataclass(frozen=True, slots=True)
class GradedColumns:
    """The columns that grading reads. finish_reason: None where the table has none."""

    trajectory: TrajectoryColumns
    answer: str
    finish_reason: str | None

    @property
    def beside(self) -> list[str]:
        """Those that are not the trajectory's."""
        return [self.answer, *([self.finish_reason] if self.finish_reason else [])]


@dataclass(frozen=True, slots=True)
class _Plan:
    """A run that can start. done: summary of the shards that need nothing more."""

    columns: GradedColumns
    store: RunStore
    unfinished: dict[str, Shard]
    todo: list[Unit]
    done: Summary


def run_grade(options: GradeOptions, stop: StopRequest) -> GradeResult:
    """Grade INPUT into OUTPUT; goes on where an earlier start of the same settings stopped.

    Raises `UsageError` with OUTPUT as it was; `ShardsFailed` if some shards could not be read or
    written, the others being complete; `Interrupted` when `stop` says so, finished units kept.
    """
    with ExitStack() as opened:
        with refusing_what_cannot_be_reached():
            inputs, output = opened.enter_context(open_places(options, writer="grade"))
            shards, columns = _describe_input(options, inputs, output, stop)
            log = opened.enter_context(_log(output))
            # A verifier that cannot be had is refused before the run begins.
            first = opened.enter_context(GradingChild(options.verifier, options.cpu_seconds, log))
            plan = _begin(options, inputs, output, shards, columns)
        summary = plan.done
        if plan.unfinished:
            summary.merge(_execute(options, plan, first, log, stop))
    return GradeResult(plan.store.folder, summary)


@contextmanager
def _log(output: HeldOutput) -> Iterator[Any]:
    """Where verifiers' chatter goes; what a refused run wrote there goes with it."""
    path = output.folder.log_path
    was_there = path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            yield file
        finally:
            if not (was_there or output.has_begun):
                path.unlink(missing_ok=True)


def _describe_input(
    options: GradeOptions, inputs: list[tuple[str, str]], output: HeldOutput, stop: StopRequest
) -> tuple[list[Shard], GradedColumns]:
    shards: list[Shard] = []
    columns: GradedColumns | None = None
    exploded = options.columns.exploded
    with in_parallel(lambda named: as_parquet(*named, output, exploded), inputs) as paths:
        for (file, name), path in zip(inputs, paths, strict=True):
            stop.check()
            schema = open_parquet(path).schema_arrow
            columns = _choose_columns(options, schema, columns, file)
            shards.append(describe_input(file, path, name, columns.trajectory))
    assert columns is not None, "find_inputs finds at least one file"
    return shards, columns


def _choose_columns(
    options: GradeOptions, schema: pa.Schema, known: GradedColumns | None, file: str
) -> GradedColumns:
    wanted = options.columns if known is None else known.trajectory
    trajectory = choose_columns(schema, wanted, file)
    graded = [name for name in schema.names if is_grade_column(name)]
    if options.answer_column in graded:
        raise UsageError(f"--answer-column {options.answer_column} is a column that rsr grade adds")
    if graded and not options.overwrite_columns:
        raise UsageError(
            f"{file} already has {', '.join(graded)}; replace them with --overwrite-columns"
        )
    finish = options.finish_reason_column
    if finish is None:
        has_usual = USUAL_FINISH_REASON in schema.names
        if known is not None:
            has_usual = known.finish_reason is not None
        finish = USUAL_FINISH_REASON if has_usual else None
    columns = GradedColumns(trajectory, options.answer_column, finish)
    require_columns(schema, columns.beside, file)
    return columns


def _begin(
    options: GradeOptions,
    inputs: list[tuple[str, str]],
    output: HeldOutput,
    shards: list[Shard],
    columns: GradedColumns,
) -> _Plan:
    sources = {name: canonical(file) for file, name in inputs}
    settings = {
        "verifier": options.verifier,
        "answer_column": columns.answer,
        "finish_reason_column": columns.finish_reason,
        "cpu_seconds": options.cpu_seconds,
    }
    wanted = Manifest(
        writer="grade",
        identity=Identity(settings, columns.trajectory.to_json(), versions=versions_of(*VERSIONED)),
        shards=tuple(InputShard.of(shard, sources[shard.name]) for shard in shards),
        subject=f"of {options.input} by {options.verifier}",
        command=options.command,
        output=str(options.output),
        unit_rows=MAX_UNIT_ROWS,
        unit_bytes=UNIT_BYTES,
    )
    if output.is_new:
        needed = sum(file_size_bytes(s.path) + GRADE_BYTES_PER_ROW * s.num_rows for s in shards)
        require_disk_space(options.output, needed)
        manifest = output.begin(wanted)
    else:
        manifest = output.go_on(wanted, is_same_input=options.same_input)
    return _plan(RunStore.of(output.folder, manifest.identity), manifest, shards, columns)


def _plan(
    store: RunStore, manifest: Manifest, shards: list[Shard], columns: GradedColumns
) -> _Plan:
    plan = _Plan(columns, store, {}, [], Summary())
    with in_parallel(store.read_receipt, shards) as receipts:
        for shard, receipt in zip(shards, receipts, strict=True):
            if receipt is not None:
                plan.done.merge(receipt.summary)
                continue
            plan.unfinished[shard.name] = shard
            plan.todo.extend(
                cut_units(
                    shard,
                    max_rows=manifest.unit_rows,
                    max_bytes=manifest.unit_bytes,
                    kept=[unit for unit, _ in store.kept_units(shard)],
                    groups=row_groups(open_parquet(shard.path).metadata, columns.trajectory.names),
                )
            )
    return plan


def _execute(
    options: GradeOptions, plan: _Plan, first: GradingChild, log: Any, stop: StopRequest
) -> Summary:
    """Grade what is left and commit the shards; the summary of these.

    first: a process that has loaded the verifier.
    """
    num_processes = options.processes or len(os.sched_getaffinity(0))
    num_processes = max(1, min(num_processes, len(plan.todo)))
    console = Console(stderr=True)
    with ExitStack() as held:
        others = [
            held.enter_context(GradingChild(options.verifier, options.cpu_seconds, log))
            for _ in range(num_processes - 1)
        ]
        free: SimpleQueue[GradingChild] = SimpleQueue()
        for child in (first, *others):
            free.put(child)
        pool = held.enter_context(ThreadPoolExecutor(num_processes))
        bar = held.enter_context(
            Progress(console=console, transient=True, disable=not console.is_terminal)
        )
        grading = bar.add_task("grading", total=sum(unit.num_rows for unit in plan.todo))
        work = _Work(plan, pool, lambda unit: _grade_unit(plan, unit, free, stop))
        try:
            for unit in work.until_done(stop):
                bar.advance(grading, unit.num_rows)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in (first, *others):
                child.interrupt()
            raise
    if work.failures:
        told = sorted(work.failures.items())
        raise ShardsFailed("\n".join(f"{name}: {why}" for name, why in told))
    return work.summary


class _Work:
    """The units and shards of a plan on their way through a pool of threads.

    summary: of the shards written so far. failures: by shard, why it cannot be.
    """

    def __init__(
        self, plan: _Plan, pool: ThreadPoolExecutor, grade: Callable[[Unit], None]
    ) -> None:
        self.summary = Summary()
        self.failures: dict[str, str] = {}
        self._plan, self._pool = plan, pool
        self._missing = Counter(unit.shard.name for unit in plan.todo)
        self._waiting: dict[Future[Any], Unit | Shard] = {
            pool.submit(grade, unit): unit for unit in plan.todo
        }
        for name, shard in plan.unfinished.items():
            if not self._missing[name]:
                self._commit(shard)

    def until_done(self, stop: StopRequest) -> Iterator[Unit]:
        """Each unit as it is graded; shards are committed on the way."""
        while self._waiting:
            # A signal is only seen between two Python instructions of this thread.
            done = wait(self._waiting, timeout=0.2, return_when=FIRST_COMPLETED).done
            stop.check()
            for future in done:
                subject = self._waiting.pop(future)
                shard = subject.shard if isinstance(subject, Unit) else subject
                if (failure := _failure(future)) is not None:
                    self.failures.setdefault(shard.name, failure)
                elif isinstance(subject, Shard):
                    self.summary.merge(future.result())
                else:
                    yield subject
                    self._missing[shard.name] -= 1
                    if not self._missing[shard.name]:
                        self._commit(shard)

    def _commit(self, shard: Shard) -> None:
        self._waiting[self._pool.submit(commit_graded_shard, self._plan.store, shard)] = shard


def _failure(future: Future[Any]) -> str | None:
    """What files can do to a unit or a shard, in one line; anything else is raised."""
    try:
        future.result()
    except (OSError, pa.ArrowException, ChangedInputError) as error:
        return first_line(error)
    return None


def _grade_unit(
    plan: _Plan, unit: Unit, free: "SimpleQueue[GradingChild]", stop: StopRequest
) -> None:
    grades: list[Grade] = []
    child = free.get()
    try:
        for trajectory, beside in _rows(plan.columns, unit):
            stop.check()
            row = gradable(trajectory, beside[0], beside[1] if len(beside) > 1 else None)
            grades.append(row if isinstance(row, Grade) else child.grade(row))
    finally:
        free.put(child)
    frame = to_frame(grades)
    plan.store.commit_unit(unit, frame, summary_of(frame))


def _rows(columns: GradedColumns, unit: Unit) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Each row's trajectory, and its gold and finish reason."""
    trajectories = iter(TrajectoryReader(columns.trajectory).read(unit))
    for batch in ShardReader(unit.shard.path, columns.beside).rows(unit.start, unit.stop):
        values = [batch.column(name).to_pylist() for name in columns.beside]
        for row in zip(*values, strict=True):
            yield next(trajectories), row
