"""Sibling trajectories share their prompt: pay for it once, and lose no scored token to it.

vLLM's prefix cache supplies whole KV blocks that an earlier request computed. Two things are
ours: an order of requests in which siblings do not run side by side, so that there is something
to reuse; and filling in the scored tokens that lie inside a cached prefix. vLLM never computes
their hidden states, so they come back unscored, but the request that did compute them has the
very same tokens before them, hence the very same scores.

Pure bookkeeping over token ids and arrays: knows nothing of vLLM.
"""

import sys
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from rsr.engine.trajectory import EncodedTrajectory

MIN_SHARED_FRACTION = 0.02
"""`auto` reuses prefixes from here on: below it, ordering in waves only spreads siblings."""


def context(encoded: EncodedTrajectory) -> tuple[int, ...]:
    """The tokens before the first scored one: equal among siblings."""
    return tuple(encoded.token_ids[: encoded.spans[0][0]])


def shared_fraction(batch: Sequence[EncodedTrajectory], block_size: int) -> float:
    """The share of `batch`'s tokens that reuse could save, in whole blocks of `block_size` tokens.

    Prompts that siblings share, and whole conversations that others continue.
    """
    saved = sum(
        num_shared // block_size * block_size for _, _, num_shared in _shared_by_neighbours(batch)
    )
    return saved / max(1, sum(len(e.token_ids) for e in batch))


def wave_order(batch: Sequence[EncodedTrajectory]) -> list[int]:
    """Indices of `batch`: the first sibling of every prompt, then the second, and so on."""
    num_seen: dict[tuple[int, ...], int] = defaultdict(int)
    waves = []
    for index, encoded in enumerate(batch):
        prompt = context(encoded)
        waves.append((num_seen[prompt], index))
        num_seen[prompt] += 1
    return [index for _, index in sorted(waves)]


def scored_positions(encoded: EncodedTrajectory, end: int = sys.maxsize) -> NDArray[np.int64]:
    """(T,) positions before `end` that must come back scored."""
    parts = [np.arange(first, last) for first, last in encoded.spans_within(0, end)]
    return np.concatenate([*parts, np.empty(0, dtype=np.int64)])


def shared_ends(batch: Sequence[EncodedTrajectory]) -> list[int]:
    """For each, the end of what a cached prefix may leave unscored, or a sibling may need.

    That is one more than the longest token prefix it shares with any other: the last hidden
    state of a cached prefix predicts the token after it.
    """
    ends = [0] * len(batch)
    for left, right, num_shared in _shared_by_neighbours(batch):
        ends[left] = max(ends[left], num_shared + 1)
        ends[right] = max(ends[right], num_shared + 1)
    return ends


def _shared_by_neighbours(
    batch: Sequence[EncodedTrajectory],
) -> Iterator[tuple[int, int, int]]:
    """Neighbours in the order of their tokens, and how many tokens they begin with alike.

    The longest prefix that one shares with any other, it shares with a neighbour; and what a
    cache without limits saves is the sum over all neighbours.
    """
    by_tokens = sorted(range(len(batch)), key=lambda i: batch[i].token_ids)
    for left, right in pairwise(by_tokens):
        yield left, right, _num_shared(batch[left].token_ids, batch[right].token_ids)


def _num_shared(left: list[int], right: list[int]) -> int:
    """The length of the longest common prefix."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))


def fill_from_siblings(
    batch: Sequence[EncodedTrajectory],
    arrays: list[NDArray[np.float64]],
    order: Sequence[int],
    detail_ends: Sequence[int],
) -> dict[int, tuple[int, int]]:
    """Complete `arrays` in place where a sibling has the missing scores.

    batch: what was asked for. arrays: for each, (T, ...) rows whose first column is the position,
    ascending, of scored positions before its detail end, which is at least its shared end.
    order: in which the requests ran, so that a row filled from its elder can in turn fill its
    younger. Returns, for each index that no sibling completes, the half-open range of positions
    from its first missing one to its last.
    """
    with_prefix = _PrefixIndex([encoded.token_ids for encoded in batch])
    gaps = {}
    for index in order:
        expected = scored_positions(batch[index], detail_ends[index])
        missing = expected[np.isin(expected, arrays[index][:, 0], invert=True)]
        if not len(missing):
            continue
        last = int(missing[-1])
        # The last hidden state of a cached prefix predicts a token in which siblings may differ:
        # that token's score is then nobody else's, those before it may well be.
        for end in (last + 1, last):
            siblings = with_prefix(batch[index].token_ids[:end])
            found = _rows_at(missing[missing < end], (arrays[i] for i in siblings))
            if found is not None:
                arrays[index] = merge_rows(found, arrays[index])
                missing = missing[missing >= end]
                break
        if len(missing):
            gaps[index] = (int(missing[0]), last + 1)
    return gaps


class _PrefixIndex:
    """Finds the token sequences that begin with a given one."""

    def __init__(self, sequences: Sequence[list[int]]) -> None:
        self._indices = sorted(range(len(sequences)), key=lambda i: sequences[i])
        self._sorted = [sequences[i] for i in self._indices]

    def __call__(self, prefix: list[int]) -> Iterator[int]:
        # They stand together, from the prefix's insertion point on.
        place = bisect_left(self._sorted, prefix)
        while place < len(self._sorted) and self._sorted[place][: len(prefix)] == prefix:
            yield self._indices[place]
            place += 1


def _rows_at(
    positions: NDArray[np.int64], candidates: Iterator[NDArray[np.float64]]
) -> NDArray[np.float64] | None:
    """The rows at `positions`, of the first candidate that has them all."""
    for rows in candidates:
        found = rows[np.isin(rows[:, 0], positions)]
        if len(found) == len(positions):
            return found
    return None


def merge_rows(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """(T, ...) rows of both, by ascending position; where both have one, `left`'s."""
    rows = np.concatenate([left, right])
    _, first = np.unique(rows[:, 0], return_index=True)
    return rows[first]
