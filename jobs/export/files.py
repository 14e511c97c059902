"""The files of an export that hold rows: Parquet, JSON lines, and the scores by id."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rsr.engine.messages import without_nulls
from rsr.jobs.export.plan import Plan
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.shards.parquet import open_parquet
from rsr.jobs.shards.reader import ShardReader
from rsr.jobs.shards.score_columns import TOKEN_COLUMNS
from rsr.jobs.storage.hashing import HashingFile

ROW_GROUP_ROWS = 1000
"""Small, for the hub's viewer reads a row group to show a page of it."""
RESPONSE_COLUMN = "response"
"""Column that `rsr sample` writes beside the messages: the same text."""


def data_table(plan: Plan, number: int, stop: StopRequest) -> pa.Table:
    """The rows of one Parquet file."""
    return pa.Table.from_pylist(plan.rows_of(number, stop), plan.schema)


def write_data(plan: Plan, number: int, sink: HashingFile, stop: StopRequest) -> None:
    write_table(data_table(plan, number, stop), sink)


def write_table(table: pa.Table, sink: HashingFile) -> None:
    """The table as a Parquet file."""
    file = pa.PythonFile(sink, mode="w")
    pq.write_table(table, file, row_group_size=ROW_GROUP_ROWS, compression="zstd")


def write_json_lines(plan: Plan, sink: HashingFile, stop: StopRequest) -> None:
    """All rows, one JSON object a line, without any null."""
    for number in range(plan.num_files):
        for row in plan.rows_of(number, stop):
            text = json.dumps(without_nulls(row), ensure_ascii=False)
            sink.write(text.encode("utf-8", "backslashreplace") + b"\n")


def scores_table(plan: Plan, stop: StopRequest) -> pa.Table:
    """What else INPUT says of the exported rows, by id, in their order.

    Every column that is no part of the trajectories, but for scores of single tokens.
    """
    source = plan.source
    left_out = {*source.columns.names, RESPONSE_COLUMN, "id", *(c.name for c in TOKEN_COLUMNS)}
    parts: list[pa.Table] = []
    first = 0
    by_position = np.sort(plan.order)
    for shard in source.shards:
        stop.check()
        here = by_position[(by_position >= first) & (by_position < first + shard.num_rows)]
        ids = list(source.ids(first, first + shard.num_rows))
        table = pa.table({"id": pa.array(ids, pa.string())})
        schema = open_parquet(shard.path).schema_arrow
        names = _names(schema, left_out)
        batches = list(ShardReader(shard.path, names).rows(0, shard.num_rows)) if names else []
        for name in names if batches else []:
            column = pa.chunked_array([batch.column(name) for batch in batches])
            table = table.append_column(schema.field(name), column)
        parts.append(table.take(here - first))
        first += shard.num_rows
    whole = pa.concat_tables(parts, promote_options="permissive")
    places = np.searchsorted(by_position, plan.order)
    return whole.take(places).replace_schema_metadata(None)


def _names(schema: pa.Schema, left_out: set[str]) -> list[str]:
    return [name for name in schema.names if name not in left_out and schema.names.count(name) == 1]
