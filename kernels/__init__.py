"""Hidden states and an LM head to each target's rank, log-probability and entropy.

Tensors in, tensors out: nothing here knows about models, trajectories, vLLM or files. What computes
is imported on first use, so that reading which tiles were measured needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rsr.kernels.stats import RankLogprob, VocabStats, merge_stats
    from rsr.kernels.vocab_shard import VocabShard
    from rsr.kernels.whole_head import rank_logprob

__all__ = ["RankLogprob", "VocabShard", "VocabStats", "merge_stats", "rank_logprob"]

_MODULES = {"rank_logprob": "whole_head", "VocabShard": "vocab_shard"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"rsr.kernels.{_MODULES.get(name, 'stats')}"), name)
