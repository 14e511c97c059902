"""`rsr filter` by passes over shards: the same files as the one-machine command, byte for byte."""

import shutil
from datetime import date
from fractions import Fraction

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pickled_calls import PickledCalls
from selection_outcome import outcome, passes_of, written

from rsr.jobs.errors import Interrupted, UsageError
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.selection import boundaries, bundles, passes
from rsr.jobs.selection.candidates import Conditions
from rsr.jobs.selection.filter import FilterOptions, run_filter
from rsr.jobs.selection.filter_in_passes import run_filter_in_passes
from rsr.jobs.selection.own_row import is_of_own_row

NAN = float("nan")


REFUSALS = ("none of the", "nothing to filter by", "--within says")

ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "rsr": st.sampled_from([None, NAN, 0.0, -0.0, 1.0, 1.0, 2.0]) | st.floats(1, 1.001),
            "tokens": st.integers(1, 9),
            "teacher": st.sampled_from(["a", "b", None]),
            "id": st.sampled_from(["x", "y", None]),
        }
    ),
    min_size=1,
    max_size=24,
)


@pytest.mark.seconds
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25
)
@given(
    rows=ROWS,
    cuts=st.lists(st.integers(0, 24), min_size=2, max_size=2).map(sorted),
    keep_fraction=st.sampled_from([None, Fraction(1, 5), Fraction(1, 2), Fraction(1)]),
    keep_rows=st.none() | st.integers(1, 6),
    token_budget=st.none() | st.integers(1, 40),
    max_rsr=st.sampled_from([None, 1.0, 1.0005]),
    within=st.sampled_from([None, "teacher"]),
    where=st.sampled_from([None, "teacher <> 'b'"]),
    metric=st.sampled_from(["rsr", "perplexity"]),
    has_id=st.booleans(),
    refined_above=st.sampled_from([0, 3, 100]),
    bundle_rows=st.sampled_from([1, 12, 1000]),
)
def test_same_files_as_on_one_machine(
    tmp_path, write_scored, monkeypatch, rows, cuts, keep_fraction, keep_rows, token_budget,
    max_rsr, within, where, metric, has_id, refined_above, bundle_rows,
):  # fmt: skip
    monkeypatch.setattr(bundles, "MIN_BUNDLE_ROWS", bundle_rows)
    monkeypatch.setattr(boundaries, "REFINED_ABOVE_ROWS", refined_above)
    for folder in ("in", "one", "many"):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
    low, high = cuts
    for name, part in zip("cab", (rows[:low], rows[low:high], rows[high:]), strict=True):
        columns = {
            "teacher": pa.array([row["teacher"] for row in part], pa.string()),
            "payload": pa.array([str(n) for n in range(len(part))], pa.string()),
        }
        if has_id:
            columns["id"] = pa.array([row["id"] for row in part], pa.string())
        write_scored(
            tmp_path / "in" / f"{name}.parquet",
            [row["rsr"] for row in part],
            num_tokens=[row["tokens"] for row in part],
            columns=columns,
        )

    def options(output):
        return FilterOptions(
            input=str(tmp_path / "in"),
            output=tmp_path / output,
            conditions=Conditions(where=where),
            metric=metric,
            max_rsr=max_rsr if metric == "rsr" else None,
            keep_fraction=keep_fraction,
            keep_rows=keep_rows,
            token_budget=token_budget,
            within=within,
        )

    stop = StopRequest()
    one = outcome(lambda: run_filter(options("one"), stop), tmp_path / "one")
    many = outcome(
        lambda: run_filter_in_passes(options("many"), PickledCalls(), stop), tmp_path / "many"
    )
    assert many == one
    # What is refused is refused for its rows or its limits, not for how this test writes files.
    assert not isinstance(one, str) or one.startswith(REFUSALS)


