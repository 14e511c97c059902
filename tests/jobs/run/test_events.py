"""The diary of a run: one whole line for each event, whatever happened to the one before."""

import json
from datetime import datetime
from pathlib import Path

from rsr.jobs.run.events import Cause, EventLog, UnitFinished, WorkerLost, read_events
from rsr.jobs.shards.score_columns import Summary

LOST = WorkerLost(worker=3, node="a", cause=Cause.CRASH, reason="killed")
FINISHED = UnitFinished(
    shard="x.parquet", start=0, stop=8, worker=1, node="b", seconds=0.5,
    summary=Summary(num_rows=8, num_tokens=80, rows_by_status={"ok": 8}),
)  # fmt: skip


def test_each_event_is_one_line_with_its_time_and_fields(tmp_path):
    with EventLog(tmp_path / "deep" / "events.jsonl") as log:
        log.write(LOST)
        log.write(FINISHED)
    lines = (tmp_path / "deep" / "events.jsonl").read_text().splitlines()
    first, second = (json.loads(line) for line in lines)
    assert datetime.fromisoformat(first.pop("time")).tzinfo is not None
    assert first == {
        "event": "worker_lost", "worker": 3, "node": "a", "cause": "crash", "reason": "killed",
    }  # fmt: skip
    assert (second["event"], second["summary"]["num_tokens"]) == ("unit_finished", 80)


def test_line_that_a_dying_driver_left_half_written_costs_only_itself(tmp_path):
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.write(LOST)
    with path.open("a") as file:
        file.write('{"event": "unit_fin')
    with EventLog(path) as log:
        log.write(FINISHED)
    assert [event["event"] for event in read_events(path)] == ["worker_lost", "unit_finished"]


def test_disk_that_is_full_stops_no_run(caplog):
    with EventLog(Path("/dev/full")) as log:
        log.write(LOST)
        log.write(LOST)
    assert caplog.text.count("cannot be written") == 1
