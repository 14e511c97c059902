"""Correlation with what came of training: published values, definitions, and wrong tables."""

import json

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from rsr.jobs.cli import main
from rsr.jobs.errors import UsageError
from rsr.jobs.evidence.correlate import (
    CorrelateOptions,
    correlate,
    pearson,
    read_table,
    spearman,
)

FAST = {"num_permutations": 200, "num_draws": 50}
values = st.lists(st.integers(-3, 3), min_size=2, max_size=12)


def test_published_coefficients(shared_data):
    table = read_table(shared_data / "paper_qwen3_14b.csv")
    options = CorrelateOptions(["avg_surprisal", "rsr"], "performance", "student")
    result = correlate(table, options)
    assert [m.metric for m in result.metrics] == ["rsr", "avg_surprisal"]
    rsr = result.metrics[0]
    assert rsr.num_rows == 11
    # Published: .855 and .654; of the table's rounded figures .8545… and .6544….
    assert rsr.spearman.absolute == pytest.approx(0.8545, abs=5e-5)
    assert rsr.pearson.absolute == pytest.approx(0.6544, abs=5e-5)
    assert f"{rsr.spearman.absolute:.3f} {rsr.pearson.absolute:.3f}" == "0.855 0.654"
    assert rsr.spearman.mean < 0
    assert rsr.spearman.low < rsr.spearman.mean < rsr.spearman.high < 0
    # The exact p of ρ = .8545 at n = 11, from tables, is below .002 (two-sided .0016).
    assert rsr.spearman.p_value == pytest.approx(0.0016, abs=0.0015)


def naive_midranks(column):
    return [sum(o < v for o in column) + (sum(o == v for o in column) + 1) / 2 for v in column]


@given(st.lists(st.tuples(st.integers(-3, 3), st.floats(-9, 9)), min_size=2, max_size=12))
def test_coefficients_against_numpy(rows):
    x, y = np.array(rows, float).T
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert np.isnan(pearson(x, y))
    elif np.ptp(y) > 1e-3:
        assert pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-9)
        ranks = naive_midranks(x), naive_midranks(y)
        assert spearman(x, y) == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-9)


def two_students(second_sign: float) -> pl.DataFrame:
    metric = [1.0, 2, 3, 4, 5] * 2
    target = [5.0, 4, 3, 2, 1] + [second_sign * v for v in (5, 4, 3, 2, 1)]
    return pl.DataFrame({"student": ["a"] * 5 + ["b"] * 5, "rsr": metric, "accuracy": target})


def test_average_over_students_comes_before_the_absolute_value():
    options = CorrelateOptions(["rsr"], "accuracy", "student", **FAST)
    agreeing = correlate(two_students(1.0), options).metrics[0].spearman
    assert (agreeing.mean, agreeing.absolute) == pytest.approx((-1.0, 1.0))
    opposed = correlate(two_students(-1.0), options).metrics[0].spearman
    assert opposed.by_group == pytest.approx({"a": -1.0, "b": 1.0})
    assert opposed.absolute == pytest.approx(0.0, abs=1e-12)
    assert opposed.p_value == 1.0


def test_permutation_p_of_a_perfect_order():
    table = pl.DataFrame({"rsr": range(5), "accuracy": range(5)})
    told = correlate(table, CorrelateOptions(["rsr"], "accuracy", num_permutations=20_000))
    # Of 5! orders, two are as far from 0: the same and its reverse.
    assert told.metrics[0].spearman.p_value == pytest.approx(2 / 120, rel=0.15)


@pytest.mark.seconds
def test_bootstrap_interval_by_resampling_one_by_one():
    rng = np.random.default_rng(5)
    x = rng.integers(0, 6, 40).astype(float)
    y = x + rng.normal(0, 2, 40)
    table = pl.DataFrame({"rsr": x, "accuracy": y})
    told = correlate(table, CorrelateOptions(["rsr"], "accuracy", num_draws=4_000)).metrics[0]
    drawn = [rng.integers(0, 40, 40) for _ in range(4_000)]
    for coefficient, function in ((told.spearman, spearman), (told.pearson, pearson)):
        expected = np.quantile([function(x[i], y[i]) for i in drawn], [0.025, 0.975])
        assert [coefficient.low, coefficient.high] == pytest.approx(expected, abs=0.02)


