"""Which files the kept rows go into: one for each file of SCORED, or files of so many rows.

    the kept rows, in their order  →  files, each made of kept rows of one shard or of several

A file's name, and what vouches for its input, follow from SCORED and from how many rows are kept of
each shard; so a run that goes on finds the files that it began with.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rsr.jobs.errors import UsageError
from rsr.jobs.shards.scored import ScoredTable
from rsr.jobs.shards.shard import Shard, digest_of

ROWS_PER_FILE = "rows_per_file"
"""The setting of a run whose files are not those of SCORED."""

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Slice:
    """Kept rows of one shard, from number `start` of them on; up to number `stop`, or all."""

    shard: Shard
    start: int = 0
    stop: int | None = None

    def within(self, kept: Mask) -> Mask:
        """(num_rows,) mask of the slice's rows. kept: of all rows of the shard that are kept."""
        if not self.start and self.stop is None:
            return kept
        mask = np.zeros(len(kept), bool)
        mask[np.flatnonzero(kept)[self.start : self.stop]] = True
        return mask


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A file of OUTPUT, as the shard that a receipt vouches for, and what it is made of."""

    shard: Shard
    slices: tuple[Slice, ...]

    @property
    def path(self) -> str:
        """What a user is told of a call that is lost."""
        return f"the rows of {self.shard.name}"


def files_like_input(table: ScoredTable) -> list[OutputFile]:
    """One for each shard, also where no row of it is kept."""
    return [OutputFile(shard, (Slice(shard),)) for shard in table.shards]


def files_of_rows(
    table: ScoredTable, num_kept: Sequence[int], rows_per_file: int, source: str
) -> list[OutputFile]:
    """Files of `rows_per_file` rows each, of fewer in the last.

    num_kept: rows kept of each shard. source: where SCORED is, as every machine finds it.
    """
    digest = digest_of(table.shards)
    ends = np.cumsum(num_kept)
    files: list[OutputFile] = []
    for first in range(0, int(ends[-1]), rows_per_file):
        last = min(first + rows_per_file, int(ends[-1]))
        slices = []
        low, high = np.searchsorted(ends, [first, last - 1], side="right")
        for number in range(low, high + 1):
            before = int(ends[number]) - int(num_kept[number])
            start, stop = max(first - before, 0), min(last, int(ends[number])) - before
            if start < stop:
                slices.append(Slice(table.shards[number], start, stop))
        name = f"part-{len(files):05d}.parquet"
        num_bytes = sum(piece.shard.num_bytes for piece in slices)
        files.append(
            OutputFile(Shard(source, name, last - first, num_bytes, digest), tuple(slices))
        )
    return files


def require_one_run(table: ScoredTable) -> None:
    """Raises `UsageError` where files cannot be joined, since each says which run scored it."""
    if len(table.identities) > 1:
        raise UsageError(
            f"the files of {table.path} were scored by {len(table.identities)} runs of other "
            "settings or versions, and each file says by which: they cannot be joined; leave "
            "--rows-per-file out, and let OUTPUT be a folder"
        )
