"""`rsr compare --gate`: refined traces that are correct and have not drifted, native ones else.

OUTPUT has the refined stream's files and rows, in their order. Where a refined trace does not pass,
everything that both streams say of a trace is the native row's, to the last bit.
"""

import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from rsr.jobs.comparison.drift import DRIFT_FORMULA, drift_values, pair_sums
from rsr.jobs.comparison.pairs import pair_all_rows, read_pairs, why_no_tokens
from rsr.jobs.comparison.streams import Stream
from rsr.jobs.errors import ShardsFailed, UsageError, first_line
from rsr.jobs.grading.columns import is_grade_column
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.manifest import Identity, InputShard, Json, Manifest
from rsr.jobs.run.opening import HeldOutput, hold_output
from rsr.jobs.run.preflight import (
    canonical,
    check_columns,
    check_form,
    check_places,
    refusing_what_cannot_be_reached,
    require_disk_space,
)
from rsr.jobs.run.store import ChangedInputError, RunStore
from rsr.jobs.run.whole import require_finished
from rsr.jobs.shards.parquet import file_size_bytes, fingerprint, open_parquet
from rsr.jobs.shards.reader import ShardReader
from rsr.jobs.shards.score_columns import Summary, is_score_column
from rsr.jobs.shards.scored import USUAL_CORRECT, ScoredTable
from rsr.jobs.shards.shard import Shard
from rsr.jobs.shards.writer import GATE_METADATA_KEY, ShardWriter
from rsr.jobs.storage.hashing import HashingFile, hash_bytes

GATE_FIELDS: "tuple[pa.Field[Any], ...]" = (
    pa.field("gate_status", pa.string()),
    pa.field("gate_detail", pa.string()),
    pa.field("gate_drift", pa.float64()),
)
"""The columns that a run adds, in order."""
DEFAULT_MAX_DRIFT = 0.4
"""The largest `DRIFT_FORMULA` that passes; docs/quality.md says what it was measured on."""
GATE_COLUMNS = tuple(field.name for field in GATE_FIELDS)


class GateStatus(StrEnum):
    """The values of the output column `gate_status`; of all but the first the row is native."""

    REFINED = "refined"
    NOT_CORRECT = "not_correct"
    """The refined trace is wrong, or nobody knows."""
    NO_SCORE = "no_score"
    """One of the two traces has no score: how far one is from the other, nobody knows."""
    DRIFTED = "drifted"


@dataclass(frozen=True, slots=True, kw_only=True)
class GateOptions:
    """What `rsr compare --gate` is asked to do.

    output: local path or URL. max_drift: of `DRIFT_FORMULA`, inclusive. overwrite: discard an
    earlier run in OUTPUT. command: what was typed.
    """

    output: Path | str
    max_drift: float
    overwrite: bool = False
    command: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GateResult:
    """What a run has written, earlier starts included."""

    folder: RunFolder
    summary: Summary


@dataclass(frozen=True, slots=True)
class _Decisions:
    """Decisions about the rows of the refined stream, in order.

    status, detail, drift: see `GATE_FIELDS`. native_rows: the row of the native table that each
    was made from.
    """

    status: list[str]
    detail: list[str | None]
    drift: list[float | None]
    native_rows: list[int]


def run_gate(
    native: Stream, refined: Stream, options: GateOptions, stop: StopRequest
) -> GateResult:
    """Write the gated stream; goes on where an earlier start of the same settings stopped.

    Raises `UsageError` with OUTPUT as it was: streams without token columns or grades, rows that
    pair with none, columns of different types; `ShardsFailed` if a file cannot be read or written
    or an input changes meanwhile.
    """
    _require_gateable(native, refined)
    with ExitStack() as opened:
        with refusing_what_cannot_be_reached():
            check_form(options.output, len(refined.table.shards))
            check_columns(options.output, refined.table.schema)
            for stream in (native, refined):
                require_finished(stream.table.path)
                files = [(shard.path, shard.name) for shard in stream.table.shards]
                check_places(stream.table.path, files, options.output)
            output = opened.enter_context(
                hold_output(options.output, writer="compare", overwrite=options.overwrite)
            )
            decisions = _decide(native, refined, options.max_drift, stop)
            store = _begin(native, refined, options, output)
        summary, start = Summary(), 0
        try:
            for shard in refined.table.shards:
                stop.check()
                receipt = store.read_receipt(shard)
                if receipt is not None:
                    summary.merge(receipt.summary)
                else:
                    summary.merge(_publish(store, native, shard, decisions, start))
                start += shard.num_rows
            for shard in native.table.shards:
                if fingerprint(shard.path) != shard.fingerprint:
                    raise ChangedInputError(f"{shard.path} has changed since the run began")
        except (OSError, pa.ArrowException, ChangedInputError) as error:
            raise ShardsFailed(first_line(error)) from error
    return GateResult(store.folder, summary)


