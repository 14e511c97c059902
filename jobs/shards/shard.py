"""A shard, which is one input file, and the units that its rows are cut into."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

from rsr.jobs.shards.columns import TrajectoryColumns
from rsr.jobs.shards.parquet import RowGroup, file_state, open_parquet, row_groups
from rsr.jobs.storage import locate
from rsr.jobs.storage.hashing import hash_bytes


@dataclass(frozen=True, slots=True)
class UnitRule:
    """How large units of a device's workers may be, and how many each place should get.

    A unit holds at most `max_rows` rows and about `max_bytes` of trajectory text: a few seconds of
    work, so that a restart does little again, and a run that finds more machines later has enough
    to hand out. It is not cut below `min_rows` rows and `min_bytes`, which fill a few prefill
    steps: shorter units would leave the engine waiting between them, and part siblings that share
    a prompt. Of `units_per_place` equal units, the last wave idles a worker for one at most.
    """

    max_rows: int
    max_bytes: int
    min_rows: int
    min_bytes: int
    units_per_place: int


UNIT_RULES = {
    "cpu": UnitRule(64, 64 << 10, 8, 16 << 10, units_per_place=10),
    "gpu": UnitRule(4096, 1 << 20, 64, 256 << 10, units_per_place=32),
}


@dataclass(frozen=True, slots=True)
class UnitLimits:
    """The most rows, and about the most bytes of trajectory text, of one run's units."""

    max_rows: int
    max_bytes: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One input file.

    path: what is read, a path or URL (for JSON input, its staged Parquet). name: the output's
    path below the output folder. num_rows: rows the run takes of it, from the front. num_bytes:
    their share of the uncompressed columns that are read, estimated from the footer. fingerprint,
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


def describe_shard(
    path: str, name: str, columns: TrajectoryColumns | None, max_rows: int | None
) -> Shard:
    """Row count, size and fingerprint from a Parquet footer, nothing else being read.

    columns: those that are read; None is all.
    """
    metadata = open_parquet(path).metadata
    names = None if columns is None else columns.names
    num_bytes = sum(group.num_bytes for group in row_groups(metadata, names))
    num_rows = metadata.num_rows if max_rows is None else min(metadata.num_rows, max_rows)
    share = num_rows / max(1, metadata.num_rows)
    state = file_state(path)
    return Shard(path, name, num_rows, int(num_bytes * share), state.fingerprint, state.version)


def digest_of(shards: Sequence[Shard]) -> str:
    """A digest of several inputs together: others have another."""
    return hash_bytes("\n".join(f"{shard.name} {shard.fingerprint}" for shard in shards).encode())


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


def unit_limits(num_rows: int, num_bytes: int, num_places: int, device: str) -> UnitLimits:
    """Limits of units for a run that begins with `num_places` workers on "cpu" or "gpu".

    num_bytes: of trajectory text in all rows. The run keeps these limits for as long as it lives,
    whatever machines join or leave, since the borders of units decide the last bits of scores.
    """
    rule = UNIT_RULES[device]
    num_units = rule.units_per_place * max(1, num_places)
    return UnitLimits(
        max_rows=min(rule.max_rows, max(rule.min_rows, ceil(num_rows / num_units))),
        max_bytes=min(rule.max_bytes, max(rule.min_bytes, ceil(num_bytes / num_units))),
    )
