"""OUTPUT called `x.jsonl`: the rows of a finished Parquet file, one JSON object a line.

The Parquet file stays in the hidden folder beside it: its types are exact, JSON's are not, and
what reads scores reads that one. Says too whether the lines are still those that were written.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Self

import pyarrow as pa
import pyarrow.types as arrow

from rsr.jobs.errors import UsageError
from rsr.jobs.shards.json_file import JSON_TEXT_KEY, JsonFile, Tally
from rsr.jobs.shards.parquet import open_parquet
from rsr.jobs.shards.score_columns import is_score_column
from rsr.jobs.storage import Storage, locate, open_storage
from rsr.jobs.storage.hashing import HashingFile, hash_file
from rsr.jobs.storage.one_file import folder_beside

LINES_SUFFIXES = (".jsonl", ".ndjson")
ROWS, SEAL = "rows.parquet", "lines.json"
"""In the hidden folder: the rows as Parquet, and what the lines are known again by."""
BATCH_ROWS = 1024


def is_lines(path: str) -> bool:
    """Whether a file's name says that it is one JSON object a line, uncompressed."""
    return path.lower().endswith(LINES_SUFFIXES)


@dataclass(frozen=True, slots=True)
class Seal:
    """What lines are known again by. version: see `StoredFile.version`."""

    num_bytes: int
    blake2b: str
    version: str

    @classmethod
    def parse(cls, text: bytes) -> Self | None:
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            return None


@dataclass(frozen=True, slots=True)
class LinesFile:
    """A file of JSON lines that a run writes. Making one touches nothing.

    path: a local path, or an object store's URL.
    """

    path: str

    @property
    def rows_path(self) -> str:
        """The Parquet file of the same rows."""
        return self.beside.describe(ROWS)

    @property
    def beside(self) -> Storage:
        return open_storage(folder_beside(self.path))

    def write(self) -> None:
        """Write the lines of the Parquet file, whole or not at all, and then their seal."""
        around, name = locate(self.path)
        with around.writing(name) as temporary, temporary.open("wb") as file:
            sink = HashingFile(file)
            with open_parquet(self.rows_path) as rows:
                for batch in rows.iter_batches(BATCH_ROWS):
                    for line in lines_of(batch):
                        sink.write(line)
        found = around.find(name)
        if found is None:
            raise FileNotFoundError(f"{self.path} was removed as it was written")
        seal = Seal(sink.num_bytes, sink.hexdigest(), found.version)
        self.beside.write(SEAL, json.dumps(asdict(seal)).encode())

    def is_whole(self, *, by_content: bool = False) -> bool:
        """Whether the lines are there, and those that were written.

        by_content: read them even if nobody has written to the file since.
        """
        around, name = locate(self.path)
        found, seal = around.find(name), self._seal()
        if found is None or seal is None or found.num_bytes != seal.num_bytes:
            return False
        if found.version == seal.version and not by_content:
            return True
        with around.open(name) as file:
            return hash_file(file) == seal.blake2b

    def exists(self) -> bool:
        around, name = locate(self.path)
        return around.find(name) is not None

    def remove(self) -> None:
        around, name = locate(self.path)
        around.remove(name)

    def remove_leftovers(self) -> None:
        """Remove what a writer that died has left of the lines."""
        around, name = locate(self.path)
        around.remove_leftovers(of=name)

    def _seal(self) -> Seal | None:
        try:
            return Seal.parse(self.beside.read(SEAL))
        except (FileNotFoundError, NotADirectoryError):
            return None


def scored_rows_of(path: str) -> str:
    """The Parquet file behind the lines that a run wrote; any other path as it is.

    Raises `UsageError` if somebody has changed the lines since: the two would differ.
    """
    lines = LinesFile(path)
    if not is_lines(path) or lines.beside.find(ROWS) is None:
        return path
    if not lines.is_whole():
        raise UsageError(
            f"{path} is not as rsr wrote it: scores are read from {lines.rows_path}, whose rows "
            "would be others. Name that file, or let the command that wrote it write it again"
        )
    return lines.rows_path


def holds_scores(path: str) -> bool:
    """Whether the first entry of a JSON file has the columns of `rsr score`."""
    first, _ = next(JsonFile(path, max_entries=1).entries(Tally()), (None, 0))
    return any(is_score_column(name) for name in first or ())


def require_json_types(schema: pa.Schema, output: str) -> None:
    """Raises `UsageError` for a column that JSON has no form for, or two of one name."""
    for field in schema:
        told = None
        if schema.names.count(field.name) > 1:
            told = "stands twice in the rows"
        elif not (_is_text(field.type) or _is_json(field.type)):
            told = f"is {field.type}, which JSON has no form for"
        if told is not None:
            stem = output.rpartition(".")[0]
            raise UsageError(
                f"OUTPUT {output}: column {field.name!r} {told}; name OUTPUT {stem}.parquet"
            )


def lines_of(batch: pa.RecordBatch) -> Iterator[bytes]:
    """Each row as a line. Dates, times and decimals are text; NaN and infinities are null."""
    columns = [_values(batch.column(n), field) for n, field in enumerate(batch.schema)]
    names = batch.schema.names
    for values in zip(*columns, strict=True):
        row = dict(zip(names, values, strict=True))
        text = json.dumps(row, ensure_ascii=False, allow_nan=False)
        yield text.encode("utf-8", "backslashreplace") + b"\n"


def _values(column: "pa.Array[Any]", field: "pa.Field[Any]") -> list[Any]:
    if JSON_TEXT_KEY in (field.metadata or {}):
        return [None if text is None else json.loads(text) for text in column.to_pylist()]
    values = (column.cast(pa.string()) if _is_text(field.type) else column).to_pylist()
    return [_finite(value) for value in values] if _has_floats(field.type) else values


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return value


def _is_text(kind: pa.DataType) -> bool:
    """Whether values are written as the text that Arrow makes of them, which is exact."""
    is_time = arrow.is_date(kind) or arrow.is_timestamp(kind) or arrow.is_time(kind)
    return is_time or arrow.is_decimal(kind)


def _is_json(kind: pa.DataType) -> bool:
    element = _element(kind)
    if element is not None:
        return _is_json(element)
    if arrow.is_struct(kind):
        fields = list(kind.fields)
        is_named_once = len({field.name for field in fields}) == len(fields)
        return is_named_once and all(_is_json(field.type) for field in fields)
    is_number = arrow.is_integer(kind) or arrow.is_floating(kind)
    is_string = arrow.is_string(kind) or arrow.is_large_string(kind) or arrow.is_string_view(kind)
    return is_number or is_string or arrow.is_boolean(kind) or arrow.is_null(kind)


def _has_floats(kind: pa.DataType) -> bool:
    element = _element(kind)
    if element is not None:
        return _has_floats(element)
    if arrow.is_struct(kind):
        return any(_has_floats(field.type) for field in kind.fields)
    return arrow.is_floating(kind)


def _element(kind: pa.DataType) -> pa.DataType | None:
    """The type of the values of a list or a dictionary; None of any other type."""
    if (
        arrow.is_dictionary(kind)
        or arrow.is_list(kind)
        or arrow.is_large_list(kind)
        or arrow.is_fixed_size_list(kind)
    ):
        element: pa.DataType = kind.value_type
        return element
    return None
