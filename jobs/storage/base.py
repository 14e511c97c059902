"""Files under one root, by name: what every kind of storage offers.

Whichever it is, a file appears whole under its name or not at all, and one process at a time can
hold a folder. Knows nothing of what is in the files.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import pyarrow as pa

from rsr.jobs.storage.locks import Holder


class StorageError(OSError):
    """A file that an object store would not give or take, after all tries; says which and why."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a storage, as a listing tells it.

    name: below the storage's root. modified_s: Unix time.

    version: changes with every write: an object store's etag, else size and time of writing.
    """

    name: str
    num_bytes: int
    modified_s: float
    version: str


class Storage(Protocol):
    """Files under one root, by names relative to it with `/` between folders.

    A file that is not there is a `FileNotFoundError`; any other failure is an `OSError`.
    read_ahead_bytes: to ask for at a time of a file that is read from front to back.
    """

    read_ahead_bytes: ClassVar[int]

    def describe(self, name: str = "") -> str:
        """The file's, or the root's, path or URL."""

    def find(self, name: str) -> StoredFile | None:
        """What is known of a file without reading it; None if there is none."""

    def list(self, folder: str = "") -> list[StoredFile]:
        """All files below `folder`, however deep, by name; none if there is no such folder."""

    def read(self, name: str, *, last_bytes: int | None = None) -> bytes:
        """The file, or only its end."""

    def open(self, name: str) -> pa.NativeFile:
        """Open a file that can be read at any position."""

    def writing(self, name: str) -> AbstractContextManager[Path]:
        """A local path whose content becomes the file if the block ends well."""

    def write(self, name: str, content: bytes) -> None: ...

    def remove(self, name: str) -> None:
        """Does nothing if there is no such file."""

    def remove_folder(self, folder: str) -> None:
        """Remove every file below `folder`, however deep."""

    def remove_leftovers(self, *, of: str | None = None) -> None:
        """Remove what killed processes left half-written. Only for who holds the folder.

        of: the name of a file; what is left of it alone goes.
        """

    def hold(self, name: str) -> AbstractContextManager[None]:
        """Hold the lock `name`; raises `locks.HeldError`, with who, if another process does."""

    def holder(self, name: str) -> Holder | None:
        """Who holds the lock `name` now, if somebody does."""
