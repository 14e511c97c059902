"""Writing a shard's output: rows copied from its input, type for type, and columns beside them.

Rows are copied with pyarrow, not Polars, which normalises Arrow types. Knows neither where the
file will stand nor who vouches for it.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from rsr.jobs.shards.parquet import open_parquet
from rsr.jobs.shards.reader import ShardReader
from rsr.jobs.shards.shard import Shard
from rsr.jobs.storage.hashing import HashingFile

METADATA_KEY = b"rsr"
"""Key of the run's identity, as JSON, in the metadata of every scored file."""
GRADE_METADATA_KEY = b"rsr_grade"
"""Key of the run's identity, as JSON, in the metadata of every graded file; that of the run which
scored the rows, if one did, stays beside it."""
REFINE_METADATA_KEY = b"rsr_refine"
"""The same of every refined file; scores and grades of the native traces are no longer in it."""
GATE_METADATA_KEY = b"rsr_gate"
"""The same of every gated file, beside those of the runs that scored and graded the rows."""
ROW_GROUP_BYTES = 64 << 20
"""Decoded size at which a row group is written, however few rows that is."""
ROW_GROUP_ROWS = 1 << 16
"""Rows at which one is written, unless the input's own are larger: a few kept rows of each of
many small row groups should not become as many smaller ones."""
DICTIONARY_SAMPLE_ROWS = 1024


class ShardWriter:
    """A Parquet file that takes record batches and writes row groups of a bounded size.

    A context manager: leaving it well completes the file. source: the input, whose codec is used
    and whose largest row group says how many rows one of the output may have.
    """

    def __init__(self, sink: HashingFile, schema: pa.Schema, source: pq.ParquetFile) -> None:
        self._sink, self._schema = sink, schema
        self._compression = _compression_of(source)
        self._max_rows = _max_group_rows(source.metadata)
        self._writer: pq.ParquetWriter | None = None
        self._batches: list[pa.RecordBatch] = []
        self._num_rows = self._num_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        if kind is None:
            self._flush()
            self._open([])
        if self._writer is not None:
            self._writer.close()

    def add(self, batch: pa.RecordBatch) -> None:
        """Write these rows, of the file's schema, now or with those that follow."""
        if self._num_rows + batch.num_rows > self._max_rows:
            self._flush()
        self._batches.append(batch)
        self._num_rows += batch.num_rows
        self._num_bytes += batch.nbytes
        if self._num_bytes >= ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._batches:
            rows = pa.Table.from_batches(self._batches, self._schema)
            self._open(self._batches[:1]).write_table(rows)
        self._batches, self._num_rows, self._num_bytes = [], 0, 0

    def _open(self, first_rows: list[pa.RecordBatch]) -> pq.ParquetWriter:
        if self._writer is None:
            # A list of names is allowed, and any file object: the stubs know of neither.
            repeating: Any = _repeating_leaves(first_rows, _leaf_paths(self._schema))
            sink: Any = self._sink
            self._writer = pq.ParquetWriter(
                sink, self._schema, compression=self._compression, use_dictionary=repeating
            )
        return self._writer


def write_beside(
    sink: HashingFile,
    shard: Shard,
    tables: Iterator[pa.Table],
    is_added: Callable[[str], bool],
    metadata: Mapping[bytes, bytes | None],
) -> None:
    """Write the shard's rows with further columns beside them, in the place of earlier ones.

    tables: of consecutive rows, all rows together; at least one table. is_added: whether a name is
    that of a further column. metadata: for the file, besides the input's own; None takes an entry
    of the input's away.
    """
    added = _TableQueue(tables)
    with open_parquet(shard.path) as source:
        schema = source.schema_arrow
        kept = [i for i, name in enumerate(schema.names) if not is_added(name)]
        fields = [schema.field(i) for i in kept]
        own = {**(schema.metadata or {}), **metadata}
        merged: dict[bytes | str, bytes | str] = {k: v for k, v in own.items() if v is not None}
        full = pa.schema([*fields, *added.schema], metadata=merged)
        with ShardWriter(sink, full, source) as writer:
            for batch in ShardReader(shard.path).rows(0, shard.num_rows):
                beside = added.take(batch.num_rows)
                columns = [*(batch.column(i) for i in kept), *beside.columns]
                writer.add(pa.RecordBatch.from_arrays(columns, schema=full))


class _TableQueue:
    """Tables from which any number of rows can be taken, in order."""

    def __init__(self, tables: Iterator[pa.Table]) -> None:
        self._tables = tables
        self._table = next(tables)
        self.schema = self._table.schema

    def take(self, num_rows: int) -> pa.RecordBatch:
        parts = [self._table]
        while sum(part.num_rows for part in parts) < num_rows:
            parts.append(next(self._tables))
        whole = pa.concat_tables(parts)
        self._table = whole.slice(num_rows)
        taken = whole.slice(0, num_rows).combine_chunks()
        columns: list[Any] = [column.chunk(0) for column in taken.columns]
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)


def _compression_of(source: pq.ParquetFile) -> Any:
    """The input's own codec, so that the output is no larger than expected."""
    if not source.metadata.num_row_groups or not source.metadata.num_columns:
        return "zstd"
    codec = source.metadata.row_group(0).column(0).compression.lower()
    return "none" if codec == "uncompressed" else codec


def _max_group_rows(metadata: pq.FileMetaData) -> int:
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    return max([ROW_GROUP_ROWS, *(group.num_rows for group in groups)])


def _leaf_paths(schema: pa.Schema) -> list[str]:
    """Names of the leaf columns, as Parquet will call them."""
    sink = pa.BufferOutputStream()
    pq.ParquetWriter(sink, schema).close()
    leaves = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    return [leaves.column(i).path for i in range(len(leaves))]


def _repeating_leaves(first_rows: list[pa.RecordBatch], paths: list[str]) -> list[str]:
    """Leaf columns whose values repeat among the first rows: only those gain by a dictionary.

    Trying one on distinct values costs a third of the time to write, and leaves larger files.
    """
    sample = [rows.slice(0, DICTIONARY_SAMPLE_ROWS) for rows in first_rows]
    leaves = [leaf for rows in sample for column in rows.columns for leaf in _leaves(column)]
    if len(leaves) != len(paths):
        return paths
    return [
        path
        for path, leaf in zip(paths, leaves, strict=True)
        if 2 * len(leaf.unique()) <= len(leaf)
    ]


def _leaves(array: Any) -> Iterator[Any]:
    """The leaf columns of an Arrow array, in the order in which Parquet stores them."""
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        yield from _leaves(array.storage)
    elif pa.types.is_struct(kind):
        for child in array.flatten():
            yield from _leaves(child)
    elif pa.types.is_map(kind):
        yield from _leaves(array.keys)
        yield from _leaves(array.items)
    elif hasattr(array, "flatten") and pa.types.is_nested(kind):
        yield from _leaves(array.flatten())
    else:
        yield array
