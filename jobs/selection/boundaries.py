"""Where each group's kept rows end, found by passes over shards: exact, without holding the rows.

A score is a 64-bit word that sorts as the score does. A first pass counts rows and tokens by group
and by the leading bits; on the driver the bin in which a group's limit lies is known then. The next
pass counts within those bins by the bits that follow, until so few rows are left there that they
can be looked at one by one, in the order of score, id, shard and row. Knows nothing of Ray: whoever
calls says how a function is called on every shard.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from rsr.jobs.errors import UsageError
from rsr.jobs.run.calls import Piece
from rsr.jobs.run.passes import Passes
from rsr.jobs.selection.bundles import Bundle
from rsr.jobs.selection.ranking import OUTSIDE, share_of
from rsr.jobs.shards.scored import ScoredTable
from rsr.jobs.shards.shard import Shard

SHIFTS = (48, 34, 17, 0)
"""Bits of a word that each pass leaves out: the first has few bins, as groups may be many."""
SHIFTS_OF_ONE_GROUP = (42, 28, 14, 0)
"""The same where all rows are of one group: at a hundred million, the first pass is the last."""
REFINED_ABOVE_ROWS = 1 << 20
"""Rows in the bins of all limits for which another pass counts before they are looked at."""
MAX_CONTESTED_ROWS = 1 << 20
"""Rows at the limits that the driver looks at one by one; some 50 MB with their ids."""
MAX_BINS_ADDED = 1 << 18
"""Bins that wait to be added up, unless the sums are more; some 10 MB."""
SIGN = np.uint64(1 << 63)


@dataclass(frozen=True, slots=True)
class Narrow:
    """What passes read of a shard, as expressions that were checked against the whole table.

    score: f64, lower is better; null or NaN takes no part. is_unmeasured: None where every scored
    row has a score. group: None where all rows are of one. has_budget: whether tokens count.
    """

    table: ScoredTable
    score: pl.Expr
    is_scored: pl.Expr
    is_unmeasured: pl.Expr | None
    group: pl.Expr | None
    id_column: str | None
    has_budget: bool

    @property
    def shifts(self) -> tuple[int, ...]:
        return SHIFTS_OF_ONE_GROUP if self.group is None else SHIFTS

    def read(self, shard: Shard, **more: pl.Expr) -> pl.DataFrame:
        """Every row of a shard in order: word, score, num_tokens, and group if there are groups.

        word: `OUTSIDE` of a row that takes no part. num_tokens: 0 where tokens do not count. more:
        other expressions to evaluate.
        """
        tokens = pl.col("rsr_num_tokens").cast(pl.Int64)
        columns = {
            "score": self.score.fill_null(float("nan")),
            "num_tokens": tokens if self.has_budget else pl.lit(0, pl.Int64),
        }
        if self.group is not None:
            columns["group"] = self.group
        frame = self.table.of(shard).collect(self.table.of(shard).scan.select(**columns, **more))
        scores = frame["score"].to_numpy()
        words = sortable(scores)
        words[np.isnan(scores)] = OUTSIDE
        return frame.with_columns(word=pl.Series(words, dtype=pl.UInt64))


def sortable(scores: NDArray[np.float64]) -> NDArray[np.uint64]:
    """Words that sort as the scores do; minus zero is zero."""
    bits = (scores + 0.0).view(np.uint64)
    return np.where(bits & SIGN, ~bits, bits | SIGN)


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of each group may be kept; at least one is given, or everything is."""

    keep_fraction: Fraction | None = None
    keep_rows: int | None = None
    token_budget: int | None = None

    @property
    def is_open(self) -> bool:
        return (self.keep_fraction, self.keep_rows, self.token_budget) == (None, None, None)

    def rows_of(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        most = counts
        if self.keep_fraction is not None:
            most = np.minimum(most, share_of(counts, self.keep_fraction))
        if self.keep_rows is not None:
            most = np.minimum(most, self.keep_rows)
        return most


@dataclass(frozen=True, slots=True)
class Boundaries:
    """Which rows are kept, in a few words a group.

    cuts: group, and the word `below` which its rows are kept. A group that is not among them is
    kept whole. Rows at the cut are not. max_score: inclusive, whatever the group.
    """

    cuts: pl.DataFrame
    max_score: float | None

    def mask(self, rows: pl.DataFrame) -> NDArray[np.bool_]:
        """(num_rows,) which rows of `Narrow.read` are kept."""
        keep: NDArray[np.bool_] = rows["word"].to_numpy() < _of_groups(rows, self.cuts, "below")
        if self.max_score is not None:
            keep &= rows["score"].to_numpy() <= self.max_score
        return keep


def _of_groups(rows: pl.DataFrame, per_group: pl.DataFrame, column: str) -> NDArray[np.uint64]:
    """(num_rows,) what `per_group` has for each row's group, or (1,) for all; else `OUTSIDE`."""
    if "group" not in rows.columns:
        return per_group[column].to_numpy() if per_group.height else np.array([OUTSIDE])
    found = rows.select("group").join(
        per_group.select("group", column), on="group", how="left", nulls_equal=True,
        maintain_order="left",
    )  # fmt: skip
    return found[column].fill_null(pl.lit(int(OUTSIDE), pl.UInt64)).to_numpy()


@dataclass(frozen=True, slots=True)
class Counts:
    """The candidates of all shards, before limits."""

    num_scored: int
    num_unmeasured: int
    num_candidates: int
    num_groups: int


@dataclass(frozen=True, slots=True)
class Looked:
    """What the last look at a shard found.

    at_limit: its rows in the bins at the limits: group, word, row, score, num_tokens, and the id
    where ids order rows. num_below: its rows that are kept whatever comes of those. worst: the
    largest score of these, -inf without any. beside: what the caller has looked at meanwhile.
    """

    at_limit: pl.DataFrame
    num_below: int
    worst: float
    beside: Any


@dataclass(frozen=True, slots=True)
class Kept:
    """What is kept. num_rows: of each shard. worst: the largest score of them all.

    masks: of each bundle the piece of its rows below the limits, a bit a row. winners: of the rows
    at the limits those that are kept, by the shard's name. beside: what the caller has looked at
    meanwhile, of each shard.
    """

    num_rows: list[int]
    worst: float
    masks: list[Piece]
    winners: dict[str, NDArray[np.int64]]
    beside: list[Any]


@dataclass(frozen=True, slots=True)
class Beside:
    """What else is asked of every shard's rows. look: is called with rows that have the columns."""

    columns: Mapping[str, pl.Expr]
    look: Callable[[pl.DataFrame], Any]


def find_kept(
    narrow: Narrow,
    bundles: Sequence[Bundle],
    limits: Limits,
    max_score: float | None,
    passes: Passes,
    beside: Beside,
) -> tuple[Counts, Kept]:
    """Passes over every shard until each group's boundary is known, and what it keeps.

    bundles: of the table's shards. beside: what is asked of rows where they are read last.
    """
    sums = BinSums()
    num_scored = num_unmeasured = 0
    counted = passes.begin("count", len(bundles))(partial(_count_all, narrow), bundles)
    for _, (bins, scored_here, unmeasured_here) in counted:
        sums.add(bins)
        num_scored += scored_here
        num_unmeasured += unmeasured_here
    bins = sums.total()
    per_group = bins.group_by("group").agg(pl.col("num_rows").sum(), pl.col("num_tokens").sum())
    counts = Counts(
        num_scored=num_scored,
        num_unmeasured=num_unmeasured,
        num_candidates=int(per_group["num_rows"].sum()),
        num_groups=per_group.height,
    )
    room = per_group.select(
        "group", room_rows=pl.Series(limits.rows_of(per_group["num_rows"].to_numpy()))
    ).with_columns(room_tokens=pl.lit(limits.token_budget, pl.Int64))
    cuts = first_bins_over(bins, room)
    decided = []
    for shift, finer in itertools.zip_longest(narrow.shifts, narrow.shifts[1:]):
        is_decided = _is_decided()
        decided.append(_below(cuts.filter(is_decided), shift))
        cuts = cuts.filter(~is_decided)
        if finer is None or cuts["num_rows"].sum() <= REFINED_ABOVE_ROWS:
            break
        within = cuts.select("group", "bin")
        count = partial(_count_within, narrow, within, shift, finer)
        sums = BinSums()
        for _, bins in passes.begin("refine", len(bundles))(count, bundles):
            sums.add(bins)
        cuts = first_bins_over(sums.total(), cuts.select("group", "room_rows", "room_tokens"))
    if cuts["num_rows"].sum() > MAX_CONTESTED_ROWS:
        raise _too_many_ties(narrow, cuts)
    sure = Boundaries(pl.concat([*decided, _below(cuts, shift)]), max_score)
    return counts, _kept(narrow, bundles, sure, cuts, shift, passes, beside)


def _is_decided() -> pl.Expr:
    """Whether it is known that nothing of a bin that does not fit whole is kept.

    Either there is room for no row, or the one row that it has does not fit.
    """
    return (pl.col("room_rows") <= 0) | (pl.col("num_rows") == 1)


def _below(cuts: pl.DataFrame, shift: int) -> pl.DataFrame:
    return cuts.select("group", below=pl.col("bin") * pl.lit(1 << shift, pl.UInt64))


def _too_many_ties(narrow: Narrow, cuts: pl.DataFrame) -> UsageError:
    """What is left at the last bit has siblings of the same score."""
    where = "a limit" if cuts.height == 1 else f"the limits of {cuts.height:,} groups"
    by = "position" if narrow.id_column is None else narrow.id_column
    return UsageError(
        f"{cuts['num_rows'].sum():,} rows that share their score with others stand at {where}, and "
        f"a cluster's driver puts at most {MAX_CONTESTED_ROWS:,} of them in order of {by}; leave "
        "--address out (and unset RAY_ADDRESS)"
    )


def _count_all(narrow: Narrow, bundle: Bundle) -> tuple[pl.DataFrame, int, int]:
    asked = {"is_scored": narrow.is_scored}
    if narrow.is_unmeasured is not None:
        asked["is_unmeasured"] = narrow.is_unmeasured
    shift = narrow.shifts[0]
    sums = BinSums()
    num_scored = num_unmeasured = 0
    for shard, _ in bundle.shards:
        rows = narrow.read(shard, **asked)
        sums.add(bins_of(rows, shift))
        num_scored += int(rows["is_scored"].sum())
        num_unmeasured += int(rows["is_unmeasured"].sum()) if "is_unmeasured" in asked else 0
    return sums.total(), num_scored, num_unmeasured


def _count_within(
    narrow: Narrow, within: pl.DataFrame, shift: int, finer: int, bundle: Bundle
) -> pl.DataFrame:
    sums = BinSums()
    for shard, _ in bundle.shards:
        sums.add(bins_of(_inside(narrow.read(shard), within, shift), finer))
    return sums.total()


def _inside(rows: pl.DataFrame, within: pl.DataFrame, shift: int) -> pl.DataFrame:
    """The rows in the bin of their group, in their order. within: one bin a group at the most."""
    words = rows["word"].to_numpy()
    is_inside = words >> np.uint64(shift) == _of_groups(rows, within, "bin")
    return rows.filter(pl.Series(is_inside & (words != OUTSIDE), dtype=pl.Boolean))


def bins_of(rows: pl.DataFrame, shift: int) -> pl.DataFrame:
    """Rows and tokens by group and by the bits of the word from `shift` on.

    Rows that take no part are not counted. Without a column `group`, all are of group 0.
    """
    groups = ["group"] if "group" in rows.columns else []
    bins = rows.group_by(*groups, bin=pl.col("word") // pl.lit(1 << shift, pl.UInt64)).agg(
        num_rows=pl.len().cast(pl.Int64), num_tokens=pl.col("num_tokens").sum()
    )
    bins = bins.filter(pl.col("bin") != int(OUTSIDE) >> shift)
    if not groups:
        bins = bins.with_columns(group=pl.lit(0, pl.Int8))
    return bins.select("group", "bin", "num_rows", "num_tokens")


def merged_bins(parts: list[pl.DataFrame]) -> pl.DataFrame:
    """The bins of several sets of rows, added up."""
    sums = pl.col("num_rows").sum(), pl.col("num_tokens").sum()
    return pl.concat(parts).group_by("group", "bin").agg(*sums)


class BinSums:
    """Bins of many sets of rows, added up as they come: never much more than the sums are kept."""

    def __init__(self) -> None:
        self._sums: pl.DataFrame | None = None
        self._added: list[pl.DataFrame] = []

    def add(self, bins: pl.DataFrame) -> None:
        self._added.append(bins)
        num_summed = 0 if self._sums is None else self._sums.height
        if sum(bins.height for bins in self._added) > max(MAX_BINS_ADDED, num_summed):
            self.total()

    def total(self) -> pl.DataFrame:
        """All bins so far; at least one set of rows has been added."""
        if self._added:
            before = [] if self._sums is None else [self._sums]
            self._sums, self._added = merged_bins(before + self._added), []
        assert self._sums is not None
        return self._sums


def first_bins_over(bins: pl.DataFrame, room: pl.DataFrame) -> pl.DataFrame:
    """The first bin of each group that does not fit whole, and the room that is left for it."""
    sums = bins.join(room, on="group", nulls_equal=True).sort("group", "bin", nulls_last=True)
    sums = sums.with_columns(
        rows_upto=pl.col("num_rows").cum_sum().over("group"),
        tokens_upto=pl.col("num_tokens").cum_sum().over("group"),
    )
    over = (pl.col("rows_upto") > pl.col("room_rows")) | (
        pl.col("tokens_upto") > pl.col("room_tokens")
    ).fill_null(False)
    first = sums.filter(over).unique("group", keep="first", maintain_order=True)
    return first.select(
        "group",
        "bin",
        "num_rows",
        room_rows=pl.col("room_rows") - pl.col("rows_upto") + pl.col("num_rows"),
        room_tokens=pl.col("room_tokens") - pl.col("tokens_upto") + pl.col("num_tokens"),
    )


def _kept(
    narrow: Narrow,
    bundles: Sequence[Bundle],
    sure: Boundaries,
    contested: pl.DataFrame,
    shift: int,
    passes: Passes,
    beside: Beside,
) -> Kept:
    """What a last look at every shard finds. contested: the bins in which limits lie."""
    look = partial(_look, narrow, sure, contested.select("group", "bin"), shift, beside)
    calls = passes.begin("limits", len(bundles))
    of_bundles: list[list[Looked]] = [[] for _ in bundles]
    masks: list[Piece] = [None for _ in bundles]
    for number, found, (mask,) in calls.scatter(look, bundles, [()] * len(bundles), 1):
        of_bundles[number], masks[number] = found, mask
    looked = [one for found in of_bundles for one in found]
    shards = narrow.table.shards
    at_limit = {s.name: one.at_limit for s, one in zip(shards, looked, strict=True)}
    won = _winners(narrow, contested, at_limit, sure.max_score)
    scores = [rows["score"].to_numpy() for rows in won.values()]
    return Kept(
        [
            one.num_below + (won[shard.name].height if shard.name in won else 0)
            for shard, one in zip(shards, looked, strict=True)
        ],
        max([one.worst for one in looked] + [float(s.max(initial=-np.inf)) for s in scores]),
        masks,
        {name: rows["row"].to_numpy() for name, rows in won.items()},
        [one.beside for one in looked],
    )


def _winners(
    narrow: Narrow,
    contested: pl.DataFrame,
    at_limit: dict[str, pl.DataFrame],
    max_score: float | None,
) -> dict[str, pl.DataFrame]:
    """The rows at the limits that are kept, `row` and `score`, by the shard's name."""
    parts = [
        rows.with_columns(shard=pl.lit(number, pl.Int64))
        for number, rows in enumerate(at_limit.values())
        if rows.height
    ]
    if not parts:
        return {}
    keys = ["word", *(["id"] if narrow.id_column is not None else []), "shard", "row"]
    room = contested.select("group", "room_rows", "room_tokens")
    ranked = pl.concat(parts).sort("group", *keys, nulls_last=True)
    ranked = ranked.join(room, on="group", nulls_equal=True, how="left", maintain_order="left")
    fits = (pl.int_range(1, pl.len() + 1).over("group") <= pl.col("room_rows")) & (
        pl.col("num_tokens").cum_sum().over("group") <= pl.col("room_tokens")
    ).fill_null(True)
    kept = ranked.filter(fits)
    if max_score is not None:
        kept = kept.filter(pl.col("score") <= max_score)
    names = list(at_limit)
    return {
        names[number[0]]: rows.select("row", "score") for number, rows in kept.group_by("shard")
    }


def _look(
    narrow: Narrow,
    sure: Boundaries,
    within: pl.DataFrame,
    shift: int,
    beside: Beside,
    bundle: Bundle,
) -> tuple[list[Looked], NDArray[np.uint8]]:
    """What is found in each shard of a bundle, and the rows that `sure` keeps, a bit a row.

    within: the bins at the limits.
    """
    looked, masks = [], []
    for shard, _ in bundle.shards:
        rows = narrow.read(shard, **beside.columns)
        mask = sure.mask(rows)
        below = rows["score"].to_numpy()[mask]
        found = _inside(rows.with_row_index("row"), within, shift)
        if "group" not in found.columns:
            found = found.with_columns(group=pl.lit(0, pl.Int8))
        found = found.select("group", "word", "row", "score", "num_tokens")
        if narrow.id_column is not None and found.height:
            ids = narrow.table.of(shard).read_at(narrow.id_column, found["row"].to_numpy())
            found = found.with_columns(id=ids)
        looked.append(
            Looked(found, len(below), float(below.max(initial=-np.inf)), beside.look(rows))
        )
        masks.append(mask)
    return looked, np.packbits(np.concatenate(masks))
