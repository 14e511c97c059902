"""What the prefix cache leaves unscored is filled from siblings, or named for another pass."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rsr.engine.prefix_reuse import (
    fill_from_siblings,
    merge_rows,
    scored_positions,
    shared_ends,
    shared_fraction,
    wave_order,
)
from rsr.engine.trajectory import EncodedTrajectory

BLOCK_SIZE = 32


def trajectory(prompt: list[int], response: list[int]) -> EncodedTrajectory:
    return EncodedTrajectory(prompt + response, [(len(prompt), len(prompt) + len(response))])


def score_of(encoded: EncodedTrajectory, position: int) -> float:
    """Stands in for the model: a number that depends on every token up to `position`."""
    return float(hash(tuple(encoded.token_ids[: position + 1])) % 100_003)


def full_scores(encoded: EncodedTrajectory) -> np.ndarray:
    positions = scored_positions(encoded)
    return np.array([[p, score_of(encoded, p)] for p in positions], dtype=np.float64)


def test_siblings_never_run_side_by_side_while_there_are_others():
    batch = [trajectory([p] * 4, [r]) for p in (1, 2, 3) for r in (7, 8)]
    assert wave_order(batch) == [0, 2, 4, 1, 3, 5]


def test_shared_fraction_counts_whole_blocks_of_later_siblings():
    prompt = [1] * (2 * BLOCK_SIZE + 5)
    batch = [trajectory(prompt, [2] * 27), trajectory(prompt, [3] * 27)]
    assert shared_fraction(batch, BLOCK_SIZE) == 2 * BLOCK_SIZE / (2 * (len(prompt) + 27))
    assert shared_fraction([trajectory([1], [2]), trajectory([2], [2])], BLOCK_SIZE) == 0.0


def test_shared_fraction_counts_conversations_that_others_continue():
    first = trajectory([1] * BLOCK_SIZE, [2] * BLOCK_SIZE)
    longer = EncodedTrajectory(
        [*first.token_ids, *[3] * BLOCK_SIZE], [*first.spans, (2 * BLOCK_SIZE, 3 * BLOCK_SIZE)]
    )
    assert shared_fraction([longer, first], BLOCK_SIZE) == 2 / 5


def test_shared_ends_reach_one_token_beyond_the_longest_common_prefix():
    batch = [trajectory([1, 2], r) for r in ([5, 6, 7], [5, 6, 8], [9])]
    alone = trajectory([3], [1, 2, 5])
    assert shared_ends([*batch, alone]) == [5, 5, 3, 1]
    assert shared_ends([alone]) == [0]


@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.lists(st.integers(0, 1), min_size=1, max_size=12)),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 4),
)
def test_every_gap_is_filled_right_or_named(rows, block):
    """A cache of whole blocks, as vLLM's: position p is unscored if p − 1 lies in a hit."""
    batch = [trajectory([prompt] * 3, response) for prompt, response in rows]
    order = wave_order(batch)
    ends = shared_ends(batch)
    cached: set[tuple[int, ...]] = set()
    arrays = [full_scores(encoded) for encoded in batch]
    for index in order:
        ids = batch[index].token_ids
        blocks = [tuple(ids[:end]) for end in range(block, len(ids) + 1, block)]
        hit = 0
        for prefix in blocks:
            if prefix not in cached or len(prefix) >= len(ids):
                break
            hit = len(prefix)
        cached.update(blocks)
        positions = arrays[index][:, 0]
        unscored = positions <= hit
        assert not unscored[positions >= ends[index]].any(), "what is lost must be asked for"
        arrays[index] = arrays[index][~unscored & (positions < ends[index])]
    gaps = fill_from_siblings(batch, arrays, order, ends)
    for index, encoded in enumerate(batch):
        expected = full_scores(encoded)
        expected = expected[expected[:, 0] < ends[index]]
        if index in gaps:
            start, end = gaps[index]
            has = np.isin(expected[:, 0], arrays[index][:, 0])
            missing = expected[~has]
            assert (start, end) == (missing[0, 0], missing[-1, 0] + 1)
            arrays[index] = merge_rows(missing, arrays[index])
        assert np.array_equal(arrays[index], expected)


def test_only_the_token_in_which_siblings_part_is_left_to_score():
    prompt = [1] * BLOCK_SIZE
    batch = [trajectory(prompt, r) for r in ([5, 6, 7], [5, 6, 8])]
    # The younger's cached prefix ends with the 6: its rows up to the 8 are missing.
    elder, younger = (full_scores(encoded) for encoded in batch)
    arrays = [elder, younger[3:]]
    ends = shared_ends(batch)
    gaps = fill_from_siblings(batch, arrays, [0, 1], ends)
    assert gaps == {1: (BLOCK_SIZE + 2, BLOCK_SIZE + 3)}
    assert np.array_equal(arrays[1], younger[:2])
