"""An LM head, or the part of its vocabulary that one tensor-parallel rank holds.

Chooses an implementation and sends tensors its way. Knows no collectives: what ranks exchange are
a float per token before the pass and four after it, by any means of the caller's.
N is tokens, V this shard's columns, D the hidden size.
"""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Literal, get_args

import torch

from rsr.kernels import tiled
from rsr.kernels.logits import LogitsDtype, LogitTransform
from rsr.kernels.stats import RankLogprob, VocabStats, finish, merge_stats

logger = logging.getLogger(__name__)

ShardImpl = Literal["auto", "fused", "tiled"]

FUSED_CAPABILITY = (8, 0)
"""Least compute capability for the Triton kernel: below it Triton compiles bf16 products without
tensor cores, with kilobytes of spills."""
OPERAND_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class VocabShard:
    """Columns [vocab_start, vocab_start + V) of an LM head; all of it by default.

    On each tensor-parallel rank, with its own shard and the same hidden states and targets:

        raw = all_reduce_sum(shard.target_raw(hidden, targets))
        stats = shard.stats(hidden, targets, raw)
        parts = all_gather(stats.pack())                            # (ranks, 4, N)
        result = shard.finish([VocabStats.unpack(p) for p in parts], raw)

    A row whose softmax is undefined (see `rsr.kernels.rank_logprob`) has log-probability NaN,
    entropy NaN and rank `vocab_size`, whichever shard has the column that makes it so.

    Raises ValueError for tensors or options that do not fit together, on creation and on use.
    """

    weight: torch.Tensor
    """(V, D) float32, float16 or bfloat16, without padding columns."""
    bias: torch.Tensor | None = None
    """(V,) floating point."""
    vocab_start: int = 0
    vocab_size: int | None = None
    """Columns of the whole head. None says that this is the whole head."""
    scale: float = 1.0
    soft_cap: float | None = None
    logits_dtype: LogitsDtype = "float32"
    impl: ShardImpl = "auto"

    def __post_init__(self) -> None:
        weight, bias = self.weight, self.bias
        if weight.ndim != 2 or 0 in weight.shape or weight.dtype not in OPERAND_DTYPES:
            raise ValueError(
                f"weight must be a non-empty (V, D) in one of {OPERAND_DTYPES}, "
                f"got {weight.dtype} of shape {tuple(weight.shape)}"
            )
        if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
            raise ValueError(
                f"bias must be floating point of shape {tuple(weight.shape[:1])}, "
                f"got {bias.dtype} of shape {tuple(bias.shape)}"
            )
        if bias is not None and bias.device != weight.device:
            raise ValueError(f"bias is on {bias.device}, weight on {weight.device}")
        end = self.vocab_start + weight.shape[0]
        if self.vocab_start < 0 or (self.vocab_size is not None and end > self.vocab_size):
            raise ValueError(
                f"columns [{self.vocab_start}, {end}) are not in a vocabulary of {self.vocab_size}"
            )
        if self.vocab_size is None and self.vocab_start > 0:
            raise ValueError(
                f"a shard that starts at column {self.vocab_start} needs the vocab_size of its head"
            )
        if self.impl not in get_args(ShardImpl):
            raise ValueError(f"impl must be one of {get_args(ShardImpl)}, got {self.impl!r}")
        _ = self.transform  # checks its own options

    @functools.cached_property
    def transform(self) -> LogitTransform:
        """The transform from h·w + b to the logit."""
        return LogitTransform.of(self.weight.dtype, self.scale, self.soft_cap, self.logits_dtype)

    @torch.no_grad()
    def target_raw(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """h·w + b of each target, (N,) float32, and 0 where another shard has the target.

        Summed over shards it is every target's, whichever shard has it.
        `hidden` (N, D) has the weight's dtype, `targets` (N,) is int64 or int32, global ids.
        """
        self.check(hidden, targets)
        implementation = _implementation(self.impl, hidden.device.type)
        columns = targets.long() - self.vocab_start
        raw: torch.Tensor = implementation.target_raw(hidden, self.weight, columns, self.bias)
        return raw

    @torch.no_grad()
    def stats(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        target_raw: torch.Tensor,
        entropy: bool = False,
    ) -> VocabStats:
        """Statistics of this shard's columns, each (N,), each token's own target left out.

        `target_raw` (N,) float32 is the sum over shards of what `target_raw` gave.
        """
        self.check(hidden, targets)
        implementation = _implementation(self.impl, hidden.device.type)
        stats: VocabStats = implementation.vocab_stats(
            hidden,
            self.weight,
            targets.long() - self.vocab_start,
            target_raw,
            bias=self.bias,
            transform=self.transform,
            entropy=entropy,
        )
        return stats

    @torch.no_grad()
    def finish(
        self, parts: Sequence[VocabStats], target_raw: torch.Tensor, entropy: bool = False
    ) -> RankLogprob:
        """Results from the statistics of all shards, in any order."""
        vocab_size = self.weight.shape[0] if self.vocab_size is None else self.vocab_size
        if self.vocab_size is None and len(parts) > 1:
            raise ValueError(f"finishing {len(parts)} shards needs the vocab_size of their head")
        return finish(merge_stats(parts), target_raw, self.transform, entropy, vocab_size)

    def check(self, hidden: torch.Tensor, targets: torch.Tensor) -> None:
        """Raise ValueError unless `hidden` and `targets` fit this shard and each other."""
        depth = self.weight.shape[1]
        if hidden.ndim != 2 or hidden.shape[1] != depth or hidden.dtype != self.weight.dtype:
            raise ValueError(
                f"hidden must be {self.weight.dtype} of shape (N, {depth}) like the weight, "
                f"got {hidden.dtype} of shape {tuple(hidden.shape)}"
            )
        if targets.shape != hidden.shape[:1] or targets.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"targets must be int64 or int32 of shape {tuple(hidden.shape[:1])}, "
                f"got {targets.dtype} of shape {tuple(targets.shape)}"
            )
        devices = {hidden.device, targets.device, self.weight.device}
        if len(devices) > 1:
            raise ValueError(f"tensors must share one device, got {sorted(map(str, devices))}")


def _implementation(impl: ShardImpl, device_type: str) -> ModuleType:
    """The module that makes the pass."""
    if impl == "tiled" or (impl == "auto" and not _is_fused_usable(device_type)):
        return tiled
    from rsr.kernels import fused  # Triton is not everywhere that torch is

    if device_type != "cuda" and not fused.is_interpreted():
        raise ValueError(f'impl="fused" needs tensors on a CUDA GPU, got {device_type}')
    return fused


@functools.cache
def _is_fused_usable(device_type: str) -> bool:
    """What "auto" goes by; says once in the log what it took, and why."""
    if device_type != "cuda":
        logger.info("rank kernel: tiled torch on %s", device_type)
        return False
    try:
        import triton  # noqa: F401
    except ImportError as error:
        logger.warning("rank kernel: tiled torch on %s, for want of Triton: %s", device_type, error)
        return False
    capability = torch.cuda.get_device_capability()
    if capability < FUSED_CAPABILITY:
        logger.info("rank kernel: tiled torch on compute capability %d.%d", *capability)
        return False
    logger.info("rank kernel: fused Triton on %s", device_type)
    return True
