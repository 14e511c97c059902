"""INPUT's rows in the order in which `rsr score` takes them, read no further than is needed."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pyarrow as pa

from rsr.engine.trajectory import Trajectory
from rsr.jobs.errors import UsageError, first_line
from rsr.jobs.shards.columns import TrajectoryColumns, choose_columns, warn_of_unused_columns
from rsr.jobs.shards.inputs import find_inputs
from rsr.jobs.shards.parquet import open_parquet
from rsr.jobs.shards.reader import TrajectoryReader
from rsr.jobs.shards.shard import Shard, Unit, describe_shard
from rsr.jobs.shards.staging import needs_staging, stage_head
from rsr.jobs.storage import StorageError

PIECE_ROWS = 64
"""Rows in memory at a time."""


@dataclass(frozen=True, slots=True)
class InputRow:
    """One row of INPUT. number: among all of its rows, from 0. shard, row: where it stands."""

    number: int
    shard: str
    row: int
    trajectory: Trajectory


class InputRows:
    """The first `num_rows` rows of INPUT; a context manager, for some files must be staged.

    Raises `UsageError` where `rsr score` would: if there are no files, one cannot be read, or has
    no trajectories in the columns that are `wanted`.
    """

    def __init__(self, pattern: str, wanted: TrajectoryColumns, num_rows: int) -> None:
        self._inputs = find_inputs(pattern)
        self._columns = wanted
        self._num_rows = num_rows
        self._shards: list[Shard] = []
        self._reader: TrajectoryReader | None = None
        self._staged = tempfile.TemporaryDirectory(prefix="rsr-inspect-")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._staged.cleanup()

    def pieces(self, start: int, stop: int) -> Iterator[list[InputRow]]:
        """Rows [start, stop), as far as there are any, some at a time."""
        first = 0
        for index in range(len(self._inputs)):
            if first >= min(stop, self._num_rows):
                return
            shard = self._shard(index, self._num_rows - first)
            low, high = max(0, start - first), min(shard.num_rows, stop - first)
            for begin in range(low, high, PIECE_ROWS):
                unit = Unit(shard, begin, min(high, begin + PIECE_ROWS))
                yield [
                    InputRow(first + row, shard.name, row, trajectory)
                    for row, trajectory in enumerate(self._read(unit), begin)
                ]
            first += shard.num_rows

    def _shard(self, index: int, num_rows: int) -> Shard:
        """The file, looked at once. num_rows: that are needed of it."""
        if index < len(self._shards):
            return self._shards[index]
        file, name = self._inputs[index]
        path = file
        if needs_staging(file, self._columns.exploded):
            path = str(Path(self._staged.name) / f"{index}.parquet")
            stage_head(file, path, self._columns.exploded, num_rows)
        schema = open_parquet(path).schema_arrow
        self._columns = choose_columns(schema, self._columns, file)
        if not index:
            warn_of_unused_columns(schema, self._columns, file)
        self._shards.append(describe_shard(path, name, self._columns, None))
        return self._shards[index]

    def _read(self, unit: Unit) -> list[Trajectory]:
        if self._reader is None:
            self._reader = TrajectoryReader(self._columns)
        try:
            return self._reader.read(unit)
        except StorageError:
            raise
        except (OSError, pa.ArrowException) as error:
            raise UsageError(f"{unit.shard.path} cannot be read: {first_line(error)}") from error
