"""`rsr refine`: an oracle's version of each row's trace, the native one beside it.

    prepare   look at INPUT and the server, decide what is left to do
    execute   ask for row after row, so many at a time; commit units and shards on the way

Runs on this machine alone: the server does the work.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.progress import Progress

from rsr.jobs.errors import ShardsFailed, UsageError, first_line
from rsr.jobs.grading.answers import text_of
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.refinement.commit import RefinedColumns, commit_refined_shard
from rsr.jobs.refinement.endpoint import (
    Budget,
    BudgetSpentError,
    Endpoint,
    EndpointError,
    EndpointOptions,
)
from rsr.jobs.refinement.journal import NAME, Journal
from rsr.jobs.refinement.outcome import (
    ADDED_COLUMNS,
    Mode,
    Outcome,
    RefineStatus,
    summary_of,
    to_frame,
)
from rsr.jobs.refinement.prompts import Prompt, load_prompt
from rsr.jobs.refinement.rows import refinable
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.manifest import Identity, InputShard, Manifest, versions_of
from rsr.jobs.run.opening import HeldOutput, hold_output
from rsr.jobs.run.preflight import (
    canonical,
    check_places,
    refusing_what_cannot_be_reached,
    require_disk_space,
)
from rsr.jobs.run.staging import as_parquet, describe_input
from rsr.jobs.run.store import ChangedInputError, RunStore
from rsr.jobs.shards.columns import TrajectoryColumns, choose_columns, require_columns
from rsr.jobs.shards.inputs import find_inputs
from rsr.jobs.shards.parquet import file_size_bytes, open_parquet, row_groups
from rsr.jobs.shards.reader import ShardReader, TrajectoryReader
from rsr.jobs.shards.score_columns import Summary
from rsr.jobs.shards.scored import USUAL_ID
from rsr.jobs.shards.shard import Shard, Unit, cut_units
from rsr.jobs.storage.concurrency import in_parallel
from rsr.jobs.terminal import Console

DEFAULT_CONCURRENCY = 16
MAX_UNIT_ROWS, UNIT_BYTES = 32, 1 << 20
"""What is committed at a time; answers of unfinished units are in the journal."""
COPIES = 3
"""Copies of INPUT's bytes, for the disk check: the refined trace and the native one beside it."""
FAILURES_PER_REQUEST = 2
"""So many rows in a row for each request at a time may fail before the server is given up; of a
small INPUT all rows, so that a server that is down costs no row its refinement for good."""
POLL_S = 0.2
"""A signal is only seen between two waits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineOptions:
    """What `rsr refine` is asked to do.

    input, output: local paths or URLs. mode: which prompt the oracle gets. endpoint: the server.
    answer_column: of gold answers, which the oracle is then told. id_column: None is `id`, if
    there is one. concurrency: requests at a time. max_requests: that this start may make; None is
    as many as it takes. overwrite: discard an earlier run in OUTPUT. command: what was typed.
    """

    input: str
    output: Path | str
    mode: Mode
    endpoint: EndpointOptions
    columns: TrajectoryColumns = field(default_factory=TrajectoryColumns)
    answer_column: str | None = None
    id_column: str | None = None
    concurrency: int = DEFAULT_CONCURRENCY
    max_requests: int | None = None
    overwrite: bool = False
    same_input: bool = False
    command: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RefineResult:
    """What a run has written, earlier starts included. num_requests: of this start."""

    folder: RunFolder
    summary: Summary
    num_requests: int


@dataclass(frozen=True, slots=True)
class _Plan:
    """A run that can start. done: summary of the shards that need nothing more."""

    columns: RefinedColumns
    prompt: Prompt
    store: RunStore
    unfinished: dict[str, Shard]
    todo: list[Unit]
    done: Summary


def run_refine(options: RefineOptions, stop: StopRequest) -> RefineResult:
    """Refine INPUT into OUTPUT; goes on where an earlier start of the same settings stopped.

    Raises `UsageError` with OUTPUT as it was; `ShardsFailed` if the budget is spent, the server
    given up or a file not to be read or written, every answer so far being kept; `Interrupted` when
    `stop` says so, with the same kept.
    """
    budget = Budget(options.max_requests)
    with ExitStack() as opened:
        with refusing_what_cannot_be_reached():
            inputs = find_inputs(options.input)
            check_places(options.input, inputs, options.output)
            output = opened.enter_context(
                hold_output(options.output, writer="refine", overwrite=options.overwrite)
            )
            shards, columns = _describe_input(options, inputs, output, stop)
            asyncio.run(_probe(options.endpoint, budget))
            plan = _begin(options, inputs, output, shards, columns)
        journal = Journal(output.folder.state / NAME, plan.store.digest)
        if output.is_new:
            journal.remove()
        summary = plan.done
        if plan.unfinished:
            with journal:
                work = _Work(options, plan, journal, budget)
                asyncio.run(work.run(stop))
            summary.merge(work.summary)
        journal.remove()
    return RefineResult(plan.store.folder, summary, budget.num_requests)


async def _probe(options: EndpointOptions, budget: Budget) -> None:
    async with Endpoint(options, budget) as endpoint:
        await endpoint.probe()


def _describe_input(
    options: RefineOptions, inputs: list[tuple[str, str]], output: HeldOutput, stop: StopRequest
) -> tuple[list[Shard], RefinedColumns]:
    shards: list[Shard] = []
    columns: RefinedColumns | None = None
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
    options: RefineOptions, schema: pa.Schema, known: RefinedColumns | None, file: str
) -> RefinedColumns:
    wanted = options.columns if known is None else known.trajectory
    trajectory = choose_columns(schema, wanted, file)
    if trajectory.text:
        raise UsageError(
            f"{file}: a text column has no problem apart from its response; expected messages, or "
            "a prompt and a response"
        )
    if there := [name for name in schema.names if name in ADDED_COLUMNS]:
        raise UsageError(f"{file} already has {', '.join(there)}: refine the native rows instead")
    name = options.id_column
    if name is None:
        has_usual = USUAL_ID in schema.names if known is None else known.id is not None
        name = USUAL_ID if has_usual else None
    columns = RefinedColumns(trajectory, options.answer_column, name)
    require_columns(schema, columns.beside, file)
    return columns


def _begin(
    options: RefineOptions,
    inputs: list[tuple[str, str]],
    output: HeldOutput,
    shards: list[Shard],
    columns: RefinedColumns,
) -> _Plan:
    sources = {name: canonical(file) for file, name in inputs}
    prompt = load_prompt(options.mode)
    settings = {
        "mode": options.mode,
        "api_model": options.endpoint.model,
        "prompt_blake2b": prompt.digest,
        "temperature": options.endpoint.temperature,
        "max_tokens": options.endpoint.max_tokens,
        "answer_column": columns.answer,
        "id_column": columns.id,
    }
    versions = versions_of("rsr-engine", "openai")
    wanted = Manifest(
        writer="refine",
        identity=Identity(settings, columns.trajectory.to_json(), versions=versions),
        shards=tuple(InputShard.of(shard, sources[shard.name]) for shard in shards),
        subject=f"{options.mode} of {options.input} by {options.endpoint.model} at "
        f"{options.endpoint.url}",
        command=options.command,
        output=str(options.output),
        unit_rows=MAX_UNIT_ROWS,
        unit_bytes=UNIT_BYTES,
    )
    if output.is_new:
        needed = COPIES * sum(file_size_bytes(shard.path) for shard in shards)
        require_disk_space(options.output, needed)
        manifest = output.begin(wanted)
    else:
        manifest = output.go_on(wanted, is_same_input=options.same_input)
    store = RunStore.of(output.folder, manifest.identity)
    plan = _Plan(columns, prompt, store, {}, [], Summary())
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


@dataclass(frozen=True, slots=True)
class _Question:
    """A row that the oracle is to be asked about, or whose outcome is known already."""

    unit: Unit
    row: int
    prompt: str = ""
    native: str = ""
    outcome: Outcome | None = None


class _Work:
    """The rows of a plan on their way through so many requests at a time.

    summary: of the shards written so far. Units are committed when their last row is answered,
    shards when their last unit is.
    """

    def __init__(
        self, options: RefineOptions, plan: _Plan, journal: Journal, budget: Budget
    ) -> None:
        self.summary = Summary()
        self._options, self._plan, self._journal, self._budget = options, plan, journal, budget
        self._outcomes: dict[Unit, dict[int, Outcome]] = {}
        self._units_left = {name: 0 for name in plan.unfinished}
        for unit in plan.todo:
            self._units_left[unit.shard.name] += 1
        self._failures_in_a_row = 0
        num_rows = sum(shard.num_rows for shard in plan.unfinished.values())
        self._max_failures = max(2, min(FAILURES_PER_REQUEST * options.concurrency, num_rows))
        self._ending: str | None = None

    async def run(self, stop: StopRequest) -> None:
        """Ask about every row that is left; raises as `run_refine` does."""
        console = Console(stderr=True)
        num_rows = sum(unit.num_rows for unit in self._plan.todo)
        try:
            for name, shard in self._plan.unfinished.items():
                if not self._units_left[name]:
                    self._commit(shard)
            bar = Progress(console=console, transient=True, disable=not console.is_terminal)
            with bar:
                task = bar.add_task("refining", total=num_rows)
                async with Endpoint(self._options.endpoint, self._budget) as endpoint:
                    await self._ask_all(endpoint, stop, lambda: bar.advance(task))
        except (OSError, pa.ArrowException, ChangedInputError) as error:
            raise ShardsFailed(first_line(error)) from error
        if self._ending is not None:
            raise ShardsFailed(f"{self._ending}; the same command goes on")

    async def _ask_all(
        self, endpoint: Endpoint, stop: StopRequest, advance: Callable[[], None]
    ) -> None:
        questions = self._questions(stop)
        waiting: dict[asyncio.Task[Outcome], _Question] = {}
        try:
            while True:
                while self._ending is None and len(waiting) < self._options.concurrency:
                    question = next(questions, None)
                    if question is None:
                        break
                    if question.outcome is not None:
                        self._note(question, question.outcome)
                        advance()
                        continue
                    asked = endpoint.ask(question.prompt, question.native)
                    waiting[asyncio.create_task(asked)] = question
                if not waiting:
                    return
                done, _ = await asyncio.wait(
                    waiting, timeout=POLL_S, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    question = waiting.pop(task)
                    if (outcome := self._outcome(task)) is not None:
                        if outcome.status is not RefineStatus.FAILED:
                            self._journal.add(question.unit.shard, question.row, outcome)
                        self._note(question, outcome)
                        advance()
                # After what has come was written down.
                stop.check()
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    def _outcome(self, task: "asyncio.Task[Outcome]") -> Outcome | None:
        """What became of a row; None if it has to wait for another start."""
        try:
            outcome = task.result()
        except BudgetSpentError:
            self._ending = self._ending or f"--max-requests {self._budget.limit} is spent"
            return None
        except EndpointError as error:
            self._ending = str(error)
            return None
        if outcome.status is not RefineStatus.FAILED:
            self._failures_in_a_row = 0
            return outcome
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= self._max_failures:
            self._ending = self._ending or (
                f"--endpoint {self._options.endpoint.url} answered none of "
                f"{self._failures_in_a_row} rows in a row: {outcome.detail}"
            )
        return outcome if self._ending is None else None

    def _questions(self, stop: StopRequest) -> Iterator[_Question]:
        """Every row of the units that are left, in order."""
        known = self._journal.read()
        reader = TrajectoryReader(self._plan.columns.trajectory)
        for unit in self._plan.todo:
            answers = _gold_answers(self._plan.columns.answer, unit)
            for index, trajectory in enumerate(reader.read(unit)):
                stop.check()
                row = unit.start + index
                outcome: Any = known.get((unit.shard.name, unit.shard.fingerprint, row))
                found = refinable(trajectory) if outcome is None else outcome
                if isinstance(found, Outcome):
                    yield _Question(unit, row, outcome=found)
                    continue
                prompt = self._plan.prompt.render(found.problem, found.trace, answers[index])
                yield _Question(unit, row, prompt, found.trace)

    def _note(self, question: _Question, outcome: Outcome) -> None:
        """Keep a row's outcome; with the last one of its unit, the unit; of its shard, that."""
        unit = question.unit
        outcomes = self._outcomes.setdefault(unit, {})
        outcomes[question.row] = outcome
        if len(outcomes) < unit.num_rows:
            return
        frame = to_frame([outcomes[row] for row in range(unit.start, unit.stop)])
        self._plan.store.commit_unit(unit, frame, summary_of(frame))
        del self._outcomes[unit]
        self._units_left[unit.shard.name] -= 1
        if not self._units_left[unit.shard.name]:
            self._commit(unit.shard)

    def _commit(self, shard: Shard) -> None:
        plan, options = self._plan, self._options
        self.summary.merge(
            commit_refined_shard(
                plan.store, shard, plan.columns, options.mode, options.endpoint.model
            )
        )


def _gold_answers(column: str | None, unit: Unit) -> list[str]:
    if column is None:
        return [""] * unit.num_rows
    answers: list[str] = []
    for batch in ShardReader(unit.shard.path, [column]).rows(unit.start, unit.stop):
        answers += [text_of(value) for value in batch.column(0).to_pylist()]
    return answers
