"""`quotas.admit` by passes over parts: exact, and no part's rows come to the caller.

Where a value is full, everything after its last admitted row is out: a cut, which is a place in the
order of all rows. Between two cuts only the groups' room matters. So each pass admits anew under
the cuts found so far, and tells by bins of scores how many rows of each value that takes. The first
row past any value's cap is the next cut. It is found as the boundaries of `rsr filter` are: bins,
finer bins, and in the end the rows of one bin.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from rsr.jobs.errors import UsageError
from rsr.jobs.run.calls import Piece
from rsr.jobs.run.passes import Passes
from rsr.jobs.selection import exchange
from rsr.jobs.selection.boundaries import (
    REFINED_ABOVE_ROWS,
    SHIFTS,
    bins_of,
    first_bins_over,
    merged_bins,
    sortable,
)
from rsr.jobs.selection.quotas import first_of_groups
from rsr.jobs.selection.ranking import ReadIds
from rsr.jobs.selection.select import CORRECT

MAX_ROWS_AT_CUT = 4 << 20
"""Rows of equal score that the caller puts in order by id; some 200 MB."""

LEVELS = tuple((column, shift) for column in ("word", "second_word") for shift in SHIFTS)
"""What each pass over the rows at a cut counts by: a word, and the bits from which on."""

ORDER = ("rank_score", "second", "id", "position")
"""What rows are ranked by, whatever their group."""

Part = pa.Buffer
"""Rows of whole groups, one group after another, best first: `group`, `rank_score`, `score`,
`position`, the quotas' columns of hashed values, and where it orders rows `second`."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Rows of a value from here on are out. winners: positions of those at these two scores that
    are still in.
    """

    score: float
    second: float
    winners: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Admission:
    """Which rows are out: the cuts of each quota's column, by value."""

    cuts: dict[str, dict[int, Cut]] = field(default_factory=dict)

    def allowed(self, rows: pl.DataFrame) -> NDArray[np.bool_]:
        """(num_rows,) mask of the rows before all cuts of their values."""
        allowed = np.ones(rows.height, bool)
        scores, seconds = rows["rank_score"].to_numpy(), _seconds(rows)
        positions = rows["position"].to_numpy()
        for name, cuts in self.cuts.items():
            values = rows[name].to_numpy()
            for value, cut in cuts.items():
                of_value = np.flatnonzero(values == np.uint64(value))
                score, second = scores[of_value], seconds[of_value]
                is_in = (score < cut.score) | ((score == cut.score) & (second < cut.second))
                is_at = (score == cut.score) & (second == cut.second)
                is_in |= is_at & np.isin(positions[of_value], cut.winners)
                allowed[of_value[~is_in]] = False
        return allowed


@dataclass(slots=True)
class Chosen:
    """What is kept of parts. worst: the largest score. num_wrong: rows that are not correct, where
    that was looked at.
    """

    num_rows_by_shard: NDArray[np.int64]
    num_groups: int = 0
    num_groups_complete: int = 0
    num_wrong: int = 0
    worst: float = -np.inf

    def add(self, other: "Chosen") -> None:
        self.num_rows_by_shard += other.num_rows_by_shard
        self.num_groups += other.num_groups
        self.num_groups_complete += other.num_groups_complete
        self.num_wrong += other.num_wrong
        self.worst = max(self.worst, other.worst)


def chosen_of_part(
    room: int,
    admission: Admission | None,
    keep: int | None,
    ends: NDArray[np.int64],
    _: int,
    part: Part,
) -> tuple[Chosen, NDArray[np.int64]]:
    """What is kept, and the ascending positions of the kept rows.

    room: of each group, of which the part's rows are taken if there is no `admission`. keep: rows
    of a complete group. ends: (num_shards,) positions after each shard's last row.
    """
    rows = exchange.unpacked(part)
    if rows.height and admission is not None:
        rows = rows.filter(pl.Series(_admitted(room, admission, rows)))
    if not rows.height:
        return Chosen(np.zeros(len(ends), np.int64)), np.zeros(0, np.int64)
    positions = np.sort(rows["position"].to_numpy())
    by_shard = np.bincount(
        np.searchsorted(ends, positions, side="right"), minlength=len(ends)
    ).astype(np.int64)
    counts = np.bincount(rows["group"].to_numpy())
    chosen = Chosen(
        by_shard,
        int(np.count_nonzero(counts)),
        int(np.count_nonzero(counts >= (keep or 1))),
        int((~rows[CORRECT]).sum()) if CORRECT in rows.columns else 0,
        float(rows["score"].to_numpy().max()),
    )
    return chosen, positions


