"""How far a run is, seen from outside: before, while and after it writes."""

import json
import os
import subprocess
import sys
import time

import pyarrow as pa
import pytest
from click.testing import CliRunner

from rsr.jobs.cli import main
from rsr.jobs.run.status import Span, rate, read_status
from rsr.jobs.shards.shard import Unit


def table(num_rows):
    return pa.table({"text": [f"row {i}" for i in range(num_rows)]})


def status_json(output, *options):
    result = CliRunner().invoke(main, ["status", str(output.root), "--json", *options])
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_status_follows_a_run(make_run):
    run = make_run({"a.parquet": table(10), "deep/b.parquet": table(6), "none.parquet": table(0)})
    (found,) = status_json(run.output)
    assert (found["num_rows"], found["num_rows_done"]) == (16, 0)
    assert (found["num_shards"], found["num_shards_done"]) == (3, 0)
    assert found["rows_per_s"] is None
    first, second, none = run.shards
    run.finish(first)
    run.finish(none)
    # A unit that was halved and whose whole came home after all: its rows count once.
    for start, stop in ((0, 2), (2, 4), (0, 4)):
        run.keep(Unit(second, start, stop))
    (found,) = status_json(run.output)
    assert (found["num_rows_done"], found["num_shards_done"]) == (14, 2)
    assert found["rows_by_status"] == {"no_response": 2, "ok": 8}
    assert found["num_tokens"] == 16
    assert not found["is_finished"]
    assert found["holder"] is None
    run.finish(second)
    (found,) = status_json(run.output)
    assert found["is_finished"]
    assert found["num_units_kept"] == 0
    assert found["dataset_rsr"] > 0


def test_status_says_who_writes(make_run):
    run = make_run({"a.parquet": table(3)})
    with run.output.lock():
        (found,) = status_json(run.output)
        assert found["holder"]["pid"] == os.getpid()
        text = CliRunner().invoke(main, ["status", str(run.output.root)]).stdout
        assert f"written by process {os.getpid()} on" in text
    assert read_status(run.output).holder is None


@pytest.mark.seconds
def test_watch_ends_with_the_run(make_run):
    run = make_run({"a.parquet": table(3)})
    command = [sys.executable, "-m", "rsr.jobs.cli", "status", str(run.output.root)]
    with run.output.lock():
        process = subprocess.Popen(
            [*command, "--watch", "--json"], stdout=subprocess.PIPE, text=True
        )
        first = json.loads(process.stdout.readline())
        assert first["num_rows_done"] == 0
        run.finish(run.shards[0])
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    last = json.loads(rest.splitlines()[-1])
    assert last["is_finished"]
    assert last["holder"] is None


def test_folder_that_is_not_a_runs(tmp_path):
    for command in ("status", "verify"):
        result = CliRunner().invoke(main, [command, str(tmp_path)])
        assert result.exit_code == 2
        assert "holds no run" in result.stderr


def test_rate_is_that_of_the_last_minutes():
    now = time.time()
    assert rate([]) is None
    assert rate([Span(now, now, 10)]) is None
    assert rate([Span(now - 100, now - 100, 0), Span(now, now, 50)]) == pytest.approx(0.5)
    # Half of a long shard's rows lie before the ten minutes that count.
    assert rate([Span(now - 1200, now, 1200)]) == pytest.approx(1.0)
    assert rate([Span(now - 7200, now - 3600, 9), Span(now, now, 60)]) == pytest.approx(0.1)
    # Who has not finished anything for ten minutes is not fast.
    assert rate([Span(now - 7200, now - 3600, 9)], now_s=now) == 0


def test_reasons_are_counted_with_an_example(make_run):
    run = make_run({"a.parquet": table(10)})
    run.finish(run.shards[0])
    (found,) = status_json(run.output)
    assert found["reasons"] == {
        "no_response: row N has no response": {
            "num_rows": 2, "example": "a.parquet row 4", "hint": "write one",
        }
    }  # fmt: skip
    text = CliRunner().invoke(main, ["status", str(run.output.root)]).stdout
    assert "2 no_response: row N has no response (as a.parquet row 4): write one" in text
