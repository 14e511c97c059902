"""`rsr filter` from the command line: against a naive definition, and what it refuses."""

import datetime
import decimal
import json
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rsr.jobs.cli import main
from rsr.jobs.errors import Interrupted
from rsr.jobs.interrupt import StopRequest

NAN = float("nan")


def run(source, output, *options):
    return CliRunner().invoke(main, ["filter", str(source), str(output), *map(str, options)])


def filtered(source, output, *options):
    """The JSON result, and the ids of the kept rows in their order."""
    result = run(source, output, *options, "--json")
    assert result.exit_code == 0, result.stderr
    kept = pl.scan_parquet(output / "**/*.parquet").select("id").collect()["id"].to_list()
    told = json.loads(result.stdout)
    assert told["num_kept"] == len(kept)
    assert told == json.loads((output / ".rsr" / "composition.json").read_text())
    return told, kept


def assert_refused(result, message, output):
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""
    assert not output.exists()


ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "rsr": st.sampled_from([None, NAN, 1.0, 1.0, 2.0, 2.5]),
            "tokens": st.integers(1, 9),
            "teacher": st.sampled_from(["a", "b", None]),
        }
    ),
    min_size=1,
    max_size=24,
)


def naive(rows, *, keep_fraction, keep_rows, token_budget, max_rsr, within, min_tokens):
    """Ids kept, by the definition in docs/selection.md read aloud."""
    candidates = [
        row
        for row in rows
        if row["rsr"] is not None and row["rsr"] == row["rsr"] and row["tokens"] >= min_tokens
    ]
    kept = set()
    for group in {row["teacher"] if within else None for row in candidates}:
        ranking = [row for row in candidates if not within or row["teacher"] == group]
        ranking.sort(key=lambda row: (row["rsr"], row["id"]))
        limit = len(ranking)
        if keep_fraction is not None:
            limit = int(keep_fraction * len(ranking) + Fraction(1, 2))
        used = 0
        for place, row in enumerate(ranking):
            used += row["tokens"]
            if place >= min(limit, keep_rows or limit) or used > (token_budget or used):
                break
            if max_rsr is None or row["rsr"] <= max_rsr:
                kept.add(row["id"])
    return kept


@pytest.mark.seconds
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    rows=ROWS,
    cuts=st.lists(st.integers(0, 24), min_size=2, max_size=2).map(sorted),
    keep_fraction=st.sampled_from([None, "0.2", "0.5", "1/3", "1"]),
    keep_rows=st.none() | st.integers(1, 6),
    token_budget=st.none() | st.integers(1, 40),
    max_rsr=st.sampled_from([None, 1.0, 2.2]),
    within=st.booleans(),
    order=st.randoms(use_true_random=False),
)
def test_keeps_what_the_definition_says(
    tmp_path, write_scored, rows, cuts, keep_fraction, keep_rows, token_budget, max_rsr, within,
    order,
):  # fmt: skip
    for folder in ("in", "out"):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
    for number, row in enumerate(rows):
        row["id"] = f"{number:02d}"
    order.shuffle(rows)
    low, high = cuts
    for name, part in zip("cab", (rows[:low], rows[low:high], rows[high:]), strict=True):
        columns = {
            "id": pa.array([row["id"] for row in part], pa.string()),
            "teacher": pa.array([row["teacher"] for row in part], pa.string()),
        }
        write_scored(
            tmp_path / "in" / f"{name}.parquet",
            [row["rsr"] for row in part],
            columns=columns,
            num_tokens=[row["tokens"] for row in part],
            row_group_size=3,
        )
    in_order = [*rows[low:high], *rows[high:], *rows[:low]]
    limits = {
        "--keep-fraction": keep_fraction,
        "--keep-rows": keep_rows,
        "--token-budget": token_budget,
        "--max-rsr": max_rsr,
        "--min-tokens": 2,
    }
    options = [str(x) for pair in limits.items() if pair[1] is not None for x in pair]
    within = within and bool(keep_fraction or keep_rows or token_budget)
    if within:
        options += ["--within", "teacher"]
    expected = naive(
        rows,
        keep_fraction=None if keep_fraction is None else Fraction(keep_fraction),
        keep_rows=keep_rows,
        token_budget=token_budget,
        max_rsr=max_rsr,
        within=within,
        min_tokens=2,
    )
    if expected:
        _, kept = filtered(tmp_path / "in", tmp_path / "out", *options)
        assert kept == [row["id"] for row in in_order if row["id"] in expected]
    else:
        result = run(tmp_path / "in", tmp_path / "out", *options)
        assert_refused(result, "none of the", tmp_path / "out")


