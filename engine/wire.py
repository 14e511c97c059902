"""What the driver and vLLM's workers tell each other, and the form in which it travels.

An engine's settings travel in vLLM's `additional_config`, what to score of a request in its
`PoolingParams.extra_kwargs`, and a request's scores come back as one flat tensor. Each form is
packed and unpacked here and nowhere else. Imports no vLLM.
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from rsr.engine import metric_sums, metrics
from rsr.engine.config import LogitsDtype, ScorerConfig

POOLING_TASK = "token_classify"
"""What vLLM calls a request that gets something for each of its tokens."""
SETTINGS_KEY = "rsr"
"""Key in `VllmConfig.additional_config` of a `WorkerSettings` as a dict."""
POSITIONS_KEY = "rsr_positions"
"""Key in `PoolingParams.extra_kwargs` of the scored positions, as bytes of an int32 array."""
TARGETS_KEY = "rsr_targets"
"""Likewise: the tokens at these positions. The last of them is not part of vLLM's prompt."""
PARTS_KEY = "rsr_parts"
"""Likewise: the part of its trajectory that each of these tokens is of, one byte a token."""
DETAIL_END_KEY = "rsr_detail_end"
"""Likewise: scored positions before it come back one by one, those from it on as sums."""

TOKEN_COLUMNS = ("position", "rank", "logprob", "entropy")
"""Columns of one scored token; positions and ranks are exact in float32 below 2**24."""
SUM_COLUMNS = ("num_tokens", "position", *metrics.TERMS)
"""Sums over scored tokens. That of positions tells a lost or repeated token from none."""
REST_COLUMNS = (*SUM_COLUMNS, *metric_sums.SUMS, "first_not_finite")
"""Columns of the scored tokens from a request's detail end on: `SUM_COLUMNS`, of which only the
first two count the prompt's tokens; the other metrics' sums, 0 where not asked for; and the
position of the first of these tokens without a finite score, or inf where all have one."""


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What a worker must know of a `ScorerConfig`; the fields mean what they mean there."""

    logits_dtype: LogitsDtype
    entropy: bool
    rank_clip: int | None
    has_metrics: bool

    @classmethod
    def of(cls, config: ScorerConfig) -> Self:
        return cls(config.logits_dtype, config.entropy, config.rank_clip, config.has_metrics)

    def pack(self) -> dict[str, Any]:
        """The entry of `VllmConfig.additional_config`."""
        return {SETTINGS_KEY: asdict(self)}

    @classmethod
    def unpack(cls, additional_config: Mapping[str, Any]) -> Self:
        """The inverse of `pack`."""
        return cls(**additional_config[SETTINGS_KEY])


@dataclass(frozen=True, slots=True)
class PrefillRequest:
    """A sequence of tokens, some of which are to be scored, as the driver states it.

    token_ids: the sequence. spans: half-open [start, end) ranges of positions ≥ 1, at least one.
    detail_end: scored positions before it come back one by one, those from it on only as sums.
    reuse_prefix: take from the cache what earlier requests have computed of the same prefix; the
    scored positions that those hidden states predict do not come back. parts: of each position in
    `spans`, as in `EncodedTrajectory`; empty where no sums by part are wanted of it.
    """

    token_ids: list[int]
    spans: list[tuple[int, int]]
    detail_end: int = sys.maxsize
    reuse_prefix: bool = False
    parts: bytes = b""

    @property
    def computed_ids(self) -> list[int]:
        """The tokens whose hidden states are needed: all before the last scored one."""
        return self.token_ids[: self.spans[-1][1] - 1]

    def pack(self) -> dict[str, Any]:
        """The entries of `PoolingParams.extra_kwargs`; the worker unpacks it as `ScoredTokens`."""
        positions = np.concatenate([np.arange(*span, dtype=np.int32) for span in self.spans])
        targets = np.asarray(self.token_ids, dtype=np.int32)[positions]
        return {
            PARTS_KEY: self.parts or bytes(len(positions)),
            POSITIONS_KEY: positions.tobytes(),
            TARGETS_KEY: targets.tobytes(),
            DETAIL_END_KEY: self.detail_end,
        }


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """What a worker is to score of one request.

    positions: (T,) int32, ascending. targets: (T,) int32, the tokens at these positions.
    parts: (T,) uint8, of `parts.py`. detail_end: positions before it are wanted one by one.
    """

    positions: NDArray[np.int32]
    targets: NDArray[np.int32]
    parts: NDArray[np.uint8]
    detail_end: int

    @classmethod
    def unpack(cls, extra_kwargs: Mapping[str, Any]) -> Self:
        """The inverse of `PrefillRequest.pack`."""
        return cls(
            np.frombuffer(extra_kwargs[POSITIONS_KEY], dtype=np.int32),
            np.frombuffer(extra_kwargs[TARGETS_KEY], dtype=np.int32),
            np.frombuffer(extra_kwargs[PARTS_KEY], dtype=np.uint8),
            extra_kwargs[DETAIL_END_KEY],
        )

    @classmethod
    def all_of(cls, num_tokens: int) -> Self:
        """The targets of a made-up request: each of its tokens predicts a token 0."""
        positions = np.arange(1, num_tokens + 1, dtype=np.int32)
        return cls(positions, np.zeros_like(positions), np.zeros(num_tokens, np.uint8), 0)


@dataclass(frozen=True, slots=True)
class PrefillScores:
    """The scores of one request's tokens: one by one before its detail end, as sums from it on.

    tokens: (T, 4) float64 rows of `TOKEN_COLUMNS`. num_rest, rest_position_sum: how many scored
    positions there are from the detail end on, and their sum. rest_sums, rest_metric_sums: over
    these, the sums of `metrics.TERMS` and of `metric_sums.SUMS`. rest_first_not_finite: the
    position of the first of these that has no finite score; inf where all have one.
    """

    tokens: NDArray[np.float64]
    num_rest: int
    rest_position_sum: int
    rest_sums: NDArray[np.float64]
    rest_metric_sums: NDArray[np.float64]
    rest_first_not_finite: float

    @classmethod
    def of(
        cls,
        rows: NDArray[np.float64],
        detail_end: int,
        rank_clip: int | None,
        *,
        has_entropy: bool,
        parts: NDArray[np.uint8],
    ) -> Self:
        """Scores of (T, 4) rows of `TOKEN_COLUMNS`, one a scored position, and their parts."""
        is_rest = rows[:, 0] >= detail_end
        rest = rows[is_rest]
        sums, more_sums = sums_of(rest, parts[is_rest], rank_clip)
        return cls(
            tokens=rows[~is_rest],
            num_rest=len(rest),
            rest_position_sum=int(rest[:, 0].sum()),
            rest_sums=sums,
            rest_metric_sums=more_sums,
            rest_first_not_finite=first_not_finite(rest, has_entropy=has_entropy),
        )

    @classmethod
    def unpack(cls, flat: NDArray[np.float64]) -> Self:
        """The inverse of `pack_scores`, for one request."""
        metrics_from, metrics_to = len(SUM_COLUMNS), len(REST_COLUMNS) - 1
        return cls(
            tokens=flat[len(REST_COLUMNS) :].reshape(-1, len(TOKEN_COLUMNS)),
            num_rest=int(flat[0]),
            rest_position_sum=int(flat[1]),
            rest_sums=flat[2:metrics_from],
            rest_metric_sums=flat[metrics_from:metrics_to],
            rest_first_not_finite=float(flat[metrics_to]),
        )


def sums_of(
    rows: NDArray[np.float64], parts: NDArray[np.uint8], rank_clip: int | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The sums of `metrics.TERMS`, and of `metric_sums.SUMS`, over (T, 4) `TOKEN_COLUMNS`."""
    _, ranks, logprobs, entropies = rows.T
    own = metric_sums.is_response(parts)
    return (
        metrics.sum_terms(ranks[own], logprobs[own], entropies[own], rank_clip),
        metric_sums.sum_metrics(metrics.clipped(ranks, rank_clip), -logprobs, entropies, parts),
    )


