"""When the units of a run would be done: the cutter and the order of `rsr score`, on paper.

Knows shards, units and workers; knows nothing of tokens or GPUs.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rsr.jobs.cluster.deadlines import unit_bytes
from rsr.jobs.cluster.work import long_first
from rsr.jobs.shards.parquet import RowGroup
from rsr.jobs.shards.shard import Shard, Unit, UnitLimits, cut_units, unit_limits

WAVES_SIMULATED = 256
"""With more units per worker the end of a run is as even as its mean: less than a 256th is lost."""
WORTH_MORE_WORKERS = 0.05
"""Share of a run's time that twice as many workers must save to be worth it."""


@dataclass(frozen=True, slots=True)
class CuttableShard:
    """An input file and the row groups by which it is cut."""

    shard: Shard
    groups: Sequence[RowGroup]


@dataclass(frozen=True, slots=True)
class Schedule:
    """A run on `num_workers` workers that are all ready at 0.

    scored_seconds: until the last row is scored. seconds: until the last shard is written.
    share_busy: of the workers' time until `seconds`.
    """

    num_workers: int
    limits: UnitLimits
    num_units: int
    scored_seconds: float
    seconds: float
    share_busy: float


@dataclass(slots=True)
class PaperRun:
    """A run of `rsr score` on GPUs whose workers exist on paper only.

    seconds_per_byte: of a worker for a byte of trajectory text. write_seconds_per_byte: for a
    shard's output, which one worker writes beside its units when the shard's rows are scored.
    """

    shards: Sequence[CuttableShard]
    seconds_per_byte: float
    write_seconds_per_byte: float
    _last_cut: tuple[UnitLimits, list[Unit]] | None = field(default=None, init=False)

    def on(self, num_workers: int) -> Schedule:
        """The run on so many workers."""
        limits, units = self._cut_for(num_workers)
        scored_at = self._scored_at(units, num_workers)
        written_at = [
            scored_at.get(file.shard.name, 0.0) + file.shard.num_bytes * self.write_seconds_per_byte
            for file in self.shards
        ]
        seconds = max(written_at, default=0.0)
        busy = sum(map(self._seconds, units)) / num_workers
        return Schedule(
            num_workers=num_workers,
            limits=limits,
            num_units=len(units),
            scored_seconds=max(scored_at.values(), default=0.0),
            seconds=seconds,
            share_busy=busy / seconds if seconds else 0.0,
        )

    def on_most_useful(self, start_seconds: float) -> Schedule:
        """The schedule on the fewest workers, a power of two, that cannot usefully be doubled.

        start_seconds: until workers are ready, which more of them do not shorten.
        """
        runs = self._on_twice_as_many()
        fewer = next(runs)
        for more in runs:
            before, after = start_seconds + fewer.seconds, start_seconds + more.seconds
            if after > (1 - WORTH_MORE_WORKERS) * before:
                break
            fewer = more
        return fewer

    def _on_twice_as_many(self) -> Iterator[Schedule]:
        """The schedules on 1, 2, 4 … workers, until some would have no unit."""
        run = self.on(1)
        yield run
        while run.num_workers < run.num_units:
            run = self.on(2 * run.num_workers)
            yield run

    def _cut_for(self, num_workers: int) -> tuple[UnitLimits, list[Unit]]:
        num_rows = sum(file.shard.num_rows for file in self.shards)
        num_bytes = sum(file.shard.num_bytes for file in self.shards)
        limits = unit_limits(num_rows, num_bytes, num_workers, "gpu")
        if self._last_cut is None or self._last_cut[0] != limits:
            units = [unit for file in self.shards for unit in _cut(file, limits)]
            self._last_cut = limits, long_first(units)
        return self._last_cut

    def _scored_at(self, units: Sequence[Unit], num_workers: int) -> dict[str, float]:
        """Times at which each shard's last unit is done: each goes to the first free worker."""
        scored_at: dict[str, float] = {}
        if len(units) > WAVES_SIMULATED * num_workers:
            elapsed = 0.0
            for unit in units:
                elapsed += self._seconds(unit) / num_workers
                scored_at[unit.shard.name] = elapsed
            return scored_at
        free_at = [0.0] * num_workers
        for unit in units:
            end = free_at[0] + self._seconds(unit)
            heapq.heapreplace(free_at, end)
            scored_at[unit.shard.name] = max(scored_at.get(unit.shard.name, 0.0), end)
        return scored_at

    def _seconds(self, unit: Unit) -> float:
        return unit_bytes(unit) * self.seconds_per_byte


def _cut(file: CuttableShard, limits: UnitLimits) -> list[Unit]:
    return cut_units(
        file.shard, max_rows=limits.max_rows, max_bytes=limits.max_bytes, groups=file.groups
    )