OF_OWN_ROW = [
    "a > 1 AND t IN ('x', 'y')",
    "LOWER(t) LIKE 'a%' OR NOT (t IS NULL)",
    "COALESCE(a, 2) BETWEEN 1 AND 3",
    "CASE WHEN a > 1 THEN TRUE ELSE b END",
    "(a * 2 + 1) / 3 - a % 2 > 0.5",
    "MOD(a, 2) = 1 OR DIV(a, 2) = 1 OR a // 2 = 1",
    "ROUND(f, 1) > FLOOR(f) AND CEIL(f) > SIGN(f)",
    "SQRT(f) + POW(f, 2) + EXP(f) + LN(f) + LOG10(f) > SIN(f)",
    "GREATEST(a, f) > LEAST(a, f)",
    "CONCAT(t, 'x') = 'bx' OR STRPOS(t, 'a') > 0 OR REVERSE(t) = 'ab' OR INITCAP(t) = 'A'",
    "SPLIT_PART(t, 'b', 1) = 'a'",
    "sums.clip_50 > 3",
    "ARRAY_CONTAINS(l, 3) OR ARRAY_LENGTH(l) > 1 OR l[1] > 2",
    "EXTRACT(year FROM d) = 2020 OR DATE_PART('month', d) = 2 OR STRFTIME(d, '%Y') = '2021'",
]
OF_OTHER_ROWS = [
    "a <= AVG(a)",
    "a > COUNT(*)",
    "a <= MAX(a) OVER (PARTITION BY t)",
    "ROW_NUMBER() OVER () < 3",
    "a = FIRST(a)",
    "a > RANK() OVER (ORDER BY a)",
    "a < QUANTILE_CONT(a, 0.5)",
    "COUNT(DISTINCT t) > 1",
    "ROUND(AVG(f), 1) > f",
]


def test_events_name_the_passes_in_their_order(tmp_path, write_scored, monkeypatch):
    monkeypatch.setattr(boundaries, "REFINED_ABOVE_ROWS", 3)
    for number in range(3):
        # Of each score many rows: no bin is so fine that it holds one.
        write_scored(tmp_path / "in" / f"{number}.parquet", [1.0, 1.5, 2.0] * 10)
    options = FilterOptions(input=str(tmp_path / "in"), output=tmp_path / "out", keep_rows=40)
    run_filter_in_passes(options, PickledCalls(), StopRequest())
    names = ["count", *["refine"] * 3, "limits", "copy", "describe"]
    # A call takes a bundle of shards.
    assert passes_of(tmp_path / "out") == [(name, 1) for name in names]


@pytest.mark.parametrize("text", OF_OWN_ROW)
def test_what_looks_at_its_own_row_says_the_same_of_rows_taken_apart(text):
    frame = pl.DataFrame(
        {
            "a": [1, 2, None, 5, 3, 3],
            "b": [True, None, False, True, False, True],
            "f": [0.5, 1.25, 2.75, None, 9.0, 1.0],
            "t": ["ab", "x", None, "b", "cab", ""],
            "l": [[1, 2, 3], [], None, [3], [2, 9], [1]],
            "sums": [{"clip_50": float(n)} for n in range(6)],
            "d": [date(2020 + n % 2, n + 1, 3) for n in range(6)],
        }
    )
    expression = pl.sql_expr(text)
    assert is_of_own_row(expression)
    of_all = frame.select(x=expression)["x"].to_list()
    assert of_all == [frame[row].select(x=expression)["x"].item() for row in range(6)]


@pytest.mark.parametrize("text", OF_OTHER_ROWS)
def test_what_looks_at_other_rows_is_known(text):
    assert not is_of_own_row(pl.sql_expr(text))


