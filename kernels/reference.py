"""The definition of correct, in plain torch: forms all logits on purpose, knows no tiles or shards.

N is tokens, V the vocabulary, D the hidden size. Source: Eq. 2 and 7 of the Rank-Surprisal Ratio
paper (arXiv 2601.14249).
"""

import torch

from rsr.kernels.logits import LogitTransform
from rsr.kernels.stats import RankLogprob


def rank_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    transform: LogitTransform,
    entropy: bool,
    accumulate: torch.dtype = torch.float32,
) -> RankLogprob:
    """Rank, log-probability and entropy of each target, from (N, V) logits in `accumulate`.

    Takes checked arguments; `rsr.kernels.rank_logprob(..., impl="reference")` checks them.
    `accumulate=torch.float64` gives the truth that tests hold every implementation against.
    """
    raw = hidden.to(accumulate) @ weight.to(accumulate).T
    if bias is not None:
        raw = raw + bias.to(accumulate)
    logits = transform(raw)
    columns = targets[:, None]
    ranked = raw if transform.round_to is None else logits
    rank = 1 + (ranked > ranked.gather(1, columns)).sum(dim=1, dtype=torch.int32)

    logprobs = logits.log_softmax(dim=1)
    nats = None
    if entropy:
        nats = torch.special.entr(logprobs.exp()).sum(dim=1).float()
    logprob = logprobs.gather(1, columns).squeeze(1).float()

    own = torch.cat([raw.gather(1, columns), logits.gather(1, columns)], dim=1)
    # The largest of numbers one of which is NaN is NaN.
    is_defined = own.isfinite().all(dim=1) & (logits.amax(dim=1) < torch.inf)
    return RankLogprob(
        torch.where(is_defined, rank, len(weight)),
        torch.where(is_defined, logprob, torch.nan),
        None if nats is None else torch.where(is_defined, nats, torch.nan),
    )
