"""A run over lists of responses: the whole way, resumed, verified, and as if they had been rows."""

import json
import re
import shutil

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typed import rsr

from rsr.jobs.shards.staging import is_staged_from, stage
from rsr.jobs.storage import locate

ROWS = [
    {
        "problem": f"What is {i} + 1?",
        "generations": None if i == 5 else [f"It is {i + 1}.", f"Well: {i + 1}", ""][: i % 4],
        "correct": None if i == 5 else [True, False, None][: i % 4],
        "id": i,
    }
    for i in range(40)
]
OPTIONS = ["--prompt-column", "problem", "--explode-responses", "generations"]
NAMES = ["id", "generations", "correct", "source_row", "response_index"]
SIBLING = ["--explode-column", "correct"]


def expected_rows() -> list[tuple[object, ...]]:
    return [
        (row["id"], response, is_correct, row["id"], index)
        for row in ROWS
        for index, response, is_correct in (
            [
                (i, r, c)
                for i, (r, c) in enumerate(zip(row["generations"], row["correct"], strict=True))
            ]
            if row["generations"]
            else [(None, None, None)]
        )
    ]


@pytest.fixture(scope="module")
def exploded_run(tmp_path_factory, tiny_student):
    """The run; and the same responses as a row each, scored as such by the same command."""
    root = tmp_path_factory.mktemp("exploded")
    source = root / "in" / "a.parquet"
    source.parent.mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), source, row_group_size=7)
    command = ("score", source, root / "out", "--model", tiny_student, *OPTIONS, *SIBLING)
    done = rsr(*command, "--json")
    return root, command, json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.ray
def test_every_response_is_scored_once_with_its_row_and_index(exploded_run):
    root, _, summary = exploded_run
    frame = pl.read_parquet(root / "out" / "a.parquet")
    assert frame.select(NAMES).rows() == expected_rows()
    answered = [bool(row[1]) for row in expected_rows()]
    assert (frame["rsr"].is_not_null()).to_list() == answered
    assert summary["rows_by_status"] == {
        "no_response": answered.count(False),
        "ok": answered.count(True),
    }


@pytest.mark.vllm
@pytest.mark.ray
@pytest.mark.slow
def test_lost_output_is_written_again_and_verified(exploded_run, tiny_student):
    root, command, _ = exploded_run
    before = pl.read_parquet(root / "out" / "a.parquet")
    rsr("verify", root / "out", "--deep")
    (root / "out" / "a.parquet").unlink()
    shutil.rmtree(root / "out" / ".rsr" / "staged")
    rsr(*command)
    again = pl.read_parquet(root / "out" / "a.parquet")
    assert again.equals(before)
    rsr("verify", root / "out", "--deep")
    other = rsr(*[word for word in command if word not in SIBLING], exit_code=2)
    assert "exploded was ['generations', 'correct'] and is now ['generations']" in other.stderr
    changed = [*ROWS[:-1], ROWS[-1] | {"generations": ["x"], "correct": [None]}]
    pq.write_table(pa.Table.from_pylist(changed), root / "in" / "a.parquet", row_group_size=7)
    checked = rsr("verify", root / "out", "--deep", exit_code=1)
    assert "has changed since the run began" in checked.stdout
    refused = rsr(*command, exit_code=2)
    assert "input shards changed: a.parquet" in refused.stderr


def test_options_that_do_not_go_together_are_refused(tmp_path, tiny_student):
    source = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), source)
    for options, told in (
        (SIBLING, "--explode-column correct goes with --explode-responses COLUMN"),
        ([*OPTIONS, "--response-column", "id"], "'id' is named for them too: leave that out"),
        (["--explode-responses", "answers"], "no column 'answers'; it has: problem, gen"),
        ([*OPTIONS, "--explode-column", "id"], "column 'id' of .* is int64; expected lists"),
    ):
        typed = ["score", source, tmp_path / "out", "--model", tiny_student, *options]
        result = rsr(*typed, exit_code=2)
        (line,) = result.stderr.strip().splitlines()
        assert re.search(told, line)
        assert not (tmp_path / "out").exists()


def test_lists_of_an_object_store_become_rows_there(s3_url, tmp_path):
    source = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), source)
    storage, name = locate(f"{s3_url}/a.parquet")
    storage.write(name, source.read_bytes())
    stage(f"{s3_url}/a.parquet", f"{s3_url}/out/a.parquet", ["generations", "correct"])
    assert is_staged_from(f"{s3_url}/out/a.parquet", f"{s3_url}/a.parquet")
    storage, name = locate(f"{s3_url}/out/a.parquet")
    table = pq.read_table(pa.BufferReader(storage.read(name))).select(NAMES)
    assert [tuple(row.values()) for row in table.to_pylist()] == expected_rows()