@pytest.fixture
def corpus(tmp_path, write_scored) -> Path:
    """Three shards of five rows; RSR rises with the id, rows 4 and 9 have no score."""
    for shard in range(3):
        numbers = range(5 * shard, 5 * shard + 5)
        rsr = [None if n == 4 else NAN if n == 9 else 1.0 + n / 10 for n in numbers]
        columns = {
            "id": list(numbers),
            "teacher": ["a" if n % 2 else "b" for n in numbers],
            "correct": [n % 3 == 0 for n in numbers],
        }
        write_scored(tmp_path / "in" / f"{shard}.parquet", rsr, columns=columns)
    return tmp_path / "in"


def test_counts_and_composition(tmp_path, corpus):
    told, kept = filtered(corpus, tmp_path / "out", "--keep-fraction", "0.5")
    assert kept == [0, 1, 2, 3, 5, 6, 7]
    counts = ("num_rows", "num_scored", "num_candidates", "num_kept", "num_tokens")
    assert [told[name] for name in counts] == [15, 13, 13, 7, 70]
    assert told["largest_rsr"] == 1.7
    composition = told["composition"]
    assert composition["pool"]["num_rows"] == 13
    assert composition["pool"]["share_correct"] == 4 / 13
    assert composition["selected"]["share_correct"] == 3 / 7
    parts = {part["teacher"]: part for part in composition["teachers"]}
    assert [parts[t]["selected"]["num_rows"] for t in "ab"] == [4, 3]
    assert parts["a"]["selected"]["share"] == 4 / 7
    assert parts["a"]["pool"]["num_rows"] == 6
    assert parts["a"]["selected"]["dataset_rsr"] == pytest.approx((1.1 + 1.3 + 1.5 + 1.7) / 4)


def test_shard_without_a_kept_row_is_there_and_empty(tmp_path, corpus):
    filtered(corpus, tmp_path / "out", "--keep-rows", 1)
    empty = pq.read_table(tmp_path / "out" / "2.parquet")
    assert empty.num_rows == 0
    assert empty.schema.equals(pq.read_schema(corpus / "2.parquet"), check_metadata=True)


def test_where_sees_the_whole_table(tmp_path, corpus):
    condition = "correct AND rsr_num_tokens <= AVG(rsr_num_tokens) + 1 AND id > MIN(id)"
    _, kept = filtered(corpus, tmp_path / "out", "--where", condition)
    assert kept == [3, 6, 12]


def test_another_rank_clip_ranks_by_its_sums_and_leaves_the_columns_alone(tmp_path, corpus):
    _, kept = filtered(corpus, tmp_path / "out", "--max-rsr", "0.56", "--rank-clip", "50")
    assert kept == [0, 1]
    written = pq.read_table(tmp_path / "out" / "0.parquet")
    assert written.equals(pq.read_table(corpus / "0.parquet").slice(0, 2))


def test_ties_follow_the_id_column_or_else_the_position(tmp_path, write_scored):
    columns = {"id": ["b", "a", "c"], "other": [3, 2, 1]}
    path = write_scored(tmp_path / "x.parquet", [1.0, 1.0, 1.0], columns=columns)
    told, kept = filtered(path, tmp_path / "by_id", "--keep-rows", 1)
    assert (told["ties_by"], kept) == ("id", ["a"])
    _, kept = filtered(path, tmp_path / "by_other", "--keep-rows", 1, "--id-column", "other")
    assert kept == ["c"]
    plain = write_scored(tmp_path / "y.parquet", [1.0, 1.0], columns={"id": [[1], [0]]})
    told, kept = filtered(plain, tmp_path / "by_position", "--keep-rows", 1)
    assert (told["ties_by"], kept) == ("position", [[1]])


def test_duplicate_ids_are_kept_apart_by_position(tmp_path, write_scored):
    columns = {"id": ["a", "a", "a"], "n": [0, 1, 2]}
    path = write_scored(tmp_path / "x.parquet", [2.0, 1.0, 1.0], columns=columns)
    filtered(path, tmp_path / "out", "--keep-rows", 1)
    assert pq.read_table(tmp_path / "out")["n"].to_pylist() == [1]


