"""Opening Parquet files wherever they are, and what their footers say.

Tables are read with pyarrow, not Polars: Polars normalises Arrow types on the way in (dictionary
keys, maps, fixed-size binary, 256-bit decimals, time32, nullability), and input columns must
leave bit for bit as they came.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rsr.jobs.errors import UsageError, first_line
from rsr.jobs.storage import Storage, StorageError, StoredFile, locate
from rsr.jobs.storage.hashing import hash_bytes

END_BYTES = 64 << 10
"""Least bytes of a file's end that go into its fingerprint; a footer may survive shuffled rows."""
MAGIC = b"PAR1"
TRAILER_BYTES = 8
"""The last bytes of a Parquet file: the footer's length, 4 bytes little-endian, and `MAGIC`."""
SIGNATURE_BYTES = 28
"""A footer's signature: a nonce of 12 bytes and a tag of 16."""


def open_parquet(path: str | Path, read_dictionary: Sequence[str] = ()) -> pq.ParquetFile:
    """Raises `UsageError` if the file is not Parquet, is encrypted, or its footer makes no sense;
    `StorageError` if an object store fails.

    read_dictionary: columns of strings to read as Arrow dictionaries.
    """
    storage, name = locate(path)
    try:
        opened = storage.open(name)
        # Column chunks are read through a small buffer, not whole: they may be gigabytes.
        file = pq.ParquetFile(
            opened,
            buffer_size=storage.read_ahead_bytes,
            pre_buffer=False,
            read_dictionary=list(read_dictionary),
        )
        # Read here, where what is wrong with it has a name; kept by pyarrow from then on.
        _ = file.schema_arrow
        is_signed = _footer_is_signed(opened, file.metadata)
    except StorageError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = first_line(error)
        raise UsageError(f"{path} cannot be read as Parquet: {reason}") from error
    if is_signed:
        file.close()
        raise UsageError(f"{path} has encrypted columns; write it without, for rows to be copied")
    return file


def _footer_is_signed(file: pa.NativeFile, metadata: pq.FileMetaData) -> bool:
    """Whether the footer can be read and columns are encrypted.

    Arrow ends the process, without an exception, when it is asked for such a column's sizes. The
    format has a signature after the metadata of such a footer, and of no other (parquet-format,
    Encryption.md, 5.4 "Plaintext Footer Mode").
    """
    file.seek(-TRAILER_BYTES, os.SEEK_END)
    footer_bytes = int.from_bytes(file.read(TRAILER_BYTES)[:4], "little")
    return footer_bytes - metadata.serialized_size == SIGNATURE_BYTES


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


@dataclass(frozen=True, slots=True)
class FileState:
    """What a file was when it was looked at.

    fingerprint: its size and a hash of its end, with all of the Parquet footer; equal for copies,
    and unequal after nearly any rewrite: the footer has every column chunk's size and statistics.
    version: unequal after any write, see `StoredFile.version`; may be unequal for copies, too.
    """

    fingerprint: str
    version: str


def file_state(path: str) -> FileState:
    """Looks at the file's end alone; raises `UsageError` if the file is gone."""
    storage, name = locate(path)
    found = _find(storage, name, path)
    end = _end(storage, name)
    return FileState(f"{found.num_bytes}:{hash_bytes(end)}", found.version)


def fingerprint(path: str) -> str:
    """The fingerprint of a Parquet file's `file_state`."""
    return file_state(path).fingerprint


def file_version(path: str) -> str:
    """Changes with every write of the file; raises `UsageError` if it is gone."""
    storage, name = locate(path)
    return _find(storage, name, path).version


def file_size_bytes(path: str) -> int:
    storage, name = locate(path)
    return _find(storage, name, path).num_bytes


def _find(storage: Storage, name: str, path: str) -> StoredFile:
    found = storage.find(name)
    if found is None:
        raise UsageError(f"{path} is gone")
    return found


def _end(storage: Storage, name: str) -> bytes:
    """The last `END_BYTES`, or the whole Parquet footer where that is longer."""
    end = storage.read(name, last_bytes=END_BYTES)
    if not end.endswith(MAGIC):
        return end
    footer_bytes = int.from_bytes(end[-TRAILER_BYTES:-4], "little") + TRAILER_BYTES
    return end if footer_bytes <= END_BYTES else storage.read(name, last_bytes=footer_bytes)