def test_as_many_limits_as_groups_are_no_ties(tmp_path, write_scored, monkeypatch):
    """A row that alone does not fit its group's budget needs no order."""
    monkeypatch.setattr(boundaries, "MAX_CONTESTED_ROWS", 3)
    monkeypatch.setattr(boundaries, "REFINED_ABOVE_ROWS", 3)
    rng = np.random.default_rng(2)
    columns = {"problem": np.arange(60) // 3, "payload": np.arange(60)}
    write_scored(tmp_path / "in" / "a.parquet", 1 + rng.random(60), columns=columns)

    def options(output):
        limits = {"token_budget": 25, "within": "problem"}
        return FilterOptions(input=str(tmp_path / "in"), output=tmp_path / output, **limits)

    run_filter(options("one"), StopRequest())
    run_filter_in_passes(options("many"), PickledCalls(), StopRequest())
    assert written(tmp_path / "many") == written(tmp_path / "one")


def test_too_many_ties_are_refused_as_such(tmp_path, write_scored, monkeypatch):
    monkeypatch.setattr(boundaries, "MAX_CONTESTED_ROWS", 3)
    monkeypatch.setattr(boundaries, "REFINED_ABOVE_ROWS", 3)
    columns = {"payload": np.arange(9)}
    write_scored(tmp_path / "in" / "a.parquet", [1.0, *[2.0] * 8], columns=columns)
    options = FilterOptions(input=str(tmp_path / "in"), output=tmp_path / "out", keep_rows=4)
    message = "8 rows that share their score with others stand at a limit, .* at most 3 of them"
    with pytest.raises(UsageError, match=message):
        run_filter_in_passes(options, PickledCalls(), StopRequest())


@pytest.fixture
def scored(tmp_path, write_scored):
    rng = np.random.default_rng(5)
    for number in range(4):
        rsr = rng.choice([1.0, 1.5, 2.0, 2.5, 3.0], 50) + rng.choice([0.0, 1e-9], 50)
        columns = {"teacher": rng.choice(["a", "b"], 50), "payload": np.arange(50)}
        write_scored(tmp_path / "in" / f"{number}.parquet", rsr, columns=columns)
    return tmp_path / "in"


@pytest.mark.seconds
def test_goes_on_where_a_pass_was_stopped(tmp_path, scored, monkeypatch):
    monkeypatch.setattr(bundles, "MIN_BUNDLE_ROWS", 1)
    monkeypatch.setattr(passes, "MAX_BYTES_OF_CALL", 1)

    def options(output):
        return FilterOptions(
            input=str(scored), output=tmp_path / output, keep_fraction=Fraction(1, 3)
        )

    run_filter(options("one"), StopRequest())

    def stopping_after(num_calls):
        left = iter(range(num_calls))

        class Stopping(PickledCalls):
            def __call__(self, *asked):
                yield from self.counted(super().__call__(*asked))

            def scatter(self, *asked):
                yield from self.counted(super().scatter(*asked))

            def counted(self, answers):
                for answer in answers:
                    if next(left, None) is None:
                        raise Interrupted
                    yield answer

        return Stopping()

    num_stops = 0
    while True:
        try:
            run_filter_in_passes(options("many"), stopping_after(num_stops), StopRequest())
        except Interrupted:
            num_stops += 1
        else:
            break
    # Three passes of four shards each, and the description of what was written.
    assert num_stops == 4 * 4
    assert written(tmp_path / "many") == written(tmp_path / "one")


def test_a_link_keeps_its_name(tmp_path, scored):
    """As one machine names its output."""
    (tmp_path / "latest.parquet").symlink_to(scored / "0.parquet")

    def options(output):
        source = str(tmp_path / "latest.parquet")
        return FilterOptions(input=source, output=tmp_path / output, keep_rows=3)

    run_filter(options("one"), StopRequest())
    run_filter_in_passes(options("many"), PickledCalls(), StopRequest())
    assert "latest.parquet" in written(tmp_path / "many")
    assert written(tmp_path / "many") == written(tmp_path / "one")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"conditions": Conditions(where="CAST(teacher AS BIGINT) > 3")}, "cannot be read"),
        ({"conditions": Conditions(where="rsr <= AVG(rsr)")}, "may look at other rows"),
        ({"within": "rsr_mean_rank", "keep_rows": 1}, "floating-point"),
    ],
)
def test_refuses_what_passes_cannot_do(tmp_path, scored, asked, message):
    options = FilterOptions(input=str(scored), output=tmp_path / "out", **asked)
    with pytest.raises(UsageError, match=message):
        run_filter_in_passes(options, PickledCalls(), StopRequest())
    assert not (tmp_path / "out").exists()


def test_a_machine_that_sees_another_output_is_refused(tmp_path, scored):
    """What it would write to a folder of its own under that name would be lost."""

    class Elsewhere(PickledCalls):
        def scatter(self, *asked):
            for probe in (tmp_path / "out").rglob(".probe-*"):
                probe.unlink()
            yield from super().scatter(*asked)

    options = FilterOptions(input=str(scored), output=tmp_path / "out", keep_rows=3)
    with pytest.raises(UsageError, match="every machine of the cluster must see the same files"):
        run_filter_in_passes(options, Elsewhere(), StopRequest())
    assert not list((tmp_path / "out").glob("*.parquet"))
