import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsr.engine.metrics import (
    STORED_RANK_CLIPS,
    DatasetRsr,
    TrajectoryScore,
    rank_surprisal_ratio,
    score_tokens,
    sum_terms,
    trajectory_score,
)
from rsr.engine.trajectory import Status, TokenScores


def token_scores(ranks: list[int], surprisals: list[float]) -> TokenScores:
    return TokenScores(
        token_ids=np.arange(len(ranks), dtype=np.int32),
        ranks=np.array(ranks, dtype=np.int32),
        logprobs=-np.array(surprisals, dtype=np.float32),
        entropies=np.full(len(ranks), 0.5, dtype=np.float32),
    )


def test_trajectory_ratio_is_clipped_rank_sum_over_surprisal_sum():
    score = score_tokens(token_scores([1, 3, 500], [0.5, 1.5, 8.0]))
    assert score.rsr == pytest.approx((1 + 3 + 100) / 10.0)
    assert score.mean_rank == pytest.approx(104 / 3)
    assert score.mean_surprisal_nats == pytest.approx(10 / 3)
    assert score.mean_entropy_nats == pytest.approx(0.5)


def test_stored_sums_answer_every_other_clip():
    ranks, surprisals = [1, 70, 150, 300, 20_000], [1.0, 2.0, 3.0, 4.0, 5.0]
    stored = score_tokens(token_scores(ranks, surprisals)).rank_sums
    for name, clip in STORED_RANK_CLIPS.items():
        directly = score_tokens(token_scores(ranks, surprisals), rank_clip=clip)
        assert stored[name] == directly.rank_sum


def test_nothing_scored_has_no_ratio_and_changes_no_data_set():
    empty = TrajectoryScore(Status.NO_RESPONSE)
    assert empty.rsr is None
    assert empty.mean_rank is None
    one = score_tokens(token_scores([2], [1.0]))
    assert DatasetRsr.of([one, empty]).rsr == DatasetRsr.of([one]).rsr
    assert DatasetRsr.of([empty]).rsr is None


def test_certain_response_scores_high_and_finite():
    assert rank_surprisal_ratio(1.0, 0.0, 1) == pytest.approx(1e12)


def test_data_set_ratio_is_of_means_not_pooled():
    short = score_tokens(token_scores([10], [1.0]))
    long = score_tokens(token_scores([1] * 99, [1.0] * 99))
    assert DatasetRsr.of([short, long]).rsr == pytest.approx((10 + 1) / (1 + 1))


@pytest.mark.seconds
@given(
    st.lists(
        st.lists(
            st.tuples(st.integers(1, 50_000), st.floats(0.015625, 30)), min_size=1, max_size=9
        ),
        min_size=1,
        max_size=9,
    ),
    st.data(),
)
def test_data_set_ratio_of_parts_adds_up(rows, data):
    scores = [score_tokens(token_scores(*map(list, zip(*row, strict=True)))) for row in rows]
    cut = data.draw(st.integers(0, len(scores)))
    merged = DatasetRsr.of(scores[:cut])
    merged.merge(DatasetRsr.of(scores[cut:]))
    assert merged.rsr == pytest.approx(DatasetRsr.of(scores).rsr, rel=1e-12)


@pytest.mark.parametrize("surprisal", [np.nan, np.inf, -np.inf])
def test_a_token_without_a_finite_surprisal_leaves_no_score(surprisal):
    bad = score_tokens(token_scores([1, 2, 3], [0.5, surprisal, 1.0]), keep_tokens=True)
    assert bad == TrajectoryScore(Status.NOT_FINITE)
    assert not bad.status.is_scored
    assert (bad.rsr, bad.mean_rank, bad.mean_surprisal_nats, bad.mean_entropy_nats) == (None,) * 4
    good = score_tokens(token_scores([2], [1.0]))
    assert DatasetRsr.of([bad, good]).rsr == good.rsr


def test_entropy_that_is_nan_is_none_if_it_was_not_asked_for_and_no_score_if_it_was():
    tokens = token_scores([1, 2], [0.5, 1.0])
    tokens.entropies[:] = np.nan
    assert score_tokens(tokens).status == "ok"
    assert score_tokens(tokens).mean_entropy_nats is None
    sums = sum_terms(tokens.ranks, tokens.logprobs, tokens.entropies, None)
    assert trajectory_score(sums, 2, has_entropy=False).status == "ok"
    assert trajectory_score(sums, 2, has_entropy=True).status == "not_finite"
