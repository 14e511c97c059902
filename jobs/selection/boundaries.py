"""Where each group's kept rows end, found by passes over shards: exact, without holding the rows.

A score is a 64-bit word that sorts as the score does. A first pass counts rows and tokens by group
and by the leading 16 bits; on the driver the bin in which a group's limit lies is known then. The
next pass counts within those bins by the next 16 bits, until so few rows are left there that they
can be looked at one by one, in the order of score, id, shard and row. Knows nothing of Ray: whoever
calls says how a function is called on every shard.
"""

from collections.abc import Callable, Sequence
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
from rsr.jobs.selection.ranking import share_of
from rsr.jobs.shards.scored import ScoredTable
from rsr.jobs.shards.shard import Shard

BITS_PER_PASS = 16
WORD_BITS = 64
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

    score: f64, lower is better; null or NaN takes no part. group: None where all rows are of one.
    """

    table: ScoredTable
    score: pl.Expr
    is_scored: pl.Expr
    is_unmeasured: pl.Expr
    group: pl.Expr | None
    id_column: str | None

    def read(self, shard: Shard) -> pl.DataFrame:
        """Every row of a shard in order: word, takes_part, score, group, num_tokens."""
        group = pl.lit(0, pl.Int8) if self.group is None else self.group
        rows = self.table.of(shard).scan.select(
            score=self.score.fill_null(float("nan")),
            is_scored=self.is_scored,
            is_unmeasured=self.is_unmeasured,
            group=group,
            num_tokens=pl.col("rsr_num_tokens").cast(pl.Int64),
        )
        frame = self.table.of(shard).collect(rows)
        scores = frame["score"].to_numpy()
        return frame.with_columns(
            word=pl.Series(sortable(scores), dtype=pl.UInt64),
            takes_part=pl.Series(~np.isnan(scores), dtype=pl.Boolean),
        )


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
        joined = rows.select("group", "word", "takes_part").join(
            self.cuts, on="group", how="left", nulls_equal=True, maintain_order="left"
        )
        is_below = (pl.col("word") < pl.col("below")).fill_null(True)
        keep = joined.select(pl.col("takes_part") & is_below).to_series().to_numpy()
        if self.max_score is not None:
            keep = keep & (rows["score"].to_numpy() <= self.max_score)
        return keep


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


def find_kept(
    narrow: Narrow,
    bundles: Sequence[Bundle],
    limits: Limits,
    max_score: float | None,
    passes: Passes,
    beside: Callable[[Shard], Any],
) -> tuple[Counts, Kept]:
    """Passes over every shard until each group's boundary is known, and what it keeps.

    bundles: of the table's shards. beside: called for every shard, where its rows are looked at for
    the last time.
    """
    shift = WORD_BITS - BITS_PER_PASS
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
    while True:
        is_decided = _is_decided()
        decided.append(_below(cuts.filter(is_decided), shift))
        cuts = cuts.filter(~is_decided)
        if not shift or cuts["num_rows"].sum() <= REFINED_ABOVE_ROWS:
            break
        within = cuts.select("group", "bin")
        count = partial(_count_within, narrow, within, shift)
        sums = BinSums()
        for _, bins in passes.begin("refine", len(bundles))(count, bundles):
            sums.add(bins)
        cuts = first_bins_over(sums.total(), cuts.select("group", "room_rows", "room_tokens"))
        shift -= BITS_PER_PASS
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
    sums = BinSums()
    num_scored = num_unmeasured = 0
    for shard, _ in bundle.shards:
        rows = narrow.read(shard)
        sums.add(bins_of(rows.filter("takes_part"), WORD_BITS - BITS_PER_PASS))
        num_scored += int(rows["is_scored"].sum())
        num_unmeasured += int(rows["is_unmeasured"].sum())
    return sums.total(), num_scored, num_unmeasured


def _count_within(narrow: Narrow, within: pl.DataFrame, shift: int, bundle: Bundle) -> pl.DataFrame:
    sums = BinSums()
    for shard, _ in bundle.shards:
        inside = _inside(narrow.read(shard).filter("takes_part"), within, shift)
        sums.add(bins_of(inside, shift - BITS_PER_PASS))
    return sums.total()


def _inside(rows: pl.DataFrame, within: pl.DataFrame, shift: int) -> pl.DataFrame:
    """The rows in the bin of their group, in their order."""
    keyed = rows.with_columns(bin=pl.col("word") // pl.lit(1 << shift, pl.UInt64))
    return keyed.join(
        within, on=["group", "bin"], how="semi", nulls_equal=True, maintain_order="left"
    )


def bins_of(rows: pl.DataFrame, shift: int) -> pl.DataFrame:
    """Rows and tokens by group and by the bits of the word from `shift` on."""
    return rows.group_by("group", bin=pl.col("word") // pl.lit(1 << shift, pl.UInt64)).agg(
        num_rows=pl.len().cast(pl.Int64), num_tokens=pl.col("num_tokens").sum()
    )


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
    beside: Callable[[Shard], Any],
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
    beside: Callable[[Shard], Any],
    bundle: Bundle,
) -> tuple[list[Looked], NDArray[np.uint8]]:
    """What is found in each shard of a bundle, and the rows that `sure` keeps, a bit a row.

    within: the bins at the limits.
    """
    looked, masks = [], []
    for shard, _ in bundle.shards:
        rows = narrow.read(shard)
        mask = sure.mask(rows)
        below = rows["score"].to_numpy()[mask]
        numbered = rows.with_columns(row=pl.int_range(pl.len(), dtype=pl.Int64))
        found = _inside(numbered.filter("takes_part"), within, shift)
        found = found.select("group", "word", "row", "score", "num_tokens")
        if narrow.id_column is not None and found.height:
            ids = narrow.table.of(shard).read_at(narrow.id_column, found["row"].to_numpy())
            found = found.with_columns(id=ids)
        looked.append(Looked(found, len(below), float(below.max(initial=-np.inf)), beside(shard)))
        masks.append(mask)
    return looked, np.packbits(np.concatenate(masks))
