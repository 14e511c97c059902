"""The public operation: one call, one head, no shards.

Knows what is asked and which implementations there are, and no arithmetic.
N is tokens, V the vocabulary, D the hidden size.
"""

from typing import Literal, get_args

import torch

from rsr.kernels import reference
from rsr.kernels.logits import LogitsDtype
from rsr.kernels.stats import RankLogprob
from rsr.kernels.vocab_shard import VocabShard

Impl = Literal["auto", "fused", "tiled", "reference"]


@torch.no_grad()
def rank_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    soft_cap: float | None = None,
    logits_dtype: LogitsDtype = "float32",
    impl: Impl = "auto",
    entropy: bool = False,
) -> RankLogprob:
    """Rank and log-probability of each target under `hidden @ weight.T`, without the logits.

    The logit of column j is `scale * soft_cap * tanh((h·w_j + b_j) / soft_cap)`, or
    `scale * (h·w_j + b_j)` without a cap. Rank is one plus the number of logits strictly greater
    than the target's, so ties favour the target (Eq. 2 of arXiv 2601.14249).

    Numbers that are not finite never look like a good score. A token has log-probability NaN,
    entropy NaN and rank V, the last, if its softmax is undefined: if any logit of its row is NaN
    or +inf, or if the target's h·w + b or logit is NaN, +inf or −inf. A logit of −inf in another
    column is a probability of 0. Under a soft cap an infinite h·w_j + b_j of another column is a
    logit of ±scale·soft_cap. fp16 logits ("model") beyond ±65,504 are infinite.

    Args:
        hidden: (N, D) float32, float16 or bfloat16; rows may be strided.
        weight: (V, D), same dtype and device: the LM head without padding columns.
        targets: (N,) int64 or int32 in [0, V).
        bias: (V,) of any floating dtype, or None.
        scale: positive factor on the logits.
        soft_cap: positive bound on the logits before `scale`, or None.
        logits_dtype: "float32" ranks what fp32 accumulation of the operands gives; "model" rounds
            each logit once to the operands' dtype first, as the published numbers do.
        impl: "fused" is Triton, "tiled" torch by tiles, "reference" forms all logits; "auto" takes
            "fused" on a GPU of compute capability 8.0 or more where Triton is, and "tiled"
            elsewhere.
        entropy: also return the entropy of each predictive distribution.

    Returns:
        `rank` (N,) int32 from 1 to V, `logprob` (N,) float32 in nats, `entropy` (N,) float32 in
        nats or None.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit, or a target outside [0, V).
    """
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {get_args(Impl)}, got {impl!r}")
    shard_impl = "auto" if impl == "reference" else impl
    shard = VocabShard(
        weight,
        bias,
        scale=scale,
        soft_cap=soft_cap,
        logits_dtype=logits_dtype,
        impl=shard_impl,
    )
    shard.check(hidden, targets)
    _check_in_vocabulary(targets, weight.shape[0])
    if impl == "reference":
        return reference.rank_logprob(
            hidden, weight, targets.long(), bias=bias, transform=shard.transform, entropy=entropy
        )
    target_raw = shard.target_raw(hidden, targets)
    stats = shard.stats(hidden, targets, target_raw, entropy)
    return shard.finish([stats], target_raw, entropy)


def _check_in_vocabulary(targets: torch.Tensor, vocab_size: int) -> None:
    if targets.numel() == 0:
        return
    low, high = (int(bound) for bound in targets.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"targets must be in [0, {vocab_size}), got values from {low} to {high}")
