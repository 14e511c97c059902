"""Joint selection, against comparing every two rows of a group."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsr.jobs.selection.objectives import (
    correct_first,
    pareto_front,
    standardised_ranks,
    weighted,
)

ROWS = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from([1.0, 1.5, 2.0, 3.0]), st.integers(-2, 2)),
    min_size=1,
    max_size=30,
)


def arrays(rows):
    groups, rsr, quality = zip(*rows, strict=True)
    return np.array(rsr), np.array(quality, np.float64), np.array(groups, np.int32)


@given(ROWS)
def test_front_is_what_no_row_of_the_group_dominates(rows):
    def dominates(one, other):
        return (
            one[0] == other[0]
            and one[1] <= other[1]
            and one[2] >= other[2]
            and one[1:] != other[1:]
        )

    expected = [not any(dominates(one, other) for one in rows) for other in rows]
    assert pareto_front(*arrays(rows)).tolist() == expected


@given(ROWS)
def test_ranks_count_the_lower_rows_and_half_of_the_equal_ones(rows):
    rsr, _, groups = arrays(rows)
    expected = []
    for group, value in zip(groups, rsr, strict=True):
        others = rsr[groups == group]
        below, equal = (others < value).sum(), (others == value).sum() - 1
        expected.append((below + equal / 2) / max(1, len(others) - 1))
    assert standardised_ranks(rsr, groups) == pytest.approx(expected, abs=1e-15)


def test_weight_moves_from_rsr_to_quality():
    rsr, quality = np.array([1.0, 2.0, 3.0]), np.array([0.0, 5.0, 9.0])
    groups = np.zeros(3, np.int32)
    assert weighted(rsr, quality, groups, 0.0).tolist() == [0.0, 0.5, 1.0]
    assert weighted(rsr, quality, groups, 1.0).tolist() == [1.0, 0.5, 0.0]
    assert weighted(rsr, quality, groups, 0.25).tolist() == [0.25, 0.5, 0.75]


def test_ranks_do_not_depend_on_the_scale_of_other_groups():
    values = np.array([1.0, 2.0, 1e9, 2e9, 7.0])
    ranks = standardised_ranks(values, np.array([0, 0, 1, 1, 2], np.int32))
    assert ranks.tolist() == [0.0, 1.0, 0.0, 1.0, 0.0]


def test_correct_rows_come_first_and_equal_scores_stay_equal():
    scores = np.array([1 / 3, 0.1, 1 / 3, np.nextafter(1 / 3, 1), 0.1, 1.0, 0.0, 1.0, 0.1])
    is_correct = np.array([True, False, True, True, True, True, False, False, False])
    first = correct_first(scores, is_correct)
    assert np.isfinite(first).all()
    _, places = np.unique(first, return_inverse=True)
    assert places.tolist() == [1, 5, 1, 2, 0, 3, 4, 6, 5]