@pytest.mark.seconds
def test_difference_of_two_metrics_by_resampling_one_by_one():
    """Both metrics see the same draw: they go together, and the difference is surer than either."""
    rng = np.random.default_rng(8)
    y = rng.normal(0, 1, 30)
    better = -y + rng.normal(0, 0.4, 30)
    worse = better + rng.normal(0, 0.6, 30)
    table = pl.DataFrame({"better": better, "worse": worse, "accuracy": y})
    options = CorrelateOptions(["better", "worse"], "accuracy", num_draws=1_000)
    (told,) = correlate(table, options).differences
    drawn = [rng.integers(0, 30, 30) for _ in range(1_000)]
    differences = [abs(spearman(better[i], y[i])) - abs(spearman(worse[i], y[i])) for i in drawn]
    assert (told.metric, told.other, told.num_rows) == ("better", "worse", 30)
    expected = abs(spearman(better, y)) - abs(spearman(worse, y))
    assert told.difference == pytest.approx(expected)
    assert [told.low, told.high] == pytest.approx(
        np.quantile(differences, [0.025, 0.975]), abs=0.05
    )
    assert told.share_better == pytest.approx(np.mean(np.array(differences) > 0), abs=0.05)


def test_difference_takes_only_rows_and_students_that_have_both():
    table = pl.DataFrame(
        {
            "student": ["a"] * 5 + ["b"] * 3,
            "rsr": [1.0, 2, 3, 4, None, 1, 2, 3],
            "length": [9.0, None, 7, 6, 5, 4, 4, 4],
            "accuracy": [5.0, 4, 3, 2, 1, 1, 2, 3],
        }
    )
    options = CorrelateOptions(["rsr", "length"], "accuracy", "student", **FAST)
    (told,) = correlate(table, options).differences
    # Of b, length is constant; of a, three rows have both, and both order them alike.
    assert (told.num_rows, told.difference, told.low, told.high) == (3, 0.0, 0.0, 0.0)
    assert told.share_better == 0.0


def test_rows_and_groups_that_cannot_count_are_told():
    table = pl.DataFrame(
        {
            "student": ["a", "a", "a", "a", "b", "b", "c", "c", "c", None],
            "rsr": [1.0, 2, 3, float("nan"), 1, 2, 7, 7, 7, 1],
            "accuracy": [3.0, 2, 1, 9, 1, 2, 1, 2, 3, 1],
        }
    )
    told = correlate(table, CorrelateOptions(["rsr"], "accuracy", "student", **FAST))
    assert told.metrics[0].spearman.by_group == {"a": pytest.approx(-1.0)}
    assert told.notes == [
        "rsr: 2 of 10 rows have no usable value",
        "rsr: b left out, 2 rows where 3 are needed",
        "rsr: c left out, a column is constant there",
    ]


@pytest.mark.parametrize(
    ("columns", "metrics", "message"),
    [
        ({"accuracy": [1, 2, 3]}, ["rsr"], "no column 'rsr'; it has: accuracy"),
        ({"rsr": ["x", "y", "z"], "accuracy": [1, 2, 3]}, ["rsr"], "expected numbers"),
        ({"rsr": [1.0, None, None], "accuracy": [1, 2, 3]}, ["rsr"], "1 rows where 3 are needed"),
        ({"accuracy": [1, 2, 3]}, ["accuracy"], "target and a metric at once"),
    ],
)
def test_tables_that_cannot_be_correlated(columns, metrics, message):
    with pytest.raises(UsageError, match=message):
        correlate(pl.DataFrame(columns), CorrelateOptions(metrics, "accuracy", **FAST))


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
def test_command_reads_every_kind_of_table(tmp_path, suffix):
    table = two_students(1.0)
    path = tmp_path / f"table.{suffix}"
    {"csv": table.write_csv, "parquet": table.write_parquet, "jsonl": table.write_ndjson}[suffix](
        path
    )
    arguments = ["correlate", str(path), "--target", "accuracy", "--by", "student"]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)["metrics"][0]
    assert (told["metric"], told["spearman"]["absolute"]) == ("rsr", pytest.approx(1.0))
    assert "averaged over 2 students" in CliRunner().invoke(main, arguments).output


def test_table_that_is_not_there_or_not_a_table(tmp_path):
    (tmp_path / "t.parquet").write_text("no")
    (tmp_path / "e.csv").write_text("rsr,performance\n")
    for name, message in (
        ("none.csv", "no such file"),
        ("t.parquet", "cannot be read"),
        ("e.csv", "has no rows"),
        ("x.xlsx", "expected a table ending in"),
    ):
        result = CliRunner().invoke(main, ["correlate", str(tmp_path / name)])
        assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
        assert message in result.stderr
