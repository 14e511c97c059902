"""`rsr grade` as a run: columns, resume, refusals, stores; and held against real verdicts."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import polars as pl
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from rsr.jobs.cli import main
from rsr.jobs.storage import open_storage

ROWS = [
    ("p1", "7", "A: 7", "stop"),
    ("p1", "7", "A: 8", "stop"),
    ("p1", "7", "I give up", "stop"),
    ("p2", "8", "A: 8", "length"),
    ("p2", None, "A: 8", "stop"),
    ("p2", "8", "<think>no</think>\\boxed{8}", "stop"),
]
STATUSES = ["correct", "wrong", "no_answer", "truncated", "gold_unparsable", "correct"]


def table(rows=ROWS):
    problem, gold, response, finish = zip(*rows, strict=True)
    return pa.table(
        {
            "problem_id": pa.array(problem).dictionary_encode(),
            "answer": pa.array(gold, pa.string()),
            "prompt": ["What is it?"] * len(rows),
            "response": response,
            "finish_reason": finish,
        }
    )


def run(*arguments, exit_code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == exit_code, result.output + result.stderr
    return result


def grade(*arguments, exit_code=0):
    options = ("--answer-column", "answer", "--verifier", "exact", *arguments[2:])
    return run("grade", *arguments[:2], *options, exit_code=exit_code)


@pytest.fixture
def rows_file(tmp_path):
    pq.write_table(table(), tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


@pytest.mark.seconds
def test_every_row_keeps_its_columns_and_gets_a_grade(rows_file, tmp_path):
    told = json.loads(
        run("grade", rows_file, tmp_path / "out", "--answer-column", "answer", "--json").stdout
    )
    graded = pq.read_table(tmp_path / "out" / "rows.parquet")
    assert graded.select(table().column_names).equals(table())
    assert graded["grade_status"].to_pylist() == STATUSES
    assert graded["correct"].to_pylist() == [True, False, False, False, None, True]
    assert graded["grade_extracted"].to_pylist()[:2] == ["7", "8"]
    assert "limit of tokens" in graded["grade_detail"].to_pylist()[3]
    assert told["rows_by_status"] == {s: STATUSES.count(s) for s in sorted(set(STATUSES))}
    assert (told["solve_rate"], told["num_known"]) == (2 / 5, 5)
    assert told["truncation_rate"] == 1 / 6
    assert (told["num_problems"], told["num_solved"]) == (2, 2)
    assert told["pass_rates"]["up to a half"] == 2


def test_status_and_verify_know_a_graded_run(rows_file, tmp_path):
    grade(rows_file, tmp_path / "out")
    status = json.loads(run("status", tmp_path / "out", "--json").stdout)
    assert (status["writer"], status["num_rows_done"], status["is_finished"]) == ("grade", 6, True)
    assert "whole, in order" in run("verify", "--deep", tmp_path / "out").stdout
    graded = tmp_path / "out" / "rows.parquet"
    other = pq.read_table(graded)
    place = other.column_names.index("correct")
    lies = pa.array([False, *other["correct"].to_pylist()[1:]])
    pq.write_table(other.set_column(place, "correct", lies), graded)
    assert "bytes" in run("verify", tmp_path / "out", exit_code=1).stdout


def test_going_on_changes_nothing_and_other_settings_are_refused(rows_file, tmp_path):
    grade(rows_file, tmp_path / "out")
    before = (tmp_path / "out" / "rows.parquet").stat()
    grade(rows_file, tmp_path / "out")
    after = (tmp_path / "out" / "rows.parquet").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    refused = run(
        *("grade", rows_file, tmp_path / "out", "--answer-column", "answer", "--verifier", "mcq"),
        exit_code=2,
    )
    assert "verifier was 'exact' and is now 'mcq'" in refused.stderr
    run("filter", rows_file, tmp_path / "out", "--max-rsr", "1", exit_code=2)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--answer-column", "gold"], "has no column 'gold'; it has: "),
        (["--answer-column", "correct"], "is a column that rsr grade adds|has no column"),
        (["--answer-column", "answer", "--verifier", "maths"], "expected math, exact, mcq"),
        (["--answer-column", "answer", "--verifier", "no_such:f"], "No module named"),
        (["--answer-column", "answer", "--messages-column", "none"], "no column 'none'"),
        (["--answer-column", "answer", "--text-column", "t", "--prompt-column", "p"], "give --"),
        (["--answer-column", "answer", "--finish-reason-column", "why"], "no column 'why'"),
        (["--answer-column", "answer", "--cpu-seconds", "0"], "cpu-seconds"),
        ([], "answer-column"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_written(rows_file, tmp_path, arguments, reason):
    refused = run("grade", rows_file, tmp_path / "out", *arguments, exit_code=2)
    assert re.search(reason, refused.stderr), refused.stderr
    assert not (tmp_path / "out").exists()


def test_grades_that_are_there_are_replaced_only_when_asked(rows_file, tmp_path):
    grade(rows_file, tmp_path / "first")
    again = grade(tmp_path / "first", tmp_path / "second", exit_code=2)
    assert "--overwrite-columns" in again.stderr
    grade(tmp_path / "first", tmp_path / "second", "--overwrite-columns")
    first, second = (pq.read_table(tmp_path / n / "rows.parquet") for n in ("first", "second"))
    assert first.equals(second)


def test_no_known_grade_at_all_is_a_failure(tmp_path):
    pq.write_table(table([("p", None, "A: 1", "stop")]), tmp_path / "rows.parquet")
    failed = grade(tmp_path / "rows.parquet", tmp_path / "out", exit_code=1)
    assert "no row has a grade: 1 gold_unparsable" in failed.stderr


def test_file_without_rows_is_graded(tmp_path):
    pq.write_table(table().slice(0, 0), tmp_path / "rows.parquet")
    grade(tmp_path / "rows.parquet", tmp_path / "out")
    assert pq.read_table(tmp_path / "out" / "rows.parquet").column_names[-1] == "correct"


@pytest.mark.seconds
def test_json_lines_are_graded(tmp_path):
    lines = [json.dumps(row) for row in table().to_pylist()]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    run("grade", tmp_path / "rows.jsonl", tmp_path / "out", "--answer-column", "answer")
    graded = pq.read_table(tmp_path / "out" / "rows.parquet")
    assert graded["grade_status"].to_pylist() == STATUSES
    run("verify", "--deep", tmp_path / "out")


def test_scores_of_graded_rows_stay_known(tmp_path, write_scored):
    columns = {"text": ["A: 1", "A: 2"], "answer": ["1", "1"], "problem": [0, 0]}
    write_scored(tmp_path / "scored.parquet", [1.5, 1.2], columns=columns)
    grade(tmp_path / "scored.parquet", tmp_path / "graded")
    selected = ("--group-by", "problem", "--require", "correct")
    run("select", tmp_path / "graded", tmp_path / "best", *selected)
    assert pl.read_parquet(tmp_path / "best" / "*.parquet")["rsr"].to_list() == [1.5]


def test_store_holds_input_and_output(rows_file, s3_url, tmp_path):
    grade(rows_file, tmp_path / "out")
    open_storage(s3_url).write("in/rows.parquet", rows_file.read_bytes())
    grade(f"{s3_url}/in", f"{s3_url}/out")
    stored = open_storage(f"{s3_url}/out").read("rows.parquet")
    assert stored == (tmp_path / "out" / "rows.parquet").read_bytes()
    run("verify", "--deep", f"{s3_url}/out")


@pytest.mark.seconds
@pytest.mark.parametrize(
    "sent", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_interrupted_run_goes_on_and_leaves_no_process(tmp_path, sent):
    rows = [(f"p{i}", str(i), f"A: {i + i % 3}", "stop") for i in range(3000)]
    pq.write_table(table(rows), tmp_path / "rows.parquet", row_group_size=100)
    (tmp_path / "slow.py").write_text(
        "import time\ndef same(answer, gold):\n    time.sleep(0.002)\n"
        "    return answer == 'A: ' + gold\n"
    )
    command = [sys.executable, "-m", "rsr.jobs.cli", "grade", "rows.parquet", "out"]
    command += ["--answer-column", "answer", "--verifier", "slow:same", "--processes", "2"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    units = tmp_path / "out" / ".rsr" / "units"
    while not (units.exists() and any(units.rglob("*.scores"))):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    mine = [child.pid for child in psutil.Process(process.pid).children()]
    process.send_signal(sent)
    code = process.wait(60)
    assert code == (75 if sent == signal.SIGINT else -sent)
    deadline = time.monotonic() + 30
    while alive := [pid for pid in mine if psutil.pid_exists(pid)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)
    kept = {path: path.stat().st_mtime_ns for path in units.rglob("*.scores")}
    assert kept
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    graded = pq.read_table(tmp_path / "out" / "rows.parquet")
    assert graded["correct"].to_pylist() == [i % 3 == 0 for i in range(3000)]
    run("verify", "--deep", "--input", tmp_path / "rows.parquet", tmp_path / "out")
    assert os.listdir(tmp_path / "out" / ".rsr" / "receipts")


@pytest.mark.slow
def test_published_verdicts_of_five_thousand_real_answers_come_back(shared_data, tmp_path):
    """Golds are the last lines of the ground truth rows; every verdict is the published one."""
    rows = pl.read_parquet(shared_data / "gsm8k_teachers.parquet")
    last = pl.col("messages").list.last().struct.field("content")
    golds = rows.filter(pl.col("teacher") == "ground_truth").select(
        "problem_id", last.str.extract(r"A:\s*(.*?)\s*$").alias("answer")
    )
    held = rows.rename({"correct": "verdict"}).join(golds, on="problem_id", maintain_order="left")
    assert held["answer"].null_count() == 0
    held.write_parquet(tmp_path / "rows.parquet")
    run("grade", tmp_path / "rows.parquet", tmp_path / "out", "--answer-column", "answer")
    graded = pl.read_parquet(tmp_path / "out" / "rows.parquet")
    differing = graded.filter(pl.col("correct").ne_missing(pl.col("verdict")))
    assert differing.height == 0
    assert graded.height == 5000