def admit_by_passes(
    names: Sequence[str],
    max_shares: Sequence[Fraction],
    room: int,
    parts: Sequence[Sequence[Piece]],
    passes: Passes,
    read_ids: ReadIds | None,
) -> Admission | None:
    """The admission of `quotas.admit` over the rows of all parts; None if it admits no row.

    names: the quotas' columns. parts: the piece of each part. read_ids: of rows by their positions.
    Raises `UsageError` where more rows of one score stand at a cut than the caller orders.
    """
    over_parts = _OverParts(names, room, parts, passes, read_ids)
    num_selected = None
    while True:
        admission = Admission({name: {} for name in names})
        while True:
            bins = over_parts.count(admission)
            num_admitted = int(bins[names[0]]["num_rows"].sum())
            if num_selected is None:
                num_selected = num_admitted
            caps = {
                name: int(share * num_selected)
                for name, share in zip(names, max_shares, strict=True)
            }
            cuts = over_parts.first_cuts(admission, bins, caps)
            if not cuts:
                break
            for name, value, cut in cuts:
                admission.cuts[name][value] = cut
        num_selected = num_admitted
        if not num_selected:
            return None
        if all(
            _counts(bins[name]).max() <= int(share * num_selected)
            for name, share in zip(names, max_shares, strict=True)
        ):
            return admission


@dataclass(frozen=True, slots=True)
class _OverParts:
    """Passes over the parts under an admission."""

    names: Sequence[str]
    room: int
    parts: Sequence[Sequence[Piece]]
    passes: Passes
    read_ids: ReadIds | None

    def count(self, admission: Admission) -> dict[str, pl.DataFrame]:
        """By quota: rows admitted of each value, by the leading bits of their score."""
        count = partial(_count_part, self.room, admission, self.names)
        answers = self._answers(count)
        return {name: merged_bins([answer[name] for answer in answers]) for name in self.names}

    def first_cuts(
        self, admission: Admission, bins: dict[str, pl.DataFrame], caps: dict[str, int]
    ) -> list[tuple[str, int, Cut]]:
        """The first admitted row past any value's cap, as a cut of each value that it is past."""
        found = []
        for name in self.names:
            room = bins[name].group_by("group").agg(pl.col("num_rows").sum())
            room = room.filter(pl.col("num_rows") > caps[name]).select(
                "group",
                room_rows=pl.lit(caps[name], pl.Int64),
                room_tokens=pl.lit(None, pl.Int64),
            )
            over = first_bins_over(bins[name].join(room, on="group", how="semi"), room)
            found.append(over.with_columns(quota=pl.lit(name)))
        over = _first(pl.concat(found))
        if not over.height:
            return []
        word = 0
        for level, (column, shift) in enumerate(LEVELS):
            # All brackets that are left begin with the same bits.
            fixed = [(column, shift, int(over["bin"][0]))]
            if column == "second_word":
                fixed.append(("word", 0, word))
            elif not shift:
                word = fixed[0][2]
            if over["num_rows"].sum() <= REFINED_ABOVE_ROWS or level + 1 == len(LEVELS):
                break
            over = self._refined(admission, over, fixed, LEVELS[level + 1])
        return self._cuts_within(admission, over, fixed)

    def _refined(
        self,
        admission: Admission,
        over: pl.DataFrame,
        fixed: Sequence[tuple[str, int, int]],
        level: tuple[str, int],
    ) -> pl.DataFrame:
        """The lowest bins of the next level in which the first row past a cap is."""
        values = over.select("quota", "group")
        refine = partial(_refine_part, self.room, admission, values, fixed, level)
        bins = pl.concat(self._answers(refine)).group_by("quota", "group", "bin")
        finer = bins.agg(pl.col("num_rows").sum(), pl.col("num_tokens").sum())
        found = [
            first_bins_over(
                finer.filter(pl.col("quota") == quota).drop("quota"),
                of_quota.select("group", "room_rows", "room_tokens"),
            ).with_columns(quota=pl.lit(quota))
            for (quota,), of_quota in over.group_by("quota")
        ]
        return _first(pl.concat(found))

    def _cuts_within(
        self, admission: Admission, over: pl.DataFrame, fixed: Sequence[tuple[str, int, int]]
    ) -> list[tuple[str, int, Cut]]:
        """`first_cuts` of the values in `over`, which lie in one bin: its rows are put in order."""
        if over["num_rows"].sum() > MAX_ROWS_AT_CUT:
            raise UsageError(
                f"{over['num_rows'].sum():,} candidates of equal score compete for the last places "
                "of a value of --max-share-per, more than a cluster's driver puts in the order of "
                "their ids; leave --address out (and unset RAY_ADDRESS)"
            )
        fetch = partial(_fetch_part, self.room, admission, over.select("quota", "group"), fixed)
        rows = pl.concat([rows for rows in self._answers(fetch) if rows.height])
        rows = self._with_ids(rows).sort(*ORDER, nulls_last=True).with_row_index("place")
        rows = rows.join(over, on=["quota", "group"], how="left", maintain_order="left")
        upto = pl.int_range(pl.len()).over("quota", "group")
        past = rows.filter(upto == pl.col("room_rows"))
        first = past.filter(pl.col("position") == past["position"][0])
        cuts = []
        for row in first.iter_rows(named=True):
            before = rows.filter(
                pl.col("quota") == row["quota"],
                pl.col("group") == row["group"],
                pl.col("place") < row["place"],
                pl.col("rank_score") == row["rank_score"],
                pl.col("second") == row["second"],
            )
            cut = Cut(row["rank_score"], row["second"], before["position"].to_numpy())
            cuts.append((row["quota"], row["group"], cut))
        return cuts

    def _with_ids(self, rows: pl.DataFrame) -> pl.DataFrame:
        """`rows` with the ids of those of equal scores, null for the others."""
        # A row stands there once for each quota of which it has a value.
        places = rows.unique("position").sort("position")
        tied = places.filter(pl.struct(ORDER[:2]).is_duplicated())["position"]
        if self.read_ids is None or not len(tied):
            return rows.with_columns(id=pl.lit(None, pl.String))
        ids = pl.DataFrame({"position": tied, "id": self.read_ids(tied.to_numpy())})
        return rows.join(ids, on="position", how="left")

    def _answers(self, function: Any) -> list[Any]:
        numbers = range(len(self.parts))
        answers: list[Any] = [None] * len(numbers)
        calls = self.passes.begin("admit", len(numbers))
        for number, answer, _ in calls.scatter(function, numbers, self.parts, 0):
            answers[number] = answer
        return answers


