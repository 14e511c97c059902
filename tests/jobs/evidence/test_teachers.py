"""Teachers: Eq. 9 and its intervals on real files, samples, confounds, and every stated outcome."""

import csv
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rsr.engine.metrics import DatasetRsr
from rsr.jobs.cli import main
from rsr.jobs.evidence.confounds import measure_confounds, warn_of_confounds
from rsr.jobs.evidence.correlate import spearman
from rsr.jobs.evidence.observations import ObservationColumns, observe
from rsr.jobs.evidence.teachers import CompareOptions, compare_teachers

FAST = CompareOptions(num_draws=100)


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture
def scored(tmp_path, write_scored) -> Path:
    """60 problems × 3 teachers: `near` a little under `middle`, `far` far above both."""
    rng = np.random.default_rng(0)
    means = {"near": 3.0, "middle": 3.1, "far": 6.0}
    rows = [(t, p, m + rng.normal(0, 0.3)) for p in range(60) for t, m in means.items()]
    teacher, problem, rsr = zip(*rows, strict=True)
    columns = {
        "id": [f"{p}-{t}" for t, p, _ in rows],
        "teacher": teacher,
        "problem_id": problem,
        "correct": [t != "far" for t in teacher],
    }
    return write_scored(tmp_path / "scored.parquet", rsr, columns=columns, num_tokens=[100] * 180)


def test_ranking_intervals_and_probabilities(scored):
    told = compare_teachers(observe(str(scored), ObservationColumns()), CompareOptions())
    assert [t.teacher for t in told.teachers] == ["near", "middle", "far"]
    near, middle, far = told.teachers
    for teacher in told.teachers:
        assert teacher.low < teacher.rsr < teacher.high
        assert teacher.num_trajectories == 60
    # The spread of the mean of 60 values of deviation 0.3.
    assert near.high - near.low == pytest.approx(2 * 1.96 * 0.3 / 60**0.5, rel=0.3)
    assert near.probability_best + middle.probability_best == pytest.approx(1.0)
    assert far.probability_best == 0.0
    assert (far.share_correct, near.share_correct) == (0.0, 1.0)
    assert (told.num_problems, told.num_shared_problems) == (60, 60)


cells = st.tuples(
    st.sampled_from("abc"),
    st.integers(0, 4),
    st.one_of(st.none(), st.just(float("nan")), st.floats(0.5, 50)),
)


@pytest.mark.seconds
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(cells, min_size=1, max_size=25), st.sampled_from([None, "clip_50", "unclipped"]))
def test_any_table_against_dataset_rsr(tmp_path, write_scored, rows, rank_clip):
    teacher, problem, rsr = zip(*rows, strict=True)
    path = write_scored(
        tmp_path / "any.parquet", rsr, columns={"teacher": teacher, "problem_id": problem}
    )
    usable = [(t, r) for t, r in zip(teacher, rsr, strict=True) if r is not None and r == r]
    if not usable:
        assert "none of" in run("teachers", path).stderr
        return
    factor = {None: 1.0, "clip_50": 0.5, "unclipped": 10.0}[rank_clip]
    told = compare_teachers(observe(str(path), ObservationColumns(), rank_clip=rank_clip), FAST)
    assert {t.teacher for t in told.teachers} == set(teacher)
    for t in told.teachers:
        own = [r for name, r in usable if name == t.teacher]
        expected = DatasetRsr()
        for r in own:
            expected.merge(DatasetRsr(1, 2.0 * r * factor, 2.0))
        assert t.num_trajectories == len(own)
        assert t.num_rows == teacher.count(t.teacher)
        assert t.rsr == (pytest.approx(expected.rsr) if own else None)
    scores = [t.rsr for t in told.teachers if t.rsr is not None]
    assert scores == sorted(scores)
    assert sum(t.probability_best or 0 for t in told.teachers) == pytest.approx(1.0)


def test_input_order_changes_nothing(tmp_path, scored, write_scored):
    frame = pl.read_parquet(scored).sample(fraction=1, shuffle=True, seed=1)
    columns = {n: frame[n].to_list() for n in ("id", "teacher", "problem_id", "correct")}
    shuffled = write_scored(
        tmp_path / "shuffled.parquet",
        frame["rsr"].to_list(),
        columns=columns,
        num_tokens=[100] * 180,
    )
    for options in (FAST, CompareOptions(num_draws=100, sample=20)):
        one, two = (
            compare_teachers(observe(str(p), ObservationColumns()), options).teachers
            for p in (scored, shuffled)
        )
        for a, b in zip(one, two, strict=True):
            assert (a.teacher, a.num_trajectories) == (b.teacher, b.num_trajectories)
            assert [a.rsr, a.low, a.high] == pytest.approx([b.rsr, b.low, b.high])