def first_not_finite(rows: NDArray[np.float64], *, has_entropy: bool) -> float:
    """The position of the first of (T, 4) `TOKEN_COLUMNS` without a finite score, or inf."""
    positions, _, logprobs, entropies = rows.T
    is_scored = metrics.is_finite(logprobs, entropies if has_entropy else None)
    return float(positions[~is_scored].min(initial=math.inf))


def pack_scores(
    rests: torch.Tensor, tokens: Sequence[Sequence[torch.Tensor]]
) -> Iterator[torch.Tensor]:
    """One flat float64 tensor for each request, in the host's memory as soon as the device is done.

    All of them are parts of one tensor and cross in one copy, which a GPU's stream makes without
    the host's waiting for it: whoever reads them synchronises with that stream first, as vLLM does
    for what its pooler returns.

    rests: (requests, len(REST_COLUMNS)) float64 of scored positions from the detail end on.
    tokens: of each request, in pieces, (T, 4) `TOKEN_COLUMNS` of the positions before it.
    """
    parts: list[torch.Tensor] = []
    sizes = []
    for row, pieces in zip(rests, tokens, strict=True):
        parts += [row, *(piece.flatten() for piece in pieces)]
        sizes.append(row.numel() + sum(piece.numel() for piece in pieces))
    flat = torch.cat(parts)
    if flat.device.type != "cpu":
        host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=flat.device.type == "cuda")
        flat = host.copy_(flat, non_blocking=True)
    return iter(flat.split(sizes))
