"""Input: which files there are, which of their columns hold trajectories, and how to read them.

A shard is one input file, on a disk or an object store. Everything downstream sees Parquet: JSON
files are rewritten as Parquet once (`staging.py`). Tables are read with pyarrow, not Polars: Polars
normalises Arrow types on the way in (dictionary keys, maps, fixed-size binary, 256-bit
decimals, time32, nullability), and input columns must leave bit for bit as they came.
Knows nothing of models or scores.
"""

import glob
import hashlib
import json
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rsr.engine.trajectory import Trajectory
from rsr.jobs.errors import UsageError
from rsr.jobs.storage import is_remote, locate, open_storage

PARQUET_SUFFIXES = (".parquet", ".pq")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
READ_BATCH_ROWS = 256
READ_BATCH_BYTES = 8 << 20
"""Decoded at a time, so that neither many nor long rows fill the memory."""
FINGERPRINT_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Shard:
    """One input file.

    path: what is read, a path or URL (for JSON input, its staged Parquet). name: the output's
    path below the output folder. num_rows: rows the run takes of it, from the front. num_bytes:
    their share of the uncompressed trajectory columns, estimated from the footer.
    """

    path: str
    name: str
    num_rows: int
    num_bytes: int
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows [start, stop) of one shard: what a worker scores at a time and a restart keeps."""

    shard: Shard
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class TrajectoryColumns:
    """Which columns hold the trajectory: `messages`, or `prompt` and `response`, or `text`."""

    messages: str | None = None
    prompt: str | None = None
    response: str | None = None
    text: str | None = None

    @property
    def names(self) -> list[str]:
        return [name for name in asdict(self).values() if name]

    def describe(self) -> str:
        return " + ".join(f"{kind}={name!r}" for kind, name in asdict(self).items() if name)


def find_inputs(pattern: str) -> list[tuple[str, str]]:
    """Files behind INPUT (a file, a folder or a glob), each with its output's path.

    Raises `UsageError` if there are none, or if two would have the same output.
    """
    found = _find_remote(pattern) if is_remote(pattern) else _find_local(pattern)
    for file, _ in found:
        if PurePosixPath(file).suffix not in PARQUET_SUFFIXES + JSON_SUFFIXES:
            raise UsageError(
                f"{file}: expected a {', '.join(PARQUET_SUFFIXES + JSON_SUFFIXES)} file"
            )
    named = [(file, str(PurePosixPath(name).with_suffix(".parquet"))) for file, name in found]
    _require_distinct_outputs(named)
    return named


def _find_local(pattern: str) -> list[tuple[str, str]]:
    path = Path(pattern)
    if path.is_file():
        return [(pattern, path.name)]
    if path.is_dir():
        names = [file.name for file in open_storage(path).list()]
        return [(str(path / name), name) for name in _files_of_folder(pattern, names)]
    if not glob.has_magic(pattern):
        raise UsageError(f"no such file or folder: {pattern}")
    root = Path(*_fixed_parts(path.parts))
    files = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    found = [(str(file), str(file.relative_to(root))) for file in files if file.is_file()]
    if not found:
        raise UsageError(f"no file matches {pattern}")
    return found


def _find_remote(url: str) -> list[tuple[str, str]]:
    storage, name = locate(url.rstrip("/"))
    if not glob.has_magic(url):
        if storage.find(name) is not None:
            return [(url, name)]
        folder = open_storage(url)
        names = [file.name for file in folder.list()]
        if not names:
            raise UsageError(f"no such file or folder: {url}")
        return [(folder.describe(n), n) for n in _files_of_folder(url, names)]
    scheme, _, rest = url.partition("://")
    fixed = "/".join(_fixed_parts(tuple(rest.split("/"))))
    root = open_storage(f"{scheme}://{fixed}")
    matching = _glob_pattern(rest[len(fixed) :].lstrip("/"))
    found = [(root.describe(f.name), f.name) for f in root.list() if matching.fullmatch(f.name)]
    if not found:
        raise UsageError(f"no file matches {url}")
    return found


def _glob_pattern(pattern: str) -> re.Pattern[str]:
    """What `glob` takes, for names that are not on a disk."""
    words = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[!?[^\]]+\])", pattern)
    return re.compile(
        "".join(
            words[part]
            if part in words
            else (f"[^{part[2:]}" if part.startswith("[!") else part)
            if index % 2
            else re.escape(part)
            for index, part in enumerate(parts)
        )
    )


def _files_of_folder(folder: str, names: Sequence[str]) -> list[str]:
    visible = [
        name for name in names if not any(part.startswith((".", "_")) for part in name.split("/"))
    ]
    parquet = [name for name in visible if name.endswith(PARQUET_SUFFIXES)]
    other = [name for name in visible if name.endswith(JSON_SUFFIXES)]
    if parquet and other:
        raise UsageError(
            f"{folder} holds both Parquet ({parquet[0]}, …) and JSON files "
            f"({other[0]}, …); name one kind with a glob such as '{folder}/**/*.parquet'"
        )
    if not parquet and not other:
        raise UsageError(f"{folder} holds no Parquet, JSON or JSON-lines file")
    return parquet or other


def _fixed_parts(parts: tuple[str, ...]) -> list[str]:
    fixed: list[str] = []
    for part in parts[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return fixed


def _require_distinct_outputs(named: list[tuple[str, str]]) -> None:
    by_name: dict[str, str] = {}
    for file, name in named:
        if (other := by_name.setdefault(name, file)) != file:
            raise UsageError(f"{other} and {file} would both become {name}; score them apart")


def open_parquet(path: str | Path, read_dictionary: Sequence[str] = ()) -> pq.ParquetFile:
    """Raises `UsageError` if the file is not Parquet, or its footer makes no sense.

    read_dictionary: columns of strings to read as Arrow dictionaries.
    """
    storage, name = locate(path)
    try:
        # Column chunks are read through a small buffer, not whole: they may be gigabytes.
        file = pq.ParquetFile(
            storage.open(name),
            buffer_size=storage.read_ahead_bytes,
            pre_buffer=False,
            read_dictionary=list(read_dictionary),
        )
        # Read here, where what is wrong with it has a name; kept by pyarrow from then on.
        _ = file.schema_arrow
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"{path} cannot be read as Parquet: {reason}") from error
    return file


def choose_columns(schema: pa.Schema, wanted: TrajectoryColumns, path: str) -> TrajectoryColumns:
    """The trajectory columns of a schema: those named, else the first usual ones there are.

    Raises `UsageError` naming the columns that exist, or the type that was expected.
    """
    chosen = wanted if wanted.names else _usual_columns(schema)
    there = ", ".join(schema.names) or "none"
    if chosen is None:
        raise UsageError(
            f"{path} has no 'messages', 'prompt' and 'response', or 'text' column; it has: "
            f"{there}. Name yours with --messages-column, --prompt-column and "
            "--response-column, or --text-column"
        )
    for name in chosen.names:
        if schema.names.count(name) != 1:
            problem = "more than one" if name in schema.names else "no"
            raise UsageError(f"{path} has {problem} column {name!r}; it has: {there}")
    for name in chosen.names:
        kind = schema.field(name).type
        is_chat = name == chosen.messages and _is_message_list(kind)
        if not (is_chat or _is_text(kind)):
            expected = "a list of {role, content}" if name == chosen.messages else "a string"
            raise UsageError(f"column {name!r} of {path} is {kind}; expected {expected}")
    return chosen


def _usual_columns(schema: pa.Schema) -> TrajectoryColumns | None:
    names = set(schema.names)
    if "messages" in names:
        return TrajectoryColumns(messages="messages")
    if {"prompt", "response"} <= names:
        return TrajectoryColumns(prompt="prompt", response="response")
    return TrajectoryColumns(text="text") if "text" in names else None


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_null(kind)
    )


def _is_message_list(kind: pa.DataType) -> bool:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    item = kind.value_type
    # A list of strings holds messages as JSON text; an empty list may have any item type.
    return pa.types.is_struct(item) or pa.types.is_null(item) or _is_text(item)


@dataclass(frozen=True, slots=True)
class RowGroup:
    """A Parquet row group. num_bytes: uncompressed, of the trajectory columns."""

    num_rows: int
    num_bytes: int


def row_groups(metadata: pq.FileMetaData, columns: Sequence[str] | None) -> list[RowGroup]:
    """The row groups of a file, in order, sized by the given columns or by all."""
    leaves = [
        leaf
        for leaf in range(metadata.num_columns)
        if columns is None or metadata.schema.column(leaf).path.split(".")[0] in columns
    ]
    groups = (metadata.row_group(index) for index in range(metadata.num_row_groups))
    return [
        RowGroup(group.num_rows, sum(group.column(i).total_uncompressed_size for i in leaves))
        for group in groups
    ]


def describe_shard(path: str, name: str, columns: TrajectoryColumns, max_rows: int | None) -> Shard:
    """Row count, size and fingerprint from a Parquet footer, nothing else being read."""
    metadata = open_parquet(path).metadata
    num_bytes = sum(group.num_bytes for group in row_groups(metadata, columns.names))
    num_rows = metadata.num_rows if max_rows is None else min(metadata.num_rows, max_rows)
    share = num_rows / max(1, metadata.num_rows)
    return Shard(path, name, num_rows, int(num_bytes * share), fingerprint(path))


def fingerprint(path: str) -> str:
    """Changes with any rewrite of a Parquet file: its size, and a hash of the footer's end."""
    storage, name = locate(path)
    end = storage.read(name, last_bytes=FINGERPRINT_BYTES)
    return f"{file_size_bytes(path)}:{hashlib.sha256(end).hexdigest()[:16]}"


