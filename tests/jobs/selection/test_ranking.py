"""The best of each group, against sorting every group by hand."""

from fractions import Fraction

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsr.jobs.selection.ranking import Rows, keep_best, share_of

NAN = float("nan")

# Few values, so that most rows tie; neighbours that differ in the last bit only; any double.
SCORES = st.one_of(
    st.sampled_from([1.0, 2.0, 2.0, 0.0, -0.0, -1.5, NAN, np.nextafter(2.0, 3.0)]),
    st.floats(allow_infinity=False),
)
ROWS = st.lists(
    st.tuples(SCORES, st.integers(0, 4), st.integers(1, 9), st.sampled_from("abcde")),
    min_size=1,
    max_size=40,
)


def naive(rows, max_rows, token_budget):
    """Row by row: rank each group by (score, id, position) and keep what fits, from the front."""
    kept = set()
    for group in {row[1] for row in rows}:
        ranking = sorted(
            (score, row_id, position, tokens)
            for position, (score, own, tokens, row_id) in enumerate(rows)
            if own == group and score == score
        )
        used = 0
        for place, (_, _, position, tokens) in enumerate(ranking):
            used += tokens
            if (max_rows is not None and place >= max_rows[group]) or (
                token_budget is not None and used > token_budget
            ):
                break
            kept.add(position)
    return kept


def as_rows(rows, num_groups):
    ids = pl.Series([row[3] for row in rows])
    return Rows(
        scores=np.array([row[0] for row in rows], np.float64),
        groups=np.array([row[1] for row in rows], np.int32),
        num_groups=num_groups,
        num_tokens=np.array([row[2] for row in rows], np.int32),
        read_ids=lambda positions: ids.gather(positions),
    )


@given(
    rows=ROWS,
    max_rows=st.none() | st.lists(st.integers(0, 12), min_size=5, max_size=5),
    token_budget=st.none() | st.integers(1, 60),
)
def test_keeps_what_ranking_each_group_by_hand_keeps(rows, max_rows, token_budget):
    limits = None if max_rows is None else np.array(max_rows)
    keep = keep_best(as_rows(rows, 5), limits, token_budget)
    assert set(np.flatnonzero(keep)) == naive(rows, max_rows, token_budget)


@given(rows=ROWS, max_rows=st.integers(0, 40), token_budget=st.none() | st.integers(1, 200))
def test_one_group_needs_no_group_numbers(rows, max_rows, token_budget):
    rows = [(score, 0, tokens, row_id) for score, _, tokens, row_id in rows]
    made = as_rows(rows, 1)
    alone = Rows(made.scores, num_tokens=made.num_tokens, read_ids=made.read_ids)
    keep = keep_best(alone, np.array([max_rows]), token_budget)
    assert set(np.flatnonzero(keep)) == naive(rows, [max_rows], token_budget)


def test_scores_that_differ_beyond_the_words_bits_are_told_apart():
    """With a million groups a word holds the first 44 bits of a score: not the last 20."""
    scores = np.full(6, 2.0)
    for place in (1, 3, 5):
        scores[place] = np.nextafter(2.0, 0.0)
    groups = np.array([0, 0, 999_999, 999_999, 5, 5], np.int32)
    rows = Rows(scores, groups=groups, num_groups=1_000_000)
    keep = keep_best(rows, np.ones(1_000_000, np.int64))
    assert np.flatnonzero(keep).tolist() == [1, 3, 5]


def test_ids_are_read_only_for_rows_whose_place_is_contested():
    asked = []

    def read_ids(positions):
        asked.extend(positions.tolist())
        return pl.Series(["z", "y", "x"]).gather(positions - 2)

    rows = Rows(np.array([1.0, 1.0, 2.0, 2.0, 2.0, 3.0, 3.0]), read_ids=read_ids)
    assert np.flatnonzero(keep_best(rows, np.array([3]))).tolist() == [0, 1, 4]
    assert asked == [2, 3, 4]
    asked.clear()
    assert keep_best(rows, np.array([5])).sum() == 5
    assert asked == []


def test_second_score_comes_before_the_id():
    rows = Rows(
        np.array([1.0, 1.0, 1.0]),
        second_scores=np.array([3.0, 2.0, 2.0]),
        read_ids=lambda positions: pl.Series(["a", "c", "b"]).gather(positions),
    )
    assert np.flatnonzero(keep_best(rows, np.array([1]))).tolist() == [2]


@pytest.mark.parametrize(
    ("fraction", "count", "share"),
    [("0.5", 5, 3), ("0.5", 3, 2), ("0.2", 7, 1), ("0.2", 8, 2), ("0.1", 4, 0), ("0.29", 100, 29)],
)
def test_share_is_rounded_half_up_exactly(fraction, count, share):
    assert share_of(np.array([count, 0]), Fraction(fraction)).tolist() == [share, 0]
