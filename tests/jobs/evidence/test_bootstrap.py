"""Resampling against its definition, and the vectorised Eq. 9 against the one in metrics.py."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rsr.engine.metrics import DatasetRsr
from rsr.jobs.evidence.bootstrap import (
    agreement_by_sample_size,
    interval,
    ratios,
    resampled_ratios,
    resampling_weights,
    share_lowest,
)

mean_ranks = st.floats(1, 1e5)
surprisals = st.floats(0, 50)


@pytest.mark.seconds
@given(st.lists(st.tuples(mean_ranks, surprisals), min_size=1, max_size=30))
def test_ratios_are_dataset_rsr(rows):
    one = DatasetRsr()
    for mean_rank, surprisal in rows:
        one.merge(DatasetRsr(1, mean_rank, surprisal))
    sums = np.array([[one.mean_rank_sum]]), np.array([[one.mean_surprisal_sum_nats]])
    assert ratios(*sums).item() == one.rsr


def test_group_without_rows_is_nan_not_zero():
    assert np.isnan(ratios(np.zeros(1), np.zeros(1))).all()


def test_weights_are_draws_of_all_problems():
    weights = resampling_weights(np.random.default_rng(0), 2_000, 7)
    assert (weights.sum(axis=1) == 7).all()
    # Multinomial: mean 1, variance 1 − 1/P.
    assert weights.mean(axis=0) == pytest.approx(np.ones(7), abs=0.1)
    assert weights.var(axis=0) == pytest.approx(np.full(7, 6 / 7), abs=0.1)


def test_all_groups_of_a_draw_see_the_same_problems():
    numerators = np.random.default_rng(0).uniform(1, 9, (50, 1)) * [1.0, 2.0]
    draws = resampled_ratios(numerators, np.ones((50, 2)), num_draws=200, seed=1)
    assert draws[:, 1] == pytest.approx(2 * draws[:, 0])
    assert share_lowest(draws).tolist() == [1.0, 0.0]


def test_spread_is_that_of_the_mean():
    values = np.random.default_rng(0).normal(10, 2, (400, 1))
    draws = resampled_ratios(values, np.ones((400, 1)), num_draws=2_000, seed=0)
    assert draws.std() == pytest.approx(values.std() / 20, rel=0.1)
    low, high = interval(draws[:, 0])
    assert (high - low) == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_chunks_do_not_change_the_draws(monkeypatch):
    sums = np.random.default_rng(0).uniform(1, 9, (2, 30, 3))
    whole = resampled_ratios(*sums, num_draws=50, seed=3)
    monkeypatch.setattr("rsr.jobs.evidence.bootstrap.CHUNK_ELEMENTS", 100)
    assert resampled_ratios(*sums, num_draws=50, seed=3) == pytest.approx(whole, rel=1e-12)


@settings(max_examples=50)
@given(
    hnp.arrays(
        np.float64,
        st.tuples(st.integers(1, 9), st.integers(1, 4)),
        elements=st.sampled_from([1.0, 2.0, 3.0, np.nan]),
    )
)
def test_shares_of_the_lowest_by_hand(draws):
    shares = np.zeros(draws.shape[1])
    told = 0
    for row in draws:
        if np.isnan(row).all():
            continue
        told += 1
        winners = np.flatnonzero(row == np.nanmin(row))
        shares[winners] += 1 / len(winners)
    if told:
        assert share_lowest(draws) == pytest.approx(shares / told)
    else:
        assert np.isnan(share_lowest(draws)).all()


def test_interval_without_a_finite_draw():
    assert interval(np.full(3, np.nan)) is None


def test_larger_samples_agree_more_often():
    rng = np.random.default_rng(0)
    numerators = np.column_stack([rng.normal(3.0, 1, 2_000), rng.normal(3.3, 1, 2_000)])
    agreement = agreement_by_sample_size(
        np.abs(numerators) + 0.1,
        np.ones((2_000, 2)),
        best=0,
        num_draws=1_000,
        max_problems=200,
        seed=0,
    )
    # Of one problem each, N(3, 1) is below N(3.3, 1) with probability Φ(0.3 / √2) = 0.584.
    assert agreement[0] == pytest.approx(0.584, abs=0.05)
    # Of n: Φ(0.3 √(n / 2)).
    assert agreement[49] == pytest.approx(0.933, abs=0.04)
    assert agreement[199] > 0.99
