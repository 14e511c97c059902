"""OUTPUT called `x.jsonl` is the rows as JSON lines, made of a Parquet file hidden beside it."""

import json
import math
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from rsr.jobs.cli import main
from rsr.jobs.errors import UsageError
from rsr.jobs.shards.lines_file import lines_of, require_json_types
from rsr.jobs.storage import open_storage

FILTER = ("filter", "--keep-rows", "2")


@pytest.fixture
def scored(tmp_path, write_scored):
    columns = {
        "problem_id": [0, 0, 1, 1],
        "teacher": ["a", "b"] * 2,
        "messages": [[{"role": "user", "content": "Wie heißt \u2028 das?"}]] * 4,
    }
    path = tmp_path / "in" / "scored.parquet"
    path.parent.mkdir()
    return write_scored(path, [1.0, 2.0, 2.1, None], columns=columns)


def rsr(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def run(command: tuple[str, ...], *places: object, more: tuple[str, ...] = ()) -> Result:
    done = rsr(command[0], *places, *command[1:], *more)
    assert done.exit_code == 0, done.output
    return done


def rows_in(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.mark.parametrize("command", [FILTER, ("select", "--group-by", "problem_id")])
def test_the_lines_are_the_rows_of_the_parquet_file(scored, tmp_path, command):
    out, folder = tmp_path / "out" / "best.jsonl", tmp_path / "folder"
    assert f"{out}\n" in run(command, scored, out).stdout.replace(" ", "")
    run(command, scored, folder)
    written = pq.read_table(folder / "scored.parquet")
    assert rows_in(out) == written.to_pylist()
    assert "\\u" not in out.read_text()
    assert sorted(path.name for path in out.parent.iterdir()) == [".best.jsonl.rsr", "best.jsonl"]
    looked = rsr("verify", out, "--deep")
    assert looked.exit_code == 0, looked.output
    assert "finished" in rsr("status", out).stdout


def test_what_reads_scores_reads_them_as_they_were_written(scored, tmp_path):
    run(("filter", "--keep-rows", "3"), scored, tmp_path / "three.jsonl")
    run(FILTER, tmp_path / "three.jsonl", tmp_path / "two.parquet")
    run(FILTER, scored, tmp_path / "direct.parquet")
    read = [pq.read_table(tmp_path / f"{name}.parquet") for name in ("two", "direct")]
    assert read[0].equals(read[1], check_metadata=True)
    assert rsr("teachers", tmp_path / "three.jsonl").exit_code == 0
    assert rsr("verify", tmp_path / "two.parquet", "--deep").exit_code == 0


def test_lines_that_somebody_has_changed_are_not_taken_for_the_rows(scored, tmp_path):
    out = tmp_path / "best.jsonl"
    run(FILTER, scored, out)
    before = out.read_bytes()
    out.write_bytes(before.replace(b'"teacher": "a"', b'"teacher": "z"'))
    refused = rsr("filter", out, tmp_path / "fewer", "--keep-rows", "1")
    assert refused.exit_code == 2
    assert "is not as rsr wrote it" in refused.stderr.replace("\n", " ")
    looked = rsr("verify", out)
    assert looked.exit_code == 1
    assert "its lines are not those that were written" in looked.stdout.replace("\n", " ")
    run(FILTER, scored, out)
    assert out.read_bytes() == before
    out.unlink()
    assert rsr("verify", out).exit_code == 1
    run(FILTER, scored, out)
    assert out.read_bytes() == before


def test_a_copy_elsewhere_is_known_by_what_is_in_it(scored, tmp_path):
    out = tmp_path / "best.jsonl"
    run(FILTER, scored, out)
    out.touch()
    before = out.stat().st_mtime_ns
    run(FILTER, scored, out)
    assert out.stat().st_mtime_ns == before
    (tmp_path / "alone.jsonl").write_bytes(out.read_bytes())
    refused = rsr("filter", tmp_path / "alone.jsonl", tmp_path / "fewer", "--keep-rows", "1")
    assert refused.exit_code == 2
    assert "a copy of scored rows as JSON lines" in refused.stderr.replace("\n", " ")


def test_other_settings_write_other_lines_when_asked(scored, tmp_path):
    out = tmp_path / "best.jsonl"
    run(FILTER, scored, out)
    other = ("filter", "--keep-rows", "3")
    assert rsr(other[0], scored, out, *other[1:]).exit_code == 2
    run(other, scored, out, more=("--overwrite",))
    assert len(rows_in(out)) == 3


def test_a_file_that_no_run_wrote_and_the_input_itself_are_never_touched(scored, tmp_path):
    mine = tmp_path / "mine.jsonl"
    mine.write_bytes(b"mine")
    for options in ([], ["--overwrite"]):
        refused = rsr("filter", scored, mine, "--keep-rows", "2", *options)
        assert refused.exit_code == 2
        assert "is a file that no run of rsr wrote" in refused.stderr
        assert mine.read_bytes() == b"mine"
        assert not (tmp_path / ".mine.jsonl.rsr").exists()
    out = tmp_path / "best.jsonl"
    run(FILTER, scored, out)
    before = out.read_bytes()
    for source in (out, tmp_path / ".best.jsonl.rsr" / "rows.parquet"):
        refused = rsr("filter", source, out, "--keep-rows", "1", "--overwrite")
        assert refused.exit_code == 2
        assert "would overwrite its own input" in refused.stderr.replace("\n", " ")
    assert out.read_bytes() == before


@pytest.mark.parametrize("command", [FILTER, ("grade", "--answer-column", "problem_id")])
def test_columns_without_a_form_in_json_are_refused_first(scored, tmp_path, command):
    table = pq.read_table(scored)
    image = pa.array([b"\xff"] * len(table))
    pq.write_table(table.append_column("image", image), scored)
    out = tmp_path / "best.jsonl"
    refused = rsr(command[0], scored, out, *command[1:])
    assert refused.exit_code == 2
    told = refused.stderr.replace("\n", " ")
    assert "column 'image' is binary, which JSON has no form for" in told
    assert "best.parquet" in told
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_json_lines_come_out_with_the_values_that_went_in(tmp_path):
    """Of a column of many types, too, which is staged as text."""
    rows = [
        {"prompt": "p", "response": "A: 1", "answer": "1", "meta": {"source": "x"}, "n": 1},
        {"prompt": "q", "response": "A: 2", "answer": "1", "meta": ["a", 1.5, None], "n": 2},
        {"prompt": "r", "response": "A: 3", "answer": "3", "meta": "x", "n": None},
    ]
    source, out = tmp_path / "rows.jsonl", tmp_path / "graded.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(("grade", "--answer-column", "answer", "--verifier", "exact"), source, out)
    written = rows_in(out)
    assert [{name: row[name] for name in rows[0]} for row in written] == rows
    assert all("correct" in row for row in written)
    assert rsr("verify", out, "--deep").exit_code == 0


def test_on_an_object_store_too(scored, s3_url, tmp_path):
    out = f"{s3_url}/deep/best.jsonl"
    run(FILTER, scored, out)
    run(FILTER, scored, tmp_path / "best.jsonl")
    storage = open_storage(s3_url)
    assert storage.read("deep/best.jsonl") == (tmp_path / "best.jsonl").read_bytes()
    others = {file.name for file in storage.list("deep")} - {"deep/best.jsonl"}
    assert all(name.startswith("deep/.best.jsonl.rsr/") for name in others)
    assert rsr("verify", out, "--deep").exit_code == 0
    run(("filter", "--keep-rows", "1"), out, f"{s3_url}/fewer.jsonl")
    assert len(storage.read("fewer.jsonl").splitlines()) == 1


KINDS = st.recursive(
    st.sampled_from([pa.int64(), pa.uint64(), pa.float32(), pa.float64(), pa.string(), pa.bool_()]),
    lambda kind: st.one_of(
        kind.map(pa.list_),
        kind.map(lambda of: pa.struct([("a", of), ("b", pa.string())])),
    ),
    max_leaves=4,
)


def values_of(kind: pa.DataType) -> st.SearchStrategy:
    if pa.types.is_list(kind):
        some = st.lists(values_of(kind.value_type), max_size=3)
    elif pa.types.is_struct(kind):
        some = st.fixed_dictionaries({field.name: values_of(field.type) for field in kind.fields})
    elif pa.types.is_floating(kind):
        some = st.floats(width=kind.bit_width)
    elif pa.types.is_integer(kind):
        low, high = (0, 2**64 - 1) if kind == pa.uint64() else (-(2**63), 2**63 - 1)
        some = st.integers(low, high)
    else:
        some = st.booleans() if pa.types.is_boolean(kind) else st.text(max_size=5)
    return st.none() | some


@st.composite
def columns(draw) -> tuple[pa.DataType, list]:
    kind = draw(KINDS)
    return kind, draw(st.lists(values_of(kind), min_size=1, max_size=5))


def as_json(value):
    """What JSON can say of a value."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [as_json(item) for item in value]
    return {k: as_json(v) for k, v in value.items()} if isinstance(value, dict) else value


@given(columns())
def test_any_value_that_json_has_a_form_for_comes_back(column):
    kind, values = column
    batch = pa.record_batch([pa.array(values, kind)], names=["ü"])
    require_json_types(batch.schema, "x.jsonl")
    lines = list(lines_of(batch))
    assert [line.count(b"\n") for line in lines] == [1] * len(values)
    assert [json.loads(line) for line in lines] == [{"ü": as_json(value)} for value in values]


def test_times_and_decimals_are_exact_text():
    nanoseconds = pa.array([1], pa.timestamp("ns", tz="UTC"))
    price = pl.Series(["1.10"]).cast(pl.Decimal(10, 2)).to_arrow()
    batch = pa.record_batch([nanoseconds, price], names=["at", "price"])
    assert list(lines_of(batch)) == [b'{"at": "1970-01-01 00:00:00.000000001Z", "price": "1.10"}\n']


@pytest.mark.parametrize(
    "schema",
    [
        pa.schema([("a", pa.duration("s"))]),
        pa.schema([("a", pa.map_(pa.string(), pa.int8()))]),
        pa.schema([("a", pa.list_(pa.binary()))]),
        pa.schema([("a", pa.string()), ("a", pa.string())]),
    ],
)
def test_types_that_json_has_no_form_for(schema):
    with pytest.raises(UsageError, match=r"column 'a' .*; name OUTPUT x\.parquet"):
        require_json_types(schema, "x.jsonl")
