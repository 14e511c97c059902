"""The chosen rows of one Parquet file, decoded, in the types of the file's own schema.

Polars decodes where it gives every type back as it came, in three quarters of pyarrow's time;
pyarrow everywhere else, since Polars normalises some Arrow types (dictionary keys, maps,
fixed-size binary, 256-bit decimals, time32). Row groups without a chosen row are not read. Knows
nothing of where the rows go.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rsr.jobs.shards import open_parquet

BATCH_BYTES = 32 << 20
"""Decoded at a time, more or less."""
MAX_BATCH_ROWS = 1 << 16
MAX_POLARS_BYTES = 4 * BATCH_BYTES
"""A larger row group goes to pyarrow, which decodes it a part at a time."""

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Span:
    """Row groups [first, last) with chosen rows among them: rows [start, stop) of the file."""

    first: int
    last: int
    start: int
    stop: int
    num_bytes: int


def chosen_rows(path: str, mask: Mask) -> Iterator[pa.RecordBatch]:
    """The rows of `path` where the (num_rows,) `mask` is true, in order, some at a time.

    Raises `OSError` or `pa.ArrowException` for a file that cannot be read.
    """
    with open_parquet(path) as source:
        survives = all(map(_survives_polars, source.schema_arrow))
        for span in _spans(source.metadata, mask):
            chosen = mask[span.start : span.stop]
            if survives and span.num_bytes <= MAX_POLARS_BYTES:
                table = _by_polars(path, source.schema_arrow, span, chosen)
                if table is not None:
                    yield from table.to_batches()
                    continue
            yield from _by_pyarrow(source, span, chosen)


def _survives_polars(field: pa.Field) -> bool:
    """Whether a column comes back from Polars as it went in, bit for bit, nulls included."""
    kind = field.type
    if pa.types.is_struct(kind):
        return kind.num_fields > 0 and all(f.nullable and _survives_polars(f) for f in kind)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return kind.value_field.nullable and _survives_polars(kind.value_field)
    return (
        pa.types.is_boolean(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_float32(kind)
        or pa.types.is_float64(kind)
        or pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
    )


def _spans(metadata: pq.FileMetaData, mask: Mask) -> Iterator[_Span]:
    """Neighbouring row groups together, up to `BATCH_BYTES` and `MAX_BATCH_ROWS`."""
    pending: _Span | None = None
    start = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        stop = start + group.num_rows
        here = _Span(number, number + 1, start, stop, group.total_byte_size)
        start = stop
        if not mask[here.start : here.stop].any():
            continue
        joined = None if pending is None else _joined(pending, here)
        if pending is not None and joined is None:
            yield pending
        pending = joined or here
    if pending is not None:
        yield pending


def _joined(span: _Span, following: _Span) -> _Span | None:
    num_bytes = span.num_bytes + following.num_bytes
    num_rows = following.stop - span.start
    if span.last != following.first or num_bytes > BATCH_BYTES or num_rows > MAX_BATCH_ROWS:
        return None
    return _Span(span.first, following.last, span.start, following.stop, num_bytes)


def _by_polars(path: str, schema: pa.Schema, span: _Span, chosen: Mask) -> pa.Table | None:
    """None where Polars does not read it: what is wrong with it is for pyarrow to say."""
    rows = pl.scan_parquet(path, glob=False, hive_partitioning=False)
    try:
        frame = rows.slice(span.start, span.stop - span.start).collect()
        kept = frame.filter(pl.Series(chosen))
        return kept.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(schema)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, pa.ArrowException, OSError):
        return None


def _by_pyarrow(source: pq.ParquetFile, span: _Span, chosen: Mask) -> Iterator[pa.RecordBatch]:
    start = 0
    for batch in source.iter_batches(
        _batch_rows(span), list(range(span.first, span.last)), use_threads=False
    ):
        yield from _filtered(batch, chosen[start : start + batch.num_rows])
        start += batch.num_rows


def _batch_rows(span: _Span) -> int:
    bytes_per_row = max(1, span.num_bytes // (span.stop - span.start))
    return max(1, min(MAX_BATCH_ROWS, BATCH_BYTES // bytes_per_row))


def _filtered(batch: pa.RecordBatch, mask: Mask) -> list[pa.RecordBatch]:
    if not mask.any():
        return []
    if mask.all():
        return [batch]
    try:
        return [batch.filter(pa.array(mask))]
    except pa.ArrowNotImplementedError:
        # Views cannot be filtered yet; slices of runs can be had of any type.
        edges = np.flatnonzero(np.diff(mask, prepend=False, append=False)).reshape(-1, 2)
        return [batch.slice(start, stop - start) for start, stop in edges.tolist()]
