"""Every metric that one forward pass can tell: one definition each, with source, unit, direction.

A metric is a ratio of two things that add up over trajectories, so that the same definition gives
the value of one trajectory, of a data set, and of every bootstrap draw of one. Definitions are
plain arithmetic on the stored sums: on Polars expressions as on NumPy arrays. Knows no files.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from rsr.engine.metric_sums import MIN_TOKEN_NATS
from rsr.engine.parts import NUM_QUARTERS

Direction = Literal["lower", "higher"]
Need = Literal[
    "entropy", "quarters", "steps", "sums", "prompt", "quality", "unconditional", "window"
]
"""What a metric is made of beside the columns that every run stores."""

RSR = "rsr"
LENGTH = "length"
SURPRISAL = "surprisal"

CAR_BETA = 3.0
"""Weight of the surprisal against the quality in CAR: ours, for rewards of about 1 to 10."""

SCAS_PROMPT_WEIGHT = 0.5
"""λ of SCAS: how much the prompt's own surprisal counts."""

RSR_PAPER = "arXiv 2601.14249"


class StoredValues(Protocol):
    """What is stored of trajectories: each attribute is an expression, an array or a number.

    Null, or NaN, where it is not defined: nothing scored, an empty quarter. Means are over a
    trajectory's response tokens, surprisals and entropies are in nats, ranks are clipped at the
    run's r_max but for those of `mean_rank_at`.
    """

    @property
    def num_tokens(self) -> Any: ...
    @property
    def mean_rank(self) -> Any: ...
    @property
    def mean_surprisal(self) -> Any: ...
    @property
    def mean_entropy(self) -> Any: ...
    def mean_rank_at(self, rank_clip: str) -> Any:
        """rank_clip: a name of `metrics.STORED_RANK_CLIPS`."""

    def quarter_tokens(self, quarter: int) -> Any:
        """quarter: from 0."""

    def quarter_surprisal(self, quarter: int) -> Any:
        """Σ surprisal over it."""

    @property
    def num_steps(self) -> Any: ...
    @property
    def step_surprisal(self) -> Any:
        """Σ surprisal over the first tokens of steps; null without a step."""

    @property
    def num_later_tokens(self) -> Any:
        """Tokens that are not the first of their step; null where there is none."""

    @property
    def mean_surprisal_squared(self) -> Any: ...
    @property
    def mean_rank_per_surprisal(self) -> Any: ...
    @property
    def mean_rank_per_entropy(self) -> Any: ...
    @property
    def mean_surprisal_per_entropy(self) -> Any: ...
    @property
    def mean_prompt_surprisal(self) -> Any: ...
    @property
    def unconditional_surprisal(self) -> Any:
        """Mean, of the same tokens without their prompt."""

    @property
    def num_windows(self) -> Any:
        """Steps that were scored after their prompt and a few steps alone."""

    @property
    def window_means_sum(self) -> Any:
        """Σ over these steps of their mean surprisal."""

    @property
    def quality(self) -> Any:
        """Name of the metric whose values are in a column that the user names."""

    @property
    def first_token_weight(self) -> Any:
        """γ of ASLEC-CASL over the corpus, of `first_token_weight`."""


Ratio = tuple[Any, Any]


@dataclass(frozen=True, slots=True)
class Metric:
    """A student-aware metric of trajectories and of data sets.

    name: as options name it. formula: in words, over a trajectory's response tokens. data_set: how
    the value of a data set is made. source: where it is from, or "here". direction: which values
    are taken to suit the student. unit: "" of pure numbers. needs: what it takes beside the columns
    of every run. ratio: numerator and denominator of one trajectory. is_exponential: the value is e
    to the power of the ratio. A data set's value is made of Σ numerator / Σ denominator over its
    trajectories: a plain mean where the denominator is 1, pooled over tokens where it is their
    number.
    """

    name: str
    formula: str
    data_set: str
    direction: Direction
    unit: str
    source: str
    ratio: Callable[[StoredValues], Ratio]
    needs: tuple[Need, ...] = ()
    is_exponential: bool = False

    def finish(self, ratio: Any) -> Any:
        """The value from numerator / denominator."""
        return math.e**ratio if self.is_exponential else ratio

    @property
    def sign(self) -> float:
        """What makes lower values the better ones."""
        return 1.0 if self.direction == "lower" else -1.0


MEAN = "mean over trajectories"
MEANS = "ratio of the means' sums"
POOLED = "pooled over tokens"


def _rsr_at(rank_clip: str) -> Callable[[StoredValues], Ratio]:
    return lambda v: (v.mean_rank_at(rank_clip), v.mean_surprisal)


