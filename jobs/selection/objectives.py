"""Joint selection: rows that both fit the student and please a judge.

A reward model's favourites can train worse than what the student could have written, since
refinement drifts from its distribution (the Quality–Utility Paradox, arXiv 2606.16152); its
advice is to weigh perceived quality and learner compatibility together. Both are compared
within a group, by rank, because neither has a scale of its own. Knows arrays only.
"""

import numpy as np
from numpy.typing import NDArray

from rsr.jobs.selection.midranks import midranks

Floats = NDArray[np.float64]


def standardised_ranks(values: Floats, groups: NDArray[np.int32]) -> Floats:
    """(M,) rank of each value within its group, from 0 (lowest) to 1; equal values share theirs.

    A group of one row has rank 0.
    """
    sizes = np.bincount(groups)[groups]
    ranks: Floats = (midranks(values, groups) - 1) / np.maximum(1, sizes - 1)
    return ranks


def weighted(
    rsr: Floats, quality: Floats, groups: NDArray[np.int32], quality_weight: float
) -> Floats:
    """(M,) scores, lower is better: ranks of RSR and of falling quality within the group, mixed."""
    rsr_ranks = standardised_ranks(rsr, groups)
    quality_ranks = standardised_ranks(-quality, groups)
    return (1.0 - quality_weight) * rsr_ranks + quality_weight * quality_ranks


def pareto_front(rsr: Floats, quality: Floats, groups: NDArray[np.int32]) -> NDArray[np.bool_]:
    """(M,) mask of the rows that no other of their group dominates.

    One dominates another if its RSR is no higher and its quality no lower, and one of both is
    strictly better; rows equal in both stay together.
    """
    if not len(rsr):
        return np.zeros(0, bool)
    levels, quality_level = np.unique(quality, return_inverse=True)
    order = np.lexsort((-quality_level, rsr, groups))
    # The group goes above the quality, so that one running maximum starts anew in each group.
    best = groups[order].astype(np.int64) * len(levels) + quality_level[order]
    new_run = np.ones(len(order), bool)
    new_run[1:] = (rsr[order][1:] != rsr[order][:-1]) | (groups[order][1:] != groups[order][:-1])
    starts = np.flatnonzero(new_run)
    lengths = np.diff(starts, append=len(order))
    so_far = np.maximum.accumulate(best)
    before_run = np.concatenate([[-1], so_far[starts[1:] - 1]])
    best_of_run = best[starts]
    on_front = (best == np.repeat(best_of_run, lengths)) & (best > np.repeat(before_run, lengths))
    front = np.empty(len(order), bool)
    front[order] = on_front
    return front


def correct_first(scores: Floats, is_correct: NDArray[np.bool_]) -> Floats:
    """(M,) scores that put every correct row before every other one, each kind in its order.

    scores: from 0 to 1. Equal scores of one kind stay equal, and others apart: a sum of kind and
    score would round, so those of the other kind are moved in their bits, which sort as they do.
    """
    bits = (scores + 0.0).view(np.uint64)
    moved = (bits + (np.float64(1.0).view(np.uint64) + np.uint64(1))).view(np.float64)
    first: Floats = np.where(is_correct, scores, moved)
    return first


def of_best_kind(groups: NDArray[np.int32], is_correct: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(M,) mask of the correct rows, and of all rows of groups that have none."""
    has_correct = np.zeros(groups.max(initial=0) + 1, bool)
    has_correct[groups[is_correct]] = True
    return is_correct | ~has_correct[groups]
