"""One finished shard's bytes: the input's rows as they were, the score columns beside them.

Input columns are copied with pyarrow, type for type; only the score columns are made by Polars.
Knows neither where the file will stand nor who vouches for it.
"""

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rsr.jobs.shards import score_columns
from rsr.jobs.shards.parquet import open_parquet
from rsr.jobs.shards.reader import ShardReader
from rsr.jobs.shards.shard import Shard
from rsr.jobs.storage.hashing import HashingFile

METADATA_KEY = b"rsr"
"""Key of the run's identity, as JSON, in the metadata of every output file."""
ROW_GROUP_BYTES = 64 << 20
"""Decoded; a shard is written with no more than this in memory."""


def output_schema(source: pa.Schema, scores: pa.Schema, identity: dict[str, Any]) -> pa.Schema:
    """The input's columns but for earlier scores, then the scores; metadata of both."""
    kept = [field for field in source if not score_columns.is_score_column(field.name)]
    metadata = {**(source.metadata or {}), METADATA_KEY: json.dumps(identity).encode()}
    return pa.schema([*kept, *scores], metadata=metadata)


def write_shard(
    sink: HashingFile, shard: Shard, score_tables: Iterator[pa.Table], identity: dict[str, Any]
) -> None:
    first = next(score_tables)
    with open_parquet(shard.path) as source:
        schema = source.schema_arrow
        compression = compression_of(source)
    kept = [i for i, name in enumerate(schema.names) if not score_columns.is_score_column(name)]
    full = output_schema(schema, first.schema, identity)
    input_schema = pa.schema([schema.field(i) for i in kept])
    scores = _TableQueue(first, score_tables)
    with pq.ParquetWriter(sink, full, compression=compression) as writer:
        for batches in _row_groups(ShardReader(shard.path).rows(0, shard.num_rows)):
            table = pa.Table.from_batches([batch.select(kept) for batch in batches], input_schema)
            columns = [*table.columns, *scores.take(table.num_rows).columns]
            writer.write_table(pa.Table.from_arrays(columns, schema=full))


def _row_groups(batches: Iterator[pa.RecordBatch]) -> Iterator[list[pa.RecordBatch]]:
    """Batches together, as many as are written at a time."""
    group: list[pa.RecordBatch] = []
    num_bytes = 0
    for batch in batches:
        group.append(batch)
        num_bytes += batch.nbytes
        if num_bytes >= ROW_GROUP_BYTES:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group


class _TableQueue:
    """Tables from which any number of rows can be taken, in order."""

    def __init__(self, first: pa.Table, more: Iterator[pa.Table]) -> None:
        self._table = first
        self._more = more

    def take(self, num_rows: int) -> pa.Table:
        parts = [self._table]
        while sum(part.num_rows for part in parts) < num_rows:
            parts.append(next(self._more))
        whole = pa.concat_tables(parts)
        self._table = whole.slice(num_rows)
        return whole.slice(0, num_rows)


def compression_of(source: pq.ParquetFile) -> str:
    """The input's own codec, so that the output is no larger than expected."""
    if not source.metadata.num_row_groups or not source.metadata.num_columns:
        return "zstd"
    codec = source.metadata.row_group(0).column(0).compression.lower()
    return "none" if codec == "uncompressed" else codec