ODD_COLUMNS = {
    "id": pa.array(["a", "b", "c", "d"]),
    "fixed": pa.array([b"ab", None, b"cd", b"ef"], pa.binary(2)),
    "wide": pa.array([decimal.Decimal("1.23"), None, None, None], pa.decimal256(60, 2)),
    "category": pa.array(["x", None, "y", "x"]).dictionary_encode(),
    "zoned": pa.array([datetime.datetime(2024, 5, 1)] * 4, pa.timestamp("us", "Asia/Tokyo")),
    "clock": pa.array([1, None, 2, 3], pa.time32("ms")),
    "map": pa.array([[("k", 1)], None, [], [("l", None)]], pa.map_(pa.string(), pa.int32())),
    "pair": pa.array([[1, 2], None, [3, 4], [5, 6]], pa.list_(pa.int16(), 2)),
    "nested": pa.array([{"a": [None, {"b": 1}]}, None, {"a": []}, {"a": None}]),
    "half": pa.array(np.array([1.5, np.nan, -0.0, 2], np.float16)),
    "nothing": pa.nulls(4),
    "view": pa.array(["a", None, "a string that is too long to be inlined", "d"], pa.string_view()),
    "messages": pa.array([[{"role": "user", "content": "q"}], None, [], []]),
}


@pytest.mark.parametrize("row_group_size", [1, 3, 100])
def test_columns_of_any_type_leave_as_they_came(tmp_path, write_scored, row_group_size):
    columns = pa.table(ODD_COLUMNS)
    path = write_scored(
        tmp_path / "x.parquet",
        [1.0, 9.0, 2.0, 3.0],
        columns=dict(zip(columns.column_names, columns.columns, strict=True)),
        row_group_size=row_group_size,
        compression="zstd",
    )
    filtered(path, tmp_path / "out", "--max-rsr", 2.0)
    before, after = pq.ParquetFile(path), pq.ParquetFile(tmp_path / "out" / "x.parquet")
    assert after.schema_arrow.equals(before.schema_arrow, check_metadata=True)
    assert after.read().to_pylist() == [before.read().to_pylist()[n] for n in (0, 2)]
    assert after.metadata.row_group(0).column(0).compression == "ZSTD"


def test_repeating_strings_leave_as_they_came(tmp_path, write_scored):
    """They are read as dictionaries, the first row group's as they are stored, the second's not."""
    num_each = 1500
    teachers = [["a", None, ""][i % 3] for i in range(num_each)]
    distinct = [f"only {i}" for i in range(num_each)]
    columns = pa.table(
        {
            "id": range(2 * num_each),
            "teacher": teachers + distinct,
            "bytes": pa.array([t and t.encode() for t in teachers] + [None] * num_each),
            "large": pa.array(teachers * 2, pa.large_string()),
            "a.b": teachers * 2,
            "a": [{"b": t} for t in teachers * 2],
        }
    )
    path = write_scored(
        tmp_path / "x.parquet",
        [float(1 + i % 7) for i in range(2 * num_each)],
        columns=dict(zip(columns.column_names, columns.columns, strict=True)),
        row_group_size=num_each,
    )
    filtered(path, tmp_path / "out", "--max-rsr", 2.0)
    before, after = pq.read_table(path), pq.read_table(tmp_path / "out" / "x.parquet")
    assert after.schema.equals(before.schema, check_metadata=True)
    assert after.equals(before.filter(pc.less_equal(before["rsr"], 2.0)))


class StoppedAt(StopRequest):
    """Asks to stop at the n-th look."""

    looks_left = 10**9

    def check(self) -> None:
        StoppedAt.looks_left -= 1
        if StoppedAt.looks_left <= 0:
            raise Interrupted


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.parquet"))}


def test_interrupted_run_goes_on_and_ends_the_same(tmp_path, corpus, monkeypatch):
    filtered(corpus, tmp_path / "whole", "--keep-fraction", "0.5")
    monkeypatch.setattr("rsr.jobs.command.StopRequest", StoppedAt)
    monkeypatch.setattr("rsr.jobs.selection.subset.MAX_COPIES_AT_A_TIME", 1)
    out = tmp_path / "out"
    StoppedAt.looks_left = 3
    result = run(corpus, out, "--keep-fraction", "0.5")
    assert result.exit_code == 75
    assert "goes on from here" in result.stderr
    first = contents(out)
    assert "0.parquet" in first
    assert "1.parquet" not in first
    assert not list(out.rglob("*.rsr-tmp"))
    written_ns = {name: (out / name).stat().st_mtime_ns for name in first}
    StoppedAt.looks_left = 10**9
    filtered(corpus, out, "--keep-fraction", "0.5")
    assert contents(out) == contents(tmp_path / "whole")
    assert all((out / name).stat().st_mtime_ns == ns for name, ns in written_ns.items())


