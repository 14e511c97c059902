"""Input: which files there are, which of their columns hold trajectories, and how to read them.

A shard is one input file. Everything downstream sees Parquet: JSON files are rewritten as
Parquet once, row for row (`stage_json`). Tables are read with pyarrow, not Polars: Polars
normalises Arrow types on the way in (dictionary keys, maps, fixed-size binary, 256-bit
decimals, time32, nullability), and input columns must leave bit for bit as they came.
Knows nothing of models or scores.
"""

import glob
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rsr.engine.trajectory import Trajectory
from rsr.jobs.errors import UsageError
from rsr.jobs.files import atomic_path

logger = logging.getLogger(__name__)

PARQUET_SUFFIXES = (".parquet", ".pq")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
READ_BATCH_ROWS = 1024
FINGERPRINT_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Shard:
    """One input file.

    path: what is read (for JSON input, its staged Parquet). name: the output's path below the
    output folder. num_rows: rows the run takes of it, from the front. num_bytes: their share of
    the uncompressed trajectory columns, estimated from the footer.
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


def find_inputs(pattern: str) -> list[tuple[Path, str]]:
    """Files behind INPUT (a file, a folder or a glob), each with its path relative to INPUT.

    Raises `UsageError` if there are none, or if two would have the same output.
    """
    if "://" in pattern:
        raise UsageError(f"{pattern}: object stores are not supported yet; give a local path")
    path = Path(pattern)
    if path.is_file():
        found = [(path, path.name)]
    elif path.is_dir():
        found = [(file, str(file.relative_to(path))) for file in _files_of_folder(path)]
    elif glob.has_magic(pattern):
        root = Path(*_fixed_parts(path))
        files = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
        found = [(file, str(file.relative_to(root))) for file in files if file.is_file()]
        if not found:
            raise UsageError(f"no file matches {pattern}")
    else:
        raise UsageError(f"no such file or folder: {pattern}")
    for file, _ in found:
        if file.suffix not in PARQUET_SUFFIXES + JSON_SUFFIXES:
            raise UsageError(
                f"{file}: expected a {', '.join(PARQUET_SUFFIXES + JSON_SUFFIXES)} file"
            )
    named = [(file, str(Path(name).with_suffix(".parquet"))) for file, name in found]
    _require_distinct_outputs(named)
    return named


def _files_of_folder(folder: Path) -> list[Path]:
    visible = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file()
        and not any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)
    )
    parquet = [file for file in visible if file.suffix in PARQUET_SUFFIXES]
    other = [file for file in visible if file.suffix in JSON_SUFFIXES]
    if parquet and other:
        raise UsageError(
            f"{folder} holds both Parquet ({parquet[0].name}, …) and JSON files "
            f"({other[0].name}, …); name one kind with a glob such as '{folder}/**/*.parquet'"
        )
    if not parquet and not other:
        raise UsageError(f"{folder} holds no Parquet, JSON or JSON-lines file")
    return parquet or other


def _fixed_parts(path: Path) -> list[str]:
    fixed: list[str] = []
    for part in path.parts[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return fixed


def _require_distinct_outputs(named: list[tuple[Path, str]]) -> None:
    by_name: dict[str, Path] = {}
    for file, name in named:
        if (other := by_name.setdefault(name, file)) != file:
            raise UsageError(f"{other} and {file} would both become {name}; score them apart")


def open_parquet(path: str | Path) -> pq.ParquetFile:
    """Raises `UsageError` if the file is not Parquet."""
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"{path} cannot be read as Parquet: {reason}") from error


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


def describe_shard(path: str, name: str, columns: TrajectoryColumns, max_rows: int | None) -> Shard:
    """Row count, size and fingerprint from a Parquet footer, nothing else being read."""
    file = open_parquet(path)
    metadata = file.metadata
    num_bytes = sum(
        metadata.row_group(group).column(leaf).total_uncompressed_size
        for group in range(metadata.num_row_groups)
        for leaf in range(metadata.num_columns)
        if metadata.schema.column(leaf).path.split(".")[0] in columns.names
    )
    num_rows = metadata.num_rows if max_rows is None else min(metadata.num_rows, max_rows)
    share = num_rows / max(1, metadata.num_rows)
    return Shard(path, name, num_rows, int(num_bytes * share), _fingerprint(Path(path)))


def _fingerprint(path: Path) -> str:
    """Changes with any rewrite of a Parquet file: its size, and a hash of the footer's end."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - FINGERPRINT_BYTES))
        return f"{size}:{hashlib.sha256(file.read()).hexdigest()[:16]}"


