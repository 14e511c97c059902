"""JSON input as Parquet: rewritten once, row for row, so that everything downstream sees Parquet.

A file is read twice: first for the type that a column's values have in common, then to write.
Knows nothing of trajectories.
"""

import json
import logging
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import pyarrow as pa
import pyarrow.parquet as pq

from rsr.jobs.errors import UsageError
from rsr.jobs.shards.exploded import Exploder
from rsr.jobs.shards.json_file import JSON_TEXT_KEY, JsonFile, Row, Tally
from rsr.jobs.shards.parquet import open_parquet
from rsr.jobs.storage import locate
from rsr.jobs.storage.hashing import hash_file

logger = logging.getLogger(__name__)

CHUNK_BYTES = 4 << 20
"""JSON text read, and written as a row group, at a time."""

SOURCE_KEY = "rsr_json_blake2b"
"""Key of the source's hash in the metadata of its Parquet: another source has another footer."""

ColumnType: TypeAlias = pa.DataType | None
"""None: the column holds each value's JSON text, strings in their quotes."""


_one_at_a_time = threading.Lock()
"""Python parses no faster on several threads, and each would hold a chunk, or a `.json` file."""


class _NotOfTypeError(Exception):
    """A column's values do not fit the type that their chunks seemed to have in common."""


def stage_json(
    source: str | Path,
    target: str | Path,
    exploded: Sequence[str] = (),
    *,
    max_entries: int | None = None,
) -> None:
    """Rewrite a `.json` (one list) or JSON-lines file as Parquet, one row for each entry.

    exploded: columns of lists that become a row for each of their entries, see `Exploder`.
    max_entries: stop after so many; of such a file `is_made_of` knows nothing.

    Keys become columns. A column whose values have no common Arrow type holds their JSON text.
    A line that is not a JSON object becomes a row of nulls, so that every line has its row.
    Raises `UsageError` if a `.json` file is not a list, if no entry is an object, or if the file
    is written to meanwhile.
    """
    with _one_at_a_time:
        _stage(JsonFile(str(source), max_entries), target, exploded)


def is_made_of(path: str, source: str) -> bool:
    """Whether a Parquet file holds the rows of the JSON file `source` as its content is now.

    path: a staged file, or one written from it.
    """
    with open_parquet(path) as file:
        metadata = file.schema_arrow.metadata or {}
    storage, name = locate(source)
    with storage.open(name) as opened:
        return metadata.get(SOURCE_KEY.encode()) == hash_file(opened).encode()


def _stage(file: JsonFile, target: str | Path, exploded: Sequence[str]) -> None:
    types: dict[str, ColumnType] = {}
    tally = Tally()
    for chunk in _chunks(file, tally):
        for name, kind in _column_types(chunk).items():
            types[name] = _common_type(types[name], kind) if name in types else kind
    file.require_objects(tally)
    _warn_of_bad_entries(file.path, tally)
    storage, target_name = locate(target)
    while True:
        try:
            with storage.writing(target_name) as temporary:
                _write(file, temporary, types, tally.content_blake2b, exploded)
            return
        except _NotOfTypeError as error:
            types[str(error)] = None


def _write(
    file: JsonFile,
    target: Path,
    types: dict[str, ColumnType],
    content_blake2b: str,
    exploded: Sequence[str],
) -> None:
    # A table needs a column to have rows.
    names = {_column_name(key): key for key in types} or {"text": "text"}
    fields = [_field(name, types.get(key, pa.string())) for name, key in names.items()]
    schema = pa.schema(fields, metadata={SOURCE_KEY: content_blake2b})
    tally = Tally()
    exploder = Exploder(exploded, schema, file.path) if exploded else None
    written = exploder.schema if exploder else schema
    with pq.ParquetWriter(target, written, compression="zstd") as writer:
        for chunk in _chunks(file, tally):
            arrays = [
                _column([row.get(key) for row in chunk], types.get(key), key)
                for key in names.values()
            ]
            rows = pa.RecordBatch.from_arrays(arrays, schema=schema)
            parts = exploder.rows(rows) if exploder else iter([rows])
            writer.write_table(pa.Table.from_batches(parts, written))
    if tally.content_blake2b != content_blake2b:
        raise UsageError(f"{file.path} was written while it was read; start again when it is whole")


def _column_types(rows: list[Row]) -> dict[str, ColumnType]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: _type_of([row.get(name) for row in rows]) for name in names}


def _type_of(values: list[Any]) -> ColumnType:
    try:
        kind = pa.array(values).type
    except (pa.ArrowException, UnicodeEncodeError, TypeError, OverflowError):
        return None
    return None if _has_empty_struct(kind) else kind


def _has_empty_struct(kind: Any) -> bool:
    """Whether Parquet cannot hold it: a struct must have fields."""
    if pa.types.is_struct(kind):
        return kind.num_fields == 0 or any(_has_empty_struct(f.type) for f in kind)
    return bool(pa.types.is_list(kind)) and _has_empty_struct(kind.value_type)


def _common_type(first: ColumnType, second: ColumnType) -> ColumnType:
    """The type that holds the values of both."""
    if first is None or second is None:
        return None
    try:
        schemas = [pa.schema([("", first)]), pa.schema([("", second)])]
        both = pa.unify_schemas(schemas, promote_options="permissive")
        return cast(pa.DataType, both.field(0).type)
    except pa.ArrowException:
        return None


def _field(name: str, kind: ColumnType) -> "pa.Field[Any]":
    if kind is None:
        return pa.field(name, pa.string(), metadata={JSON_TEXT_KEY: b"1"})
    return pa.field(name, kind)


def _column(values: list[Any], kind: ColumnType, name: str) -> "pa.Array[Any]":
    if kind is None:
        # `ensure_ascii` keeps even a lone surrogate, as its escape.
        texts = [None if v is None else json.dumps(v, ensure_ascii=True) for v in values]
        return pa.array(texts, pa.string())
    try:
        return pa.array(values, kind)
    except (pa.ArrowException, UnicodeEncodeError, TypeError, OverflowError) as error:
        raise _NotOfTypeError(name) from error


def _column_name(key: str) -> str:
    """A key as a column's name: Parquet has no place for half a surrogate pair."""
    return key.encode("utf-8", "backslashreplace").decode()


def _chunks(file: JsonFile, tally: Tally) -> Iterator[list[Row]]:
    """The file's rows, about `CHUNK_BYTES` of its text at a time; no object is an empty row."""
    rows: list[Row] = []
    num_bytes = 0
    for row, length in file.entries(tally):
        rows.append(row or {})
        num_bytes += length
        if num_bytes >= CHUNK_BYTES:
            yield rows
            rows, num_bytes = [], 0
    if rows:
        yield rows


def _warn_of_bad_entries(path: str, tally: Tally) -> None:
    for number in tally.bad:
        logger.warning("%s: entry %d is not a JSON object; it becomes a null row", path, number)
    if tally.num_bad > len(tally.bad):
        logger.warning("%s: %d entries are not JSON objects", path, tally.num_bad)
