"""Where files are kept: a folder on a disk, or a prefix of an object store's bucket.

One interface with two implementations. Whichever it is, a file appears whole under its name or
not at all, and one process at a time can hold a folder. Object stores (`s3://bucket/…`,
`gs://bucket/…`, `az://container/…`) are reached through obstore: typed, no Python dependencies,
conditional puts (which locks need, and pyarrow's and fsspec's file systems lack), and 500s,
timeouts and dropped connections tried again. Knows nothing of what is in the files.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol

import pyarrow as pa

from rsr.jobs.errors import UsageError
from rsr.jobs.files import atomic_path
from rsr.jobs.locks import Holder, find_local_holder, hold_local

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.auth.boto3 import Boto3CredentialProvider
    from obstore.store import AzureStore, GCSStore, S3Store

    Bucket = S3Store | GCSStore | AzureStore

REMOTE_SCHEMES = ("s3", "gs", "az")
READ_AHEAD_BYTES = 1 << 20
RETRY_FOR = timedelta(minutes=3)
"""How long one request is tried again; longer outages are the dispatcher's to survive."""


class StorageError(OSError):
    """A file that an object store would not give or take, after all tries; says which and why."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """name: below the storage's root. modified_s: Unix time.

    version: changes with every write: an object store's etag, else size and time of writing.
    """

    name: str
    num_bytes: int
    modified_s: float
    version: str


class Storage(Protocol):
    """Files under one root, by names relative to it with `/` between folders.

    A file that is not there is a `FileNotFoundError`; any other failure is an `OSError`.
    """

    def describe(self, name: str = "") -> str:
        """The file's, or the root's, path or URL."""

    def find(self, name: str) -> StoredFile | None:
        """What is known of a file without reading it; None if there is none."""

    def list(self, folder: str = "") -> list[StoredFile]:
        """All files below `folder`, however deep, by name; none if there is no such folder."""

    def read(self, name: str, *, last_bytes: int | None = None) -> bytes:
        """The file, or only its end."""

    def open(self, name: str) -> pa.NativeFile:
        """For reading at any place."""

    def writing(self, name: str) -> AbstractContextManager[Path]:
        """A local path whose content becomes the file if the block ends well."""

    def write(self, name: str, content: bytes) -> None: ...

    def remove(self, name: str) -> None:
        """Does nothing if there is no such file."""

    def remove_folder(self, folder: str) -> None:
        """Remove every file below `folder`, however deep."""

    def hold(self, name: str) -> AbstractContextManager[None]:
        """Hold the lock `name`; raises `locks.HeldError`, with who, if another process does."""

    def holder(self, name: str) -> Holder | None:
        """Who holds the lock `name` now, if somebody does."""


def is_remote(path: str) -> bool:
    return "://" in path


def open_storage(root: str | Path) -> Storage:
    """Raises `UsageError` if `root` is a URL that no object store has."""
    if not is_remote(str(root)):
        return LocalStorage(Path(root))
    scheme, _, rest = str(root).partition("://")
    bucket, _, prefix = rest.partition("/")
    if scheme not in REMOTE_SCHEMES or not bucket:
        expected = ", ".join(f"{s}://bucket/…" for s in REMOTE_SCHEMES)
        raise UsageError(f"{root}: expected a local path or one of {expected}")
    return ObjectStorage(scheme, bucket, prefix.strip("/"))


def locate(path: str | Path) -> tuple[Storage, str]:
    """The storage that a file's path or URL belongs to, and the file's name there."""
    folder, _, name = str(path).rpartition("/")
    return open_storage(folder or ("/" if str(path).startswith("/") else ".")), name


@dataclass(frozen=True, slots=True)
class LocalStorage:
    """A folder. Making one touches nothing; the first write makes it."""

    root: Path

    def describe(self, name: str = "") -> str:
        return str(self.root / name)

    def find(self, name: str) -> StoredFile | None:
        try:
            status = (self.root / name).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
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
        return pa.OSFile(str(self.root / name))

    def writing(self, name: str) -> AbstractContextManager[Path]:
        return atomic_path(self.root / name)

    def write(self, name: str, content: bytes) -> None:
        with self.writing(name) as temporary:
            temporary.write_bytes(content)

    def remove(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)

    def remove_folder(self, folder: str) -> None:
        for parent, folders, files in os.walk(self.root / folder, topdown=False):
            for file in files:
                (Path(parent) / file).unlink(missing_ok=True)
            for inner in folders:
                (Path(parent) / inner).rmdir()
        if (self.root / folder).is_dir():
            (self.root / folder).rmdir()

    def hold(self, name: str) -> AbstractContextManager[None]:
        return hold_local(self.root / name)

    def holder(self, name: str) -> Holder | None:
        return find_local_holder(self.root / name)


@dataclass(frozen=True, slots=True)
class ObjectStorage:
    """A prefix of a bucket. Credentials come from the environment, then from the machine's role.

    With AWS_PROFILE, or keys in ~/.aws, boto3 finds them. AWS_ENDPOINT_URL names another server
    that speaks S3.
    """

    scheme: str
    bucket: str
    prefix: str

    def describe(self, name: str = "") -> str:
        return f"{self.scheme}://{self.bucket}/{self._key(name)}".rstrip("/")

    def find(self, name: str) -> StoredFile | None:
        import obstore

        try:
            with self._explained(name):
                return self._stored(obstore.head(self._store, self._key(name)))
        except FileNotFoundError:
            return None

    def list(self, folder: str = "") -> list[StoredFile]:
        import obstore

        prefix = self._key(folder)
        with self._explained(folder):
            found = [
                self._stored(meta)
                for page in obstore.list(self._store, prefix=f"{prefix}/" if prefix else None)
                for meta in page
            ]
        return sorted(found, key=lambda file: file.name)

    def read(self, name: str, *, last_bytes: int | None = None) -> bytes:
        import obstore

        with self._explained(name):
            if last_bytes is not None:
                end = obstore.get(
                    self._store, self._key(name), options={"range": {"suffix": last_bytes}}
                )
                return bytes(end.bytes())
            return bytes(obstore.get(self._store, self._key(name)).bytes())

    def open(self, name: str) -> pa.NativeFile:
        import obstore

        with self._explained(name):
            reader = obstore.open_reader(self._store, self._key(name), buffer_size=READ_AHEAD_BYTES)
        return pa.PythonFile(reader, mode="r")

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        import obstore

        # The bytes wait on a local disk until they are complete: a file too large for memory
        # can then be sent again from the start of any part.
        with tempfile.TemporaryDirectory(prefix="rsr-") as folder:
            temporary = Path(folder) / PurePosixPath(name).name
            yield temporary
            with self._explained(name):
                obstore.put(self._store, self._key(name), temporary)

    def write(self, name: str, content: bytes) -> None:
        import obstore

        with self._explained(name):
            obstore.put(self._store, self._key(name), content)

    def remove(self, name: str) -> None:
        import obstore

        try:
            with self._explained(name):
                obstore.delete(self._store, self._key(name))
        except FileNotFoundError:
            pass

    def remove_folder(self, folder: str) -> None:
        for file in self.list(folder):
            self.remove(file.name)

    def hold(self, name: str) -> AbstractContextManager[None]:
        from rsr.jobs.object_lock import hold_object

        return hold_object(self._store, self._key(name))

    def holder(self, name: str) -> Holder | None:
        from rsr.jobs.object_lock import find_object_holder

        with self._explained(name):
            return find_object_holder(self._store, self._key(name))

    @property
    def _store(self) -> "Bucket":
        # Not a field: connections do not travel to other processes.
        return _open_bucket(self.scheme, self.bucket)

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}".strip("/")

    def _stored(self, meta: "ObjectMeta") -> StoredFile:
        name = meta["path"][len(self.prefix) :].lstrip("/")
        version = meta["e_tag"] or f"{meta['size']}-{meta['last_modified'].timestamp()}"
        return StoredFile(name, meta["size"], meta["last_modified"].timestamp(), version)

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        from obstore.exceptions import BaseError

        try:
            yield
        except BaseError as error:
            raise StorageError(f"{self.describe(name)}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The first line that says something; obstore appends a debug dump of the whole chain."""
    return str(error).split("\n\nDebug source:")[0].strip().replace("\n", " ")


@cache
def _open_bucket(scheme: str, bucket: str) -> "Bucket":
    from obstore.store import AzureStore, GCSStore, RetryConfig, S3Store

    retries = RetryConfig(retry_timeout=RETRY_FOR)
    if scheme == "gs":
        return GCSStore(bucket, retry_config=retries)
    if scheme == "az":
        return AzureStore(bucket, retry_config=retries)
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
    return S3Store(
        bucket,
        client_options={"allow_http": endpoint.startswith("http://")},
        retry_config=retries,
        credential_provider=_aws_profile(),
    )


def _aws_profile() -> "Boto3CredentialProvider | None":
    """Credentials out of ~/.aws, which obstore does not read; None where it needs no help."""
    files = [Path.home() / ".aws" / name for name in ("credentials", "config")]
    in_files = "AWS_PROFILE" in os.environ or any(file.exists() for file in files)
    if "AWS_ACCESS_KEY_ID" in os.environ or not in_files:
        return None
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as error:
        raise UsageError(
            "credentials in ~/.aws need boto3: pip install boto3, or set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY"
        ) from error
    return Boto3CredentialProvider()
