"""What one pass over part of a vocabulary leaves behind, how parts merge, and what they mean.

Knows nothing of how the pass is made (tiles, Triton, tensor-parallel ranks) and never sees a logit
other than the target's. N is tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from rsr.kernels.logits import LogitTransform


class RankLogprob(NamedTuple):
    """Per-token results, each (N,)."""

    rank: torch.Tensor
    """int32, from 1: one plus the number of logits strictly greater than the target's."""
    logprob: torch.Tensor
    """float32, nats; NaN where the softmax is undefined, and the rank is then the last."""
    entropy: torch.Tensor | None
    """float32, nats: entropy of the whole predictive distribution; None unless asked for.

    NaN where `logprob` is.
    """


class VocabStats(NamedTuple):
    """Softmax statistics of each token over some vocabulary columns, *the target's left out*.

    Each (N,). With e_j = exp(logit_j − anchor), summed over those columns. Where one of the logits
    is NaN or +inf, `rest` is NaN; −inf is a probability of 0.
    """

    anchor: torch.Tensor
    """float32: a logit near the largest, −inf where there is no column (or none above −inf)."""
    rest: torch.Tensor
    """float32: Σ e_j − 1, which leaves out the largest column's own 1 when that is the anchor.

    A distribution with one dominant token has Σ e_j = 1 + 1e-9: fp32 holds the second term alone,
    not the sum. No column: −1.
    """
    weighted: torch.Tensor
    """float32, nats: Σ (logit_j − anchor) e_j, for the entropy; 0 where that is not asked for."""
    num_greater: torch.Tensor
    """int32: columns whose logit is strictly greater than the target's."""

    def pack(self) -> torch.Tensor:
        """(4, N) float32, for one collective; counts are exact below 2²⁴ columns."""
        return torch.stack([*self[:3], self.num_greater.float()])

    @classmethod
    def unpack(cls, packed: torch.Tensor) -> "VocabStats":
        """The inverse of `pack`."""
        return cls(packed[0], packed[1], packed[2], packed[3].to(torch.int32))


def merge_stats(parts: Sequence[VocabStats]) -> VocabStats:
    """Statistics of the union of disjoint sets of columns, in any order and grouping.

    Counts are exact; the sums are associative up to fp32 rounding.
    """
    if not parts:
        raise ValueError("merge_stats needs at least one part")
    return merge_stacked(VocabStats(*(torch.stack(field) for field in zip(*parts, strict=True))))


def merge_stacked(parts: VocabStats) -> VocabStats:
    """`merge_stats` for fields stacked along a first dimension: (K, N) each to (N,) each."""
    anchor, lead = parts.anchor.max(dim=0, keepdim=True)
    # −inf − −inf is NaN where all are empty, and 0 · −inf where some are: any finite gap will do.
    gap = torch.where(parts.anchor == anchor, 0.0, parts.anchor - anchor).clamp_min(-1e9)
    decay = torch.exp(gap)
    sums = (1 + parts.rest) * decay
    weighted = parts.weighted * decay + gap * sums
    # The leading part's decay is 1, so its `rest` adds up without its own 1 ever being added.
    rest = sums.scatter(0, lead, parts.rest.gather(0, lead))
    return VocabStats(
        anchor.squeeze(0),
        rest.sum(dim=0),
        weighted.sum(dim=0),
        parts.num_greater.sum(dim=0, dtype=torch.int32),
    )


def finish(
    stats: VocabStats,
    target_raw: torch.Tensor,
    transform: LogitTransform,
    entropy: bool,
    vocab_size: int,
) -> RankLogprob:
    """Results from the statistics of all columns but the target's, and the target's own logit.

    `target_raw` (N,) float32 is the target's h·w + b. Adding the target here, once, keeps it from
    outranking itself: computed again in a tile, it can differ in the last bit.

    A row without a softmax (see `rsr.kernels.rank_logprob`) has the last of `vocab_size` ranks.
    Comparisons with NaN are false, so that its counts alone would make it the first.
    """
    target_logit = transform(target_raw)
    zeros = torch.zeros_like(target_logit)
    target = VocabStats(target_logit, zeros, zeros, torch.zeros_like(stats.num_greater))
    whole = merge_stats([target, stats])
    log_sum = torch.log1p(whole.rest)
    logprob = (target_logit - whole.anchor) - log_sum
    nats = log_sum - whole.weighted / (1 + whole.rest) if entropy else None
    # A NaN or +inf among the other logits has made the sums NaN.
    values = torch.stack([target_raw, target_logit, whole.rest, whole.weighted])
    is_defined = values.isfinite().all(dim=0)
    rank = torch.where(is_defined, 1 + stats.num_greater, vocab_size)
    return RankLogprob(
        rank,
        torch.where(is_defined, logprob, torch.nan),
        None if nats is None else torch.where(is_defined, nats, torch.nan),
    )
