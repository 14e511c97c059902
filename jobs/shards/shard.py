"""A shard, which is one input file, and the units that its rows are cut into."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

from rsr.jobs.shards.columns import TrajectoryColumns
from rsr.jobs.shards.parquet import RowGroup, file_state, open_parquet, row_groups
from rsr.jobs.storage import locate

MAX_UNIT_ROWS = {"cpu": 64, "gpu": 4096}

UNIT_BYTES = {"cpu": 64 << 10, "gpu": 4 << 20}
"""About a quarter of a minute of work either way: what a restart may have to do again."""

MIN_UNITS, MIN_UNIT_ROWS = 10, 8
"""A short run is cut finer, so that its progress shows, but not below a few siblings."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One input file.

    path: what is read, a path or URL (for JSON input, its staged Parquet). name: the output's
    path below the output folder. num_rows: rows the run takes of it, from the front. num_bytes:
    their share of the uncompressed trajectory columns, estimated from the footer. fingerprint,
    version: of the file, see `FileState`; version is "" where the fingerprint says it all.
    """

    path: str
    name: str
    num_rows: int
    num_bytes: int
    fingerprint: str
    version: str = ""


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows [start, stop) of one shard: what a worker scores at a time and a restart keeps."""

    shard: Shard
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        return self.stop - self.start


def describe_shard(path: str, name: str, columns: TrajectoryColumns, max_rows: int | None) -> Shard:
    """Row count, size and fingerprint from a Parquet footer, nothing else being read."""
    metadata = open_parquet(path).metadata
    num_bytes = sum(group.num_bytes for group in row_groups(metadata, columns.names))
    num_rows = metadata.num_rows if max_rows is None else min(metadata.num_rows, max_rows)
    share = num_rows / max(1, metadata.num_rows)
    state = file_state(path)
    return Shard(path, name, num_rows, int(num_bytes * share), state.fingerprint, state.version)


def was_written_again(shard: Shard) -> bool:
    """Whether the shard's file is there and was written since the shard was described."""
    storage, name = locate(shard.path)
    found = storage.find(name)
    return bool(shard.version) and found is not None and found.version != shard.version


def cut_units(
    shard: Shard,
    *,
    max_rows: int,
    max_bytes: int,
    kept: Sequence[Unit] = (),
    groups: Sequence[RowGroup] = (),
) -> list[Unit]:
    """Contiguous units of at most `max_rows` rows and about `max_bytes` of trajectory text.

    A unit is a run of whole row groups, or an even part of one: a row group can only be read
    from its front, so that a unit with the end of one and the front of the next would have two
    decoded for it. kept: rows that need no scoring, in order and disjoint. They leave gaps in the
    units and move none of their borders: which rows are scored together changes the last bits of
    their scores, and an interruption must not. groups: the shard's row groups; without, it counts
    as one.
    """
    gaps = deque(_gaps(kept, shard.num_rows))
    units: list[Unit] = []
    for start, stop in _cut(shard, max_rows, max_bytes, groups):
        while gaps and gaps[0][0] < stop:
            low, high = max(start, gaps[0][0]), min(stop, gaps[0][1])
            if low < high:
                units.append(Unit(shard, low, high))
            if gaps[0][1] > stop:
                break
            gaps.popleft()
    return units


def _cut(
    shard: Shard, max_rows: int, max_bytes: int, groups: Sequence[RowGroup]
) -> Iterator[tuple[int, int]]:
    """Borders of the units of a whole shard."""
    start, num_bytes = 0, 0.0
    for low, high, row_bytes in _pieces(shard, groups):
        step = max(1, min(max_rows, int(max_bytes / row_bytes)))
        fits = high - start <= max_rows and num_bytes + (high - low) * row_bytes <= max_bytes
        if start < low and not fits:
            yield start, low
            start, num_bytes = low, 0.0
        num_bytes += (high - low) * row_bytes
        if high - low > step:
            size = ceil((high - low) / ceil((high - low) / step))
            yield from ((s, min(s + size, high)) for s in range(low, high, size))
            start, num_bytes = high, 0.0
    if start < shard.num_rows:
        yield start, shard.num_rows


def _gaps(kept: Sequence[Unit], num_rows: int) -> Iterator[tuple[int, int]]:
    starts = [0, *(unit.stop for unit in kept)]
    stops = [*(unit.start for unit in kept), num_rows]
    return ((start, stop) for start, stop in zip(starts, stops, strict=True) if start < stop)


def _pieces(shard: Shard, groups: Sequence[RowGroup]) -> Iterator[tuple[int, int, float]]:
    """Row groups, as far as the shard goes: first row, row after the last, bytes of a row, ≥ 1."""
    first = 0
    for group in groups or [RowGroup(shard.num_rows, shard.num_bytes)]:
        last = min(shard.num_rows, first + group.num_rows)
        if first < last:
            yield first, last, max(1.0, group.num_bytes / group.num_rows)
        first += group.num_rows


def unit_rows(num_rows: int, device: str) -> int:
    return min(MAX_UNIT_ROWS[device], max(MIN_UNIT_ROWS, num_rows // MIN_UNITS))
