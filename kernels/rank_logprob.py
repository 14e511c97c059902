"""The public operation: checks its inputs and hands them to an implementation.

Knows the shapes and what an implementation is for, and no arithmetic beyond that.
N is tokens, V the vocabulary (or this shard's part of it), D the hidden size.
"""

import functools
import logging
from typing import Literal, get_args

import torch

from rsr.kernels import reference, tiled
from rsr.kernels.logits import LogitsDtype, LogitTransform
from rsr.kernels.stats import RankLogprob, finish

logger = logging.getLogger(__name__)

Impl = Literal["auto", "fused", "tiled", "reference"]
OPERAND_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
            "fused" on a GPU that Triton can use and "tiled" elsewhere.
        entropy: also return the entropy of each predictive distribution.

    Returns:
        `rank` (N,) int32 from 1, `logprob` (N,) float32 in nats, `entropy` (N,) float32 in nats
        or None.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit, or a target outside [0, V).
    """
    _check_operands(hidden, weight, targets, bias)
    transform = LogitTransform.of(weight.dtype, scale, soft_cap, logits_dtype)
    _check_targets(targets, weight.shape[0])
    targets = targets.long()
    if _resolve(impl, hidden.device.type) == "reference":
        return reference.rank_logprob(
            hidden, weight, targets, bias=bias, transform=transform, entropy=entropy
        )
    own_raw = tiled.target_raw(hidden, weight, targets, bias)
    stats = tiled.vocab_stats(hidden, weight, targets, own_raw, bias=bias, transform=transform)
    return finish(stats, own_raw, transform, entropy)


def _resolve(impl: str, device_type: str) -> str:
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {get_args(Impl)}, got {impl!r}")
    return _auto(device_type) if impl == "auto" else impl


@functools.cache
def _auto(device_type: str) -> str:
    logger.info("rank_logprob on %s: tiled", device_type)
    return "tiled"


def _check_operands(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None
) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "hidden must be (N, D) and weight (V, D), "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(f"weight must not be empty, got {tuple(weight.shape)}")
    if hidden.dtype != weight.dtype or weight.dtype not in OPERAND_DTYPES:
        raise ValueError(
            f"hidden and weight must share one of {OPERAND_DTYPES}, "
            f"got {hidden.dtype} and {weight.dtype}"
        )
    if targets.shape != hidden.shape[:1] or targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"targets must be int64 or int32 of shape {tuple(hidden.shape[:1])}, "
            f"got {targets.dtype} of shape {tuple(targets.shape)}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise ValueError(
            f"bias must be floating point of shape {tuple(weight.shape[:1])}, "
            f"got {bias.dtype} of shape {tuple(bias.shape)}"
        )
    devices = {t.device for t in (hidden, weight, targets, bias) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"tensors must share one device, got {sorted(map(str, devices))}")


def _check_targets(targets: torch.Tensor, vocab_size: int) -> None:
    if targets.numel() == 0:
        return
    low, high = (int(bound) for bound in targets.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"targets must be in [0, {vocab_size}), got values from {low} to {high}")
