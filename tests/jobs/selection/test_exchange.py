"""How rows of one group come together: parts, numbers, and which groups are crowded."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsr.jobs.selection import exchange

VALUES = st.lists(
    st.integers(-3, 3) | st.sampled_from([-(2**63), 2**63 - 1, 10**9]), min_size=1, max_size=50
)


def keyed(values: list[int], kind: type[pl.DataType]) -> pl.DataFrame:
    rows = pl.DataFrame({"row": pl.Series(range(len(values)), dtype=pl.Int64)})
    return exchange.with_keys(rows, pl.Series(values, dtype=pl.Int64).cast(kind))


@pytest.mark.seconds
@given(values=VALUES, kind=st.sampled_from([pl.Int64, pl.String]), num_parts=st.integers(1, 7))
def test_a_group_is_in_one_part_under_one_number(values, kind, num_parts):
    found: dict[tuple[int, int], set[int]] = {}
    rows = []
    for number, part in enumerate(exchange.split(keyed(values, kind), num_parts)):
        if not part.height:
            continue
        numbers, bound = exchange.numbered(part, num_parts)
        assert 0 <= numbers.min() <= numbers.max() < bound
        assert part["row"].is_sorted()
        for group, row in zip(numbers.tolist(), part["row"], strict=True):
            found.setdefault((number, group), set()).add(values[row])
            rows.append(row)
    assert sorted(rows) == list(range(len(values)))
    assert all(len(group) == 1 for group in found.values())
    assert len(found) == len(set(values))


@given(values=VALUES, kind=st.sampled_from([pl.Int64, pl.String]), room=st.integers(1, 60))
def test_crowded_are_the_rows_of_groups_with_more_than_there_is_room_for(values, kind, room):
    expected = [row for row, value in enumerate(values) if values.count(value) > room]
    assert exchange.crowded(keyed(values, kind), room).tolist() == expected


@pytest.mark.parametrize("stride", [1, 2, 10, 96, 100, 1 << 22])
def test_integers_of_any_stride_fill_all_parts(stride):
    num_parts = exchange.num_parts_upto(100)
    assert num_parts == 97
    values = [number * stride for number in range(97 * 10)]
    heights = [part.height for part in exchange.split(keyed(values, pl.Int64), num_parts)]
    assert heights == [10] * 97


def test_numbers_of_parts():
    found = [exchange.num_parts_upto(most) for most in (0, 1, 2, 4, 5, 24, 100)]
    assert found == [1, 1, 2, 3, 5, 23, 97]


def test_integers_that_lie_closely_together_are_their_own_numbers():
    """Told by the bound: it is no larger than what they span."""
    part = exchange.split(keyed(list(range(0, 970)), pl.Int64), 97)[5]
    numbers, bound = exchange.numbered(part, 97)
    assert bound == 10
    assert np.array_equal(numbers, np.arange(10))
