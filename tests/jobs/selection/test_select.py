"""`rsr select` from the command line: against a naive definition, and what it refuses."""

import json
import re
import shutil
from collections import Counter

import polars as pl
import pyarrow as pa
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rsr.jobs.cli import main

NAN = float("nan")


def run(source, output, *options, group_by="problem"):
    arguments = ["select", str(source), str(output), "--group-by", group_by, *map(str, options)]
    return CliRunner().invoke(main, arguments)


def selected(source, output, *options):
    """The JSON result, and the ids of the selected rows in their order."""
    result = run(source, output, *options, "--json")
    assert result.exit_code == 0, result.stderr
    kept = pl.scan_parquet(output / "**/*.parquet").select("id").collect()["id"].to_list()
    return json.loads(result.stdout), kept


def assert_refused(result, message, output):
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not output.exists()


ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "rsr": st.sampled_from([None, NAN, 1.0, 1.0, 2.0, 2.5]),
            "tokens": st.integers(1, 9),
            "problem": st.sampled_from([1, 2, 3, None]),
            "teacher": st.sampled_from(["a", "b", "c", None]),
            "correct": st.sampled_from([True, False, None]),
            "reward": st.sampled_from([None, NAN, -1.0, 0.0, 0.5, 2.0]),
        }
    ),
    min_size=1,
    max_size=24,
)


def is_number(value):
    return value is not None and value == value


def rank(row, rows, key):
    """Standardised rank in the group: rows below, and half of the equal others."""
    values = [key(other) for other in rows if other["problem"] == row["problem"]]
    below = sum(value < key(row) for value in values)
    equal = sum(value == key(row) for value in values) - 1
    return (below + equal / 2) / max(1, len(values) - 1)


def dominates(one, other):
    return (
        one["problem"] == other["problem"]
        and one["rsr"] <= other["rsr"]
        and one["reward"] >= other["reward"]
        and (one["rsr"], one["reward"]) != (other["rsr"], other["reward"])
    )


def is_of_kind(one, other):
    """Joint selection compares rows of one problem that are both correct, or both not."""
    same_problem = one["problem"] == other["problem"]
    return same_problem and (one["correct"] is True) == (other["correct"] is True)


def naive(rows, *, keep, objective, weight, require, max_share):
    """Ids selected, by the definition in docs/selection.md read aloud."""
    pool = [r for r in rows if is_number(r["rsr"]) and r["problem"] is not None]
    pool = [r for r in pool if r["correct"] is True or not require]
    is_joint, is_front = objective == "joint", objective == "pareto"
    if is_joint and weight is None:
        is_front = True
    weight = 0.5 if weight is None else weight
    if objective is not None:
        pool = [r for r in pool if is_number(r["reward"])]
        for row in pool:
            others = [r for r in pool if is_of_kind(r, row)] if is_joint else pool
            row["score"] = (1 - weight) * rank(row, others, lambda r: r["rsr"]) + weight * rank(
                row, others, lambda r: -r["reward"]
            )
    else:
        for row in pool:
            row["score"] = row["rsr"]
    if is_front:

        def beats(one, other):
            if is_joint and not is_of_kind(one, other):
                return one["problem"] == other["problem"] and one["correct"] is True
            return dominates(one, other)

        pool = [r for r in pool if not any(beats(other, r) for other in pool)]
        keep = keep or len(rows)
    pool.sort(key=lambda r: (is_joint and r["correct"] is not True, r["score"], r["rsr"], r["id"]))
    num_selected = sum(min(keep or 1, n) for n in Counter(r["problem"] for r in pool).values())
    while True:
        taken, of_group, of_teacher = [], Counter(), Counter()
        for row in pool:
            is_full = max_share and of_teacher[row["teacher"]] >= int(max_share * num_selected)
            if of_group[row["problem"]] < (keep or 1) and not is_full:
                taken.append(row["id"])
                of_group[row["problem"]] += 1
                of_teacher[row["teacher"]] += 1
        num_selected = len(taken)
        if not max_share or all(n <= max_share * num_selected for n in of_teacher.values()):
            return set(taken)


