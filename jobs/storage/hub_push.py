"""Uploading a folder of files to a data set of the Hugging Face hub, as one commit.

With the token that the hub's own tools use. Knows nothing of what is in the files.
"""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rsr.jobs.errors import UsageError, first_line
from rsr.jobs.storage.base import Storage, StorageError
from rsr.jobs.storage.hub import HUB_URL, hub_endpoint

OUR_FILES = ("data/train-*.parquet",)
"""Files of earlier uploads: an export of fewer files must not leave the rest of a longer one."""


@dataclass(frozen=True, slots=True)
class PushTarget:
    """A data set of the hub that this machine's token may write to. repository: ORG/NAME."""

    repository: str

    @classmethod
    def of(cls, url: str) -> "PushTarget":
        """Raises `UsageError`, nothing having been sent, for another form of URL or no token."""
        from huggingface_hub import get_token

        match = HUB_URL.fullmatch(url)
        if match is None or match["revision"] or (match["path"] or "").strip("/"):
            raise UsageError(f"--push {url}: expected hf://datasets/ORG/NAME")
        if get_token() is None:
            raise UsageError(f"--push {url} needs a token: set HF_TOKEN or run hf auth login")
        return cls(match["repository"])

    def push(self, storage: Storage, names: Sequence[str], *, private: bool) -> str:
        """Upload these files, creating the data set if there is none; the commit's URL.

        Raises `StorageError` if the hub refuses or does not answer.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

        api = HfApi(endpoint=hub_endpoint())
        try:
            api.create_repo(self.repository, repo_type="dataset", private=private, exist_ok=True)
            with ExitStack() as held:
                commit = api.upload_folder(
                    repo_id=self.repository,
                    repo_type="dataset",
                    folder_path=_local_folder(storage, names, held),
                    allow_patterns=list(names),
                    delete_patterns=list(OUR_FILES),
                    commit_message="Upload by rsr export",
                )
        except (HfHubHTTPError, HTTPError, ConnectionError) as error:
            place = f"{api.endpoint}/datasets/{self.repository}"
            raise StorageError(f"{place}: {first_line(error)}") from error
        return str(commit.commit_url)


def _local_folder(storage: Storage, names: Sequence[str], held: ExitStack) -> str:
    """Where the files stand on this machine; copies of them, for they may be anywhere."""
    folder = held.enter_context(tempfile.TemporaryDirectory(prefix="rsr-push-"))
    for name in names:
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(storage.read(name))
    return folder
