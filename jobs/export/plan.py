"""Which rows are exported, in which order, and which file each goes into."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rsr.engine.trajectory import Trajectory
from rsr.jobs.errors import UsageError
from rsr.jobs.export.formats import Format, NotExportableError, Row, message_fields
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.shards.columns import TrajectoryColumns
from rsr.jobs.shards.reader import ShardReader, TrajectoryReader
from rsr.jobs.shards.scored import USUAL_ID
from rsr.jobs.shards.shard import Shard, Unit

ROWS_AT_A_TIME = 512


@dataclass(frozen=True, slots=True)
class Source:
    """The rows to export: shards one after another.

    columns: that hold the trajectories. id_column: tells rows apart; None: their file and number.
    form: what becomes of a row.
    """

    shards: Sequence[Shard]
    columns: TrajectoryColumns
    id_column: str | None
    form: Format

    @property
    def num_rows(self) -> int:
        return sum(shard.num_rows for shard in self.shards)

    def trajectories(self, first: int = 0, stop: int | None = None) -> Iterator[Trajectory]:
        """Rows [first, stop) of all, in order."""
        for shard, start, end in self.ranges(first, stop):
            reader = TrajectoryReader(self.columns)
            for low in range(start, end, ROWS_AT_A_TIME):
                yield from reader.read(Unit(shard, low, min(end, low + ROWS_AT_A_TIME)))

    def ids(self, first: int = 0, stop: int | None = None) -> Iterator[str]:
        """What rows [first, stop) are called, in order."""
        for shard, start, end in self.ranges(first, stop):
            if self.id_column is None:
                yield from (f"{shard.name}#{row}" for row in range(start, end))
                continue
            for batch in ShardReader(shard.path, [self.id_column]).rows(start, end):
                yield from map(str, batch.column(self.id_column).to_pylist())

    def ranges(self, first: int, stop: int | None) -> Iterator[tuple[Shard, int, int]]:
        """Shards and the rows of each that make up rows [first, stop) of all."""
        stop = self.num_rows if stop is None else stop
        before = 0
        for shard in self.shards:
            low, high = max(first - before, 0), min(stop - before, shard.num_rows)
            if low < high:
                yield shard, low, high
            before += shard.num_rows


@dataclass(slots=True)
class Survey:
    """What a look at every row found. positions: of rows that can be exported.

    left_out: how many cannot, by reason. message_fields, columns: that their forms have.
    """

    positions: NDArray[np.int64]
    left_out: Counter[str] = field(default_factory=Counter)
    message_fields: set[str] = field(default_factory=set)
    columns: set[str] = field(default_factory=set)


def survey(source: Source, stop: StopRequest) -> Survey:
    """Look at every row; raises `UsageError` if none can be exported."""
    kept: list[int] = []
    found = Survey(np.zeros(0, np.int64))
    for position, trajectory in enumerate(source.trajectories()):
        stop.check()
        try:
            row = source.form.row(trajectory)
        except NotExportableError as error:
            found.left_out[str(error)] += 1
            continue
        kept.append(position)
        found.message_fields |= message_fields(row)
        found.columns |= row.keys()
    if not kept:
        told = "; ".join(f"{count:,} {why}" for why, count in found.left_out.most_common())
        raise UsageError(f"no row can be exported: {told or 'INPUT has no rows'}")
    found.positions = np.array(kept, np.int64)
    return found


@dataclass(frozen=True, slots=True)
class Plan:
    """The rows of an export, in order, and the files that they go into.

    order: (N,) positions of the exported rows, as they will stand. schema: of the rows.
    """

    source: Source
    order: NDArray[np.int64]
    schema: pa.Schema
    rows_per_file: int

    @classmethod
    def of(cls, source: Source, found: Survey, seed: int | None, shard_rows: int) -> "Plan":
        """seed: of the order, as numpy's default generator permutes; None is that of INPUT."""
        order = found.positions
        if seed is not None:
            order = np.random.default_rng(seed).permutation(order)
        num_files = max(1, ceil(len(order) / shard_rows))
        schema = source.form.schema(found.message_fields, found.columns)
        return cls(source, order, schema, ceil(len(order) / num_files))

    @property
    def num_files(self) -> int:
        return ceil(len(self.order) / self.rows_per_file)

    def positions_of(self, number: int) -> NDArray[np.int64]:
        return self.order[number * self.rows_per_file : (number + 1) * self.rows_per_file]

    def rows_of(self, number: int, stop: StopRequest) -> list[Row]:
        """The rows of one file, in order, each with its id."""
        wanted = self.positions_of(number)
        places = {int(position): place for place, position in enumerate(wanted)}
        rows: list[Any] = [None] * len(wanted)
        first, end = int(wanted.min()), int(wanted.max()) + 1
        ids, trajectories = self.source.ids(first, end), self.source.trajectories(first, end)
        for position, (row_id, trajectory) in enumerate(zip(ids, trajectories, strict=True), first):
            stop.check()
            if (place := places.get(position)) is not None:
                rows[place] = {"id": row_id, **self.source.form.row(trajectory)}
        return rows


def choose_ids(shards: Sequence[Shard], schema: pa.Schema, named: str | None) -> str | None:
    """The column that tells rows apart: the named one, else `id` if its values are distinct.

    Raises `UsageError` if the named one is missing, or has nulls or a value twice.
    """
    if named is None and schema.names.count(USUAL_ID) != 1:
        return None
    column = named or USUAL_ID
    if schema.names.count(column) != 1:
        there = ", ".join(schema.names)
        raise UsageError(f"INPUT has no column {column!r}, or more than one; it has: {there}")
    seen: set[Any] = set()
    num_rows = 0
    for shard in shards:
        for batch in ShardReader(shard.path, [column]).rows(0, shard.num_rows):
            values = batch.column(column).to_pylist()
            num_rows += len(values)
            seen.update(str(value) for value in values if value is not None)
    if len(seen) == num_rows:
        return column
    if named is not None:
        raise UsageError(
            f"column {named!r} of INPUT has {num_rows:,} rows and {len(seen):,} different values; "
            "ids must tell rows apart: name another, or leave --id-column out"
        )
    return None
