"""Quotas, against admitting one row after another."""

from collections import Counter
from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rsr.jobs.selection.quotas import Quota, admit

ROWS = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=40
)
SHARES = st.sampled_from([Fraction(1), Fraction(1, 2), Fraction(2, 5), Fraction(1, 3)])


def admit_one_by_one(rows, keep, shares, num_selected):
    taken, of_group, of_value = [], Counter(), Counter()
    for place, (group, *values) in enumerate(rows):
        is_full = any(
            of_value[column, value] >= int(share * num_selected)
            for column, (value, share) in enumerate(zip(values, shares, strict=True))
        )
        if of_group[group] < keep and not is_full:
            taken.append(place)
            of_group[group] += 1
            of_value.update(enumerate(values))
    return taken


def naive(rows, keep, shares):
    num_selected = sum(min(keep, n) for n in Counter(row[0] for row in rows).values())
    while True:
        taken = admit_one_by_one(rows, keep, shares, num_selected)
        num_selected = len(taken)
        counts = Counter(pair for place in taken for pair in enumerate(rows[place][1:]))
        if all(n <= shares[column] * num_selected for (column, _), n in counts.items()):
            return taken


def quotas_of(rows, shares):
    columns = np.array([row[1:] for row in rows], np.int32).T
    return [Quota(column, 4, share) for column, share in zip(columns, shares, strict=True)]


@given(rows=ROWS, keep=st.integers(1, 3), shares=st.tuples(SHARES, SHARES))
def test_admits_what_admitting_row_by_row_admits(rows, keep, shares):
    groups = np.array([row[0] for row in rows], np.int32)
    admitted = admit(groups, keep, quotas_of(rows, shares))
    assert np.flatnonzero(admitted).tolist() == naive(rows, keep, shares)


def test_a_full_value_gives_way_to_the_next_best_of_the_group():
    # Teacher 0 is best everywhere; two of four places are its, the best two.
    rows = [(0, 0), (1, 0), (2, 0), (3, 0), (0, 1), (1, 1), (2, 1), (3, 1)]
    groups = np.array([row[0] for row in rows], np.int32)
    admitted = admit(groups, 1, quotas_of(rows, [Fraction(1, 2)]))
    assert np.flatnonzero(admitted).tolist() == [0, 1, 6, 7]


def test_the_selection_shrinks_until_the_shares_hold():
    # Three problems know teacher 0 only, one both: one row of each teacher is all there can be.
    rows = [(0, 0), (1, 0), (2, 0), (3, 1)]
    groups = np.array([row[0] for row in rows], np.int32)
    admitted = admit(groups, 1, quotas_of(rows, [Fraction(1, 2)]))
    assert np.flatnonzero(admitted).tolist() == [0, 3]


def test_nothing_meets_a_share_that_one_value_alone_would_exceed():
    groups = np.array([0, 1, 2], np.int32)
    quota = Quota(np.zeros(3, np.int32), 1, Fraction(1, 2))
    assert not admit(groups, 1, [quota]).any()
