"""Lists of responses as rows of their own: one for each entry, everything beside it repeated.

Done once, before a run begins and into a Parquet file of its own, so that whatever comes after
sees plain rows. Knows Arrow tables; knows nothing of trajectories.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rsr.jobs.errors import UsageError, first_line
from rsr.jobs.shards.columns import require_columns
from rsr.jobs.shards.json_file import JSON_TEXT_KEY, parse_json
from rsr.jobs.shards.parquet import file_state, fingerprint, open_parquet
from rsr.jobs.shards.reader import READ_BATCH_BYTES, READ_BATCH_ROWS, ShardReader
from rsr.jobs.shards.writer import ShardWriter
from rsr.jobs.storage import StorageError, locate
from rsr.jobs.storage.hashing import HashingFile

SOURCE_ROW = "source_row"
RESPONSE_INDEX = "response_index"
ADDED = (pa.field(SOURCE_ROW, pa.int64()), pa.field(RESPONSE_INDEX, pa.int32()))
"""The row of the input file that a row was made of, and which entry of its list; from 0.

Their names do not begin with `rsr`: they belong to the rows, and stay when another student scores
the output.
"""

EXPLODED_KEY = b"rsr_exploded_from"
"""Key of the source's fingerprint in the metadata of what was made of it."""


class Exploder:
    """Makes a row of each entry of a table's lists, a batch of consecutive rows at a time.

    columns: the lists, the responses' first; the others' must be as long in every row, or null or
    empty, which leaves null. A row whose responses are null or empty stays one row, with null in
    their place and as its index, so that every row of the table is found again. schema: of what
    comes out. path: the file, for messages. Raises `UsageError` if the table has no such lists.
    """

    def __init__(self, columns: Sequence[str], schema: pa.Schema, path: str) -> None:
        self._path, self._columns = path, list(dict.fromkeys(columns))
        require_columns(schema, self._columns, path)
        for name in (SOURCE_ROW, RESPONSE_INDEX):
            if name in schema.names:
                raise UsageError(
                    f"{path} has a column {name!r}, which --explode-responses adds; rename it"
                )
        fields = [self._entry(f) if f.name in self._columns else f for f in schema]
        metadata: Any = schema.metadata
        self.schema = pa.schema([*fields, *ADDED], metadata=metadata)
        self._first_row = 0

    def rows(self, batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        """The rows of the next batch, no more and no larger at a time than rows are read."""
        lists = {name: _as_lists(batch, name) for name in self._columns}
        lengths = {name: _lengths(column) for name, column in lists.items()}
        self._require_equal(lengths)
        responses = lengths[self._columns[0]]
        # Every row has a place, also for want of entries.
        places = np.maximum(responses, 1)
        rows = np.repeat(np.arange(batch.num_rows), places)
        index = np.arange(len(rows)) - np.repeat(np.cumsum(places) - places, places)
        entries = {
            name: (pc.list_flatten(column), _entry_of(lengths[name], rows, index))
            for name, column in lists.items()
        }
        step = max(1, min(READ_BATCH_ROWS, READ_BATCH_BYTES * batch.num_rows // (batch.nbytes + 1)))
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            columns = []
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                if name in entries:
                    values, chosen = entries[name]
                    columns.append(rows_at(values, chosen[part]))
                else:
                    columns.append(rows_at(column, pa.array(rows[part])))
            has_none = responses[rows[part]] == 0
            columns += [
                pa.array(self._first_row + rows[part], ADDED[0].type),
                pa.array(index[part].astype(np.int32), ADDED[1].type, mask=has_none),
            ]
            yield pa.RecordBatch.from_arrays(columns, schema=self.schema)
        self._first_row += batch.num_rows

    def _entry(self, field: "pa.Field[Any]") -> "pa.Field[Any]":
        """The column of a list's entries, in the list's place."""
        kind: Any = field.type
        if pa.types.is_null(kind) or JSON_TEXT_KEY in (field.metadata or {}):
            return field.with_nullable(True)
        if not _is_list(kind):
            raise UsageError(
                f"column {field.name!r} of {self._path} is {kind}; expected lists to make rows of"
            )
        return field.with_type(kind.value_type).with_nullable(True)

    def _require_equal(self, lengths: dict[str, NDArray[np.int64]]) -> None:
        """Raises `UsageError` where a list beside the responses has entries of no response."""
        first, *others = self._columns
        for name in others:
            differs = (lengths[name] != lengths[first]) & (lengths[name] > 0)
            for row in np.flatnonzero(differs)[:1].tolist():
                raise UsageError(
                    f"row {self._first_row + row} of {self._path} has {lengths[first][row]} "
                    f"{first!r} and {lengths[name][row]} {name!r}; mend it, or leave out "
                    f"--explode-column {name}, and every row keeps the whole list"
                )


def explode_parquet(
    source: str, target: str, columns: Sequence[str], *, max_rows: int | None = None
) -> None:
    """Write a row for each entry of a Parquet file's lists; see `Exploder`.

    max_rows: stop once there are as many. Raises `UsageError` if the file cannot be read, if its
    lists are not what they should be, or if it is written to meanwhile.
    """
    state = file_state(source)
    storage, name = locate(target)
    with open_parquet(source) as file, storage.writing(name) as temporary:
        exploder = Exploder(columns, file.schema_arrow, source)
        metadata = {**(exploder.schema.metadata or {}), EXPLODED_KEY: state.fingerprint.encode()}
        schema = exploder.schema.with_metadata(metadata)
        with temporary.open("wb") as opened, ShardWriter(HashingFile(opened), schema, file) as out:
            for batch in _first_rows(_exploded(source, exploder, file.metadata.num_rows), max_rows):
                out.add(batch.replace_schema_metadata(metadata))
        if file_state(source) != state:
            raise UsageError(f"{source} was written while it was read; start again when it is done")


def is_exploded_from(path: str, source: str) -> bool:
    """Whether a file was made of the Parquet file `source` as it is now, by its fingerprint."""
    with open_parquet(path) as file:
        metadata = file.schema_arrow.metadata or {}
    return metadata.get(EXPLODED_KEY) == fingerprint(source).encode()


def rows_at(array: "pa.Array[Any]", rows: "pa.Array[Any]") -> "pa.Array[Any]":
    """These rows of an array of any type; null where `rows` is: views cannot be taken from yet."""
    try:
        return array.take(rows)
    except pa.ArrowNotImplementedError:
        nothing = pa.nulls(1, array.type)
        parts = [nothing if row is None else array.slice(row, 1) for row in rows.to_pylist()]
        return pa.concat_arrays(parts or [array.slice(0, 0)])


def _exploded(source: str, exploder: Exploder, num_rows: int) -> Iterator[pa.RecordBatch]:
    try:
        for batch in ShardReader(source).rows(0, num_rows):
            yield from exploder.rows(batch)
    except StorageError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"{source} cannot be read: {first_line(error)}") from error


def _first_rows(
    batches: Iterator[pa.RecordBatch], max_rows: int | None
) -> Iterator[pa.RecordBatch]:
    left = max_rows
    for batch in batches:
        yield batch if left is None else batch.slice(0, left)
        if left is not None:
            left -= min(left, batch.num_rows)
            if not left:
                return


def _is_list(kind: pa.DataType) -> bool:
    return (
        pa.types.is_list(kind)
        or pa.types.is_large_list(kind)
        or pa.types.is_fixed_size_list(kind)
        or pa.types.is_list_view(kind)
        or pa.types.is_large_list_view(kind)
    )


def _as_lists(batch: pa.RecordBatch, name: str) -> "pa.Array[Any]":
    """The column as lists, also where it is null throughout or holds each value's JSON text."""
    column, field = batch.column(name), batch.schema.field(name)
    if pa.types.is_null(column.type):
        return pa.nulls(len(column), pa.list_(pa.null()))
    if JSON_TEXT_KEY not in (field.metadata or {}):
        return column
    lists = [None if text is None else _entries_of_text(text) for text in column.to_pylist()]
    return pa.array(lists, pa.list_(column.type))


def _entries_of_text(text: str) -> list[str | None]:
    """The JSON text of each entry; a value that is no list is its own only entry."""
    value = parse_json(text)
    if not isinstance(value, list):
        return [text]
    return [None if entry is None else json.dumps(entry, ensure_ascii=True) for entry in value]


def _lengths(column: "pa.Array[Any]") -> NDArray[np.int64]:
    lengths = pc.list_value_length(column).fill_null(0)
    return np.asarray(lengths, np.int64)


def _entry_of(
    lengths: NDArray[np.int64], rows: NDArray[np.int64], index: NDArray[np.int64]
) -> "pa.Array[Any]":
    """Where each row's entry stands among all entries; null where its list has none."""
    starts = np.cumsum(lengths) - lengths
    places: pa.Array[Any] = pa.array(starts[rows] + index, mask=lengths[rows] == 0)
    return places