def test_interrupted_before_the_first_row_leaves_nothing(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr("rsr.jobs.command.StopRequest", StoppedAt)
    StoppedAt.looks_left = 1
    assert run(corpus, tmp_path / "out", "--keep-rows", 1).exit_code == 75
    assert not (tmp_path / "out").exists()


def test_other_settings_are_refused_unless_overwritten(tmp_path, corpus):
    out = tmp_path / "out"
    _, before = filtered(corpus, out, "--keep-rows", 2)
    result = run(corpus, out, "--keep-rows", 3)
    assert result.exit_code == 2
    assert "keep_rows was 2 and is now 3" in result.stderr
    assert filtered(corpus, out, "--keep-rows", 2)[1] == before
    assert len(filtered(corpus, out, "--keep-rows", 3, "--overwrite")[1]) == 3


def test_changed_input_is_refused(tmp_path, corpus):
    filtered(corpus, tmp_path / "out", "--keep-rows", 2)
    (corpus / "2.parquet").unlink()
    result = run(corpus, tmp_path / "out", "--keep-rows", 2)
    assert result.exit_code == 2
    assert "gone: 2.parquet" in result.stderr


def test_another_commands_output_is_refused_even_to_overwrite(tmp_path, corpus):
    out = tmp_path / "out"
    filtered(corpus, out, "--keep-rows", 2)
    options = ["select", str(corpus), str(out), "--group-by", "teacher", "--overwrite"]
    result = CliRunner().invoke(main, options)
    assert result.exit_code == 2
    assert "holds what rsr filter wrote" in result.stderr
    manifest = out / ".rsr" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"writer": "filter"', '"writer": "score"'))
    result = run(corpus, out, "--keep-rows", 2, "--overwrite")
    assert "holds what rsr score wrote" in result.stderr


def test_damaged_shard_is_listed_and_the_others_are_written(tmp_path, write_scored):
    for name in ("a", "b"):
        columns = {"id": [name], "text": ["some text of many words " * 400]}
        write_scored(tmp_path / "in" / f"{name}.parquet", [1.0], columns=columns, compression=None)
    damaged = bytearray((tmp_path / "in" / "a.parquet").read_bytes())
    place = bytes(damaged).index(b"some text") - 30
    damaged[place : place + 30] = b"\xff" * 30
    (tmp_path / "in" / "a.parquet").write_bytes(damaged)
    result = run(tmp_path / "in", tmp_path / "out", "--keep-fraction", "1", "--json")
    assert result.exit_code == 1
    assert result.stderr.startswith("rsr: failed: a.parquet: ")
    assert pq.read_table(tmp_path / "out" / "b.parquet")["id"].to_pylist() == ["b"]
    assert not (tmp_path / "out" / "a.parquet").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to filter by"),
        (["--within", "teacher"], "--within says where"),
        (["--max-rsr", "0.5"], "stays within --max-rsr 0.5: there is nothing to write"),
        (["--keep-fraction", "0.01"], "stays within --keep-fraction 1/100"),
        (["--min-tokens", "11"], "none of the 13 scored rows"),
        (["--keep-rows", "1", "--within", "tutor"], "no column 'tutor'; it has: id, teacher"),
        (["--keep-rows", "1", "--id-column", "nr"], "no column 'nr'"),
        (["--keep-rows", "1", "--teacher-column", "tutor"], "no column 'tutor'"),
        (["--keep-rows", "1", "--correct-column", "teacher"], "expected Boolean"),
        (["--keep-rows", "1", "--within", "rsr_rank_sums"], "rows of it form no groups"),
        (["--keep-rows", "1", "--id-column", "rsr_rank_sums"], "ids must have an order"),
        (["--where", "id >"], "--where 'id >'"),
        (["--where", "nr > 1"], "columns: id, teacher, correct, rsr"),
        (["--where", "id + 1"], "expected a condition"),
    ],
)
def test_what_cannot_be_done_is_refused(tmp_path, corpus, options, message):
    assert_refused(run(corpus, tmp_path / "out", *options), message, tmp_path / "out")


@pytest.mark.parametrize("fraction", ["0", "1.1", "-1", "half", "1/0"])
def test_keep_fraction_out_of_range(tmp_path, corpus, fraction):
    result = run(corpus, tmp_path / "out", f"--keep-fraction={fraction}")
    assert result.exit_code == 2
    assert "expected a fraction above 0 and up to 1" in result.stderr


def test_input_without_any_score(tmp_path, write_scored):
    path = write_scored(tmp_path / "x.parquet", [None, NAN], columns={"id": [1, 2]})
    result = run(path, tmp_path / "out", "--keep-rows", 1)
    assert_refused(result, "none of the 2 rows", tmp_path / "out")


def test_output_inside_input_or_over_it(tmp_path, corpus):
    result = run(corpus, corpus / "out", "--keep-rows", 1)
    assert_refused(result, "lies inside INPUT", corpus / "out")
    result = run(corpus / "0.parquet", corpus, "--keep-rows", 1)
    assert result.exit_code == 2
    assert "would overwrite its own input" in result.stderr
