"""Kept rows of many files in files of so many rows, or in one file: the same rows, in order."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from rsr.jobs.cli import main
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.run.calls import CallsHere
from rsr.jobs.selection.filter import FilterOptions
from rsr.jobs.selection.filter_in_passes import run_filter_in_passes
from rsr.jobs.selection.layout import Slice, files_of_rows
from rsr.jobs.selection.select import SelectOptions
from rsr.jobs.selection.select_in_passes import run_select_in_passes
from rsr.jobs.shards.scored import ScoredTable
from rsr.jobs.shards.shard import Shard

FILTER = ("filter", "--keep-rows", "20")
SELECT = ("select", "--group-by", "problem_id", "--keep", "2")
COMMANDS = pytest.mark.parametrize("command", [FILTER, SELECT], ids=["filter", "select"])


@pytest.fixture
def scored(tmp_path, write_scored) -> Path:
    rng = np.random.default_rng(3)
    for number in range(5):
        columns = {
            "id": [f"{number}-{row}" for row in range(12)],
            "problem_id": rng.integers(0, 9, 12),
            "teacher": rng.choice(["a", "b"], 12),
        }
        # Of the fourth file nothing is kept.
        rsr = rng.uniform(100, 200, 12) if number == 3 else rng.uniform(1, 9, 12)
        write_scored(tmp_path / "in" / "deep" / f"{number}.parquet", rsr, columns=columns)
    return tmp_path / "in"


def rsr(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def run(command: tuple[str, ...], *places: object, more: tuple[str, ...] = ()) -> None:
    done = rsr(command[0], *places, *command[1:], *more)
    assert done.exit_code == 0, done.output


def rows_of(folder: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted(folder.rglob("*.parquet")))


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.parquet"))


def told_of(output: Path) -> dict:
    """The result, without where it is; sums over other files may differ in the last bit."""
    text = (output / ".rsr" / "composition.json").read_text()
    return json.loads(text, parse_float=lambda number: f"{float(number):.12g}") | {"output": ""}


@pytest.mark.seconds
@COMMANDS
@pytest.mark.parametrize("num_rows", [1, 7, 1000])
def test_files_of_so_many_rows_hold_the_rows_of_the_usual_ones(scored, tmp_path, command, num_rows):
    out, usual = tmp_path / "out", tmp_path / "usual"
    run(command, scored, usual)
    run(command, scored, out, more=("--rows-per-file", str(num_rows)))
    expected = rows_of(usual / "deep")
    assert rows_of(out).equals(expected)
    sizes = [pq.read_metadata(out / name).num_rows for name in names_in(out)]
    assert all(size == num_rows for size in sizes[:-1])
    assert len(sizes) == -(-len(expected) // num_rows)
    assert names_in(out)[0] == "part-00000.parquet"
    assert told_of(out) == told_of(usual)
    looked = rsr("verify", out, "--deep")
    assert looked.exit_code == 0, looked.output
    scored.rename(tmp_path / "moved")
    assert rsr("verify", out, "--deep", "--input", tmp_path / "moved").exit_code == 0


@pytest.mark.seconds
@COMMANDS
@pytest.mark.parametrize("num_rows", [None, 7])
def test_calls_write_the_same_files(scored, tmp_path, command, num_rows):
    out, passes = tmp_path / "out", tmp_path / "passes"
    more = () if num_rows is None else ("--rows-per-file", str(num_rows))
    run(command, scored, out, more=more)
    common = {"input": str(scored), "output": passes, "rows_per_file": num_rows}
    if command is FILTER:
        run_filter_in_passes(FilterOptions(keep_rows=20, **common), CallsHere(), StopRequest())
    else:
        options = SelectOptions(group_by="problem_id", keep=2, **common)
        run_select_in_passes(options, CallsHere(), StopRequest())
    files = [p.relative_to(out) for p in out.rglob("*") if p.suffix in (".parquet", ".rows")]
    assert len(files) >= 6
    for file in files:
        assert (passes / file).read_bytes() == (out / file).read_bytes()


@pytest.mark.seconds
@COMMANDS
@pytest.mark.parametrize("name", ["best.parquet", "best.jsonl"])
def test_many_files_become_one_where_output_is_one(scored, tmp_path, command, name):
    out, usual = tmp_path / name, tmp_path / "usual"
    run(command, scored, usual)
    run(command, scored, out)
    expected = rows_of(usual / "deep")
    if name.endswith(".jsonl"):
        assert [json.loads(line) for line in out.open()] == expected.to_pylist()
    else:
        assert pq.read_table(out).equals(expected)
    assert rsr("verify", out, "--deep").exit_code == 0
    before = out.stat().st_mtime_ns
    run(command, scored, out)
    assert out.stat().st_mtime_ns == before
    run(("filter", "--keep-rows", "1"), out, tmp_path / "one.parquet")
    assert rsr("verify", tmp_path / "one.parquet", "--deep", "--input", out).exit_code == 0


def test_a_lost_or_damaged_file_alone_is_written_again(scored, tmp_path):
    out, more = tmp_path / "out", ("--rows-per-file", "6")
    run(FILTER, scored, out, more=more)
    before = {name: (out / name).read_bytes() for name in names_in(out)}
    lost, torn, *others = names_in(out)
    times = [(out / name).stat().st_mtime_ns for name in others]
    (out / lost).unlink()
    (out / torn).write_bytes(before[torn][:-1])
    assert rsr("verify", out).exit_code == 1
    run(FILTER, scored, out, more=more)
    assert {name: (out / name).read_bytes() for name in names_in(out)} == before
    assert [(out / name).stat().st_mtime_ns for name in others] == times


@pytest.mark.seconds
def test_another_number_of_rows_or_another_input_is_another_run(scored, tmp_path, write_scored):
    out = tmp_path / "out"
    run(FILTER, scored, out, more=("--rows-per-file", "6"))
    for more in ((), ("--rows-per-file", "7")):
        refused = rsr(FILTER[0], scored, out, *FILTER[1:], *more)
        assert refused.exit_code == 2
        assert "holds a run with other settings: rows_per_file was 6" in refused.stderr
    columns = {"id": ["x"] * 12, "problem_id": np.zeros(12, int), "teacher": ["a"] * 12}
    write_scored(scored / "deep" / "2.parquet", [1.0] * 12, columns=columns)
    refused = rsr(FILTER[0], scored, out, *FILTER[1:], "--rows-per-file", "6")
    assert refused.exit_code == 2
    assert "input shards changed" in refused.stderr
    assert rsr("verify", out).exit_code == 0
    looked = rsr("verify", out, "--deep")
    assert looked.exit_code == 1
    assert "its input has changed since the run began" in looked.stdout.replace("\n", " ")
    run(FILTER, scored, out, more=("--rows-per-file", "7", "--overwrite"))
    assert len(names_in(out)) == 3


def test_verify_finds_rows_that_stand_in_another_order(scored, tmp_path):
    """As a mistake of the program itself would leave them: with a receipt of these very bytes."""
    out = tmp_path / "out"
    run(FILTER, scored, out, more=("--rows-per-file", "6"))
    kept = out / ".rsr" / "kept" / "part-00001.parquet.rows"
    lines = kept.read_text().splitlines()
    assert len(lines) > 1
    kept.write_text("\n".join(reversed(lines)) + "\n")
    assert rsr("verify", out).exit_code == 0
    looked = rsr("verify", out, "--deep")
    assert looked.exit_code == 1
    assert "differs in rows" in looked.stdout.replace("\n", " ")
    kept.write_text(lines[0][:-9] + "\n")
    assert "cannot be read" in rsr("verify", out).stdout.replace("\n", " ")


def test_files_of_runs_that_differ_are_not_joined(scored, tmp_path, write_scored):
    columns = {"id": ["x"] * 12, "problem_id": np.zeros(12, int), "teacher": ["a"] * 12}
    other = {"settings": {"model": "m", "rank_clip": 100}, "versions": {"vllm": "another"}}
    write_scored(scored / "deep" / "9.parquet", [1.0] * 12, columns=columns, identity=other)
    for out, more in ((tmp_path / "one.parquet", ()), (tmp_path / "o", ("--rows-per-file", "6"))):
        refused = rsr(FILTER[0], scored, out, *FILTER[1:], *more, "--allow-mixed-students")
        assert refused.exit_code == 2
        assert "cannot be joined" in refused.stderr.replace("\n", " ")
        assert not out.exists()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any), st.integers(1, 30))
def test_slices_cover_the_kept_rows_once_and_in_order(num_kept, rows_per_file):
    shards = tuple(Shard(f"{n}", f"{n}.parquet", 9, 1, f"f{n}") for n in range(len(num_kept)))
    table = ScoredTable("in", shards, pa.schema([]), ())
    files = files_of_rows(table, num_kept, rows_per_file, "/in")
    assert [file.shard.num_rows for file in files[:-1]] == [rows_per_file] * (len(files) - 1)
    assert 0 < files[-1].shard.num_rows <= rows_per_file
    slices = [piece for file in files for piece in file.slices]
    rows = [(piece.shard.name, row) for piece in slices for row in range(piece.start, piece.stop)]
    assert rows == [
        (shard.name, row)
        for shard, kept in zip(shards, num_kept, strict=True)
        for row in range(kept)
    ]
    for file in files:
        assert sum(piece.stop - piece.start for piece in file.slices) == file.shard.num_rows
        assert all(a.shard != b.shard for a, b in pairwise(file.slices))


@given(st.lists(st.booleans(), max_size=20), st.integers(0, 20), st.integers(0, 20))
def test_a_slice_is_of_the_kept_rows(kept, start, stop):
    shard = Shard("x", "x.parquet", len(kept), 1, "f")
    mask = Slice(shard, start, stop).within(np.array(kept, bool))
    assert np.flatnonzero(mask).tolist() == np.flatnonzero(kept)[start:stop].tolist()
