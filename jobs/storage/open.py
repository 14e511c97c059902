"""Open the storage that a path or URL is on."""

from pathlib import Path

from rsr.jobs.errors import UsageError
from rsr.jobs.storage.base import Storage
from rsr.jobs.storage.bucket import ObjectStorage
from rsr.jobs.storage.hub import HUB_FORM, HUB_SCHEME, HubStorage
from rsr.jobs.storage.local import LocalStorage

REMOTE_SCHEMES = ("s3", "gs", "az")


def is_remote(path: str) -> bool:
    return "://" in path


def is_in_bucket(path: str) -> bool:
    return path.partition("://")[0] in REMOTE_SCHEMES and is_remote(path)


def open_storage(root: str | Path) -> Storage:
    """Raises `UsageError` if `root` is a URL that no object store has."""
    if not is_remote(str(root)):
        return LocalStorage(Path(root))
    scheme, _, rest = str(root).partition("://")
    bucket, _, prefix = rest.partition("/")
    if scheme == HUB_SCHEME:
        return HubStorage(rest.strip("/"))
    if scheme not in REMOTE_SCHEMES or not bucket:
        expected = ", ".join([*(f"{s}://bucket/…" for s in REMOTE_SCHEMES), HUB_FORM])
        raise UsageError(f"{root}: expected a local path or one of {expected}")
    return ObjectStorage(scheme, bucket, prefix.strip("/"))


def locate(path: str | Path) -> tuple[Storage, str]:
    """The storage that a file's path or URL belongs to, and the file's name there."""
    folder, _, name = str(path).rpartition("/")
    return open_storage(folder or ("/" if str(path).startswith("/") else ".")), name