def _quarter(number: int) -> Callable[[StoredValues], Ratio]:
    return lambda v: (v.quarter_surprisal(number), v.quarter_tokens(number))


def casl_columns(v: StoredValues) -> dict[str, Any]:
    """What ASLEC-CASL fits, of each trajectory: M by the others and a constant.

    Mean log-probabilities (nats) of all tokens, of those that are not the first of a step, of
    those that are, and the share of the latter.
    """
    return {
        "all": -v.mean_surprisal,
        "later": _later_logprob(v),
        "first": -v.step_surprisal / v.num_steps,
        "share": v.num_steps / v.num_tokens,
    }


def first_token_weight(covariances: NDArray[np.float64]) -> float:
    """γ: the coefficient of `share` in the least-squares fit of `all` by the other columns.

    covariances: (4, 4) of `casl_columns`, in their order, up to a common factor; centred columns
    stand for the constant. Of fits that are equally good, as where no share differs, the smallest.
    """
    deviations = np.sqrt(covariances.diagonal()[1:])
    scale = np.where(deviations > 0, deviations, 1.0)
    matrix = covariances[1:, 1:] / np.outer(scale, scale)
    coefficients, *_ = np.linalg.lstsq(matrix, covariances[1:, 0] / scale, rcond=1e-12)
    return float(coefficients[2] / scale[2])


def _later_logprob(v: StoredValues) -> Any:
    later = v.mean_surprisal * v.num_tokens - v.step_surprisal
    return -later / v.num_later_tokens


