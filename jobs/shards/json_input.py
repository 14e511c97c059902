"""JSON input as Parquet: rewritten once, row for row, so that everything downstream sees Parquet.

JSON lines are streamed, twice: first for the type that a column's values have in common, then to
write. A `.json` file is one list, and is held in memory. Knows nothing of trajectories.
"""

import io
import json
import logging
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from rsr.jobs.errors import UsageError
from rsr.jobs.shards.reader import parse_json
from rsr.jobs.storage import locate

logger = logging.getLogger(__name__)

CHUNK_BYTES = 4 << 20
"""JSON text read, and written as a row group, at a time."""

BAD_ENTRIES_NAMED = 3

Row = dict[str, Any]
ColumnType: TypeAlias = pa.DataType | None
"""None: the column holds each value's JSON text, strings in their quotes."""


_one_at_a_time = threading.Lock()
"""Python parses no faster on several threads, and each would hold a chunk, or a `.json` file."""


class _NotOfTypeError(Exception):
    """A column's values do not fit the type that their chunks seemed to have in common."""


def stage_json(source: str | Path, target: str | Path) -> None:
    """Rewrite a `.json` (one list) or JSON-lines file as Parquet, one row for each entry.

    Keys become columns. A column whose values have no common Arrow type holds their JSON text.
    A line that is not a JSON object becomes a row of nulls, so that every line has its row.
    Raises `UsageError` if a `.json` file is not a list of objects, or has no text in it.
    """
    with _one_at_a_time:
        _stage(str(source), target)


def _stage(source: str, target: str | Path) -> None:
    types: dict[str, ColumnType] = {}
    for chunk in _chunks(source, warn=True):
        for name, kind in _column_types(chunk).items():
            types[name] = _common_type(types[name], kind) if name in types else kind
    storage, target_name = locate(target)
    while True:
        try:
            with storage.writing(target_name) as temporary:
                _write(source, temporary, types)
            return
        except _NotOfTypeError as error:
            types[str(error)] = None


def _write(source: str, target: Path, types: dict[str, ColumnType]) -> None:
    # A table needs a column to have rows.
    names = {_column_name(key): key for key in types} or {"text": "text"}
    schema = pa.schema([(name, types.get(key) or pa.string()) for name, key in names.items()])
    with pq.ParquetWriter(target, schema, compression="zstd") as writer:
        for chunk in _chunks(source):
            arrays = [
                _column([row.get(key) for row in chunk], types.get(key), key)
                for key in names.values()
            ]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def _column_types(rows: list[Row]) -> dict[str, ColumnType]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: _type_of([row.get(name) for row in rows]) for name in names}


def _type_of(values: list[Any]) -> ColumnType:
    try:
        kind = pa.array(values).type
    except (pa.ArrowException, UnicodeEncodeError, TypeError, OverflowError):
        return None
    return None if _has_empty_struct(kind) else kind


def _has_empty_struct(kind: pa.DataType) -> bool:
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
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pa.ArrowException:
        return None


def _column(values: list[Any], kind: ColumnType, name: str) -> pa.Array:
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


def _chunks(source: str, *, warn: bool = False) -> Iterator[list[Row]]:
    """The file's rows, about `CHUNK_BYTES` of its text at a time."""
    entries = _json_list(source) if source.endswith(".json") else _json_lines(source)
    rows: list[Row] = []
    num_bytes = num_bad = 0
    for number, (entry, entry_bytes) in enumerate(entries, start=1):
        if not isinstance(entry, dict):
            num_bad += 1
            if warn and num_bad <= BAD_ENTRIES_NAMED:
                logger.warning(
                    "%s: entry %d is not a JSON object; it becomes a null row", source, number
                )
        rows.append(entry if isinstance(entry, dict) else {})
        num_bytes += entry_bytes
        if num_bytes >= CHUNK_BYTES:
            yield rows
            rows, num_bytes = [], 0
    if rows:
        yield rows
    if warn and num_bad > BAD_ENTRIES_NAMED:
        logger.warning("%s: %d entries are not JSON objects", source, num_bad)


def _json_list(source: str) -> Iterable[tuple[Any, int]]:
    storage, name = locate(source)
    text = storage.read(name).decode("utf-8-sig", errors="replace")
    try:
        loaded = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{source} is not JSON: {error}") from error
    if not isinstance(loaded, list):
        raise UsageError(f"{source} holds a {type(loaded).__name__}; expected a list of rows")
    size = len(text) // max(1, len(loaded))
    return ((entry, size) for entry in loaded)


def _json_lines(source: str) -> Iterator[tuple[Any, int]]:
    storage, name = locate(source)
    with storage.open(name) as file:
        # Only "\n" ends a line: U+2028 and its like are legal inside a JSON string.
        lines = io.TextIOWrapper(
            io.BufferedReader(file, storage.read_ahead_bytes),
            encoding="utf-8-sig",
            errors="replace",
            newline="\n",
        )
        for line in lines:
            if line.strip():
                yield parse_json(line), len(line)