def file_size_bytes(path: str) -> int:
    storage, name = locate(path)
    found = storage.find(name)
    if found is None:
        raise UsageError(f"{path} is gone")
    return found.num_bytes


def cut_units(
    shard: Shard,
    *,
    max_rows: int,
    max_bytes: int,
    kept: Sequence[Unit] = (),
    groups: Sequence[RowGroup] = (),
) -> list[Unit]:
    """Contiguous units of at most `max_rows` rows and about `max_bytes` of trajectory text.

    A unit is a run of whole row groups, or an even part of one: a row group can only be read
    from its front, so that a unit with the end of one and the front of the next would have two
    decoded for it. kept: rows that need no scoring, in order and disjoint. They leave gaps in the
    units and move none of their borders: which rows are scored together changes the last bits of
    their scores, and an interruption must not. groups: the shard's row groups; without, it counts
    as one.
    """
    gaps = deque(_gaps(kept, shard.num_rows))
    units: list[Unit] = []
    for start, stop in _cut(shard, max_rows, max_bytes, groups):
        while gaps and gaps[0][0] < stop:
            low, high = max(start, gaps[0][0]), min(stop, gaps[0][1])
            if low < high:
                units.append(Unit(shard, low, high))
            if gaps[0][1] > stop:
                break
            gaps.popleft()
    return units


