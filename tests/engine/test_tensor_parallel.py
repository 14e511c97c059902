"""Two vLLM ranks with half of the vocabulary each give what one rank with all of it gives."""

import numpy as np
import pytest

from rsr.engine import Scorer, ScorerConfig, Trajectory

pytestmark = pytest.mark.vllm

TRAJECTORIES = (
    Trajectory(text="Seven apples cost 21 coins, so one apple costs 3 coins. " * 4),
    Trajectory(prompt="How many legs do three spiders have?", response=" 3 × 8 = 24 legs."),
)


@pytest.mark.slow
def test_two_ranks_equal_one(save_student, tiny_llama, assert_like_transformers, tmp_path):
    # 261 tokens, padded to 320: the second rank's half of the head is mostly padding.
    folder = save_student(tiny_llama(vocab_size=261, num_key_value_heads=2), tmp_path)
    scores = {}
    for num_ranks in (1, 2):
        config = ScorerConfig(
            model=str(folder), dtype="float32", token_scores=True, tensor_parallel_size=num_ranks
        )
        with Scorer(config) as scorer:
            scores[num_ranks] = scorer.score(TRAJECTORIES)
    assert_like_transformers(folder, TRAJECTORIES, scores[2])
    for one, two in zip(scores[1], scores[2], strict=True):
        np.testing.assert_array_equal(two.tokens.ranks, one.tokens.ranks)
        np.testing.assert_allclose(two.tokens.logprobs, one.tokens.logprobs, rtol=0, atol=1e-5)
