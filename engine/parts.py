"""Which part of its trajectory each scored token is of: a quarter, the first of a step, the prompt.

Parts are numbers, one byte a token, that the driver gives to the worker: sums by part then depend
neither on how a request is cut into chunks nor on what a prefix cache has. Knows positions; knows
nothing of text or scores.
"""

from bisect import bisect_left
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rsr.engine.trajectory import EncodedTrajectory

NUM_QUARTERS = 4
PROMPT = 2 * NUM_QUARTERS
"""The part of tokens before the first response; those of responses are `quarter` where they do not
begin a step, and `quarter + NUM_QUARTERS` where they do."""
NUM_PARTS = PROMPT + 1


def with_parts(trajectory: EncodedTrajectory, *, prompt: bool) -> EncodedTrajectory:
    """The same, its sequences' `parts` filled in.

    Token k of a trajectory's n response tokens, counted from 0 in reading order over all its
    sequences, is in quarter ⌊4k / n⌋: sizes differ by one token at most, and fewer than four tokens
    leave quarters empty. prompt: also score the tokens before the first response, but for the very
    first, which nothing precedes.
    """
    if not trajectory.token_ids:
        return trajectory
    total, num_before = trajectory.num_scored, 0
    made: list[EncodedTrajectory] = []
    for sequence in trajectory.sequences:
        num_prompt = 0
        if prompt and not made:
            num_prompt = sequence.spans[0][0] - 1
        parts = _of_sequence(sequence, num_before, total)
        num_before += len(parts)
        context = np.full(num_prompt, PROMPT, np.uint8)
        numbers = np.concatenate([context, parts])
        made.append(replace(sequence, num_prompt=num_prompt, parts=numbers.tobytes(), more=()))
    first, *others = made
    return replace(first, more=tuple(others))


def _of_sequence(sequence: EncodedTrajectory, num_before: int, total: int) -> NDArray[np.uint8]:
    """(T,) parts of the response tokens of a sequence, `num_before` of the `total` before it."""
    length = sum(end - start for start, end in sequence.spans)
    parts = (NUM_QUARTERS * np.arange(num_before, num_before + length) // total).astype(np.uint8)
    steps = sorted(set(sequence.step_starts))
    begins: list[int] = []
    offset = 0
    for start, end in sequence.spans:
        inside = steps[bisect_left(steps, start) : bisect_left(steps, end)]
        begins += [offset + position - start for position in inside]
        offset += end - start
    parts[begins] += NUM_QUARTERS
    return parts