@pytest.mark.seconds
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    rows=ROWS,
    cuts=st.lists(st.integers(0, 24), min_size=2, max_size=2).map(sorted),
    keep=st.none() | st.integers(1, 3),
    objective=st.sampled_from([None, None, "pareto", "weighted", "joint", "joint"]),
    weight=st.sampled_from([None, 0.0, 0.25, 1.0]),
    require=st.booleans(),
    max_share=st.sampled_from([None, 0.5]),
    order=st.randoms(use_true_random=False),
)
def test_selects_what_the_definition_says(
    tmp_path, write_scored, rows, cuts, keep, objective, weight, require, max_share, order
):
    for folder in ("in", "out"):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
    for number, row in enumerate(rows):
        row["id"] = f"{number:02d}"
    order.shuffle(rows)
    low, high = cuts
    kinds = {
        "id": pa.string(),
        "problem": pa.int64(),
        "teacher": pa.string(),
        "correct": pa.bool_(),
        "reward": pa.float64(),
    }
    for name, part in zip("cab", (rows[:low], rows[low:high], rows[high:]), strict=True):
        write_scored(
            tmp_path / "in" / f"{name}.parquet",
            [row["rsr"] for row in part],
            columns={n: pa.array([row[n] for row in part], kind) for n, kind in kinds.items()},
            num_tokens=[row["tokens"] for row in part],
            row_group_size=3,
        )
    in_order = [*rows[low:high], *rows[high:], *rows[:low]]
    options = [] if keep is None else ["--keep", keep]
    options += ["--require", "correct"] if require else []
    options += ["--max-share-per", f"teacher={max_share}"] if max_share else []
    if objective is not None:
        options += ["--objective", objective, "--quality-column", "reward"]
        options += [] if weight is None else ["--quality-weight", weight]
    expected = naive(
        rows,
        keep=keep,
        objective=objective,
        weight=weight,
        require=require,
        max_share=max_share,
    )
    if expected:
        _, kept = selected(tmp_path / "in", tmp_path / "out", *options)
        assert kept == [row["id"] for row in in_order if row["id"] in expected]
    else:
        result = run(tmp_path / "in", tmp_path / "out", *options)
        assert result.exit_code == 2
        assert not (tmp_path / "out").exists()


@pytest.fixture
def corpus(tmp_path, write_scored):
    """Problems 1 and 2 are spread over both shards, 3 has no score, one row has no problem."""
    columns = {
        "id": list("abcd"),
        "problem": [1, 2, 1, 3],
        "teacher": list("xxyy"),
        "correct": [True, False, True, True],
        "reward": [0.1, 0.2, 0.9, 0.5],
    }
    write_scored(tmp_path / "in" / "0.parquet", [1.0, 1.5, 2.0, None], columns=columns)
    columns = {
        "id": list("efgh"),
        "problem": [2, 1, None, 3],
        "teacher": list("xyxy"),
        "correct": [True, None, True, True],
        "reward": [0.8, None, 0.7, 0.6],
    }
    write_scored(tmp_path / "in" / "1.parquet", [2.5, 0.5, 0.1, NAN], columns=columns)
    return tmp_path / "in"


def test_best_of_each_problem_over_shards(tmp_path, corpus):
    told, kept = selected(corpus, tmp_path / "out")
    assert kept == ["b", "f"]
    counts = ("num_candidates", "num_groups", "num_groups_without_row", "num_ungrouped")
    assert [told[name] for name in counts] == [5, 2, 1, 1]


def test_required_columns_and_keep(tmp_path, corpus):
    told, kept = selected(corpus, tmp_path / "out", "--require", "correct", "--keep", 2)
    assert kept == ["a", "c", "e"]
    assert told["num_groups_short"] == 2


def test_objectives_differ(tmp_path, corpus):
    joint = ["--quality-column", "reward"]
    told, kept = selected(corpus, tmp_path / "front", *joint, "--objective", "pareto")
    assert kept == ["a", "b", "c", "e"]
    assert told["num_unjudged"] == 1
    weighted = [*joint, "--objective", "weighted", "--quality-weight", "0.9"]
    assert selected(corpus, tmp_path / "weighted", *weighted)[1] == ["c", "e"]