def test_sample_takes_problems_that_all_teachers_solved(tmp_path, write_scored):
    teacher = ["a"] * 30 + ["b"] * 20
    problem = [*range(30), *range(20)]
    path = write_scored(
        tmp_path / "s.parquet", [3.0] * 50, columns={"teacher": teacher, "problem_id": problem}
    )
    result = run("teachers", path, "--sample", "20", "--json")
    (told,) = json.loads(result.stdout)["students"]
    assert [t["num_trajectories"] for t in told["teachers"]] == [20, 20]
    assert (told["sample"], told["num_problems"], told["num_shared_problems"]) == (20, 20, 20)
    refused = run("teachers", path, "--sample", "21")
    assert refused.exit_code == 2
    assert "only 20 problems have a scored row of every teacher" in refused.stderr


def test_samples_needed(tmp_path, write_scored):
    rng = np.random.default_rng(0)
    n = 600
    gap = 0.3
    rsr = np.concatenate([rng.normal(10, 1, n), rng.normal(10 + gap, 1, n)])
    columns = {"teacher": ["a"] * n + ["b"] * n, "problem_id": [*range(n)] * 2}
    path = write_scored(tmp_path / "s.parquet", rsr.tolist(), columns=columns)
    told = compare_teachers(observe(str(path), ObservationColumns()), CompareOptions())
    # Φ(gap √(n / 2)) = 0.95 at n = 60; less as draws come out of 600 without replacement.
    assert told.samples_needed == pytest.approx(60, rel=0.35)
    close = write_scored(
        tmp_path / "c.parquet",
        np.concatenate([rsr[:n], rsr[:n] + rng.normal(0.001, 1, n)]).tolist(),
        columns=columns,
    )
    told = compare_teachers(observe(str(close), ObservationColumns()), CompareOptions())
    assert told.samples_needed is None


def test_outcomes_that_are_stated(tmp_path, write_scored):
    path = write_scored(
        tmp_path / "odd.parquet",
        [2.0, None, float("nan"), 3.0, 4.0, 5.0],
        columns={
            "id": [1, 2, 3, 4, 4, 6],
            "teacher": ["a", "mute", "mute", "b", "b", None],
            "problem_id": [1, 1, 2, 1, None, 3],
        },
    )
    result = run("teachers", path)
    assert result.exit_code == 0, result.output
    assert "nothing scored" in result.stdout
    assert "0 of 2" in result.stdout
    for note in (
        "1 rows without a 'teacher' are left out",
        "2 rows without a score are left out",
        "1 rows repeat the 'id' of another; all of them count",
    ):
        assert f"note: {note}" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--teacher-column", "who"], "has no column 'who'; it has: id, teacher"),
        (["--problem-column", "what"], "has no column 'what'"),
        (["--confound", "reward"], "has no column 'reward'"),
        (["--confound", "id"], "a confound must be numeric"),
        (["--csv", "/proc/none/t.csv"], "cannot be written"),
    ],
)
def test_refusals(scored, arguments, message):
    result = run("teachers", scored, *arguments)
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1), result.output
    assert message in result.stderr


@pytest.mark.seconds
def test_input_without_scores(tmp_path):
    path = tmp_path / "raw.parquet"
    pl.DataFrame({"teacher": ["a"], "problem_id": [1]}).write_parquet(path)
    for command in (["teachers", path], ["report", path, tmp_path / "out.html"]):
        result = run(*command)
        assert result.exit_code == 2
        assert "was never scored" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["raw.parquet"]


def test_rows_as_problems(scored):
    (told,) = json.loads(run("teachers", scored, "--problem-column", "none", "--json").stdout)[
        "students"
    ]
    assert (told["num_problems"], told["num_shared_problems"]) == (180, 0)
    assert told["samples_needed"] is None


def test_rank_clip_and_students_side_by_side(tmp_path, scored, write_scored, identity):
    frame = pl.read_parquet(scored)
    columns = {n: frame[n].to_list() for n in ("teacher", "problem_id")}
    identity["settings"]["model"] = "org/other"
    other = write_scored(
        tmp_path / "other.parquet", (9 - frame["rsr"]).to_list(), columns=columns, identity=identity
    )
    table = tmp_path / "table.csv"
    result = run("teachers", scored, other, "--csv", table, "--rank-clip", "200")
    assert result.exit_code == 0, result.output
    assert "Side by side" in result.stdout
    rows = list(csv.DictReader(table.open()))
    best = {r["student"]: r["teacher"] for r in reversed(rows)}
    assert best == {"student": "near", "other": "far"}
    # write_scored: ranks clipped at 200 add up to twice those at 100.
    near = next(r for r in rows if r["student"] == "student" and r["teacher"] == "near")
    assert float(near["rsr"]) == pytest.approx(6.0, abs=0.2)


