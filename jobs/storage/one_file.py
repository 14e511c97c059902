"""A single file as a storage of its own, with a hidden folder beside it for all that is not it."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pyarrow as pa

from rsr.jobs.storage.base import Storage, StoredFile
from rsr.jobs.storage.local import LocalStorage
from rsr.jobs.storage.locks import Holder


def folder_beside(path: str) -> str:
    """The hidden folder that belongs to a file, a path or a URL."""
    around, slash, name = path.rpartition("/")
    return f"{around}{slash}.{name}.rsr"


@dataclass(frozen=True, slots=True)
class OneFileStorage:
    """The file `file_name` of the storage `around`, by whatever name it is asked for.

    title: what it is called for people. beside: where names below `folder` lead, without that
    prefix; the only other files.
    """

    read_ahead_bytes: ClassVar[int] = LocalStorage.read_ahead_bytes
    title: str
    around: Storage
    file_name: str
    folder: str
    beside: Storage

    def describe(self, name: str = "") -> str:
        if not name:
            return self.title
        storage, there = self._place(name)
        return storage.describe(there)

    def find(self, name: str) -> StoredFile | None:
        storage, there = self._place(name)
        found = storage.find(there)
        return None if found is None else replace(found, name=name)

    def list(self, folder: str = "") -> list[StoredFile]:
        if folder:
            storage, there = self._place(folder)
            return [self._beside_as_named(file) for file in storage.list(there)]
        found = self.around.find(self.file_name)
        return [*([found] if found else []), *map(self._beside_as_named, self.beside.list())]

    def read(self, name: str, *, last_bytes: int | None = None) -> bytes:
        storage, there = self._place(name)
        return storage.read(there, last_bytes=last_bytes)

    def open(self, name: str) -> pa.NativeFile:
        storage, there = self._place(name)
        return storage.open(there)

    def writing(self, name: str) -> AbstractContextManager[Path]:
        storage, there = self._place(name)
        return storage.writing(there)

    def write(self, name: str, content: bytes) -> None:
        storage, there = self._place(name)
        storage.write(there, content)

    def remove(self, name: str) -> None:
        storage, there = self._place(name)
        storage.remove(there)

    def remove_folder(self, folder: str) -> None:
        storage, there = self._place(folder)
        storage.remove_folder(there)

    def remove_leftovers(self, *, of: str | None = None) -> None:
        self.beside.remove_leftovers()
        self.around.remove_leftovers(of=self.file_name)

    def hold(self, name: str) -> AbstractContextManager[None]:
        storage, there = self._place(name)
        return storage.hold(there)

    def holder(self, name: str) -> Holder | None:
        storage, there = self._place(name)
        return storage.holder(there)

    def _place(self, name: str) -> tuple[Storage, str]:
        if name == self.folder:
            return self.beside, ""
        if name.startswith(f"{self.folder}/"):
            return self.beside, name.removeprefix(f"{self.folder}/")
        return self.around, self.file_name

    def _beside_as_named(self, file: StoredFile) -> StoredFile:
        return replace(file, name=f"{self.folder}/{file.name}")
