"""The hash by which a written file is known again: BLAKE2b of 16 bytes."""

import hashlib
import io
from typing import Any, BinaryIO, Protocol

HASH_CHUNK_BYTES = 4 << 20


def new_digest() -> hashlib.blake2b:
    """The hash that receipts name: BLAKE2b of 16 bytes."""
    return hashlib.blake2b(digest_size=16)


def hash_bytes(content: bytes) -> str:
    digest = new_digest()
    digest.update(content)
    return digest.hexdigest()


class Readable(Protocol):
    """A file to read from."""

    def read(self, size: int, /) -> bytes: ...


def hash_file(file: Readable) -> str:
    """`hash_bytes` of all that can be read from `file`, a piece at a time."""
    digest = new_digest()
    while chunk := file.read(HASH_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


class HashingFile(io.RawIOBase):
    """A file to write to from front to back, which knows the hash of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = new_digest()
        self.num_bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        self._digest.update(content)
        self.num_bytes += len(content)
        return self._file.write(content)

    def tell(self) -> int:
        return self.num_bytes

    def flush(self) -> None:
        self._file.flush()

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


class HashingReader(io.RawIOBase):
    """A file to read from front to back, which knows the hash of what was read.

    file: is left open.
    """

    def __init__(self, file: Readable) -> None:
        self._file = file
        self._digest = new_digest()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._file.read(len(buffer))
        self._digest.update(content)
        buffer[: len(content)] = content
        return len(content)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()
