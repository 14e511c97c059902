"""A bar that moves within a unit, and a time left that does not climb while nothing is known."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsr.jobs.run.forecast import MOST_AHEAD, Forecast


def test_moves_within_a_unit_at_the_rate_so_far():
    forecast = Forecast(100, started_s=50.0)
    assert forecast.seconds_left(55.0) is None
    forecast.observe(10, 10.0, 60.0)
    assert forecast.rows_at(60.0) == 10.0
    assert forecast.seconds_left(60.0) == 90.0
    assert forecast.rows_at(65.0) == 15.0
    assert forecast.seconds_left(65.0) == 85.0


def test_unit_in_hand_is_never_said_to_be_done():
    forecast = Forecast(100, started_s=0.0)
    forecast.observe(10, 10.0, 10.0)
    assert forecast.rows_at(1e6) == 10 + MOST_AHEAD * 10
    assert forecast.seconds_left(1e6) == 81.0


def test_rows_of_an_earlier_start_tell_nothing_of_the_rate():
    forecast = Forecast(100, started_s=0.0, num_rows_before=60)
    assert forecast.rows_at(1e6) == 60
    forecast.observe(70, 10.0, 20.0)
    assert forecast.rows_per_s == 0.5
    assert forecast.seconds_left(20.0) == 60.0


def test_without_workers_nothing_moves():
    forecast = Forecast(100, started_s=0.0)
    forecast.observe(10, 10.0, 10.0)
    forecast.observe(10, 0.0, 12.0)
    assert forecast.rows_at(1e6) == 10


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0.1, 100.0)), min_size=1, max_size=20))
def test_rows_never_go_back_and_time_left_climbs_only_when_a_unit_is_late(units):
    forecast = Forecast(sum(rows for rows, _ in units), started_s=0.0)
    now, done, shown = 0.0, 0, 0.0
    for rows, seconds in units:
        left_s = forecast.seconds_left(now)
        for step in range(5):
            rows_now = forecast.rows_at(now + seconds * step / 5)
            left_now = forecast.seconds_left(now + seconds * step / 5)
            assert shown <= rows_now <= forecast.num_rows
            assert left_now is None or left_now <= left_s + 1e-9
            shown, left_s = rows_now, left_now
        now, done = now + seconds, done + rows
        forecast.observe(done, rows, now)
    assert forecast.rows_at(now) == pytest.approx(forecast.num_rows)