def cut_units(
    shard: Shard, *, max_rows: int, max_bytes: int, kept: Sequence[Unit] = ()
) -> list[Unit]:
    """Contiguous units of at most `max_rows` rows and about `max_bytes` of trajectory text.

    kept: units that need not be cut again, in order of rows and disjoint; the rest is.
    """
    if not shard.num_rows:
        return []
    bytes_per_row = max(1.0, shard.num_bytes / shard.num_rows)
    step = max(1, min(max_rows, int(max_bytes / bytes_per_row)))
    gaps = zip(
        [0, *(unit.stop for unit in kept)],
        [*(unit.start for unit in kept), shard.num_rows],
        strict=True,
    )
    return [
        Unit(shard, start, min(start + step, gap_stop))
        for gap_start, gap_stop in gaps
        for start in range(gap_start, gap_stop, step)
    ]


def read_trajectories(unit: Unit, columns: TrajectoryColumns) -> list[Trajectory]:
    """The unit's rows; a value that cannot be decoded leaves its row empty, not its neighbours'."""
    rows: list[Trajectory] = []
    for batch in iter_rows(unit.shard.path, unit.start, unit.stop, columns.names):
        decoded = {name: _decode(batch.column(name)) for name in columns.names}
        for index in range(batch.num_rows):
            values = {kind: decoded[name][index] for kind, name in asdict(columns).items() if name}
            rows.append(_trajectory(values))
    return rows


def iter_rows(
    path: str, start: int, stop: int, columns: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """Rows [start, stop) of a Parquet file in record batches, touching only their row groups."""
    with open_parquet(path) as file:
        first = 0
        for group in range(file.metadata.num_row_groups):
            last = first + file.metadata.row_group(group).num_rows
            if first < stop and start < last:
                position = first
                for batch in file.iter_batches(READ_BATCH_ROWS, [group], columns):
                    end = position + batch.num_rows
                    low, high = max(start, position), min(stop, end)
                    if low < high:
                        yield batch.slice(low - position, high - low)
                    position = end
            first = last


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
        messages = _parse_json(messages)
    elif isinstance(messages, list):
        messages = [_parse_json(m) if isinstance(m, str) else m for m in messages]
    if messages is not None and not isinstance(messages, list):
        messages = [messages]
    prompt, response = values.get("prompt"), values.get("response")
    return Trajectory(messages=messages, prompt=prompt, response=response, text=values.get("text"))


def _parse_json(text: str) -> Any:
    """The value, or the text itself where it is not JSON: the encoder refuses that row."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def stage_json(source: Path, target: Path) -> None:
    """Rewrite a `.json` (one list) or JSON-lines file as Parquet, one row for each entry.

    Keys become columns. A column whose values have no common Arrow type holds their JSON text.
    A line that is not a JSON object becomes a row of nulls, so that every line has its row.
    Raises `UsageError` if a `.json` file is not a list of objects.
    """
    rows = _read_json_rows(source)
    names = list(dict.fromkeys(name for row in rows for name in row))
    arrays = {name: _json_column([row.get(name) for row in rows]) for name in names}
    table = pa.table(arrays) if names else pa.table({"text": pa.nulls(len(rows), pa.string())})
    with atomic_path(target) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def _read_json_rows(source: Path) -> list[dict[str, Any]]:
    text = source.read_text(encoding="utf-8", errors="replace")
    if source.suffix == ".json":
        try:
            loaded = json.loads(text)
        except ValueError as error:
            raise UsageError(f"{source} is not JSON: {error}") from error
        if not isinstance(loaded, list):
            raise UsageError(f"{source} holds a {type(loaded).__name__}; expected a list of rows")
        entries = loaded
    else:
        # Not splitlines(): U+2028 and its like are legal inside a JSON string.
        entries = [_parse_json(line) for line in text.split("\n") if line.strip()]
    rows = []
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict):
            logger.warning(
                "%s: entry %d is not a JSON object; it becomes a null row", source, number
            )
            entry = {}
        rows.append(entry)
    return rows


def _json_column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, UnicodeEncodeError, TypeError, OverflowError):
        # `ensure_ascii` keeps even a lone surrogate, as its escape.
        texts = [None if v is None else json.dumps(v, ensure_ascii=True) for v in values]
        return pa.array(texts, pa.string())