def test_confounds_by_definition(tmp_path, write_scored):
    rng = np.random.default_rng(1)
    n = 60
    problem = rng.integers(0, 15, n)
    rsr, reward = rng.normal(5, 1, n), rng.normal(0, 1, n)
    reward[:5] = np.nan
    columns = {"teacher": ["a", "b"] * 30, "problem_id": problem, "reward": reward}
    path = write_scored(
        tmp_path / "c.parquet", rsr.tolist(), columns=columns, num_tokens=rng.integers(40, 90, n)
    )
    observed = observe(str(path), ObservationColumns(confounds=["reward"]))
    length, surprisal, told = measure_confounds(observed)
    assert (length.name, surprisal.name, told.name) == ("length", "surprisal", "reward")
    assert surprisal.overall is None, "write_scored's surprisal is the same everywhere"
    known = ~np.isnan(reward)
    assert told.num_rows == known.sum()
    assert told.overall == pytest.approx(spearman(rsr[known], reward[known]))
    x, y = [], []
    for p in set(problem[known]):
        here = known & (problem == p)
        if here.sum() > 1:
            for values, ranks in ((rsr, x), (reward, y)):
                own = [(np.sum(values[here] < v) + 0.5) / here.sum() for v in values[here]]
                ranks += list(np.array(own) - np.mean(own))
    assert told.within_problem == pytest.approx(np.corrcoef(x, y)[0, 1])


def warnings_of(path: Path) -> str:
    observed = observe(str(path), ObservationColumns())
    return "\n".join(warn_of_confounds(observed, measure_confounds(observed)))


def test_warnings(tmp_path, scored, write_scored):
    assert "fewer than 32" not in warnings_of(scored)
    # RSR is length: and without its short responses b, not a, is best.
    teacher = ["a"] * 40 + ["b"] * 40
    tokens = [10] * 20 + [100] * 20 + [50] * 40
    rsr = [1.0] * 20 + [9.0] * 20 + [6.0] * 40
    columns = {"teacher": teacher, "problem_id": [*range(40)] * 2}
    told = warnings_of(
        write_scored(tmp_path / "w.parquet", rsr, columns=columns, num_tokens=tokens)
    )
    assert "25% of the responses have fewer than 32 scored tokens" in told
    assert "without responses of fewer than 32 tokens the best teacher is b, not a" in told
    assert "RSR goes with length (Spearman +1.00)" in told
    # Only `odd` has lengths that go with RSR.
    rng = np.random.default_rng(0)
    rsr = [*rng.uniform(4, 5, 50), *np.linspace(2, 9, 50)]
    tokens = [*rng.integers(400, 500, 50), *np.linspace(40, 900, 50).astype(int)]
    columns = {"teacher": ["even"] * 50 + ["odd"] * 50, "problem_id": [*range(50)] * 2}
    told = warnings_of(
        write_scored(tmp_path / "o.parquet", rsr, columns=columns, num_tokens=tokens)
    )
    assert "RSR's correlation with length rests on odd" in told


def test_simpson_is_told(tmp_path, write_scored):
    # Harder problems: longer and higher. Within each: the longer, the lower.
    problem = [p for p in range(20) for _ in range(3)]
    rsr = [5 + p - 0.1 * k for p in range(20) for k in range(3)]
    tokens = [100 + 100 * p + k for p in range(20) for k in range(3)]
    columns = {"teacher": ["a", "b", "c"] * 20, "problem_id": problem}
    told = warnings_of(
        write_scored(tmp_path / "s.parquet", rsr, columns=columns, num_tokens=tokens)
    )
    assert "one way overall" in told
    assert "the other way within problems (-1.00)" in told


def test_real_teachers(shared_data, tmp_path, write_scored):
    """The 400 published rows: teachers in the published order of data-set RSR."""
    published = pl.read_parquet(shared_data / "rsr_published_fp32.parquet").join(
        pl.read_parquet(shared_data / "gsm8k_teachers.parquet"), on="id"
    )
    columns = {n: published[n].to_list() for n in ("id", "teacher", "problem_id", "correct")}
    path = write_scored(
        tmp_path / "real.parquet",
        published["rsr"].to_list(),
        columns=columns,
        num_tokens=published["num_tokens"].to_list(),
    )
    frame = pl.read_parquet(path).with_columns(
        rsr_mean_rank=published["avg_rank_clip"], rsr_mean_surprisal=published["avg_surprisal"]
    )
    frame.write_parquet(path)
    told = compare_teachers(observe(str(path), ObservationColumns()), FAST)
    expected = (
        published.group_by("teacher")
        .agg(rsr=pl.sum("avg_rank_clip") / pl.sum("avg_surprisal"))
        .sort("rsr")
    )
    assert [t.teacher for t in told.teachers] == expected["teacher"].to_list()
    assert [t.rsr for t in told.teachers] == pytest.approx(expected["rsr"].to_list())
