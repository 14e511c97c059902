"""A corpus of more rows than should be held is compared over whole problems drawn at random."""

from collections import Counter
from itertools import pairwise

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typed import rsr

from rsr.jobs.errors import UsageError
from rsr.jobs.evidence.observations import ObservationColumns, observe
from rsr.jobs.evidence.teachers import CompareOptions, compare_teachers
from rsr.jobs.run.calls import CallsHere

FAST = CompareOptions(num_draws=50)

problems = st.one_of(
    st.lists(st.integers(-3, 20), min_size=2, max_size=120),
    st.lists(st.sampled_from(["", "a", "b", "ü", "a long name of a problem"]), min_size=2),
    st.lists(st.one_of(st.none(), st.integers(0, 9)), min_size=2, max_size=120),
    st.lists(st.sampled_from([0.0, -0.0, 0.5, float("nan")]), min_size=2),
)


@pytest.mark.seconds
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problems, st.integers(1, 120), st.integers(0, 3), st.booleans(), st.booleans())
def test_problems_are_whole_and_as_many_as_fit(
    tmp_path_factory, write_scored, problem, percent, seed, has_problems, is_dictionary
):
    kind = pl.Series(problem).dtype
    problem = pl.Series(problem, dtype=kind if kind != pl.Null else pl.Int64).to_list()
    folder = tmp_path_factory.mktemp("drawn")
    table = {"id": list(range(len(problem))), "problem_id": problem}
    teacher = ["ab"[row % 2] for row in table["id"]]
    values = [2.0 + row % 7 / 10 for row in table["id"]]
    types = {"problem_id": kind if kind != pl.Null else pl.Int64}
    frame = pl.DataFrame(table, schema_overrides=types).with_columns(teacher=pl.Series(teacher))
    if is_dictionary and kind == pl.String:
        frame = frame.with_columns(pl.col("problem_id").cast(pl.Categorical))
    edges = [0, len(frame) // 2, len(frame) - 1, len(frame)]
    for number, (start, stop) in enumerate(pairwise(edges)):
        part = frame[start:stop].to_arrow(compat_level=pl.CompatLevel.oldest())
        columns = dict(zip(part.column_names, part.columns, strict=True))
        write_scored(folder / f"{number}.parquet", values[start:stop], columns=columns)
    columns = ObservationColumns(problem="problem_id" if has_problems else None)
    max_rows = max(1, len(problem) * percent // 100)
    options = {"max_rows": max_rows, "seed": seed}
    # A null is a problem of its own, and one NaN is the other's.
    name_of = [
        ("row", row) if p is None or not has_problems else "NaN" if p != p else p
        for row, p in enumerate(problem)
    ]
    sizes = Counter(name_of)
    try:
        drawn = observe(str(folder), columns, **options)
    except UsageError:
        assert max(sizes.values()) > max_rows
        return
    by_calls = observe(str(folder), columns, **options, calls=CallsHere())
    assert drawn.rows.equals(by_calls.rows)
    assert drawn.notes == by_calls.notes
    rows = drawn.rows["row"].to_list()
    assert rows == sorted(set(rows))
    taken = Counter(name_of[row] for row in rows)
    assert all(sizes[name] == number for name, number in taken.items()), "a problem in part"
    assert drawn.num_problems == len(taken)
    if len(problem) <= max_rows:
        assert rows == list(range(len(problem)))
        assert not drawn.is_drawn
    else:
        assert 1 <= len(rows) <= max_rows
        assert any(f"{len(rows):,} of {len(problem):,} rows" in note for note in drawn.notes)


def test_what_is_said_is_what_a_corpus_of_the_drawn_problems_says(tmp_path, write_scored):
    problem = [row // 6 for row in range(1200)]
    whole = write_scored(
        tmp_path / "whole.parquet",
        [2.0 + (row * 37) % 101 / 100 for row in range(1200)],
        columns={
            "problem_id": problem,
            "teacher": ["abc"[row % 3] for row in range(1200)],
            "correct": [row % 5 > 1 for row in range(1200)],
        },
    )
    drawn = observe(str(whole), ObservationColumns(), max_rows=300, seed=4)
    kept = pl.Series([problem[row] for row in drawn.rows["row"]]).unique()
    assert 40 <= len(kept) <= 50
    frame = pl.read_parquet(whole).filter(pl.col("problem_id").is_in(kept.implode()))
    small = write_scored(
        tmp_path / "small.parquet",
        frame["rsr"].to_list(),
        columns={n: frame[n].to_list() for n in ("problem_id", "teacher", "correct")},
    )
    one, two = (
        compare_teachers(observations, FAST)
        for observations in (drawn, observe(str(small), ObservationColumns()))
    )
    assert one.teachers == two.teachers
    assert one.confounds == two.confounds
    assert (one.samples_needed, one.num_shared_problems) == (
        two.samples_needed,
        two.num_shared_problems,
    )


@pytest.mark.seconds
def test_every_problem_is_drawn_as_often(tmp_path, write_scored):
    path = write_scored(
        tmp_path / "rows.parquet",
        [2.0] * 400,
        columns={"problem_id": [row // 2 for row in range(400)], "teacher": ["a"] * 400},
    )
    drawn = Counter(
        row
        for seed in range(100)
        for row in observe(str(path), ObservationColumns(), max_rows=100, seed=seed).rows["row"]
    )
    # A quarter of 100 draws, whose standard deviation is 4.3.
    assert set(drawn) == set(range(400))
    assert 5 < min(drawn.values()) < max(drawn.values()) < 50


@pytest.mark.seconds
@pytest.mark.parametrize("command", ["teachers", "report"])
def test_command_says_how_many_rows_it_compares(tmp_path, write_scored, command):
    path = write_scored(
        tmp_path / "rows.parquet",
        [2.0 + row % 9 for row in range(200)],
        columns={
            "problem_id": [row // 2 for row in range(200)],
            "teacher": ["ab"[row % 2] for row in range(200)],
        },
    )
    page = [tmp_path / "page.html"] if command == "report" else []
    told = rsr(command, path, *page, "--max-rows", "50")
    said = " ".join(told.stdout.split())
    assert "compared are 50 of 200 rows, all those of 25 problems drawn at random" in said
    assert all("50 of 200 rows" in file.read_text() for file in page)
    all_rows = rsr(command, path, *page)
    assert "drawn at random: --max-rows" not in " ".join(all_rows.stdout.split())


def test_a_problem_of_too_many_rows_is_refused(tmp_path, write_scored):
    path = write_scored(
        tmp_path / "rows.parquet",
        [2.0] * 100,
        columns={"problem_id": ["the only one"] * 100, "teacher": ["a"] * 100},
    )
    refused = rsr("teachers", path, "--max-rows", "40", exit_code=2)
    (line,) = refused.stderr.strip().splitlines()
    assert "the problem that was drawn has more than 40 rows" in line
    assert "--problem-column none" in line
    told = rsr("teachers", path, "--max-rows", "40", "--problem-column", "none")
    assert "compared are 40 of 100 rows" in " ".join(told.stdout.split())


def test_a_sample_of_more_problems_than_were_drawn_says_what_to_do(tmp_path, write_scored):
    path = write_scored(
        tmp_path / "rows.parquet",
        [2.0] * 100,
        columns={"problem_id": list(range(100)), "teacher": ["a"] * 100},
    )
    refused = rsr("teachers", path, "--sample", "80", "--max-rows", "40", exit_code=2)
    assert "only 40 problems have a scored row of every teacher" in refused.stderr
    assert "--max-rows looks at more rows" in refused.stderr
