"""Token scores to Rank-Surprisal Ratio: plain arithmetic, in float64.

Source: arXiv 2601.14249v5, Eq. 7 (trajectory) and Eq. 9, App. A.8 (data set); the guard
against a zero denominator is that of the authors' code, `rsr_cal.py`.
Knows nothing of models; a rank here is 1 + the number of strictly likelier tokens.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsr.engine.metric_sums import MetricSums
from rsr.engine.trajectory import Status, TokenScores, join_tokens

DEFAULT_RANK_CLIP = 100
"""r_max of the paper's Eq. 7."""

STORED_RANK_CLIPS: dict[str, int | None] = {
    "clip_50": 50,
    "clip_100": 100,
    "clip_200": 200,
    "clip_500": 500,
    "unclipped": None,
}
"""The r_max values whose rank sums every score carries, so that another one needs no GPU."""

MIN_SURPRISAL_SUM_NATS = 1e-12
"""Smallest denominator of a ratio: a response the student is certain of scores high, not inf."""


@dataclass(frozen=True, slots=True)
class TrajectoryScore:
    """One trajectory under one student; the sums are NaN-free and 0 where nothing was scored.

    rank_clip: the run's r_max; None means unclipped.
    rank_sum: Σ min(rank, rank_clip). surprisal_sum_nats: Σ −log p.
    entropy_sum_nats: Σ H, or None where entropy was not asked for.
    rank_sums: Σ min(rank, r) for each of STORED_RANK_CLIPS. metric_sums: what other metrics are
    made of, or None where they were not asked for. sequence_means_nats: the mean surprisal of each
    sequence that was scored apart, if there were several.
    tokens: per-token values where they were asked for.
    detail: why there is no score. reason: the same without what is this row's alone, or "".
    hint: the option that may help, or "".
    """

    status: Status
    rank_clip: int | None = DEFAULT_RANK_CLIP
    num_tokens: int = 0
    rank_sum: float = 0.0
    surprisal_sum_nats: float = 0.0
    entropy_sum_nats: float | None = None
    rank_sums: dict[str, float] = field(default_factory=dict)
    metric_sums: MetricSums | None = None
    sequence_means_nats: tuple[float, ...] = ()
    tokens: TokenScores | None = None
    detail: str = ""
    reason: str = ""
    hint: str = ""

    @property
    def rsr(self) -> float | None:
        """Eq. 7; None where no token was scored."""
        return rank_surprisal_ratio(self.rank_sum, self.surprisal_sum_nats, self.num_tokens)

    @property
    def mean_rank(self) -> float | None:
        return self.rank_sum / self.num_tokens if self.num_tokens else None

    @property
    def mean_surprisal_nats(self) -> float | None:
        return self.surprisal_sum_nats / self.num_tokens if self.num_tokens else None

    @property
    def mean_entropy_nats(self) -> float | None:
        if self.entropy_sum_nats is None or not self.num_tokens:
            return None
        return self.entropy_sum_nats / self.num_tokens


def rank_surprisal_ratio(
    rank_sum: float, surprisal_sum_nats: float, num_tokens: int
) -> float | None:
    """Σ clipped rank / Σ surprisal (Eq. 7); None where `num_tokens` is 0."""
    if not num_tokens:
        return None
    return rank_sum / max(surprisal_sum_nats, MIN_SURPRISAL_SUM_NATS)


TERMS = ("rank", "surprisal_nats", "entropy_nats", *STORED_RANK_CLIPS)
"""What a trajectory's sums are sums of, in the order of `token_terms`."""


def token_terms(ranks: Any, logprobs: Any, entropies: Any, rank_clip: int | None) -> list[Any]:
    """Each of `TERMS` for each token: (T,) NumPy arrays or torch tensors, as they were given."""
    return [
        clipped(ranks, rank_clip),
        -logprobs,
        entropies,
        *(clipped(ranks, clip) for clip in STORED_RANK_CLIPS.values()),
    ]


def clipped(ranks: Any, rank_clip: int | None) -> Any:
    """min(rank, rank_clip) of each."""
    return ranks if rank_clip is None else ranks.clip(max=rank_clip)


def sum_terms(
    ranks: NDArray[Any], logprobs: NDArray[Any], entropies: NDArray[Any], rank_clip: int | None
) -> NDArray[np.float64]:
    """(len(TERMS),) sums over (T,) tokens."""
    terms = token_terms(ranks, logprobs, entropies, rank_clip)
    return np.array([term.sum(dtype=np.float64) for term in terms])


def is_finite(logprobs: Any, entropies: Any | None) -> Any:
    """Which tokens are scored: (T,) NumPy arrays or torch tensors to one of booleans.

    A student that overflows, or has a weight that is not a number, gives log-probabilities that
    are NaN or −inf. entropies: None where they were not asked for, whatever stands for them.
    """
    is_scored = abs(logprobs) < math.inf
    return is_scored if entropies is None else is_scored & (abs(entropies) < math.inf)


