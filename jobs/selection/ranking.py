"""Which rows are the best of their group: exact, whatever the order of the rows.

Rows are positions in narrow arrays; lower scores are better. Decides by sorting one 64-bit word
a row (the group's number and as many leading bits of the score as fit), then looks closely only
at the rows that share a word with their group's last place: NumPy sorts plain words an order of
magnitude faster than it finds the permutation that would sort them. The best one of each group
takes no sort at all. Knows nothing of files, columns or what a score means.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import polars as pl
from numpy.typing import NDArray

OUTSIDE = np.uint64(2**64 - 1)
"""The word of a row that takes no part: after every finite score's."""

CHUNK_ROWS = 1 << 20
"""Rows whose words are made at a time, so that temporaries stay small."""

ReadIds = Callable[[NDArray[np.int64]], pl.Series]
"""Reads the ids of the rows at ascending positions, to order rows of equal score."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows to choose from.

    scores: (N,) f64, lower is better; NaN takes no part, infinities are not allowed. groups:
    (N,) int32 in [0, num_groups), or None where all are of one group. num_tokens: (N,) int32,
    needed for a budget only. second_scores: (N,) f64, orders rows of equal score. read_ids:
    orders rows of equal scores; where it is None or the ids are equal too, the earlier row wins.
    """

    scores: NDArray[np.float64]
    groups: NDArray[np.int32] | None = None
    num_groups: int = 1
    num_tokens: NDArray[np.int32] | None = None
    second_scores: NDArray[np.float64] | None = None
    read_ids: ReadIds | None = None

    def group_sizes(self) -> NDArray[np.int64]:
        """(num_groups,) rows that take part."""
        return self.count(~np.isnan(self.scores))

    def count(self, chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
        """(num_groups,) rows of the (N,) mask `chosen`."""
        if self.groups is None:
            return np.array([np.count_nonzero(chosen)])
        return np.bincount(self.groups[chosen], minlength=self.num_groups)

    def sum_tokens(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> NDArray[np.int64]:
        """(num_groups,) tokens of the chosen rows; exact below 2^53."""
        assert self.num_tokens is not None
        tokens = self.num_tokens[chosen]
        if self.groups is None:
            return np.array([tokens.sum(dtype=np.int64)])
        sums = np.bincount(self.groups[chosen], weights=tokens, minlength=self.num_groups)
        return sums.astype(np.int64)


def share_of(counts: NDArray[np.int64], fraction: Fraction) -> NDArray[np.int64]:
    """`fraction` of each count, rounded half up, in exact arithmetic."""
    distinct, places = np.unique(counts, return_inverse=True)
    rounded = [int(fraction * int(count) + Fraction(1, 2)) for count in distinct]
    return np.array(rounded, np.int64)[places]


def keep_best(
    rows: Rows, max_rows: NDArray[np.int64] | None = None, token_budget: int | None = None
) -> NDArray[np.bool_]:
    """(N,) mask of the longest prefix of each group's ranking that stays within the limits.

    The ranking of a group: by score, second score, id, position. max_rows: (num_groups,) rows of
    each group. token_budget: tokens of each group; the first row that would exceed it ends the
    prefix, even if a later, shorter one would fit.
    """
    if max_rows is not None and token_budget is None and (max_rows == 1).all():
        return _best_of_each(rows)
    words = _words(rows)
    last = np.full(rows.num_groups, OUTSIDE)
    if max_rows is not None:
        last = np.minimum(last, _words_of_last_rows(rows, words, max_rows))
    if token_budget is not None:
        last = np.minimum(last, _words_over_budget(rows, words, token_budget))
    last_of_row = last[0] if rows.groups is None else last[rows.groups]
    keep: NDArray[np.bool_] = words < last_of_row
    at_limit = np.flatnonzero((words == last_of_row) & (words != OUTSIDE))
    del words, last_of_row
    keep[_first_at_limit(rows, keep, at_limit, max_rows, token_budget)] = True
    return keep


def _best_of_each(rows: Rows) -> NDArray[np.bool_]:
    """`keep_best` of one row a group, found without sorting."""
    groups = np.zeros(len(rows.scores), np.int32) if rows.groups is None else rows.groups
    best = np.full(rows.num_groups, np.inf)
    np.fmin.at(best, groups, rows.scores)
    keep: NDArray[np.bool_] = np.zeros(len(rows.scores), bool)
    at_best = np.flatnonzero(rows.scores == best[groups])
    keep[_first_at_limit(rows, keep, at_best, np.ones(rows.num_groups, np.int64), None)] = True
    return keep


def _words(rows: Rows) -> NDArray[np.uint64]:
    """(N,) words that sort by group, then by as much of the score as fits."""
    group_bits = np.uint64((rows.num_groups - 1).bit_length())
    words = np.empty(len(rows.scores), np.uint64)
    sign = np.uint64(1 << 63)
    for start in range(0, len(words), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        # + 0.0: minus zero is zero. IEEE doubles of one sign sort as integers do.
        scores = rows.scores[part] + 0.0
        bits = scores.view(np.uint64)
        sortable = np.where(bits & sign, ~bits, bits | sign) >> group_bits
        if rows.groups is not None and group_bits:
            sortable |= rows.groups[part].astype(np.uint64) << (np.uint64(64) - group_bits)
        words[part] = np.where(np.isnan(scores), OUTSIDE, sortable)
    return words


def _words_of_last_rows(
    rows: Rows, words: NDArray[np.uint64], max_rows: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """(num_groups,) word of the last row that each group may keep."""
    if rows.num_groups == 1:
        return np.array([_word_at_rank(words, int(max_rows[0]))], np.uint64)
    ordered = np.sort(words)
    starts, sizes = _runs_of_groups(rows, ordered)
    last = np.full(rows.num_groups, OUTSIDE)
    last[max_rows <= 0] = 0
    cut = np.flatnonzero((max_rows > 0) & (max_rows < sizes))
    last[cut] = ordered[starts[cut] + max_rows[cut] - 1]
    return last


def _word_at_rank(words: NDArray[np.uint64], rank: int) -> np.uint64:
    """The `rank`-th smallest word of rows that take part, from 1; 0 and `OUTSIDE` beyond them."""
    if rank <= 0:
        return np.uint64(0)
    if rank >= np.count_nonzero(words != OUTSIDE):
        return OUTSIDE
    # Half the time of sorting all.
    word: np.uint64 = np.partition(words, rank - 1)[rank - 1]
    return word


def _runs_of_groups(
    rows: Rows, ordered: NDArray[np.uint64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(num_groups,) where each group begins among the sorted words, and how many it has."""
    num_words = int(np.searchsorted(ordered, OUTSIDE))
    starts, sizes = np.zeros((2, rows.num_groups), np.int64)
    group_bits = (rows.num_groups - 1).bit_length()
    if not num_words:
        return starts, sizes
    # In the order of the words, which is quicker than to count in that of the rows.
    numbers = ordered[:num_words] >> np.uint64(64 - group_bits)
    edges = np.concatenate([[0], np.flatnonzero(numbers[1:] != numbers[:-1]) + 1, [num_words]])
    present = numbers[edges[:-1]]
    starts[present], sizes[present] = edges[:-1], np.diff(edges)
    return starts, sizes


def _words_over_budget(
    rows: Rows, words: NDArray[np.uint64], token_budget: int
) -> NDArray[np.uint64]:
    """(num_groups,) word of the first row, in the words' order, that exceeds the budget."""
    assert rows.num_tokens is not None
    order = np.argsort(words, kind="stable")[: int(rows.group_sizes().sum())]
    used = np.cumsum(rows.num_tokens[order], dtype=np.int64)
    groups = np.zeros(len(order), np.int32) if rows.groups is None else rows.groups[order]
    totals = rows.sum_tokens(order)
    over = np.flatnonzero(used - (np.cumsum(totals) - totals)[groups] > token_budget)
    exceeding, first = np.unique(groups[over], return_index=True)
    last = np.full(rows.num_groups, OUTSIDE)
    last[exceeding] = words[order[over[first]]]
    return last


def _first_at_limit(
    rows: Rows,
    keep: NDArray[np.bool_],
    at_limit: NDArray[np.int64],
    max_rows: NDArray[np.int64] | None,
    token_budget: int | None,
) -> NDArray[np.int64]:
    """Positions of those rows that still fit, among the rows with their group's last word."""
    room = np.full(rows.num_groups, np.iinfo(np.int64).max)
    if max_rows is not None:
        room = max_rows - rows.count(keep)
    budget = np.full(rows.num_groups, np.iinfo(np.int64).max)
    if token_budget is not None:
        budget = token_budget - rows.sum_tokens(keep)
    groups = np.zeros(len(at_limit), np.int32) if rows.groups is None else rows.groups[at_limit]
    fits = np.bincount(groups, minlength=rows.num_groups) <= room
    if token_budget is not None:
        fits &= rows.sum_tokens(at_limit) <= budget
    contested = ~fits[groups]
    ordered = ranked(rows, at_limit[contested])
    groups_of_ordered = (
        np.zeros(len(ordered), np.int32) if rows.groups is None else rows.groups[ordered]
    )
    starts = _starts_of_runs(groups_of_ordered)
    wins = np.arange(len(ordered)) - starts < room[groups_of_ordered]
    if rows.num_tokens is not None:
        used = np.cumsum(rows.num_tokens[ordered], dtype=np.int64)
        before = np.concatenate([[0], used])[starts]
        wins &= used - before <= budget[groups_of_ordered]
    return np.concatenate([at_limit[~contested], ordered[wins]])


def _starts_of_runs(values: NDArray[np.int32]) -> NDArray[np.int64]:
    """The place at which each place's run of equal values begins."""
    places = np.arange(len(values))
    is_start = np.ones(len(values), bool)
    is_start[1:] = values[1:] != values[:-1]
    starts: NDArray[np.int64] = np.maximum.accumulate(np.where(is_start, places, 0))
    return starts


def ranked(rows: Rows, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """The ascending `positions` of rows that take part in the order of their ranking, group after
    group.
    """
    groups = None if rows.groups is None else rows.groups[positions]
    words = _words(Rows(rows.scores[positions], groups=groups, num_groups=rows.num_groups))
    order = np.argsort(words, kind="stable")
    words = words[order]
    is_close = np.zeros(len(words), bool)
    is_close[1:] = words[1:] == words[:-1]
    is_close[:-1] |= is_close[1:]
    by_rank = positions[order]
    if is_close.any():
        by_rank[is_close] = _ranked_closely(rows, np.sort(by_rank[is_close]))
    return by_rank


def _ranked_closely(rows: Rows, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """`ranked` by every bit of the scores, and by the ids of rows whose scores are equal."""
    frame = pl.DataFrame({"position": positions, "score": rows.scores[positions]})
    keys = ["score"]
    if rows.groups is not None:
        frame = frame.with_columns(group=rows.groups[positions])
        keys = ["group", *keys]
    if rows.second_scores is not None:
        frame = frame.with_columns(second_score=rows.second_scores[positions])
        keys.append("second_score")
    if rows.read_ids is not None:
        tied = frame.select(pl.struct(keys).is_duplicated()).to_series()
        if tied.any():
            ids = rows.read_ids(positions[tied.to_numpy()])
            places = frame.select("position").filter(tied).with_columns(id=ids)
            frame = frame.join(places, on="position", how="left", maintain_order="left")
            keys.append("id")
    return frame.sort(*keys, "position", nulls_last=True)["position"].to_numpy()
