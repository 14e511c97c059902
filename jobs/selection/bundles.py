"""Bundles of shards, each of which one call reads, and the ids of rows that tie with others.

Ids order rows of equal score and nothing else: few rows have such a sibling, so ids are read where
they are needed and of no other row. Knows nothing of scores.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from rsr.jobs.selection import exchange
from rsr.jobs.selection.ranking import ReadIds
from rsr.jobs.shards.scored import ScoredTable
from rsr.jobs.shards.shard import Shard

MIN_BUNDLE_ROWS, MAX_BUNDLES = 1 << 20, 200

Item = TypeVar("Item")

TiedIds = pa.Buffer
"""Rows of a part that tie with others, as far as a bundle has them: `position` and `id`."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """Shards that one call reads, and the number in INPUT of each one's first row."""

    shards: tuple[tuple[Shard, int], ...]

    @property
    def path(self) -> str:
        """What a user is told of a call that is lost."""
        more = f" and {len(self.shards) - 1} more" if len(self.shards) > 1 else ""
        return f"{self.shards[0][0].path}{more}"

    @property
    def first_row(self) -> int:
        return self.shards[0][1]

    @property
    def end(self) -> int:
        """The number in INPUT of the row after the last."""
        shard, first_row = self.shards[-1]
        return first_row + shard.num_rows

    def ids_at(self, table: ScoredTable, id_column: str, positions: NDArray[np.int64]) -> pl.Series:
        """Ids of rows of this bundle. positions: ascending numbers of INPUT's rows."""
        parts = []
        for shard, first_row in self.shards:
            low, high = np.searchsorted(positions, [first_row, first_row + shard.num_rows])
            if low < high:
                here = positions[low:high] - first_row
                parts.append(table.of(shard).read_at(id_column, here))
        ids = pl.concat(parts)
        return ids.cast(pl.String) if ids.dtype == pl.Categorical else ids

    def id_reader(
        self, table: ScoredTable, id_column: str | None, positions: NDArray[np.int64]
    ) -> ReadIds | None:
        """Reads ids of the rows at these ascending numbers in INPUT, by their places among them."""
        if id_column is None:
            return None
        return lambda places: self.ids_at(table, id_column, positions[places])


@dataclass(frozen=True, slots=True)
class RowsOfBundle:
    """Some rows of a bundle. positions: their ascending numbers in INPUT."""

    bundle: Bundle
    positions: NDArray[np.int64]

    @property
    def path(self) -> str:
        """What a user is told of a call that is lost."""
        return self.bundle.path


def bundles_of(table: ScoredTable) -> list[Bundle]:
    """Shards in their order, bundled so that each has many rows and there are not too many."""
    max_rows = max(MIN_BUNDLE_ROWS, -(-table.num_rows // MAX_BUNDLES))
    num_rows = [shard.num_rows for shard in table.shards]
    placed = list(zip(table.shards, itertools.accumulate(num_rows[:-1], initial=0), strict=True))
    return [Bundle(tuple(shards)) for shards in in_bundles(placed, num_rows, max_rows)]


def in_bundles(items: Sequence[Item], sizes: Sequence[int], max_size: int) -> list[list[Item]]:
    """The items in their order, so many together as are no larger than `max_size`; at least one."""
    bundles: list[list[Item]] = []
    size = 0
    for item, more in zip(items, sizes, strict=True):
        if not bundles or size + more > max_size:
            bundles.append([])
            size = 0
        bundles[-1].append(item)
        size += more
    return bundles


class IdsToRead:
    """A `ReadIds` that has none: it notes the rows whose ids would order them."""

    def __init__(self, positions: NDArray[np.int64]) -> None:
        self._positions = positions
        self._asked: list[NDArray[np.int64]] = []

    def __call__(self, places: NDArray[np.int64]) -> pl.Series:
        self._asked.append(self._positions[places])
        return pl.Series([None] * len(places), dtype=pl.String)

    @property
    def positions(self) -> NDArray[np.int64]:
        """Ascending numbers in INPUT of the rows."""
        return np.unique(np.concatenate([np.zeros(0, np.int64), *self._asked]))


def reader_of(ids: Sequence[TiedIds], positions: NDArray[np.int64]) -> ReadIds:
    """Of the rows at these ascending numbers in INPUT, the `ids` that were read."""
    known = exchange.joined(list(ids)).sort("position")
    at = known["position"].to_numpy()
    return lambda places: known["id"].gather(np.searchsorted(at, positions[places]))


def tied_ids(
    table: ScoredTable, id_column: str, bundle: Bundle, *tied: NDArray[np.int64]
) -> tuple[Any, ...]:
    """Nothing, then for each part the ids of its rows that lie in the bundle.

    tied: of each part, the ascending numbers in INPUT of its rows whose ids are wanted.
    """
    here = [
        positions[slice(*np.searchsorted(positions, [bundle.first_row, bundle.end]))]
        for positions in tied
    ]
    wanted = np.sort(np.concatenate(here))
    if not len(wanted):
        return (None, *[exchange.packed(pl.DataFrame())] * len(tied))
    ids = bundle.ids_at(table, id_column, wanted)
    found = (
        pl.DataFrame({"position": positions, "id": ids.gather(np.searchsorted(wanted, positions))})
        for positions in here
    )
    return (None, *map(exchange.packed, found))


def ids_of(table: ScoredTable, id_column: str, rows: RowsOfBundle) -> tuple[pl.Series]:
    return (rows.bundle.ids_at(table, id_column, rows.positions),)
