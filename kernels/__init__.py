"""Hidden states and an LM head to each target's rank, log-probability and entropy.

Tensors in, tensors out: nothing here knows about models, trajectories, vLLM or files.
"""

from rsr.kernels.rank_logprob import rank_logprob
from rsr.kernels.stats import RankLogprob, VocabStats, merge_stats
from rsr.kernels.vocab_shard import VocabShard

__all__ = ["RankLogprob", "VocabShard", "VocabStats", "merge_stats", "rank_logprob"]
