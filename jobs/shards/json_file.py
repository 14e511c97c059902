"""JSON files as their entries: one JSON object a line, or one list of objects, compressed or not.

Also says what a file seems to be that holds neither. Knows nothing of Parquet or trajectories.
"""

import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, TypeAlias

import pyarrow as pa

from rsr.jobs.errors import UsageError
from rsr.jobs.storage import StorageError, locate
from rsr.jobs.storage.hashing import HashingReader

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
COMPRESSIONS: dict[str, Literal["gzip", "bz2", "zstd"]] = {
    "gz": "gzip",
    "bz2": "bz2",
    "zst": "zstd",
}
"""Suffixes that may follow a JSON file's own, and what Arrow calls each."""
JSON_NAME = re.compile(
    r"(?P<stem>.*[^/])\.(?P<kind>jsonl|ndjson|json)(?:\.(?P<compression>gz|bz2|zst))?",
    re.IGNORECASE | re.DOTALL,
)

JSON_TEXT_KEY = b"rsr_json_text"
"""Key in a staged column's metadata: it holds values as JSON text, strings in their quotes."""

BAD_ENTRIES_NAMED = 3
PEEK_BYTES = 512
SHOWN_CHARACTERS = 60
SIGNATURES = (
    (b"PAR1", "is a Parquet file; name it .parquet"),
    (b"\x1f\x8b", "is compressed with gzip; add .gz to its name"),
    (b"BZh", "is compressed with bzip2; add .bz2 to its name"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd; add .zst to its name"),
    (b"ARROW1", "is an Arrow file; write it as Parquet"),
    (b"PK\x03\x04", "is a zip archive; unpack it"),
)
UTF_16 = "is UTF-16 text; convert it: iconv -f utf-16 -t utf-8"

Row: TypeAlias = dict[str, Any]


def is_json(path: str) -> bool:
    """Whether a file's name says that it holds JSON."""
    return JSON_NAME.fullmatch(path) is not None


@dataclass(slots=True)
class Tally:
    """What was met in reading a file once. bad: numbers of the first entries that are no objects.

    num_with_comma: lines that would be objects but for a comma at the end. content_blake2b: of the
    file as it is stored, once all of it was read.
    """

    num_entries: int = 0
    num_objects: int = 0
    num_with_comma: int = 0
    bad: list[int] = field(default_factory=list)
    first_bad: str = ""
    content_blake2b: str = ""

    @property
    def num_bad(self) -> int:
        return self.num_entries - self.num_objects

    def add(self, entry: Any, text: str) -> None:
        self.num_entries += 1
        if isinstance(entry, dict):
            self.num_objects += 1
            return
        text = text.strip()
        self.num_with_comma += text.startswith("{") and text.endswith(",")
        self.first_bad = self.first_bad or text[:SHOWN_CHARACTERS]
        if len(self.bad) < BAD_ENTRIES_NAMED:
            self.bad.append(self.num_entries)


class JsonFile:
    """A JSON file that can be read any number of times, from front to back.

    A `.json` file is one list, and is held in memory; one that holds JSON lines all the same is
    read as such. Any other is read a line at a time. max_entries: of which no more are read.
    """

    def __init__(self, path: str, max_entries: int | None = None) -> None:
        name = JSON_NAME.fullmatch(path)
        assert name is not None, "only files of JSON names are opened as JSON"
        self.path = path
        self._max_entries = max_entries
        self._compression = COMPRESSIONS.get((name["compression"] or "").lower())
        self._is_list = name["kind"].lower() == "json"

    def entries(self, tally: Tally) -> Iterator[tuple[Row | None, int]]:
        """Each entry with the length of its text; None is an entry that is no JSON object.

        Raises `UsageError` if the file can be told to be of another kind.
        """
        entries = self._list(tally) if self._is_list else None
        entries = self._lines(tally) if entries is None else entries
        for entry, text, length in islice(entries, self._max_entries):
            tally.add(entry, text)
            yield (entry if isinstance(entry, dict) else None), length

    def require_objects(self, tally: Tally) -> None:
        """Raises `UsageError`, saying what the file seems to be, if no entry is an object."""
        num_objects, first_bad = tally.num_objects, tally.first_bad
        if num_objects >= tally.num_with_comma and (num_objects or not tally.num_entries):
            return
        if self._is_list:
            problem = "no entry of its list is a JSON object"
        elif first_bad.startswith("["):
            problem = "it seems to hold one JSON list; name it .json"
        elif tally.num_with_comma:
            problem = "its lines end in commas; expected one JSON object a line and nothing else"
        else:
            problem = f"expected one JSON object a line; the first line is {first_bad!r}"
        raise UsageError(f"{self.path} holds no row: {problem}")

    def _list(self, tally: Tally) -> Iterator[tuple[Any, str, int]] | None:
        """The entries of the one list in the file; None if it holds JSON lines."""
        with self._text(tally) as lines:
            text = lines.read()
        try:
            loaded = json.loads(text)
        except (ValueError, RecursionError) as error:
            first_line = text.lstrip().partition("\n")[0]
            if isinstance(parse_json(first_line), dict):
                self._is_list = False
                return None
            raise UsageError(f"{self.path} is not JSON: {error}") from error
        if not isinstance(loaded, list):
            raise UsageError(
                f"{self.path} holds one {type(loaded).__name__}; expected a list of rows, or a row "
                "a line in a .jsonl file"
            )
        length = len(text) // max(1, len(loaded))
        return ((entry, "", length) for entry in loaded)

    def _lines(self, tally: Tally) -> Iterator[tuple[Any, str, int]]:
        with self._text(tally) as lines:
            for line in lines:
                if line.strip():
                    yield parse_json(line), line, len(line)

    @contextmanager
    def _text(self, tally: Tally) -> Iterator[io.TextIOWrapper]:
        storage, name = locate(self.path)
        with storage.open(name) as file:
            hashed = HashingReader(file)
            content: Any = hashed
            if self._compression is not None:
                content = pa.CompressedInputStream(
                    pa.PythonFile(hashed, mode="r"), self._compression
                )
            buffered = io.BufferedReader(content, storage.read_ahead_bytes)
            try:
                _require_text(buffered.peek(PEEK_BYTES)[:PEEK_BYTES], self.path)
                # Only "\n" ends a line: U+2028 and its like are legal inside a JSON string.
                yield io.TextIOWrapper(
                    buffered, encoding="utf-8-sig", errors="replace", newline="\n"
                )
            except StorageError:
                raise
            except OSError as error:
                raise UsageError(f"{self.path} cannot be read: {error}") from error
            tally.content_blake2b = hashed.hexdigest()


def _require_text(head: bytes, path: str) -> None:
    """Raises `UsageError` if a file that begins like this is not JSON in UTF-8."""
    for signature, problem in SIGNATURES:
        if head.startswith(signature):
            raise UsageError(f"{path} {problem}")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or head.count(0) > len(head) // 4:
        raise UsageError(f"{path} {UTF_16}")


def parse_json(text: str) -> Any:
    """The value, or the text itself where it is not JSON."""
    try:
        return json.loads(text)
    # Nested a thousand deep is no conversation either.
    except (ValueError, RecursionError):
        return text
