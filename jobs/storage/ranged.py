"""A remote file, read by ranges of bytes, as a file that can be read at any place."""

import io
from typing import Protocol

from rsr.jobs.storage.base import StoredFile

END_BYTES = 64 << 10
"""Most bytes of a file's end that are kept; pyarrow reads as much to find a footer."""


class HasRanges(Protocol):
    """A storage that can be asked for a part of a file."""

    def read_range(self, name: str, start: int, num_bytes: int) -> bytes:
        """Bytes [start, start + num_bytes) of a file that has them."""


class RangedFile(io.RawIOBase):
    """A remote file: every read is one request, so read in large pieces.

    Keeps the end once it was read: that is where Parquet's footer is, which is looked at twice.
    """

    def __init__(self, storage: HasRanges, file: StoredFile) -> None:
        self._storage = storage
        self._file = file
        self._position = 0
        self._end = b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.num_bytes}
        self._position = max(0, base[whence] + offset)
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._file.num_bytes - self._position)
        num_bytes = left if size is None or size < 0 else min(size, left)
        if not num_bytes:
            return b""
        if num_bytes == left <= len(self._end):
            content = self._end[-num_bytes:]
        else:
            content = self._storage.read_range(self._file.name, self._position, num_bytes)
        if num_bytes == left <= END_BYTES:
            self._end = content
        self._position += len(content)
        return content
