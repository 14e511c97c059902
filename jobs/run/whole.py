"""Whether an input that a run of rsr wrote, or is writing, is all of it.

A command that reads a run's OUTPUT would otherwise take the files that happen to be there for the
corpus, and nobody would know that rows are missing.
"""

from dataclasses import dataclass

from rsr.jobs.errors import UsageError
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.manifest import InputShard, Manifest, ManifestError
from rsr.jobs.run.store import stored_receipt
from rsr.jobs.storage.concurrency import in_parallel
from rsr.jobs.storage.hub import HUB_SCHEME


@dataclass(frozen=True, slots=True)
class UnfinishedRun:
    """A run that has not written all of its files. num_left: of the files that it has to write."""

    place: str
    manifest: Manifest
    num_left: int

    def __str__(self) -> str:
        num_files = len(self.manifest.shards)
        return (
            f"rsr {self.manifest.writer} has written {num_files - self.num_left:,} of the "
            f"{num_files:,} files of {self.place}"
        )


def unfinished_run(place: str) -> UnfinishedRun | None:
    """The run that is to write the folder `place` and has not finished; None if there is none.

    A single file and a glob are what they are.
    """
    folder = RunFolder(place)
    if folder.is_one_file or place.startswith(f"{HUB_SCHEME}://"):
        return None
    try:
        manifest = folder.read_manifest()
    except (ManifestError, UsageError, OSError):
        # Whatever is wrong with the place, who opens it for its rows says it better.
        return None
    if manifest is None:
        return None
    with in_parallel(lambda shard: _is_written(folder, shard), manifest.shards) as written:
        num_left = sum(not is_written for is_written in written)
    return UnfinishedRun(place, manifest, num_left) if num_left else None


def require_finished(place: str) -> None:
    """Raises `UsageError` if the folder `place` is of a run that has not finished."""
    unfinished = unfinished_run(place)
    if unfinished is None:
        return
    raise UsageError(
        f"{unfinished}, so rows would be missing. Wait for it, or go on with its command (rsr "
        f"status {place} has both), or name the files that are there: "
        f"'{place.rstrip('/')}/**/*.parquet'"
    )


def _is_written(folder: RunFolder, shard: InputShard) -> bool:
    receipt = stored_receipt(folder, shard.name)
    is_whole = receipt is not None and receipt.stop == shard.num_rows
    return is_whole and folder.storage.find(shard.name) is not None
