"""Opening Parquet files wherever they are, and what their footers say.

Tables are read with pyarrow, not Polars: Polars normalises Arrow types on the way in (dictionary
keys, maps, fixed-size binary, 256-bit decimals, time32, nullability), and input columns must
leave bit for bit as they came.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rsr.jobs.errors import UsageError
from rsr.jobs.storage import locate

FINGERPRINT_BYTES = 64 << 10


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
