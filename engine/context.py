"""A trajectory's responses with less before them than there is: what a second pass reads.

Two ways: each response without its prompt, as IFD needs it (arXiv 2308.12032), and each step of a
response after its prompt and a few steps, as local naturalness needs it (arXiv 2510.03988). The
tokens that are scored are those of the whole trajectory, so that both passes compare. Knows token
ids; knows nothing of text, templates or models.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from rsr.engine.trajectory import EncodedTrajectory


def without_prompt(trajectory: EncodedTrajectory, first_token: int) -> EncodedTrajectory:
    """Each response as a sequence of its own, after `first_token` alone.

    first_token: what the student reads at the beginning of a text, since it gives the first token
    of a text no probability.
    """
    return _with_sequences(
        trajectory,
        [
            ([first_token, *sequence.token_ids[start:end]], 1)
            for sequence in trajectory.sequences
            for start, end in sequence.spans
        ],
    )


def with_window(trajectory: EncodedTrajectory, num_steps: int) -> EncodedTrajectory:
    """Each step of a response as a sequence of its own, in order.

    It stands after all that comes before its response, and the `num_steps` steps before it.
    """
    return _with_sequences(
        trajectory,
        [
            window
            for sequence in trajectory.sequences
            for span in sequence.spans
            for window in _windows(sequence, span, num_steps)
        ],
    )


def _windows(
    sequence: EncodedTrajectory, span: tuple[int, int], num_steps: int
) -> Iterator[tuple[list[int], int]]:
    """Token ids of each step with its context, and where in them the step begins."""
    start, end = span
    starts = sorted({start, *(s for s in sequence.step_starts if start < s < end)})
    prompt = sequence.token_ids[:start]
    for number, (first, last) in enumerate(pairwise([*starts, end])):
        window = sequence.token_ids[starts[max(0, number - num_steps)] : last]
        yield prompt + window, len(prompt) + len(window) - (last - first)


def _with_sequences(
    trajectory: EncodedTrajectory, sequences: Sequence[tuple[list[int], int]]
) -> EncodedTrajectory:
    """The trajectory with these sequences, each scored from a position to its end."""
    if not sequences:
        return trajectory
    (token_ids, start), *others = sequences
    return replace(
        trajectory,
        token_ids=token_ids,
        spans=[(start, len(token_ids))],
        step_starts=(),
        more=tuple(EncodedTrajectory(ids, [(first, len(ids))]) for ids, first in others),
    )
