"""What a run shows while it goes."""

import io
import re
from dataclasses import replace

from rsr.jobs.run import progress as progress_module
from rsr.jobs.run.events import (
    BatchShrunk,
    Cause,
    Next,
    NoWorkerReady,
    UnitFailed,
    UnitFinished,
    WorkerLost,
    WorkerStarted,
)
from rsr.jobs.run.progress import MAX_TROUBLES_SHOWN, Progress
from rsr.jobs.shards.score_columns import Reason, Summary
from rsr.jobs.terminal import Console


def started(worker: int) -> WorkerStarted:
    return WorkerStarted(
        worker=worker, node=f"node-{worker}", pid=1, seconds=1.0, max_num_batched_tokens=512
    )


def finished(worker: int, num_tokens: int) -> UnitFinished:
    return UnitFinished(
        shard="a.parquet", start=0, stop=10, worker=worker, node="n", seconds=2.0,
        summary=Summary(num_rows=10, num_tokens=num_tokens),
    )  # fmt: skip


def lost(worker: int) -> WorkerLost:
    return WorkerLost(worker=worker, node="n", cause=Cause.CRASH, reason="[killed]")


def shown(*, is_terminal: bool, events: list) -> str:
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=200)
    progress = Progress(console)
    with progress.scoring(100, Summary()):
        for event in events:
            progress.tell(event)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_says_what_an_earlier_start_has_done():
    def told(num_done: int) -> str:
        console = Console(file=io.StringIO())
        Progress(console).going_on(num_done, 1500)
        return console.file.getvalue()  # type: ignore[attr-defined]

    assert told(0) == ""
    assert told(60) == "going on: 60 of 1,500 rows were done\n"
    assert told(1500) == "complete: all 1,500 rows were done, nothing to do\n"


def test_terminal_shows_the_rate_of_every_worker():
    text = shown(
        is_terminal=True, events=[started(0), started(1), finished(0, 500), finished(1, 900)]
    )
    assert "worker 0 on node-0: 250 tokens/s" in text
    assert "worker 1 on node-1: 450 tokens/s" in text
    assert "20 of 100 rows" in text


def test_plain_lines_sum_the_workers_up(monkeypatch):
    monkeypatch.setattr(progress_module, "PLAIN_LINE_SECONDS", 0.0)
    text = shown(
        is_terminal=False, events=[started(0), started(1), finished(0, 500), finished(1, 900)]
    )
    last = text.strip().splitlines()[-1]
    # Workers that are at work move the share on: how far, is the clock's to say.
    assert re.match(r"\d+% · .* left · 20 of 100 rows", last)
    assert last.endswith("2 workers: 250 to 450 tokens/s")


def test_trouble_gets_a_line_that_says_what_is_done_about_it():
    failed = UnitFailed(
        shard="a.parquet", start=0, stop=10, worker=0, node="n", cause=Cause.CRASH,
        reason="[killed]", attempts=1, next=Next.AGAIN_ALONE,
    )  # fmt: skip
    shrunk = BatchShrunk(worker=0, tokens_before=8192, tokens_now=4096, reason="CUDA")
    text = shown(is_terminal=False, events=[started(0), lost(0), failed, shrunk])
    assert "worker 0 on n lost (crash): [killed]" in text
    assert "a.parquet rows 0 to 9: [killed] → again alone" in text
    assert "out of memory: prefill steps of 4,096 tokens from now on, not 8,192" in text


def test_run_that_waits_for_a_worker_says_why_and_how_long():
    event = NoWorkerReady(seconds=60.0, seconds_left=1740.0, reason="no [such] folder")
    text = shown(is_terminal=False, events=[event])
    assert "no worker is ready (no [such] folder); starts are tried again for 29 min" in text


def test_endless_trouble_does_not_fill_the_terminal():
    text = shown(is_terminal=False, events=[lost(n) for n in range(1000)])
    assert text.count("lost (crash)") == MAX_TROUBLES_SHOWN
    assert "events.jsonl" in text


def test_rows_without_a_score_are_counted_and_each_reason_is_told_once(monkeypatch):
    monkeypatch.setattr(progress_module, "PLAIN_LINE_SECONDS", 0.0)
    reason = "bad_messages: the template drops reasoning"

    def unit(row: int) -> UnitFinished:
        summary = Summary(
            num_rows=10,
            num_tokens=500,
            rows_by_status={"ok": 6, "truncated": 1, "bad_messages": 2, "too_long": 1},
            reasons={reason: Reason(2, f"a.parquet row {row}", "try --render verbatim")},
        )
        return replace(finished(0, 500), summary=summary)

    text = shown(is_terminal=False, events=[started(0), unit(3), unit(13)])
    told = f"without a score: {reason} (as a.parquet row 3): try --render verbatim"
    assert [line for line in text.splitlines() if line.startswith("without")] == [told]
    last = text.strip().splitlines()[-1]
    assert "20 of 100 rows (6 without a score: 4 bad_messages, 2 too_long) · 1,000 of" in last


def test_no_time_is_left_to_say_while_no_worker_is_there(monkeypatch):
    monkeypatch.setattr(progress_module, "PLAIN_LINE_SECONDS", 0.0)
    events = [started(0), finished(0, 500), lost(0), started(1)]
    lines = shown(is_terminal=False, events=events).splitlines()
    before, without, after = (line for line in lines if "10 of 100 rows" in line)
    assert re.match(r"\d+% · .* left · 10 of 100 rows · ", before)
    # The share never goes back to less than the clock had said of the unit in hand.
    assert re.fullmatch(r"1\d% · 10 of 100 rows · 500 of ~5,000 tokens · 0 workers", without)
    assert " left" in after


def test_workers_that_have_no_room_yet_are_named():
    console = Console(file=io.StringIO(), width=200)
    Progress(console).loading("m", 8, 8)
    Progress(console).loading("m", 8, 2)
    Progress(console).loading("m", 1, 0)
    assert console.file.getvalue().splitlines() == [
        "loading m on 8 workers …",
        "loading m on 8 workers, for 2 of which there is room now …",
        "loading m on 1 worker, for 0 of which there is room now …",
    ]