def _require_gateable(native: Stream, refined: Stream) -> None:
    for stream in (native, refined):
        if (why := why_no_tokens(stream)) is not None:
            raise UsageError(f"--gate looks at single tokens, and {why}")
    refined.table.require([USUAL_CORRECT])
    if there := [name for name in refined.table.schema.names if name in GATE_COLUMNS]:
        raise UsageError(f"{refined.table.path} already has {', '.join(there)}")
    if refined.table.scan.collect_schema()[USUAL_CORRECT] != pl.Boolean:
        raise UsageError(f"column {USUAL_CORRECT!r} of {refined.table.path} holds no grades")
    shared = set(_shared_columns(native.table, refined.table))
    for name in refined.table.schema.names:
        if name in shared:
            continue
        if is_score_column(name) or name in _trajectory_columns(refined.table):
            kind = refined.table.schema.field(name).type
            raise UsageError(
                f"column {name!r} of {refined.table.path} is {kind}, and {native.table.path} has "
                "none of this type: its rows cannot take the place of refined ones"
            )


def _trajectory_columns(table: ScoredTable) -> set[str]:
    """Those that the runs which scored the table read."""
    named = [v for i in table.identities for v in (i.get("columns") or {}).values()]
    return {name for name in named if isinstance(name, str)}


def _shared_columns(native: ScoredTable, refined: ScoredTable) -> list[str]:
    """Columns of the refined stream that the native one has with the same type."""
    return [
        field.name
        for field in refined.schema
        if native.schema.names.count(field.name) == 1
        and native.schema.field(field.name).type == field.type
    ]


def _decide(native: Stream, refined: Stream, max_drift: float, stop: StopRequest) -> _Decisions:
    rows = pair_all_rows(native, refined)
    correct = rows["correct"].to_list()
    is_scored = rows["is_scored"].to_list()
    drifts: dict[int, float] = {}
    both = rows.filter(pl.col("is_scored"))
    for pair in read_pairs(native, refined, both):
        stop.check()
        value = float(drift_values(pair_sums(pair))["drift"])
        if np.isfinite(value):
            drifts[pair.refined_row] = value
    status: list[str] = []
    detail: list[str | None] = []
    for row, (grade, scored) in enumerate(zip(correct, is_scored, strict=True)):
        drift = drifts.get(row)
        if grade is not True:
            status.append(GateStatus.NOT_CORRECT)
            detail.append("it is graded wrong" if grade is False else "its grade is not known")
        elif not scored or drift is None:
            status.append(GateStatus.NO_SCORE)
            detail.append("the refined or the native trace has no score")
        elif drift > max_drift:
            status.append(GateStatus.DRIFTED)
            detail.append(f"its drift of {drift:.3f} is more than {max_drift:g}")
        else:
            status.append(GateStatus.REFINED)
            detail.append(None)
    told = [drifts.get(row) for row in range(len(rows))]
    return _Decisions(status, detail, told, rows["native_row"].to_list())


def _begin(native: Stream, refined: Stream, options: GateOptions, output: HeldOutput) -> RunStore:
    told = [f"{shard.name} {shard.fingerprint}" for shard in native.table.shards]
    settings: dict[str, Json] = {
        "max_drift": options.max_drift,
        "drift": DRIFT_FORMULA,
        "on": refined.on,
        "native_blake2b": hash_bytes("\n".join(told).encode()),
    }
    wanted = Manifest(
        writer="compare",
        identity=Identity(
            settings, versions={"rsr-engine": importlib.metadata.version("rsr-engine")}
        ),
        shards=tuple(InputShard.of(s, canonical(s.path)) for s in refined.table.shards),
        subject=f"gate of {refined.table.path} beside {native.table.path}",
        command=options.command,
        output=str(options.output),
    )
    if output.is_new:
        shards = (*native.table.shards, *refined.table.shards)
        require_disk_space(options.output, sum(file_size_bytes(shard.path) for shard in shards))
        manifest = output.begin(wanted)
    else:
        manifest = output.go_on(wanted)
    return RunStore.of(output.folder, manifest.identity)