METRICS = (
    Metric(
        RSR,
        "Σ min(rank, r_max) / Σ surprisal, at the run's r_max or --rank-clip",
        f"{MEANS} (Eq. 9)",
        "lower",
        "1/nat",
        f"{RSR_PAPER}, Eq. 7",
        lambda v: (v.mean_rank, v.mean_surprisal),
    ),
    *(
        Metric(
            f"rsr_{clip.removeprefix('clip_')}",
            f"RSR at r_max {clip.removeprefix('clip_')}" if "_" in clip else "RSR without a clip",
            f"{MEANS} (Eq. 9)",
            "lower",
            "1/nat",
            f"{RSR_PAPER}, r_max ablation",
            _rsr_at(clip),
        )
        for clip in ("clip_50", "clip_100", "clip_200", "clip_500", "unclipped")
    ),
    Metric(
        "rsr_floor",
        "1 / mean surprisal: what RSR would be if every token were the student's first choice",
        MEANS,
        "lower",
        "1/nat",
        "here: a rank is at least 1",
        lambda v: (v.num_tokens / v.num_tokens, v.mean_surprisal),
    ),
    Metric(
        "token_ratio",
        f"mean of min(rank, r_max) / max(surprisal, {MIN_TOKEN_NATS:g}) over tokens",
        MEAN,
        "lower",
        "1/nat",
        f"{RSR_PAPER}, mean of token ratios; the floor is ours",
        lambda v: (v.mean_rank_per_surprisal, 1.0),
        ("sums",),
    ),
    Metric(
        SURPRISAL,
        "mean surprisal",
        MEAN,
        "lower",
        "nats",
        f"{RSR_PAPER}, avg_surprisal",
        lambda v: (v.mean_surprisal, 1.0),
    ),
    Metric(
        "surprisal_variance",
        "mean of squared surprisal − square of mean surprisal",
        MEAN,
        "lower",
        "nats²",
        "here",
        lambda v: (v.mean_surprisal_squared - v.mean_surprisal * v.mean_surprisal, 1.0),
        ("sums",),
    ),
    Metric(
        "rank",
        "mean of min(rank, r_max)",
        MEAN,
        "lower",
        "",
        f"{RSR_PAPER}, avg_rank",
        lambda v: (v.mean_rank, 1.0),
    ),
    Metric(
        "entropy",
        "mean entropy of the student's next-token distribution",
        MEAN,
        "lower",
        "nats",
        "here",
        lambda v: (v.mean_entropy, 1.0),
        ("entropy",),
    ),
    Metric(
        "rank_entropy",
        "Σ min(rank, r_max) / Σ entropy",
        MEANS,
        "lower",
        "1/nat",
        f"{RSR_PAPER}, rank/entropy",
        lambda v: (v.mean_rank, v.mean_entropy),
        ("entropy",),
    ),
    Metric(
        "relative_surprisal",
        "Σ surprisal / Σ entropy",
        MEANS,
        "lower",
        "",
        "arXiv 2606.31575, of a whole trajectory",
        lambda v: (v.mean_surprisal, v.mean_entropy),
        ("entropy",),
    ),
    Metric(
        "token_rank_entropy",
        f"mean of min(rank, r_max) / max(entropy, {MIN_TOKEN_NATS:g}) over tokens",
        MEAN,
        "lower",
        "1/nat",
        "here",
        lambda v: (v.mean_rank_per_entropy, 1.0),
        ("sums", "entropy"),
    ),
    Metric(
        "token_relative_surprisal",
        f"mean of surprisal / max(entropy, {MIN_TOKEN_NATS:g}) over tokens",
        MEAN,
        "lower",
        "",
        "arXiv 2606.31575, its token index; the mean is ours",
        lambda v: (v.mean_surprisal_per_entropy, 1.0),
        ("sums", "entropy"),
    ),
    Metric(
        "perplexity",
        "exp(mean surprisal)",
        POOLED,
        "lower",
        "",
        "arXiv 2606.16152, adaptation cost",
        lambda v: (v.mean_surprisal * v.num_tokens, v.num_tokens),
        is_exponential=True,
    ),
    Metric(
        "perplexity_mean",
        "exp(mean surprisal)",
        MEAN,
        "lower",
        "",
        "arXiv 2606.16152, adaptation cost: the paper does not say which mean",
        lambda v: (math.e**v.mean_surprisal, 1.0),
    ),
    *(
        Metric(
            f"perplexity_q{number + 1}",
            f"exp(mean surprisal) of quarter {number + 1} of the response tokens",
            POOLED,
            "lower",
            "",
            "arXiv 2606.16152, four equal segments",
            _quarter(number),
            ("quarters",),
            is_exponential=True,
        )
        for number in range(NUM_QUARTERS)
    ),
    Metric(
        "grape",
        "mean log-probability",
        MEAN,
        "higher",
        "nats",
        "arXiv 2502.04194",
        lambda v: (-v.mean_surprisal, 1.0),
    ),
    Metric(
        "aslec_drop",
        "mean log-probability of tokens that are not the first of a step",
        MEAN,
        "higher",
        "nats",
        "arXiv 2604.06834, s = 1",
        lambda v: (_later_logprob(v), 1.0),
        ("steps",),
    ),
    Metric(
        "aslec_casl",
        "mean log-probability − γ · share of first tokens of steps, γ fitted over all rows",
        MEAN,
        "higher",
        "nats",
        "arXiv 2604.06834, second stage on stored sums",
        lambda v: (-v.mean_surprisal - v.first_token_weight * (v.num_steps / v.num_tokens), 1.0),
        ("steps",),
    ),
    Metric(
        "scas_likelihood",
        f"(1 − λ)·A² + λ·A·Q, A and Q the mean surprisals of response and prompt, "
        f"λ = {SCAS_PROMPT_WEIGHT:g}",
        MEAN,
        "lower",
        "nats²",
        "arXiv 2605.26872, without its similarities",
        lambda v: (
            (1.0 - SCAS_PROMPT_WEIGHT) * v.mean_surprisal * v.mean_surprisal
            + SCAS_PROMPT_WEIGHT * v.mean_surprisal * v.mean_prompt_surprisal,
            1.0,
        ),
        ("prompt",),
    ),
    Metric(
        "ifd",
        "perplexity of the response / its perplexity without the prompt; 1 and more is noise",
        MEAN,
        "higher",
        "",
        "arXiv 2402.00530, of perplexities",
        lambda v: (math.e ** (v.mean_surprisal - v.unconditional_surprisal), 1.0),
        ("unconditional",),
    ),
    Metric(
        "ifd_loss",
        "mean surprisal of the response / that without the prompt; 1 and more is noise",
        MEAN,
        "higher",
        "",
        "arXiv 2308.12032, of losses",
        lambda v: (v.mean_surprisal / v.unconditional_surprisal, 1.0),
        ("unconditional",),
    ),
    Metric(
        "local_naturalness",
        "mean over steps of the mean log-probability given the prompt and --window steps",
        MEAN,
        "higher",
        "nats",
        "arXiv 2510.03988",
        lambda v: (-v.window_means_sum / v.num_windows, 1.0),
        ("window",),
    ),
    Metric(
        "car",
        f"quality / (1 + β · mean surprisal), β = {CAR_BETA:g}, quality of --quality-column",
        "mean quality / (1 + β · mean surprisal)",
        "higher",
        "of the quality",
        "arXiv 2411.07133",
        lambda v: (v.quality, 1.0 + CAR_BETA * v.mean_surprisal),
        ("quality",),
    ),
    Metric(
        LENGTH,
        "scored tokens",
        MEAN,
        "higher",
        "tokens",
        "a baseline: longer was better in some comparisons",
        lambda v: (v.num_tokens, 1.0),
    ),
)
BY_NAME = {metric.name: metric for metric in METRICS}
"""Every metric by its name."""
