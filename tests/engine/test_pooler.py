"""The layer that vLLM calls, with the metadata that vLLM makes, and no engine around it."""

import numpy as np
import pytest
import torch

from rsr.engine.wire import POOLING_TASK, PrefillRequest, PrefillScores, WorkerSettings

pytestmark = pytest.mark.vllm


class Reader:
    """Stands in for `HeadReader`: a head of its own, or none that is plain."""

    def __init__(self, *, is_plain: bool = True) -> None:
        self.is_plain = is_plain
        self.num_rows = 0

    def prepare(self, hidden_states):
        from rsr.engine.head import HeadNotPlainError

        if not self.is_plain:
            raise HeadNotPlainError("it is quantised")
        self.num_rows += len(hidden_states)
        return hidden_states, self

    def score(self, hidden_states, targets, *, entropy):
        from rsr.kernels import rank_logprob

        weight = torch.eye(8, dtype=hidden_states.dtype)
        return rank_logprob(hidden_states, weight, targets, entropy=entropy)


def pool(reader, extra_kwargs, lengths, num_scheduled):
    """One step of requests that are `lengths` tokens long, from their first token on."""
    from vllm import PoolingParams
    from vllm.v1.pool.metadata import PoolingMetadata, PoolingStates

    from rsr.engine.pooler import ScoringPooler

    pooler = ScoringPooler(reader, WorkerSettings("float32", True, None, True))
    params = [PoolingParams(task=POOLING_TASK, extra_kwargs=extra) for extra in extra_kwargs]
    for one in params:
        pooler.get_pooling_updates(POOLING_TASK).apply(one)
        assert not one.requires_token_ids
    metadata = PoolingMetadata(
        prompt_lens=torch.tensor(lengths),
        prompt_token_ids=None,
        prompt_token_ids_cpu=None,
        pooling_params=params,
        pooling_states=[PoolingStates() for _ in lengths],
    )
    metadata.build_pooling_cursor(
        np.array(num_scheduled), torch.tensor(num_scheduled), torch.device("cpu")
    )
    return pooler(torch.zeros(sum(num_scheduled), 8), metadata)


def test_warming_up_sends_every_token_through_the_head():
    reader = Reader()
    outputs = pool(reader, [None] * 5, [3] * 5, [3] * 5)
    assert reader.num_rows == 15
    assert all(output is not None for output in outputs)


def test_a_head_that_is_not_plain_lets_vllm_warm_up_but_scores_nothing():
    from rsr.engine.head import HeadNotPlainError

    assert pool(Reader(is_plain=False), [None] * 5, [3] * 5, [3] * 5) == [None] * 5
    ours = PrefillRequest([1, 2, 3, 4], [(1, 4)]).pack()
    with pytest.raises(HeadNotPlainError):
        pool(Reader(is_plain=False), [ours, None], [3, 3], [3, 3])


def test_a_request_is_answered_with_its_last_token():
    ours = PrefillRequest([1, 2, 3, 4], [(1, 4)]).pack()
    done, going_on = pool(Reader(), [ours, ours], [3, 3], [3, 2])
    assert going_on is None
    scores = PrefillScores.unpack(done.numpy())
    # All logits tie, and ties favour the target.
    assert scores.tokens[:, :2].tolist() == [[1, 1], [2, 1], [3, 1]]
    np.testing.assert_allclose(scores.tokens[:, 2], -np.log(8), rtol=1e-6)