def _publish(
    store: RunStore, native: Stream, shard: Shard, decisions: _Decisions, start: int
) -> Summary:
    """Write one file, whose first row is row `start` of the refined stream."""
    told = json.dumps(store.identity.to_json()).encode()

    def write(sink: HashingFile) -> Summary:
        with open_parquet(shard.path) as source:
            schema = source.schema_arrow
            merged: dict[bytes | str, bytes | str] = dict((schema.metadata or {}).items())
            merged[GATE_METADATA_KEY] = told
            full = pa.schema([*schema, *GATE_FIELDS], metadata=merged)
            with ShardWriter(sink, full, source) as writer:
                for batch in _gated(native, shard, decisions, start, full):
                    writer.add(batch)
        counts: dict[str, int] = {}
        for status in sorted(decisions.status[start : start + shard.num_rows]):
            counts[str(status)] = counts.get(str(status), 0) + 1
        return Summary(num_rows=shard.num_rows, rows_by_status=counts)

    return store.publish(shard, write)


def _gated(
    native: Stream, shard: Shard, decisions: _Decisions, start: int, schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    first = start
    for batch in ShardReader(shard.path).rows(0, shard.num_rows):
        rows = range(first, first + batch.num_rows)
        replaced = [i for i, row in enumerate(rows) if decisions.status[row] != GateStatus.REFINED]
        places = [decisions.native_rows[rows[i]] for i in replaced]
        columns = _with_native(batch, native.table, replaced, places)
        for name, field in zip(GATE_COLUMNS, GATE_FIELDS, strict=True):
            values: Sequence[Any] = getattr(decisions, name.removeprefix("gate_"))
            columns.append(pa.array(values[rows.start : rows.stop], field.type))
        yield pa.RecordBatch.from_arrays(columns, schema=schema)
        first += batch.num_rows


def _with_native(
    batch: pa.RecordBatch, native: ScoredTable, replaced: Sequence[int], places: Sequence[int]
) -> "list[pa.Array[Any]]":
    """The batch's columns, with native values in the `replaced` rows.

    places: row of each in the native table. What only the refined stream says of its trace, scores
    and grades, is null there; what it says of the refining stays.
    """
    if not replaced:
        return list(batch.columns)
    order = np.arange(batch.num_rows)
    order[list(replaced)] = batch.num_rows + np.arange(len(replaced))
    names = [
        field.name
        for field in batch.schema
        if native.schema.names.count(field.name) == 1
        and native.schema.field(field.name).type == field.type
    ]
    others = native_rows(native, places, names)
    columns: list[pa.Array[Any]] = []
    for field, column in zip(batch.schema, batch.columns, strict=True):
        if field.name in names:
            joined: pa.Array[Any] = pa.concat_arrays([column, others[field.name]])
            columns.append(joined.take(pa.array(order)))
        elif is_grade_column(field.name) or is_score_column(field.name):
            is_kept = np.ones(batch.num_rows, bool)
            is_kept[list(replaced)] = False
            indices = pa.array(np.arange(batch.num_rows), mask=~is_kept)
            columns.append(column.take(indices))
        else:
            columns.append(column)
    return columns


def native_rows(
    table: ScoredTable, places: Sequence[int], names: Sequence[str]
) -> "dict[str, pa.Array[Any]]":
    """Values of these columns at rows of the whole table, in the order of `places`."""
    parts: list[pa.Table] = []
    found: list[int] = []
    wanted, first = np.array(places), 0
    for shard in table.shards:
        here = np.flatnonzero((wanted >= first) & (wanted < first + shard.num_rows))
        if len(here):
            parts += _rows_of_file(shard.path, wanted[here] - first, here, tuple(names), found)
        first += shard.num_rows
    order: Any = np.argsort(found, kind="stable")
    joined = pa.concat_tables(parts).take(order)
    return {name: joined[name].combine_chunks() for name in names}


def _rows_of_file(
    path: str, rows: Any, positions: Any, names: tuple[str, ...], found: list[int]
) -> list[pa.Table]:
    """Tables of the rows of each row group, the position of each row appended to `found`."""
    tables, start = [], 0
    metadata = open_parquet(path).metadata
    for group in range(metadata.num_row_groups):
        stop = start + metadata.row_group(group).num_rows
        inside = np.flatnonzero((rows >= start) & (rows < stop))
        if len(inside):
            table = _row_group(path, group, names)
            tables.append(table.take(pa.array(rows[inside] - start)))
            found += positions[inside].tolist()
        start = stop
    return tables


@lru_cache(maxsize=2)
def _row_group(path: str, group: int, names: tuple[str, ...]) -> pa.Table:
    """A row group, decoded once for the batches that ask for it one after another."""
    return open_parquet(path).read_row_group(group, list(names))