def _cut(
    shard: Shard, max_rows: int, max_bytes: int, groups: Sequence[RowGroup]
) -> Iterator[tuple[int, int]]:
    """Borders of the units of a whole shard."""
    start, num_bytes = 0, 0.0
    for low, high, row_bytes in _pieces(shard, groups):
        step = max(1, min(max_rows, int(max_bytes / row_bytes)))
        fits = high - start <= max_rows and num_bytes + (high - low) * row_bytes <= max_bytes
        if start < low and not fits:
            yield start, low
            start, num_bytes = low, 0.0
        num_bytes += (high - low) * row_bytes
        if high - low > step:
            size = ceil((high - low) / ceil((high - low) / step))
            yield from ((s, min(s + size, high)) for s in range(low, high, size))
            start, num_bytes = high, 0.0
    if start < shard.num_rows:
        yield start, shard.num_rows


def _gaps(kept: Sequence[Unit], num_rows: int) -> Iterator[tuple[int, int]]:
    starts = [0, *(unit.stop for unit in kept)]
    stops = [*(unit.start for unit in kept), num_rows]
    return ((start, stop) for start, stop in zip(starts, stops, strict=True) if start < stop)


def _pieces(shard: Shard, groups: Sequence[RowGroup]) -> Iterator[tuple[int, int, float]]:
    """Row groups, as far as the shard goes: first row, row after the last, bytes of a row, ≥ 1."""
    first = 0
    for group in groups or [RowGroup(shard.num_rows, shard.num_bytes)]:
        last = min(shard.num_rows, first + group.num_rows)
        if first < last:
            yield first, last, max(1.0, group.num_bytes / group.num_rows)
        first += group.num_rows


class ShardReader:
    """Rows of one Parquet file, a bounded piece at a time.

    A row group can only be decoded from its front. It is therefore left open where the last read
    stopped: units of one large row group, read in ascending order, cost each row one decoding per
    reader, however many units there are. Holds a batch and a read-ahead buffer per column.
    Raises `UsageError` if the file is not Parquet, `OSError` or `pa.ArrowException` if it is
    damaged.
    """

    def __init__(self, path: str, columns: Sequence[str] | None = None) -> None:
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
    path: str, start: int, stop: int, columns: Sequence[str] | None = None
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
        rows: list[Trajectory] = []
        for batch in self._reader.rows(unit.start, unit.stop):
            decoded = {name: _decode(batch.column(name)) for name in self._columns.names}
            for index in range(batch.num_rows):
                values = {
                    kind: decoded[name][index]
                    for kind, name in asdict(self._columns).items()
                    if name
                }
                rows.append(_trajectory(values))
        return rows


def read_trajectories(unit: Unit, columns: TrajectoryColumns) -> list[Trajectory]:
    """One unit's rows, as `TrajectoryReader.read` gives them."""
    return TrajectoryReader(columns).read(unit)


def _decode(column: pa.Array) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_decode_value(value) for value in column]


def _decode_value(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return None


def _trajectory(values: dict[str, Any]) -> Trajectory:
    messages = values.get("messages")
    if isinstance(messages, str):
        messages = parse_json(messages)
    elif isinstance(messages, list):
        messages = [parse_json(m) if isinstance(m, str) else m for m in messages]
    if messages is not None and not isinstance(messages, list):
        messages = [messages]
    prompt, response = values.get("prompt"), values.get("response")
    return Trajectory(messages=messages, prompt=prompt, response=response, text=values.get("text"))


def parse_json(text: str) -> Any:
    """The value, or the text itself where it is not JSON: the encoder refuses that row."""
    try:
        return json.loads(text)
    # Nested a thousand deep is no conversation either.
    except (ValueError, RecursionError):
        return text
