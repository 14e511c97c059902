"""What one pass over part of a vocabulary leaves behind, how parts merge, and what they mean.

Knows nothing of how the pass is made (tiles, Triton, tensor-parallel ranks) and never sees a logit
other than the target's. N is tokens.
"""

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch

from rsr.kernels.logits import LogitTransform


class RankLogprob(NamedTuple):
    """Per-token results, each (N,)."""

    rank: torch.Tensor
    """int32, from 1: one plus the number of logits strictly greater than the target's."""
    logprob: torch.Tensor
    """float32, nats."""
    entropy: torch.Tensor | None
    """float32, nats: entropy of the whole predictive distribution; None unless asked for."""


class VocabStats(NamedTuple):
    """Softmax statistics of each token over some vocabulary columns, *the target's left out*.

    Each (N,). With m the largest logit of those columns and e_j = exp(z_j − m):
    """

    max_logit: torch.Tensor
    """float32: m, or −inf where there is no column (or none above −inf)."""
    rest: torch.Tensor
    """float32: Σ e_j − 1, that is, without the largest column's own 1.

    A distribution with one dominant token has Σ e_j = 1 + 1e-9: fp32 holds the second term alone,
    not the sum. No column: −1.
    """
    weighted: torch.Tensor
    """float32, nats: Σ (z_j − m) e_j; what the entropy needs."""
    num_greater: torch.Tensor
    """int32: columns whose logit is strictly greater than the target's."""

    def pack(self) -> torch.Tensor:
        """(4, N) float32, for one collective; counts are exact below 2²⁴ columns."""
        return torch.stack([*self[:3], self.num_greater.float()])

    @classmethod
    def unpack(cls, packed: torch.Tensor) -> "VocabStats":
        """The inverse of `pack`."""
        return cls(packed[0], packed[1], packed[2], packed[3].to(torch.int32))

    @classmethod
    def empty(cls, num_tokens: int, device: torch.device) -> "VocabStats":
        """Statistics of no column at all: the merge's neutral element."""
        zeros = torch.zeros(num_tokens, dtype=torch.float32, device=device)
        return cls(zeros - torch.inf, zeros - 1, zeros, zeros.to(torch.int32))


def _merge_two(a: VocabStats, b: VocabStats) -> VocabStats:
    a_leads = a.max_logit >= b.max_logit
    max_logit = torch.where(a_leads, a.max_logit, b.max_logit)
    lead_rest = torch.where(a_leads, a.rest, b.rest)
    lead_weighted = torch.where(a_leads, a.weighted, b.weighted)
    trail_max = torch.where(a_leads, b.max_logit, a.max_logit)
    trail_rest = torch.where(a_leads, b.rest, a.rest)
    trail_weighted = torch.where(a_leads, b.weighted, a.weighted)
    # −inf − −inf is NaN where both are empty, and 0 · −inf where one is: any finite gap will do.
    gap = torch.where(trail_max == max_logit, 0.0, trail_max - max_logit).clamp_min(-1e9)
    decay = torch.exp(gap)
    trail_sum = 1 + trail_rest
    return VocabStats(
        max_logit,
        lead_rest + trail_sum * decay,
        lead_weighted + (trail_weighted + gap * trail_sum) * decay,
        a.num_greater + b.num_greater,
    )


def merge_stats(parts: Sequence[VocabStats]) -> VocabStats:
    """Statistics of the union of disjoint sets of columns, in any order and grouping.

    Counts are exact; the sums are associative up to fp32 rounding.
    """
    if not parts:
        raise ValueError("merge_stats needs at least one part")
    return reduce(_merge_two, parts)


def finish(
    stats: VocabStats, target_raw: torch.Tensor, transform: LogitTransform, entropy: bool
) -> RankLogprob:
    """Results from the statistics of all columns but the target's, and the target's own logit.

    `target_raw` (N,) float32 is the target's h·w + b. Adding the target here, once, keeps it from
    outranking itself: computed again in a tile, it can differ in the last bit.
    """
    target = VocabStats(
        transform(target_raw),
        torch.zeros_like(stats.rest),
        torch.zeros_like(stats.weighted),
        torch.zeros_like(stats.num_greater),
    )
    whole = _merge_two(target, stats)
    log_sum = torch.log1p(whole.rest)
    logprob = (target.max_logit - whole.max_logit) - log_sum
    nats = log_sum - whole.weighted / (1 + whole.rest) if entropy else None
    return RankLogprob(1 + stats.num_greater, logprob, nats)
