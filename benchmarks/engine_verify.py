"""`rsr bench engine --verify`: our scores of a few rows against transformers in float32.

The second opinion shares nothing with the engine but token ids: another model implementation,
whole logits, one row at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from rsr.engine.config import ScorerConfig
from rsr.engine.metrics import score_tokens
from rsr.engine.prefix_reuse import scored_positions
from rsr.engine.student import open_student
from rsr.engine.trajectory import EncodedTrajectory, TokenScores, Trajectory


@dataclass(frozen=True, slots=True)
class Verification:
    """num_rows: those that can be scored. max_rsr_difference: relative, of one trajectory."""

    num_rows: int
    num_tokens: int
    num_equal_ranks: int
    max_surprisal_difference_nats: float
    max_rsr_difference: float


def verify(config: ScorerConfig, trajectories: Sequence[Trajectory]) -> Verification:
    """Score rows with the engine as configured, then with transformers; loads two models."""
    from transformers import AutoModelForCausalLM

    from rsr.engine.scorer import Scorer

    with Scorer(replace(config, token_scores=True)) as scorer:
        scores = scorer.score(trajectories)
    encoder = open_student(config).encoder()
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32).eval()
    num_rows = num_tokens = num_equal_ranks = 0
    surprisal_differences, rsr_differences = [0.0], [0.0]
    for trajectory, score in zip(trajectories, scores, strict=True):
        if score.tokens is None or score.rsr is None:
            continue
        tokens = _transformers_scores(model, encoder.encode(trajectory))
        truth = score_tokens(tokens, rank_clip=config.rank_clip)
        assert truth.rsr is not None
        num_rows += 1
        num_tokens += score.num_tokens
        num_equal_ranks += int((score.tokens.ranks == tokens.ranks).sum())
        surprisal_differences.append(float(abs(score.tokens.logprobs - tokens.logprobs).max()))
        rsr_differences.append(abs(score.rsr - truth.rsr) / truth.rsr)
    return Verification(
        num_rows, num_tokens, num_equal_ranks, max(surprisal_differences), max(rsr_differences)
    )


@torch.inference_mode()
def _transformers_scores(model: torch.nn.Module, encoded: EncodedTrajectory) -> TokenScores:
    positions = torch.from_numpy(scored_positions(encoded))
    targets = torch.tensor(encoded.token_ids)[positions]
    logits = model(torch.tensor([encoded.token_ids])).logits[0, positions - 1]
    target_logits = logits.gather(1, targets[:, None])
    ranks = 1 + (logits > target_logits).sum(dim=1)
    logprobs = logits.log_softmax(dim=1).gather(1, targets[:, None]).squeeze(1)
    return TokenScores(
        token_ids=targets.numpy().astype(np.int32),
        ranks=ranks.numpy().astype(np.int32),
        logprobs=logprobs.numpy(),
        entropies=np.full(len(targets), np.nan, dtype=np.float32),
    )
