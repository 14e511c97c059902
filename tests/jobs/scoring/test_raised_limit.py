"""A trial with --limit that goes on with more rows, in the same OUTPUT."""

import json
import os

import polars as pl
import pytest
from typed import rsr

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.slow]

NUM_ROWS, NUM_SHARDS = 30, 2


def chat(row: int) -> list[dict[str, str]]:
    question = {"role": "user", "content": f"What is {row} + {row}?"}
    return [question, {"role": "assistant", "content": f"It is {2 * row}. " * (1 + row % 7)}]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_student):
    """What each start says: 7 rows, 33 rows, too few, of a file written again, all; all at once.

    And what OUTPUT holds before and after the one of a file that was written again.
    """
    root = tmp_path_factory.mktemp("raised")
    (root / "in").mkdir()
    for shard in range(NUM_SHARDS):
        rows = [{"id": row, "messages": chat(row)} for row in range(NUM_ROWS * (shard + 1))]
        rows = rows[-NUM_ROWS:]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (root / "in" / f"{shard}.jsonl").write_text(lines)

    def score(output, *options, exit_code=0):
        options = ("--model", tiny_student, "--dtype", "float32", "--json", *options)
        return rsr("score", root / "in", root / output, *options, exit_code=exit_code)

    def of_a_file_written_again():
        first = root / "in" / "0.jsonl"
        text, times = first.read_text(), first.stat()
        before = contents(root / "out")
        first.write_text(text.replace("What is 0", "What was 0"))
        refused = score("out", "--limit", "40", exit_code=2)
        first.write_text(text)
        os.utime(first, ns=(times.st_atime_ns, times.st_mtime_ns))
        return before, refused, contents(root / "out")

    told = [
        score("out", "--limit", "7"),
        score("out", "--limit", "33"),
        score("out", "--limit", "32", exit_code=2),
        of_a_file_written_again(),
        score("out"),
        score("whole"),
    ]
    return root, told


def contents(folder):
    """Every file of a run but its lock and logs, by its bytes."""
    changing = ("lock", "run.log", "events.jsonl")
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in changing
    }


def scores_of(folder):
    return pl.read_parquet(folder / "*.parquet").sort("id")


def test_every_row_is_scored_once_and_as_if_at_once(runs):
    root, (trial, more, _, _, rest, whole) = runs
    told = {
        name: json.loads(run.stdout)
        for name, run in zip("tmrw", (trial, more, rest, whole), strict=True)
    }
    assert [told[name]["num_rows"] for name in "tmrw"] == [7, 33, 60, 60]
    now = [told[name]["num_tokens_now"] for name in "tmr"]
    assert sum(now) == told["w"]["num_tokens"] == told["r"]["num_tokens"]
    frame, expected = scores_of(root / "out"), scores_of(root / "whole")
    assert frame["id"].to_list() == list(range(NUM_SHARDS * NUM_ROWS))
    assert frame["rsr"].to_list() == pytest.approx(expected["rsr"].to_list(), rel=1e-5)
    assert frame.columns == expected.columns


def test_what_was_done_is_said(runs):
    _, (_, more, fewer, _, rest, _) = runs
    assert "going on: 7 of 33 rows were done" in more.stderr
    assert "going on: 33 of 60 rows were done" in rest.stderr
    assert "--limit was 33 and is now 32: it can be raised only" in fewer.stderr


def test_output_is_a_finished_run_of_its_input(runs):
    root, _ = runs
    rsr("verify", root / "out", "--deep")
    told = json.loads(rsr("status", root / "out", "--json").stdout)
    assert told["is_finished"]
    assert told["num_rows"] == NUM_SHARDS * NUM_ROWS
    assert not list((root / "out" / ".rsr" / "units").rglob("*.scores"))


def test_a_refused_one_leaves_output_as_it_was(runs):
    _, (_, _, _, (before, refused, after), _, _) = runs
    assert "input shards changed: 0.parquet" in refused.stderr
    assert before == after
