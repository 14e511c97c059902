"""Passes tell when they begin, in the events of the run, and stop no run for it."""

import os

from rsr.jobs.run.calls import CallsHere
from rsr.jobs.run.events import read_events
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.passes import Passes


def test_each_pass_is_an_event(tmp_path):
    passes = Passes(RunFolder(tmp_path / "out"), CallsHere())
    assert dict(passes.begin("count", 2)(len, ["a", "bc"])) == {"a": 1, "bc": 2}
    passes.begin("copy", 3)
    events = list(read_events(tmp_path / "out" / ".rsr" / "events.jsonl"))
    assert [(e["event"], e["name"], e["num_calls"]) for e in events] == [
        ("pass_started", "count", 2),
        ("pass_started", "copy", 3),
    ]
    assert {event["pid"] for event in events} == {os.getpid()}


def test_place_where_nothing_can_be_written_stops_no_pass(tmp_path, caplog):
    (tmp_path / "out").write_text("a file where a folder should be")
    passes = Passes(RunFolder(tmp_path / "out"), CallsHere())
    assert dict(passes.begin("count", 1)(len, ["a"])) == {"a": 1}
    assert "events.jsonl cannot be written" in caplog.text
