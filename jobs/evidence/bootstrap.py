"""Resampling: how sure a ratio of sums, or a best of several, is. NumPy arrays in and out.

Problems are drawn, not rows: trajectories of one problem resemble each other, and as independent
rows they would make every interval too narrow. Knows nothing of teachers, files or RSR.
Legend: P problems, G groups that are compared, B draws.
"""

import numpy as np
from numpy.typing import NDArray

from rsr.engine.metrics import MIN_SURPRISAL_SUM_NATS

CONFIDENCE = 0.95
CHUNK_ELEMENTS = 4 << 20
"""Weights held at a time, B × P: 32 MiB of float64."""


def resampling_weights(
    rng: np.random.Generator, num_draws: int, num_problems: int
) -> NDArray[np.float64]:
    """(num_draws, num_problems): how often each problem is in a draw of P with replacement."""
    weights = np.empty((num_draws, num_problems))
    for row in weights:
        # Counting drawn indices is several times faster than Generator.multinomial.
        row[:] = np.bincount(rng.integers(0, num_problems, num_problems), minlength=num_problems)
    return weights


def resampled_ratios(
    numerators: NDArray[np.float64],
    denominators: NDArray[np.float64],
    *,
    num_draws: int,
    seed: int,
) -> NDArray[np.float64]:
    """(B, G) `ratios` of sums over draws of P problems with replacement.

    numerators, denominators: (P, G) sums of each problem; 0 where a group has none of it. All
    groups of a draw see the same problems. A group that a draw misses altogether is NaN there.
    """
    num_problems, num_groups = numerators.shape
    rng = np.random.default_rng(seed)
    sums = np.hstack([numerators, denominators])
    drawn_ratios = np.empty((num_draws, num_groups))
    chunk = max(1, CHUNK_ELEMENTS // num_problems)
    for start in range(0, num_draws, chunk):
        stop = min(start + chunk, num_draws)
        drawn = resampling_weights(rng, stop - start, num_problems) @ sums
        drawn_ratios[start:stop] = ratios(drawn[:, :num_groups], drawn[:, num_groups:])
    return drawn_ratios


def ratios(
    numerators: NDArray[np.float64], denominators: NDArray[np.float64]
) -> NDArray[np.float64]:
    """`metrics.rank_surprisal_ratio`, elementwise; NaN where both are 0, for lack of any row.

    Of RSR every row adds a mean rank of at least 1; of other metrics, as a rule, a denominator.
    """
    floored = np.maximum(denominators, MIN_SURPRISAL_SUM_NATS)
    return np.where((numerators != 0) | (denominators > 0), numerators / floored, np.nan)


def interval(draws: NDArray[np.float64]) -> tuple[float, float] | None:
    """Percentile interval of CONFIDENCE over (B,) draws; None where no draw is finite."""
    finite = draws[np.isfinite(draws)]
    if not len(finite):
        return None
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(finite, [tail, 1 - tail])
    return float(low), float(high)


def share_lowest(draws: NDArray[np.float64]) -> NDArray[np.float64]:
    """(G,) share of (B, G) draws in which a group is lowest; a tie is split, NaN never wins.

    Draws in which no group is finite do not count; without any other draw all shares are NaN.
    """
    ranked = np.where(np.isfinite(draws), draws, np.inf)
    lowest = ranked.min(axis=1, keepdims=True)
    wins = (ranked == lowest) & np.isfinite(lowest)
    told = wins.any(axis=1)
    if not told.any():
        return np.full(draws.shape[1], np.nan)
    shares = wins[told] / wins[told].sum(axis=1, keepdims=True)
    probabilities: NDArray[np.float64] = shares.mean(axis=0)
    return probabilities


def agreement_by_sample_size(
    numerators: NDArray[np.float64],
    denominators: NDArray[np.float64],
    *,
    best: int,
    num_draws: int,
    max_problems: int,
    seed: int,
) -> NDArray[np.float64]:
    """(max_problems,) share of draws of 1, 2, … problems that find the ratio of `best` lowest.

    Draws without replacement from the (P, G) problems; every problem must have every group. The
    n-problem sample of a draw holds its (n − 1)-problem sample, so that one pass gives all n.
    """
    num_problems = len(numerators)
    rng = np.random.default_rng(seed)
    agreeing = np.zeros(max_problems)
    for _ in range(num_draws):
        drawn = rng.choice(num_problems, max_problems, replace=False)
        growing = ratios(
            np.cumsum(numerators[drawn], axis=0), np.cumsum(denominators[drawn], axis=0)
        )
        agreeing += np.argmin(growing, axis=1) == best
    return agreeing / num_draws
