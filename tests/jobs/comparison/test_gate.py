"""`rsr compare --gate`: what passes, what comes in its place; a run like any other."""

import json

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from rsr.jobs.cli import main
from rsr.jobs.storage import open_storage

WORDS = np.arange(1_000)


def run(*arguments, exit_code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == exit_code, result.output + result.stderr
    return result


def trace(make_trace, number, ids, surprisals, **beside):
    return make_trace(f"problem {number}", ids, np.ones(len(ids), int), surprisals, beside)


@pytest.fixture(scope="module")
def streams(tmp_path_factory, write_stream, make_trace):
    """Eight rows: repaired in one place, written anew, wrong, of unknown grade, without a score."""
    native, refined = [], []
    for number in range(8):
        ids = WORDS[number * 20 : number * 20 + 20]
        native.append(
            trace(
                make_trace,
                number,
                [] if number == 6 else ids,
                np.full(0 if number == 6 else 20, 0.5),
                id=f"n{number}",
                messages=f"native text {number}",
                correct=number % 2 == 0,
                source=f"web {number}",
            )
        )
        repaired = np.concatenate([ids[:9], [2_000 + number], ids[10:]])
        versions = {
            1: (3_000 + ids, np.full(20, 0.2)),
            5: (np.array([], int), np.array([])),
            7: (repaired, np.full(20, 1.2)),
        }
        tokens, surprisals = versions.get(number, (repaired, np.full(20, 0.4)))
        refined.append(
            trace(
                make_trace,
                number,
                tokens,
                surprisals,
                id=f"n{number}",
                parent_id=f"n{number}",
                messages=f"refined text {number}",
                correct={2: False, 3: None}.get(number, True),
                grade_status={2: "wrong", 3: "timeout"}.get(number, "correct"),
                refine_status="refined",
            )
        )
    folder = tmp_path_factory.mktemp("gate")
    write_stream(folder / "native" / "a.parquet", native)
    write_stream(folder / "refined" / "a.parquet", refined[:5][::-1])
    write_stream(folder / "refined" / "b.parquet", refined[5:])
    return folder


def gate(streams, output, *more, exit_code=0):
    paths = (streams / "native", streams / "refined")
    return run("compare", *paths, "--gate", output, *more, exit_code=exit_code)


EXPECTED = {
    "n0": "refined",
    "n1": "drifted",
    "n2": "not_correct",
    "n3": "not_correct",
    "n4": "refined",
    "n5": "no_score",
    "n6": "no_score",
    "n7": "drifted",
}


def test_refined_rows_pass_or_native_ones_take_their_place(streams, tmp_path):
    told = json.loads(gate(streams, tmp_path / "out", "--json").stdout)
    rows = pl.concat(
        [pl.read_parquet(tmp_path / "out" / name) for name in ("a.parquet", "b.parquet")]
    )
    assert rows["id"].to_list() == ["n4", "n3", "n2", "n1", "n0", "n5", "n6", "n7"]
    assert dict(rows.select("id", "gate_status").iter_rows()) == EXPECTED
    native = {row["id"]: row for row in pq.read_table(streams / "native").to_pylist()}
    refined = {row["id"]: row for row in pq.read_table(streams / "refined").to_pylist()}
    for row in pq.read_table(tmp_path / "out").to_pylist():
        source = refined if row["gate_status"] == "refined" else native
        for name, value in row.items():
            if name in ("parent_id", "refine_status"):
                assert value == refined[row["id"]][name]
            elif name == "grade_status":
                assert value == ("correct" if row["gate_status"] == "refined" else None)
            elif not name.startswith("gate_"):
                assert value == source[row["id"]][name], (row["id"], name)
        assert (row["gate_detail"] is None) == (row["gate_status"] == "refined")
    assert told["rows_by_status"] == {"refined": 2, "drifted": 2, "not_correct": 2, "no_score": 2}


def test_drift_is_edit_share_and_rise_of_surprisal(streams, tmp_path):
    """One of 20 tokens is another: a share of 0.05, to which costlier tokens add 0.7 nats."""
    gate(streams, tmp_path / "out")
    rows = pl.read_parquet(tmp_path / "out" / "*.parquet")
    drifts = dict(rows.select("id", "gate_drift").iter_rows())
    expected = {"n0": 0.05, "n1": 1.0, "n2": 0.05, "n7": 0.05 + 0.7, "n5": None, "n6": None}
    for row, drift in expected.items():
        assert drifts[row] == (None if drift is None else pytest.approx(drift, abs=1e-6)), row
    gate(streams, tmp_path / "wide", "--max-drift", "0.8")
    wide = pl.read_parquet(tmp_path / "wide" / "*.parquet")
    assert dict(wide.select("id", "gate_status").iter_rows())["n7"] == "refined"


@pytest.mark.seconds
def test_gated_stream_is_a_run_that_scores_and_selections_know(streams, tmp_path):
    gate(streams, tmp_path / "out")
    assert "whole, in order" in run("verify", "--deep", tmp_path / "out").stdout
    status = json.loads(run("status", tmp_path / "out", "--json").stdout)
    assert (status["writer"], status["num_rows_done"]) == ("compare", 8)
    before = (tmp_path / "out" / "a.parquet").stat().st_mtime_ns
    gate(streams, tmp_path / "out")
    assert (tmp_path / "out" / "a.parquet").stat().st_mtime_ns == before
    refused = gate(streams, tmp_path / "out", "--max-drift", "0.1", exit_code=2)
    assert "max_drift was 0.4 and is now 0.1" in refused.stderr
    gate(streams, tmp_path / "out", "--max-drift", "0.1", "--overwrite")
    chosen = ("--group-by", "problem_id", "--require", "correct")
    run("select", tmp_path / "out", tmp_path / "kept", *chosen)
    assert set(pl.read_parquet(tmp_path / "kept" / "*.parquet")["correct"]) == {True}
    run("compare", streams / "native", tmp_path / "out", "--draws", "20")


def test_refined_row_that_was_touched_is_found(streams, tmp_path):
    gate(streams, tmp_path / "out")
    (tmp_path / "moved").mkdir()
    for name in ("a.parquet", "b.parquet"):
        rows = pq.read_table(streams / "refined" / name)
        place = rows.column_names.index("messages")
        other = pa.array([f"{text}!" for text in rows["messages"].to_pylist()])
        pq.write_table(rows.set_column(place, "messages", other), tmp_path / "moved" / name)
    found = run("verify", "--deep", "--input", tmp_path / "moved", tmp_path / "out", exit_code=1)
    assert "column 'messages' differs in refined rows 0 to 4" in found.stdout


@pytest.mark.slow
def test_store_holds_streams_and_output(streams, tmp_path, s3_url):
    store = open_storage(s3_url)
    for file in streams.rglob("*.parquet"):
        store.write(file.relative_to(streams).as_posix(), file.read_bytes())
    paths = (f"{s3_url}/native", f"{s3_url}/refined")
    run("compare", *paths, "--gate", f"{s3_url}/out")
    gate(streams, tmp_path / "out")
    stored = pq.read_table(pa.BufferReader(store.read("out/a.parquet")))
    here = pq.read_table(tmp_path / "out" / "a.parquet")
    assert stored.to_pylist() == here.to_pylist()


def test_what_cannot_be_gated_is_refused_and_nothing_written(
    tmp_path, write_stream, make_trace, streams
):
    ids, nats = WORDS[:4], np.full(4, 0.5)

    def stream(name, *, token_columns=True, **beside):
        rows = [trace(make_trace, 0, ids, nats, **beside)]
        return write_stream(tmp_path / name, rows, token_columns=token_columns)

    native = stream("native.parquet", id="n0", messages="text")
    ungraded = stream("ungraded.parquet", parent_id="n0", messages="text")
    bare = stream("bare.parquet", token_columns=False, correct=True)
    stranger = stream("stranger.parquet", parent_id="n9", correct=True)
    numbers = stream("numbers.parquet", parent_id="n0", correct=1.0)
    for refined, more, reason in [
        (ungraded, (), "no column 'correct'"),
        (bare, (), "bare.parquet has no token columns"),
        (stranger, (), "1 of 1 rows of"),
        (numbers, (), "holds no grades"),
        (ungraded, (stranger,), "takes NATIVE and one REFINED; found 3"),
    ]:
        arguments = ("compare", native, refined, *more, "--gate", tmp_path / "out")
        refused = run(*arguments, exit_code=2)
        assert reason in refused.stderr, refused.stderr
        assert not (tmp_path / "out").exists()
