"""A prefix of an object store's bucket: `s3://bucket/…`, `gs://bucket/…`, `az://container/…`.

Reached through obstore: typed, no Python dependencies, conditional puts (which locks need, and
pyarrow's and fsspec's file systems lack), and 500s, timeouts and dropped connections tried again.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import pyarrow as pa

from rsr.jobs.errors import UsageError
from rsr.jobs.storage.base import StorageError, StoredFile
from rsr.jobs.storage.locks import Holder
from rsr.jobs.storage.nameless import nameless_file
from rsr.jobs.storage.ranged import RangedFile

if TYPE_CHECKING:
    from obstore import GetOptions, ObjectMeta
    from obstore.auth.boto3 import Boto3CredentialProvider
    from obstore.store import AzureStore, GCSStore, RetryConfig, S3Store

    Bucket = S3Store | GCSStore | AzureStore


T = TypeVar("T")
MAX_RETRIES = 10
RETRY_FOR = timedelta(minutes=3)
PAUSES_S = (0.2, 1.0, 5.0)
"""How often and how long obstore tries a request again, and the pauses between our own tries;
longer outages are the dispatcher's."""


def polars_options() -> dict[str, Any]:
    """Options with which Polars asks a bucket as often and for as long as obstore does."""
    return {"max_retries": MAX_RETRIES, "retry_timeout_ms": int(RETRY_FOR.total_seconds() * 1000)}


@dataclass(frozen=True, slots=True)
class ObjectStorage:
    """A prefix of a bucket. Credentials come from the environment, then from the machine's role.

    With AWS_PROFILE, or keys in ~/.aws, boto3 finds them. AWS_ENDPOINT_URL names another server
    that speaks S3.
    """

    # A store answers slowly, at any size.
    read_ahead_bytes: ClassVar[int] = 4 << 20
    scheme: str
    bucket: str
    prefix: str

    def describe(self, name: str = "") -> str:
        return f"{self.scheme}://{self.bucket}/{self._key(name)}".rstrip("/")

    def find(self, name: str) -> StoredFile | None:
        import obstore

        try:
            meta = self._ask(name, lambda: obstore.head(self._store, self._key(name)))
        except FileNotFoundError:
            return None
        return self._stored(meta)

    def list(self, folder: str = "") -> list[StoredFile]:
        import obstore

        prefix = f"{self._key(folder)}/" if self._key(folder) else None
        pages = self._ask(folder, lambda: [*obstore.list(self._store, prefix=prefix)])
        found = (self._stored(meta) for page in pages for meta in page)
        return sorted(found, key=lambda file: file.name)

    def read(self, name: str, *, last_bytes: int | None = None) -> bytes:
        import obstore

        options: GetOptions = {} if last_bytes is None else {"range": {"suffix": last_bytes}}
        return self._ask(
            name,
            lambda: bytes(obstore.get(self._store, self._key(name), options=options).bytes()),
        )

    def read_range(self, name: str, start: int, num_bytes: int) -> bytes:
        """Bytes [start, start + num_bytes) of a file that has them."""
        import obstore

        part = self._ask(
            name,
            lambda: obstore.get_range(self._store, self._key(name), start=start, length=num_bytes),
        )
        return bytes(part)

    def open(self, name: str) -> pa.NativeFile:
        found = self.find(name)
        if found is None:
            raise FileNotFoundError(self.describe(name))
        return pa.PythonFile(RangedFile(self, found), mode="r")

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        # The bytes wait on a local disk until they are complete: a file too large for memory
        # can then be sent again from the start of any part.
        with nameless_file() as temporary:
            yield temporary
            self._put(name, temporary)

    def write(self, name: str, content: bytes) -> None:
        self._put(name, content)

    def _put(self, name: str, content: Path | bytes) -> None:
        import obstore

        try:
            self._ask(name, lambda: obstore.put(self._store, self._key(name), content))
        except FileNotFoundError as error:
            # An upload that obstore gives up it also ends, and what it says is that it was gone.
            raise StorageError(f"{self.describe(name)}: {_reason(error)}") from error

    def remove(self, name: str) -> None:
        self._delete([self._key(name)])

    def remove_folder(self, folder: str) -> None:
        self._delete([self._key(file.name) for file in self.list(folder)])

    def _delete(self, keys: Sequence[str]) -> None:
        import obstore

        # Some stores mind if it is not there.
        with suppress(FileNotFoundError):
            self._ask("", lambda: obstore.delete(self._store, keys))

    def remove_leftovers(self, *, of: str | None = None) -> None:
        """None can be seen: parts of an upload that never ended are the bucket's to expire."""

    @contextmanager
    def hold(self, name: str) -> Iterator[None]:
        from obstore.exceptions import BaseError

        from rsr.jobs.storage.object_lock import hold_object

        try:
            with hold_object(self._store, self._key(name)):
                yield
        except BaseError as error:
            raise StorageError(f"{self.describe(name)}: {_reason(error)}") from error

    def holder(self, name: str) -> Holder | None:
        from rsr.jobs.storage.object_lock import find_object_holder

        return self._ask(name, lambda: find_object_holder(self._store, self._key(name)))

    @property
    def _store(self) -> "Bucket":
        # Not a field: connections do not travel to other processes.
        return open_bucket(self.scheme, self.bucket)

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}".strip("/")

    def _stored(self, meta: "ObjectMeta") -> StoredFile:
        name = meta["path"][len(self.prefix) :].lstrip("/")
        version = meta["e_tag"] or f"{meta['size']}-{meta['last_modified'].timestamp()}"
        return StoredFile(name, meta["size"], meta["last_modified"].timestamp(), version)

    def _ask(self, name: str, request: Callable[[], T]) -> T:
        """What `request` returns; it must be one that can be made twice.

        obstore tries again by itself after most failures, but not where the answer to a listing
        or a deletion broke off half way.
        """
        from obstore.exceptions import BaseError, GenericError

        for pause_s in (*PAUSES_S, None):
            try:
                return request()
            except BaseError as error:
                if pause_s is None or not isinstance(error, GenericError):
                    raise StorageError(f"{self.describe(name)}: {_reason(error)}") from error
                time.sleep(pause_s)
        raise AssertionError("the last try returns or raises")


def _reason(error: Exception) -> str:
    """The first line that says something; obstore appends a debug dump of the whole chain."""
    return str(error).split("\n\nDebug source:")[0].strip().replace("\n", " ")


@cache
def open_bucket(scheme: str, bucket: str) -> "Bucket":
    """A connection to the bucket, one for each process."""
    from obstore.store import AzureStore, GCSStore, S3Store

    retries: RetryConfig = {"max_retries": MAX_RETRIES, "retry_timeout": RETRY_FOR}
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