def test_group_column_of_strings_or_categories(tmp_path, write_scored):
    names = pa.array(["p", "q", "p", None])
    columns = {"id": list("abcd"), "problem": names, "kind": names.dictionary_encode()}
    path = write_scored(tmp_path / "x.parquet", [2.0, 1.0, 1.0, 0.5], columns=columns)
    for column in ("problem", "kind"):
        out = tmp_path / column
        assert run(path, out, group_by=column).exit_code == 0
        assert pl.read_parquet(out / "x.parquet")["id"].to_list() == ["b", "c"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--require", "right"], "no column 'right'"),
        (["--require", "teacher"], "expected Boolean. Say what is required of it with --where"),
        (["--max-share-per", "tutor=0.5"], "no column 'tutor'"),
        (["--max-share-per", "teacher=0.1"], "no selection meets --max-share-per teacher=0.1"),
        (["--quality-column", "reward"], "needs both --quality-column and --objective"),
        (["--objective", "pareto"], "needs both --quality-column and --objective"),
        (["--quality-weight", "0.5"], "--quality-weight needs"),
        (["--objective", "joint"], "needs both --quality-column and --objective"),
        (
            ["--objective", "joint", "--quality-column", "reward", "--correct-column", "teacher"],
            "expected Boolean",
        ),
        (["--quality-column", "teacher", "--objective", "pareto"], "expected numbers"),
        (["--max-tokens", "1"], "none of the 6 scored rows"),
        (["--where", "problem = 3"], "none of the 6 scored rows"),
    ],
)
def test_what_cannot_be_done_is_refused(tmp_path, corpus, options, message):
    assert_refused(run(corpus, tmp_path / "out", *options), message, tmp_path / "out")


def test_joint_selection_without_verdicts_is_refused(tmp_path, write_scored):
    columns = {"problem": [1], "reward": [0.5], "correct": ["yes"]}
    source = write_scored(tmp_path / "in.parquet", [1.0], columns=columns)
    options = ("--objective", "joint", "--quality-column", "reward")
    refused = run(source, tmp_path / "out", *options)
    assert_refused(refused, "has no Boolean column 'correct'", tmp_path / "out")


def test_joint_selection_counts_what_is_not_correct_and_keeps_to_its_verdicts(tmp_path, corpus):
    out = tmp_path / "out"
    options = ("--objective", "joint", "--quality-column", "reward", "--keep", "2")
    result, kept = selected(corpus, out, *options, "--quality-weight", "0.75")
    assert kept == ["a", "b", "c", "e"]
    assert result["num_kept_wrong"] == 1
    shown = run(corpus, out, *options, "--quality-weight", "0.75").stdout
    assert re.search("of them not known to be correct +1\n", shown)
    by_cost = ("--keep", "1", "--metric", "perplexity_mean", "--quality-weight", "0")
    _, kept = selected(corpus, tmp_path / "cost", *options[:4], *by_cost)
    assert kept == ["a", "e"]
    _, front = selected(corpus, tmp_path / "front", *options[:4])
    assert front == ["a", "c", "e"]


@pytest.mark.parametrize("text", ["teacher", "=0.5", "teacher=2", "teacher=x"])
def test_quota_that_is_not_one(tmp_path, corpus, text):
    result = run(corpus, tmp_path / "out", "--max-share-per", text)
    assert result.exit_code == 2
    assert "expected" in result.stderr


def test_no_candidate_has_a_quality(tmp_path, write_scored):
    columns = {"problem": [1], "reward": pa.array([None], pa.float64())}
    path = write_scored(tmp_path / "x.parquet", [1.0], columns=columns)
    result = run(path, tmp_path / "out", "--quality-column", "reward", "--objective", "weighted")
    assert_refused(result, "finite value in --quality-column reward", tmp_path / "out")


def test_printed_table_names_every_teacher(tmp_path, corpus):
    result = run(corpus, tmp_path / "out")
    assert result.exit_code == 0
    assert "rows kept" in result.stdout
    lines = [line.split() for line in result.stdout.splitlines()]
    assert next(w for w in lines if w[:1] == ["x"])[:6] == ["x", "1", "50.0%", "66.7%", "10", "10"]
