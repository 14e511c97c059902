"""Ranks with ties, against counting and against Polars."""

import numpy as np
import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from rsr.jobs.selection.midranks import midranks

VALUES = st.sampled_from([-2.0, -0.0, 0.0, 0.5, 1.0, 1e300, float("inf")])
ROWS = st.lists(st.tuples(st.integers(0, 3), VALUES), max_size=30)


def arrays(rows):
    return np.array([v for _, v in rows], float), np.array([g for g, _ in rows], np.int32)


def test_by_hand():
    assert midranks(np.array([3.0, 1.0, 3.0, 2.0, 3.0])).tolist() == [4.0, 1.0, 4.0, 2.0, 4.0]
    groups = np.array([1, 0, 1, 0, 1], np.int32)
    assert midranks(np.array([3.0, 1.0, 3.0, 1.0, 2.0]), groups).tolist() == [2.5, 1.5, 2.5, 1.5, 1]


@given(ROWS)
def test_by_counting(rows):
    values, _ = arrays(rows)
    expected = [(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values]
    assert midranks(values).tolist() == expected


@given(ROWS)
def test_within_groups_as_polars_ranks(rows):
    values, groups = arrays(rows)
    frame = pl.DataFrame({"v": values, "g": groups})
    expected = frame.select(pl.col("v").rank("average").over("g")).to_series()
    assert midranks(values, groups).tolist() == expected.to_list()
