"""Sums over a trajectory's tokens beside RSR's own: what the other metrics are made of.

They are formed where the scores are, and merge by addition: of chunks, of what a sibling supplied,
of sequences. What a metric makes of them is `catalogue.py`'s. Functions take NumPy arrays or torch
tensors alike.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsr.engine.parts import NUM_PARTS, NUM_QUARTERS, PROMPT

MIN_TOKEN_NATS = 1e-3
"""Smallest denominator of a single token's ratio. A token that the student is certain of has a
surprisal and an entropy of nearly 0, whose last digits are rounding: batching alone moves them by
up to 1e-5 nats, which is 1 % of this."""

TOKEN_TERMS = (
    "surprisal_squared_nats2",
    "rank_per_surprisal",
    "rank_per_entropy",
    "surprisal_per_entropy",
)
"""What is summed over all response tokens; the last three with `MIN_TOKEN_NATS` below."""

PART_TERMS = ("num_tokens", "rank", "surprisal_nats")
"""What is summed over each part of a trajectory; ranks are clipped at the run's r_max."""

SUMS = (
    *TOKEN_TERMS,
    *(f"{term} of part {part}" for term in PART_TERMS for part in range(NUM_PARTS)),
)
"""What the sums of one trajectory are, in their order."""


def is_response(parts: Any) -> Any:
    """Which of (T,) tokens count in a trajectory's own sums: all but the prompt's."""
    return parts != PROMPT


def token_terms(ranks: Any, surprisals: Any, entropies: Any, parts: Any) -> list[Any]:
    """Each of `TOKEN_TERMS` for each token, 0 for the prompt's.

    ranks: (T,) clipped. surprisals, entropies: (T,) nats. parts: (T,) of `parts.py`.
    """
    floored = surprisals.clip(min=MIN_TOKEN_NATS), entropies.clip(min=MIN_TOKEN_NATS)
    terms = [
        surprisals * surprisals,
        ranks / floored[0],
        ranks / floored[1],
        surprisals / floored[1],
    ]
    return [term * is_response(parts) for term in terms]


def part_terms(ranks: Any, surprisals: Any, parts: Any, numbers: Any) -> list[Any]:
    """Each of `PART_TERMS` for each token and part, (T, NUM_PARTS) of which one is not 0.

    As `token_terms`; a part that is not in `numbers`, 0 … NUM_PARTS − 1, counts nowhere.
    """
    is_in = parts[..., None] == numbers
    return [is_in * 1.0, is_in * ranks[..., None], is_in * surprisals[..., None]]


def sum_metrics(
    ranks: NDArray[Any], surprisals: NDArray[Any], entropies: NDArray[Any], parts: NDArray[Any]
) -> NDArray[np.float64]:
    """(len(SUMS),) sums over (T,) tokens; parameters as `token_terms`."""
    # What is not finite has no score, and its sums are not looked at.
    with np.errstate(invalid="ignore"):
        terms = [
            *(term[:, None] for term in token_terms(ranks, surprisals, entropies, parts)),
            *part_terms(ranks, surprisals, parts, np.arange(NUM_PARTS)),
        ]
    return np.concatenate([term.sum(axis=0, dtype=np.float64) for term in terms])


@dataclass(frozen=True, slots=True)
class PartSums:
    """Sums over some tokens of a trajectory. rank_sum: of ranks clipped at the run's r_max."""

    num_tokens: int
    rank_sum: float
    surprisal_sum_nats: float


@dataclass(frozen=True, slots=True)
class MetricSums:
    """The sums of one trajectory, in the order of `SUMS`; those of two halves add up.

    has_entropy: whether those with an entropy in them are numbers.
    """

    values: tuple[float, ...]
    has_entropy: bool = True

    @classmethod
    def of(cls, values: NDArray[np.float64], *, has_entropy: bool) -> "MetricSums":
        """The sums that these (len(SUMS),) numbers stand for."""
        # −0.0 would print as a surprisal below zero.
        return cls(tuple((values + 0.0).tolist()), has_entropy)

    def __add__(self, other: "MetricSums") -> "MetricSums":
        pairs = zip(self.values, other.values, strict=True)
        return MetricSums(tuple(a + b for a, b in pairs), self.has_entropy and other.has_entropy)

    @property
    def surprisal_squared_nats2(self) -> float:
        """Σ s²."""
        return self.values[0]

    @property
    def rank_per_surprisal(self) -> float:
        """Σ r / max(s, MIN_TOKEN_NATS)."""
        return self.values[1]

    @property
    def rank_per_entropy(self) -> float | None:
        """Σ r / max(H, MIN_TOKEN_NATS); None without entropy."""
        return self.values[2] if self.has_entropy else None

    @property
    def surprisal_per_entropy(self) -> float | None:
        """Σ s / max(H, MIN_TOKEN_NATS); None without entropy."""
        return self.values[3] if self.has_entropy else None

    @property
    def quarters(self) -> tuple[PartSums, ...]:
        """Those of the four quarters, first tokens of steps among them."""
        return tuple(self._of(q, q + NUM_QUARTERS) for q in range(NUM_QUARTERS))

    @property
    def step_firsts(self) -> PartSums:
        """Those of the first tokens of steps: as many tokens as there are steps."""
        return self._of(*range(NUM_QUARTERS, 2 * NUM_QUARTERS))

    @property
    def prompt(self) -> PartSums | None:
        """Those of the prompt; None where it was not scored."""
        sums = self._of(PROMPT)
        return sums if sums.num_tokens else None

    def _of(self, *parts: int) -> PartSums:
        first = len(TOKEN_TERMS)
        num_tokens, rank_sum, surprisal_sum_nats = (
            sum(self.values[first + term * NUM_PARTS + part] for part in parts)
            for term in range(len(PART_TERMS))
        )
        return PartSums(int(num_tokens), rank_sum, surprisal_sum_nats)
