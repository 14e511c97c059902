"""Inputs that are not read as they stand: their Parquet, where a run or a check keeps it."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.opening import HeldOutput
from rsr.jobs.run.preflight import canonical
from rsr.jobs.shards.columns import TrajectoryColumns
from rsr.jobs.shards.parquet import file_version
from rsr.jobs.shards.shard import Shard, describe_shard
from rsr.jobs.shards.staging import needs_staging, stage


def as_parquet(
    file: str,
    name: str,
    output: HeldOutput,
    exploded: Sequence[str] = (),
    max_rows: int | None = None,
) -> str:
    """Where an input, whose output is called `name`, stands as Parquet; staged if it needs it.

    exploded, max_rows: as `stage` has them.
    """
    if not needs_staging(file, exploded):
        return file
    # A file that was written again since, or is exploded otherwise, is staged, and found, anew.
    version = f"{canonical(file)} {file_version(file)}"
    if exploded:
        version += f" {json.dumps(exploded)} {max_rows}"
    storage, staged = output.folder.storage, RunFolder.staged_name(name, version)
    path = storage.describe(staged)
    is_new = storage.find(staged) is None
    output.use_staged(staged, is_new=is_new)
    if is_new:
        stage(file, path, exploded, max_rows=max_rows)
    return path


def describe_input(
    file: str, path: str, name: str, columns: TrajectoryColumns, max_rows: int | None = None
) -> Shard:
    """`describe_shard` of an input that stands as Parquet at `path`, where `as_parquet` put it."""
    # As every machine can open it, whatever its working directory.
    shard = describe_shard(canonical(path), name, columns, max_rows)
    # The footer of a staged file names its source's content, whenever it was staged.
    return shard if path == file else replace(shard, version="")


@contextmanager
def parquet_of(
    source: str, exploded: Sequence[str] = (), max_rows: int | None = None
) -> Iterator[str]:
    """Where an input stands as Parquet while the block lasts, wherever its run is."""
    if not needs_staging(source, exploded):
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="rsr-verify-") as temporary:
        staged = str(Path(temporary) / "staged.parquet")
        stage(source, staged, exploded, max_rows=max_rows)
        yield staged
