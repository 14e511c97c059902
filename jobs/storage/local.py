"""A folder on a disk."""

import glob
import os
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import ClassVar

import pyarrow as pa

from rsr.jobs.storage.atomic import TEMPORARY_NAME, atomic_path
from rsr.jobs.storage.base import StoredFile
from rsr.jobs.storage.locks import Holder, find_local_holder, hold_local
from rsr.jobs.storage.walk import LEADS_NOWHERE


@dataclass(frozen=True, slots=True)
class LocalStorage:
    """A folder. Making one touches nothing; the first write makes it."""

    # The kernel reads ahead by itself; what fits a core's cache is copied faster.
    read_ahead_bytes: ClassVar[int] = 256 << 10
    root: Path

    def describe(self, name: str = "") -> str:
        return str(self.root / name)

    def find(self, name: str) -> StoredFile | None:
        try:
            status = (self.root / name).stat()
        except OSError as error:
            if error.errno in LEADS_NOWHERE:
                return None
            raise
        version = f"{status.st_size}-{status.st_mtime_ns}"
        return StoredFile(name, status.st_size, status.st_mtime, version)

    def list(self, folder: str = "") -> list[StoredFile]:
        names = sorted(
            (Path(parent) / file).relative_to(self.root).as_posix()
            for parent, _, files in os.walk(self.root / folder)
            for file in files
        )
        # A file may be gone by now: somebody is writing here.
        return [found for name in names if (found := self.find(name)) is not None]

    def read(self, name: str, *, last_bytes: int | None = None) -> bytes:
        with (self.root / name).open("rb") as file:
            if last_bytes is not None:
                file.seek(max(0, os.fstat(file.fileno()).st_size - last_bytes))
            return file.read()

    def open(self, name: str) -> pa.NativeFile:
        return pa.OSFile(str(self.root / name), "r")

    def writing(self, name: str) -> AbstractContextManager[Path]:
        return atomic_path(self._inside(name))

    def write(self, name: str, content: bytes) -> None:
        with self.writing(name) as temporary:
            temporary.write_bytes(content)

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError, NotADirectoryError):
            self._inside(name).unlink()

    def remove_folder(self, folder: str) -> None:
        root = self._inside(folder)
        if root.is_symlink():
            root.unlink()
        for parent, folders, files in os.walk(root, topdown=False):
            for file in files:
                (Path(parent) / file).unlink(missing_ok=True)
            for inner in folders:
                path = Path(parent) / inner
                # A link to a folder goes; what it leads to is somebody else's.
                path.unlink() if path.is_symlink() else path.rmdir()
        if root.is_dir():
            root.rmdir()

    def remove_leftovers(self, *, of: str | None = None) -> None:
        if of is None:
            names = [file.name for file in self.list()]
        else:
            # Not by a listing: the file may lie in a folder of everything else.
            wanted = f".{glob.escape(of)}.*"
            names = [path.name for path in self.root.glob(wanted)]
        for name in names:
            if TEMPORARY_NAME.fullmatch(PurePosixPath(name).name):
                self.remove(name)

    def hold(self, name: str) -> AbstractContextManager[None]:
        return hold_local(self._inside(name))

    def holder(self, name: str) -> Holder | None:
        return find_local_holder(self.root / name)

    def _inside(self, name: str) -> Path:
        """The path of a file that may be written or removed.

        Raises `OSError` if it leads out of the root, by its name or by a link on the way.
        """
        path = self.root / name
        if not path.parent.resolve().is_relative_to(self.root.resolve()):
            raise OSError(f"{path} leads out of {self.root}; nothing there is written or removed")
        return path
