"""Sibling trajectories share their prompt: pay for it once, and lose no scored token to it.

vLLM's prefix cache supplies whole KV blocks that an earlier request computed. Two things are
ours: an order of requests in which siblings do not run side by side, so that there is something
to reuse; and filling in the scored tokens that lie inside a cached prefix. vLLM never computes
their hidden states, so they come back unscored, but the request that did compute them has the
very same tokens before them, hence the very same scores.

Pure bookkeeping over token ids and arrays: knows nothing of vLLM.
"""

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rsr.engine.trajectory import EncodedTrajectory

BLOCK_SIZE = 32
"""Tokens of a KV block: the fewest that vLLM's CPU attention takes. Its default there, 128, is
longer than most shared prompts."""

MIN_SHARED_FRACTION = 0.02
"""`auto` reuses prefixes from here on: below it, ordering in waves only spreads siblings."""


def context(encoded: EncodedTrajectory) -> tuple[int, ...]:
    """The tokens before the first scored one: equal among siblings."""
    return tuple(encoded.token_ids[: encoded.spans[0][0]])


def shared_fraction(batch: Sequence[EncodedTrajectory]) -> float:
    """The share of `batch`'s tokens that siblings' prompts could save, counted in whole blocks."""
    num_siblings = Counter(map(context, batch))
    saved = sum(
        (count - 1) * (len(prompt) // BLOCK_SIZE) * BLOCK_SIZE
        for prompt, count in num_siblings.items()
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


def scored_positions(encoded: EncodedTrajectory) -> NDArray[np.int64]:
    """(T,) positions that must come back scored."""
    return np.concatenate([np.arange(start, end) for start, end in encoded.spans])


def fill_from_siblings(
    batch: Sequence[EncodedTrajectory], arrays: list[NDArray[np.float32]], order: Sequence[int]
) -> dict[int, int]:
    """Complete `arrays` in place where a sibling has the missing scores.

    batch: what was asked for. arrays: for each, (T, ...) rows whose first column is the position;
    rows may be missing at the front. order: in which the requests ran, so that a row filled from
    its elder can in turn fill its younger. Returns, for each index that no sibling completes,
    the position after its last missing one. There are such: the last hidden state of a cached
    prefix predicts a token in which siblings may differ.
    """
    by_tokens = sorted(range(len(batch)), key=lambda i: batch[i].token_ids)
    sorted_ids = [batch[i].token_ids for i in by_tokens]
    gaps = {}
    for index in order:
        expected = scored_positions(batch[index])
        missing = expected[: len(expected) - len(arrays[index])]
        if not len(missing):
            continue
        end = int(missing[-1]) + 1
        prefix = batch[index].token_ids[:end]
        # Everything that begins with `prefix` stands together, from its insertion point on.
        place = bisect_left(sorted_ids, prefix)
        while place < len(sorted_ids) and sorted_ids[place][:end] == prefix:
            elder = arrays[by_tokens[place]]
            found = elder[np.isin(elder[:, 0], missing)]
            if len(found) == len(missing):
                arrays[index] = np.concatenate([found, arrays[index]])
                break
            place += 1
        else:
            gaps[index] = end
    return gaps
