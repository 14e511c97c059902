"""Reading a shard's rows, a bounded piece at a time, and making trajectories of them."""

from collections.abc import Iterator
from types import NoneType
from typing import Any

import pyarrow as pa

from rsr.engine.trajectory import Trajectory
from rsr.jobs.shards.columns import TrajectoryColumns
from rsr.jobs.shards.json_file import JSON_TEXT_KEY, parse_json
from rsr.jobs.shards.parquet import open_parquet, row_groups
from rsr.jobs.shards.shard import Unit

TEXT = (str, NoneType)
ALLOWED: dict[str, tuple[type, ...]] = {
    "prompt": (str, list, NoneType),
    "response": (str, list, NoneType),
    "text": TEXT,
    "system": TEXT,
    "reasoning": TEXT,
    "tools": (str, list, NoneType),
    "chat_template_kwargs": (str, dict, NoneType),
}
"""Types of a column's values, by the field of `Trajectory` that it fills. A column's type sees to
that, except where it holds the JSON text of values without a common type."""

READ_BATCH_ROWS = 256
READ_BATCH_BYTES = 8 << 20
"""Decoded at a time, so that neither many nor long rows fill the memory."""


class ShardReader:
    """Rows of one Parquet file, a bounded piece at a time.

    A row group can only be decoded from its front. It is therefore left open where the last read
    stopped: units of one large row group, read in ascending order, cost each row one decoding per
    reader, however many units there are. Holds a batch and a read-ahead buffer per column.
    Raises `UsageError` if the file is not Parquet, `OSError` or `pa.ArrowException` if it is
    damaged.
    """

    def __init__(self, path: str, columns: list[str] | None = None) -> None:
        self.path = path
        self._columns = columns
        self._file = open_parquet(path)
        self._groups = row_groups(self._file.metadata, columns)
        self._open_group: int | None = None
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._rest: pa.RecordBatch | None = None
        self._position = 0

    def rows(self, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        """Rows [start, stop), touching only their row groups."""
        first = 0
        for index, group in enumerate(self._groups):
            last = first + group.num_rows
            if first < stop and start < last:
                yield from self._rows_of_group(index, first, max(start, first), min(stop, last))
            first = last

    def _rows_of_group(
        self, index: int, first: int, start: int, stop: int
    ) -> Iterator[pa.RecordBatch]:
        if self._open_group != index or self._position > start:
            self._batches = self._file.iter_batches(self._batch_rows(index), [index], self._columns)
            self._rest, self._position = None, first
        # Not to be gone on with, should the next read fail half way.
        self._open_group = None
        while self._position < stop:
            batch = self._rest if self._rest is not None else next(self._batches, None)
            if batch is None:
                raise OSError(f"{self.path} ends at row {self._position}, before its footer says")
            end = self._position + batch.num_rows
            low, high = max(start, self._position), min(stop, end)
            self._rest = batch.slice(high - self._position) if high < end else None
            offset, self._position = self._position, min(stop, end)
            if low < high:
                yield batch.slice(low - offset, high - low)
        self._open_group = index

    def _batch_rows(self, index: int) -> int:
        group = self._groups[index]
        row_bytes = max(1, group.num_bytes // max(1, group.num_rows))
        return max(1, min(READ_BATCH_ROWS, READ_BATCH_BYTES // row_bytes))


def iter_rows(
    path: str, start: int, stop: int, columns: list[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """Rows [start, stop) of a Parquet file in record batches, touching only their row groups."""
    return ShardReader(path, columns).rows(start, stop)


class TrajectoryReader:
    """Reads units; keeps the last one's shard open, for the next is likely to be of the same."""

    def __init__(self, columns: TrajectoryColumns) -> None:
        self._columns = columns
        self._reader: ShardReader | None = None

    def read(self, unit: Unit) -> list[Trajectory]:
        """The unit's rows; a value that cannot be decoded leaves its row empty, no other."""
        if self._reader is None or self._reader.path != unit.shard.path:
            self._reader = ShardReader(unit.shard.path, self._columns.names)
        batches = self._reader.rows(unit.start, unit.stop)
        return [row for batch in batches for row in trajectories_of(batch, self._columns)]


def trajectories_of(batch: pa.RecordBatch, columns: TrajectoryColumns) -> list[Trajectory]:
    """The rows of `batch`; a value that cannot be decoded leaves its row empty, no other."""
    values = {
        kind: decoded(batch.column(name), batch.schema.field(name))
        for kind, name in columns.by_kind.items()
    }
    return [
        _trajectory({kind: column[index] for kind, column in values.items()})
        for index in range(batch.num_rows)
    ]


def read_trajectories(unit: Unit, columns: TrajectoryColumns) -> list[Trajectory]:
    """One unit's rows, as `TrajectoryReader.read` gives them."""
    return TrajectoryReader(columns).read(unit)


def decoded(column: "pa.Array[Any]", field: "pa.Field[Any]") -> list[Any]:
    """The column's values; None in the place of one that is no Unicode, objects for JSON text."""
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:
        values = [_decode_value(value) for value in column]
    if JSON_TEXT_KEY in (field.metadata or {}):
        return [parse_json(value) if isinstance(value, str) else value for value in values]
    return values


def _decode_value(value: "pa.Scalar[Any]") -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return None


def _trajectory(values: dict[str, Any]) -> Trajectory:
    for kind, value in values.items():
        if kind != "messages" and not isinstance(value, ALLOWED[kind]):
            # No conversation: the encoder refuses it, where a row without this value might pass.
            return Trajectory(messages=[value])
    if "messages" in values:
        values = values | {"messages": _messages(values["messages"])}
    return Trajectory(**values)


def _messages(value: Any) -> Any:
    if isinstance(value, str):
        value = parse_json(value)
    elif isinstance(value, list):
        value = [parse_json(m) if isinstance(m, str) else m for m in value]
    return [value] if value is not None and not isinstance(value, list) else value
