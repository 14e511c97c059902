"""A dataset on the Hugging Face hub: `hf://datasets/ORG/NAME[@REVISION][/…]`, to be read alone.

Reached through huggingface_hub's file system, with the token that its own tools use: HF_TOKEN, or
what `hf auth login` has stored. HF_ENDPOINT names another hub.
"""

import os
import re
import urllib.error
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeVar, cast
from urllib.parse import quote, unquote
from urllib.request import urlopen

import pyarrow as pa

from rsr.jobs.errors import UsageError, first_line
from rsr.jobs.storage.base import StorageError, StoredFile
from rsr.jobs.storage.locks import Holder
from rsr.jobs.storage.ranged import RangedFile

if TYPE_CHECKING:
    from huggingface_hub import HfFileSystem

DEFAULT_ENDPOINT = "https://huggingface.co"
YES = {"1", "ON", "YES", "TRUE"}
"""What huggingface_hub takes for a yes in its environment variables."""
ANSWER_SECONDS = 10.0
HUB_SCHEME = "hf"
HUB_FORM = "hf://datasets/ORG/NAME[@REVISION][/PATH]"
HUB_URL = re.compile(
    r"hf://datasets/(?P<repository>[^/@]+/[^/@]+)"
    r"(?:@(?P<revision>refs/convert/[^/]+|refs/pr/\d+|[^/]+))?(?P<path>/.*)?"
)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class HubStorage:
    """A folder of a dataset on the hub. root: its URL without the scheme."""

    # The hub answers slowly, at any size.
    read_ahead_bytes: ClassVar[int] = 4 << 20
    root: str

    def describe(self, name: str = "") -> str:
        return f"{HUB_SCHEME}://{self._path(name)}"

    def find(self, name: str) -> StoredFile | None:
        try:
            found = self._ask(name, lambda: _file_system().info(self._path(name)))
        except (FileNotFoundError, ValueError):
            # What is shorter than a dataset's name is no file either.
            return None
        return self._stored(found) if found["type"] == "file" else None

    def list(self, folder: str = "") -> list[StoredFile]:
        def find() -> dict[str, dict[str, Any]]:
            found = _file_system().find(self._path(folder), detail=True)
            return cast(dict[str, dict[str, Any]], found)

        try:
            found = self._ask(folder, find)
        except (FileNotFoundError, ValueError):
            return []
        return sorted(map(self._stored, found.values()), key=lambda file: file.name)

    def read(self, name: str, *, last_bytes: int | None = None) -> bytes:
        num_bytes = self._require(name).num_bytes
        start = 0 if last_bytes is None else max(0, num_bytes - last_bytes)
        return self.read_range(name, start, num_bytes - start) if num_bytes else b""

    def read_range(self, name: str, start: int, num_bytes: int) -> bytes:
        """Bytes [start, start + num_bytes) of a file that has them."""

        def read() -> bytes:
            with _file_system().open(self._path(name), "rb", cache_type="none") as file:
                file.seek(start)
                return bytes(file.read(num_bytes))

        return self._ask(name, read)

    def open(self, name: str) -> pa.NativeFile:
        return pa.PythonFile(RangedFile(self, self._require(name)), mode="r")

    def writing(self, name: str) -> AbstractContextManager[Path]:
        self._refuse()

    def write(self, name: str, content: bytes) -> None:
        self._refuse()

    def remove(self, name: str) -> None:
        self._refuse()

    def remove_folder(self, folder: str) -> None:
        self._refuse()

    def remove_leftovers(self, *, of: str | None = None) -> None:
        self._refuse()

    def hold(self, name: str) -> AbstractContextManager[None]:
        self._refuse()

    def holder(self, name: str) -> Holder | None:
        """Nobody: nothing is written here."""
        return None

    def _refuse(self) -> NoReturn:
        raise UsageError(
            f"{self.describe()}: the hub can only be read from; expected a local folder or an "
            "object store's"
        )

    def _require(self, name: str) -> StoredFile:
        found = self.find(name)
        if found is None:
            raise FileNotFoundError(self.describe(name))
        return found

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}".strip("/")

    def _stored(self, info: dict[str, Any]) -> StoredFile:
        # The hash of its content, whatever commit it is of.
        version = (info.get("lfs") or {}).get("sha256") or info["blob_id"]
        return StoredFile(info["name"][len(self.root) :].lstrip("/"), info["size"], 0.0, version)

    def _ask(self, name: str, request: Callable[[], T]) -> T:
        """What `request` returns; huggingface_hub tries again what may pass."""
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

        try:
            return request()
        except HTTPError as error:
            raise StorageError(f"{self.describe(name)}: {first_line(error)}") from error


def pin_revision(url: str) -> str:
    """`url` at the commit that its branch, or the main one, is at now.

    All that a run reads is then of one commit. Raises `UsageError` if there is no such dataset or
    revision, if it may not be read, or if the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    match = HUB_URL.fullmatch(url)
    if match is None:
        raise UsageError(f"{url}: expected {HUB_FORM}")
    repository, revision = match["repository"], unquote(match["revision"] or "main")
    api = HfApi(endpoint=hub_endpoint())
    place = f"{api.endpoint}/datasets/{repository}"
    try:
        api.auth_check(repository, repo_type="dataset")
        commit = api.repo_info(repository, repo_type="dataset", revision=revision).sha
    except GatedRepoError as error:
        raise UsageError(
            f"{place} is gated, and this machine's token may not read it: ask for access there, "
            "then set HF_TOKEN or run hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise UsageError(
            f"{place} does not exist, or is private: check the name, or set HF_TOKEN or run "
            "hf auth login"
        ) from error
    except RevisionNotFoundError as error:
        raise UsageError(f"{place} has no revision {revision!r}") from error
    except (HfHubHTTPError, HTTPError, ConnectionError) as error:
        raise UsageError(f"{place} cannot be reached: {first_line(error)}") from error
    assert commit is not None, "the hub tells a dataset's commit"
    return f"hf://datasets/{repository}@{quote(commit, safe='')}{match['path'] or ''}"


def stay_offline_without_hub(model: str) -> None:
    """Have this process do without the hub, if `model` is to come from it and it does not answer.

    What is wanted is then found in the cache or said to be missing at once: transformers would
    otherwise ask five times again for each file. To be called before it is imported.
    """
    if Path(model).exists() or os.environ.get("HF_HUB_OFFLINE", "").upper() in YES:
        return
    try:
        urlopen(hub_endpoint() or DEFAULT_ENDPOINT, timeout=ANSWER_SECONDS).close()
    except urllib.error.HTTPError:
        return  # an answer all the same
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"


def hub_endpoint() -> str | None:
    """The address of another hub than the usual one, where HF_ENDPOINT names it."""
    return os.environ.get("HF_ENDPOINT") or None


def _file_system() -> "HfFileSystem":
    return _file_system_of(hub_endpoint())


@cache
def _file_system_of(endpoint: str | None) -> "HfFileSystem":
    """One for each process: it remembers what it has listed."""
    from huggingface_hub import HfFileSystem

    return HfFileSystem(endpoint=endpoint)
