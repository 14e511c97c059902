"""Putting a refined shard together: the input's rows, other traces in them, and why or why not."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import polars as pl
import pyarrow as pa

from rsr.jobs.grading.columns import is_grade_column
from rsr.jobs.grading.grade import USUAL_FINISH_REASON
from rsr.jobs.refinement.outcome import ADDED_COLUMNS, ADDED_FIELDS, PARENT_ID
from rsr.jobs.refinement.rows import RefinableRow, refinable, replace_traces
from rsr.jobs.run.store import IncompleteShardError, RunStore
from rsr.jobs.sampling.commit import SAMPLE_METADATA_KEY
from rsr.jobs.shards.columns import TrajectoryColumns
from rsr.jobs.shards.parquet import open_parquet
from rsr.jobs.shards.reader import ShardReader, TrajectoryReader
from rsr.jobs.shards.score_columns import Summary, is_score_column
from rsr.jobs.shards.shard import Shard, Unit
from rsr.jobs.shards.writer import (
    GRADE_METADATA_KEY,
    METADATA_KEY,
    REFINE_METADATA_KEY,
    write_beside,
)
from rsr.jobs.storage.hashing import HashingFile

RESPONSE = "response"


@dataclass(frozen=True, slots=True)
class RefinedColumns:
    """The columns that refining reads and replaces.

    trajectory: where the rows' traces are. answer: of gold answers, or None. id: whose values
    become `parent_id`, or None for the shard's name and the row.
    """

    trajectory: TrajectoryColumns
    answer: str | None
    id: str | None

    @property
    def trace(self) -> str:
        """The column whose traces are replaced."""
        name = self.trajectory.messages or self.trajectory.response
        assert name is not None, "a run of texts without problems is refused"
        return name

    @property
    def beside(self) -> list[str]:
        """Those that are not the trajectory's, each once."""
        return [name for name in dict.fromkeys((self.answer, self.id)) if name]

    def is_not_kept(self, name: str) -> bool:
        """Whether a column of the input is replaced, or was said of another trace."""
        is_told = is_score_column(name) or is_grade_column(name)
        return is_told or name == self.trace or name in ADDED_COLUMNS


def said_of_trace(schema: pa.Schema, columns: RefinedColumns) -> list[str]:
    """Columns of a file that say something of the trace: they hold for a row with another no more.

    How it ended, by which grading would still call it cut off; and what `rsr sample` wrote beside
    the messages.
    """
    names = [USUAL_FINISH_REASON]
    if SAMPLE_METADATA_KEY in (schema.metadata or {}):
        names += [RESPONSE, "num_tokens"]
    return [n for n in names if n in schema.names and n not in columns.trajectory.names]


def is_added(columns: RefinedColumns, said: Sequence[str], name: str) -> bool:
    """Whether a column is not the input's to the last bit. said: as `said_of_trace` has it."""
    return columns.is_not_kept(name) or name in said


def parent_ids(columns: RefinedColumns, shard: Shard, start: int, stop: int) -> list[str]:
    """What rows [start, stop) are called: their ids, or where they stand if they have none."""
    names = [f"{shard.name}:{row}" for row in range(start, stop)]
    if columns.id is None:
        return names
    ids: list[Any] = []
    for batch in ShardReader(shard.path, [columns.id]).rows(start, stop):
        ids += batch.column(0).to_pylist()
    return [place if value is None else str(value) for value, place in zip(ids, names, strict=True)]


def commit_refined_shard(
    store: RunStore, shard: Shard, columns: RefinedColumns, mode: str, model: str
) -> Summary:
    """Write the shard's output from its input rows and finished units, then its receipt.

    Raises `IncompleteShardError` if not every row has a unit, `ChangedInputError` if the input is
    another by now.
    """
    covering = store.covering_units(shard)
    summary = Summary()
    for _, receipt in covering:
        summary.merge(receipt.summary)
    # What the file says of scores and grades was said of other traces.
    metadata = {
        REFINE_METADATA_KEY: json.dumps(store.identity.to_json()).encode(),
        METADATA_KEY: None,
        GRADE_METADATA_KEY: None,
    }

    def write(sink: HashingFile) -> Summary:
        tables = _tables(store, shard, [unit for unit, _ in covering], columns, (mode, model))
        said = said_of_trace(open_parquet(shard.path).schema_arrow, columns)
        write_beside(sink, shard, tables, partial(is_added, columns, said), metadata)
        return summary

    first_finished_s = min((r.finished_s for _, r in covering), default=None)
    store.publish(shard, write, first_finished_s=first_finished_s)
    store.remove_units(shard)
    return summary


def _tables(
    store: RunStore,
    shard: Shard,
    units: list[Unit],
    columns: RefinedColumns,
    told: tuple[str, str],
) -> Iterator[pa.Table]:
    """The replaced and the added columns of each unit; at least one table, if an empty one."""
    of_shard = open_parquet(shard.path).schema_arrow
    field, said = of_shard.field(columns.trace), said_of_trace(of_shard, columns)
    fields = [of_shard.field(name).with_nullable(True) for name in said]
    schema = pa.schema([field, *fields, *ADDED_FIELDS])
    yield schema.empty_table()
    reader = ShardReader(shard.path, [columns.trace, *said])
    traces = TrajectoryReader(columns.trajectory)
    is_plain = columns.trajectory.messages is None
    for unit in units:
        frame = store.read_unit(unit)
        if frame is None:
            raise IncompleteShardError(f"{store.unit_name(unit)} was damaged a moment ago")
        rows = [refinable(row) for row in traces.read(unit)]
        ids = parent_ids(columns, shard, unit.start, unit.stop)
        start = unit.start
        for batch in reader.rows(unit.start, unit.stop):
            low, high = start - unit.start, start - unit.start + batch.num_rows
            part = frame.slice(low, batch.num_rows)
            refined = {i: t for i, t in enumerate(part["text"].to_list()) if t is not None}
            replaced = replace_traces(batch[columns.trace], field, refined, plain=is_plain)
            beside = [_without_native(batch[of.name], of, refined) for of in fields]
            values = _added(part, rows[low:high], ids[low:high], told)
            arrays = [pa.array(values[f.name], f.type) for f in ADDED_FIELDS]
            yield pa.Table.from_arrays([replaced, *beside, *arrays], schema=schema)
            start += batch.num_rows


def _added(
    frame: pl.DataFrame, rows: list[Any], ids: list[str], told: tuple[str, str]
) -> dict[str, list[Any]]:
    values: dict[str, list[Any]] = {
        name: frame[name].to_list() for name in frame.columns if name in ADDED_COLUMNS
    }
    values[PARENT_ID] = ids
    values["original_response"] = [
        row.trace if isinstance(row, RefinableRow) else None for row in rows
    ]
    values["refine_mode"], values["refine_model"] = ([name] * len(rows) for name in told)
    return values


def _without_native(
    column: "pa.Array[Any]", field: "pa.Field[Any]", refined: Mapping[int, str]
) -> "pa.Array[Any]":
    """The column with the refined trace in those rows where it was the trace, null where it was
    something else of it.
    """
    if field.name == RESPONSE:
        return replace_traces(column, field, refined, plain=True)
    kept = [None if place in refined else place for place in range(len(column))]
    return column.take(pa.array(kept, pa.int64()))