def _first(over: pl.DataFrame) -> pl.DataFrame:
    """Those of the lowest bin: the first row past a cap is of one of them."""
    return over.filter(pl.col("bin") == pl.col("bin").min())


def _counts(bins: pl.DataFrame) -> NDArray[np.int64]:
    return bins.group_by("group").agg(pl.col("num_rows").sum())["num_rows"].to_numpy()


def _seconds(rows: pl.DataFrame) -> NDArray[np.float64]:
    return rows["second"].to_numpy() if "second" in rows.columns else np.zeros(rows.height)


def _admitted(room: int, admission: Admission, rows: pl.DataFrame) -> NDArray[np.bool_]:
    """(num_rows,) mask of the first rows of each group that are before all cuts."""
    layout = np.arange(rows.height)
    return first_of_groups(rows["group"].to_numpy(), layout, room, admission.allowed(rows))


def _admitted_rows(room: int, admission: Admission, part: Part) -> pl.DataFrame:
    """The admitted rows of a part, with the words that sort as their scores do."""
    rows = exchange.unpacked(part)
    if not rows.height:
        return rows
    rows = rows.filter(pl.Series(_admitted(room, admission, rows)))
    return rows.with_columns(
        word=pl.Series(sortable(rows["rank_score"].to_numpy()), dtype=pl.UInt64),
        second_word=pl.Series(sortable(_seconds(rows)), dtype=pl.UInt64),
        second=pl.Series(_seconds(rows)),
        num_tokens=pl.lit(0, pl.Int64),
    )


def _count_part(
    room: int, admission: Admission, names: Sequence[str], _: int, part: Part
) -> tuple[dict[str, pl.DataFrame]]:
    rows = _admitted_rows(room, admission, part)
    if not rows.height:
        rows = pl.DataFrame(
            schema=dict.fromkeys(names, pl.UInt64) | {"word": pl.UInt64, "num_tokens": pl.Int64}
        )
    return ({name: bins_of(rows.with_columns(group=name), SHIFTS[0]) for name in names},)


def _within(
    rows: pl.DataFrame, values: pl.DataFrame, fixed: Sequence[tuple[str, int, int]]
) -> pl.DataFrame:
    """The rows whose words begin with what is fixed, once for each quota of which they have one of
    the `values`, as `quota` and `group`.
    """
    for column, shift, bin_ in fixed:
        rows = rows.filter(pl.col(column) // pl.lit(1 << shift, pl.UInt64) == bin_)
    found = [
        rows.with_columns(group=pl.col(name), quota=pl.lit(name)).join(
            of_quota.select("group"), on="group", how="semi", maintain_order="left"
        )
        for (name,), of_quota in values.group_by("quota")
    ]
    return pl.concat(found)


def _refine_part(
    room: int,
    admission: Admission,
    values: pl.DataFrame,
    fixed: Sequence[tuple[str, int, int]],
    level: tuple[str, int],
    _: int,
    part: Part,
) -> tuple[pl.DataFrame]:
    rows = _admitted_rows(room, admission, part)
    if not rows.height:
        return (_NO_BINS,)
    rows = _within(rows, values, fixed)
    column, shift = level
    bin_ = pl.col(column) // pl.lit(1 << shift, pl.UInt64)
    bins = rows.group_by("quota", "group", bin=bin_).agg(
        num_rows=pl.len().cast(pl.Int64), num_tokens=pl.col("num_tokens").sum()
    )
    return (bins,)


_NO_BINS = pl.DataFrame(
    schema={
        "quota": pl.String,
        "group": pl.UInt64,
        "bin": pl.UInt64,
        "num_rows": pl.Int64,
        "num_tokens": pl.Int64,
    }
)


def _fetch_part(
    room: int,
    admission: Admission,
    values: pl.DataFrame,
    fixed: Sequence[tuple[str, int, int]],
    _: int,
    part: Part,
) -> tuple[pl.DataFrame]:
    rows = _admitted_rows(room, admission, part)
    if not rows.height:
        return (rows,)
    wanted = ["quota", "group", "rank_score", "second", "position"]
    return (_within(rows, values, fixed).select(wanted),)