def trajectory_score(
    sums: NDArray[np.float64],
    num_tokens: int,
    *,
    has_entropy: bool,
    status: Status = Status.OK,
    rank_clip: int | None = DEFAULT_RANK_CLIP,
    metric_sums: NDArray[np.float64] | None = None,
    tokens: TokenScores | None = None,
) -> TrajectoryScore:
    """A trajectory's score from the sums of its tokens' `TERMS`.

    has_entropy: whether entropy was asked for; if not, its sum is not looked at. metric_sums:
    (len(metric_sums.SUMS),), or None where they were not asked for. A sum of
    surprisals or of entropies that is not finite makes the row `NOT_FINITE`, without any number.
    """
    rank_sum, surprisal_sum_nats, entropy_sum_nats, *rank_sums = sums.tolist()
    if not is_finite(surprisal_sum_nats, entropy_sum_nats if has_entropy else None):
        return TrajectoryScore(Status.NOT_FINITE, rank_clip=rank_clip)
    return TrajectoryScore(
        status=status,
        rank_clip=rank_clip,
        num_tokens=num_tokens,
        rank_sum=rank_sum,
        # −0.0 would print as a surprisal below zero.
        surprisal_sum_nats=surprisal_sum_nats + 0.0,
        entropy_sum_nats=entropy_sum_nats if has_entropy else None,
        rank_sums=dict(zip(STORED_RANK_CLIPS, rank_sums, strict=True)),
        metric_sums=(
            None if metric_sums is None else MetricSums.of(metric_sums, has_entropy=has_entropy)
        ),
        tokens=tokens,
    )


def score_tokens(
    tokens: TokenScores,
    *,
    status: Status = Status.OK,
    rank_clip: int | None = DEFAULT_RANK_CLIP,
    keep_tokens: bool = False,
) -> TrajectoryScore:
    """Reduce one trajectory's token scores to its sums; entropies that are all NaN are none."""
    return trajectory_score(
        sum_terms(tokens.ranks, tokens.logprobs, tokens.entropies, rank_clip),
        len(tokens.ranks),
        has_entropy=not np.isnan(tokens.entropies).all(),
        status=status,
        rank_clip=rank_clip,
        tokens=tokens if keep_tokens else None,
    )


def add_scores(parts: Sequence[TrajectoryScore], status: Status) -> TrajectoryScore:
    """The score of a trajectory whose turns were scored apart: its sums are over all `parts`.

    Where one of them has no score, the trajectory has none. status: where all have one.
    """
    first = next((part for part in parts if not part.status.is_scored), parts[0])
    if len(parts) == 1 or not first.status.is_scored:
        return first
    entropies = [part.entropy_sum_nats for part in parts]
    tokens = [part.tokens for part in parts if part.tokens is not None]
    return replace(
        first,
        status=status,
        num_tokens=sum(part.num_tokens for part in parts),
        rank_sum=sum(part.rank_sum for part in parts),
        surprisal_sum_nats=sum(part.surprisal_sum_nats for part in parts),
        entropy_sum_nats=None if None in entropies else sum(e for e in entropies if e is not None),
        rank_sums={name: sum(part.rank_sums[name] for part in parts) for name in first.rank_sums},
        metric_sums=_add_metric_sums([part.metric_sums for part in parts]),
        sequence_means_nats=tuple(part.surprisal_sum_nats / part.num_tokens for part in parts),
        tokens=join_tokens(tokens) if tokens else None,
    )


def _add_metric_sums(parts: Sequence[MetricSums | None]) -> MetricSums | None:
    """The sums over all parts; None where one has none."""
    given = [part for part in parts if part is not None]
    if len(given) < len(parts):
        return None
    total = given[0]
    for part in given[1:]:
        total = total + part
    return total


@dataclass(slots=True)
class DatasetRsr:
    """RSR of a data set (Eq. 9): Σ_j r̄_j / Σ_j s̄_j over trajectories' *means*.

    Neither pooled over tokens nor the mean of trajectory ratios. Sums of two data sets add up,
    so shards can be combined in any order.
    """

    num_trajectories: int = 0
    mean_rank_sum: float = 0.0
    mean_surprisal_sum_nats: float = 0.0

    def add(self, score: TrajectoryScore) -> None:
        """Count one trajectory in; one with nothing scored changes nothing."""
        if score.mean_rank is None or score.mean_surprisal_nats is None:
            return
        self.num_trajectories += 1
        self.mean_rank_sum += score.mean_rank
        self.mean_surprisal_sum_nats += score.mean_surprisal_nats

    def merge(self, other: "DatasetRsr") -> None:
        self.num_trajectories += other.num_trajectories
        self.mean_rank_sum += other.mean_rank_sum
        self.mean_surprisal_sum_nats += other.mean_surprisal_sum_nats

    @classmethod
    def of(cls, scores: Iterable[TrajectoryScore]) -> "DatasetRsr":
        total = cls()
        for score in scores:
            total.add(score)
        return total

    @property
    def rsr(self) -> float | None:
        return rank_surprisal_ratio(
            self.mean_rank_sum, self.mean_surprisal_sum_nats, self.num_trajectories
        )
