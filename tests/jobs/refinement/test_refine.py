"""`rsr refine` against a server that fails: nothing is lost, and nothing asked twice."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_server import chat_server
from click.testing import CliRunner

from rsr.jobs.cli import main
from rsr.jobs.refinement import endpoint
from rsr.jobs.storage import open_storage

TRACES = ["2 + 2 is wrong", "fine already", "REFUSE wrong", "PLAIN wrong", "CUT wrong", "  wrong\n"]
STATUSES = ["refined", "unchanged", "refused", "no_trace", "cut_off", "refined"]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_S", 0.01)


@pytest.fixture(scope="module")
def server():
    with chat_server() as started:
        yield started


def messages_of(traces):
    return [
        [{"role": "user", "content": f"Problem {n}?"}, {"role": "assistant", "content": trace}]
        for n, trace in enumerate(traces)
    ]


def table(traces=TRACES, **columns):
    return pa.table(
        {
            "id": [f"row {n}" for n in range(len(traces))],
            "messages": messages_of(traces),
            "problem_id": pa.array([str(n) for n in range(len(traces))]).dictionary_encode(),
            **columns,
        }
    )


def write(path, made):
    pq.write_table(made, path, row_group_size=4)
    return path


def run(*arguments, exit_code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == exit_code, result.output + result.stderr
    return result


def refine(source, output, url, *more, exit_code=0, mode="style-aligned"):
    options = ("--mode", mode, "--endpoint", url, "--api-model", "oracle", *more)
    return run("refine", source, output, *options, exit_code=exit_code)


def test_every_row_comes_out_with_its_trace_and_its_reason(tmp_path, server):
    source = write(tmp_path / "rows.parquet", table())
    told = json.loads(refine(source, tmp_path / "out", server.url, "--json").stdout)
    rows = pq.read_table(tmp_path / "out" / "rows.parquet")
    assert rows.column_names[:2] == ["id", "problem_id"]
    assert rows.select(["id", "problem_id"]).equals(table().select(["id", "problem_id"]))
    kept = {"fine already", "REFUSE wrong", "PLAIN wrong", "CUT wrong"}
    expected = [t if t in kept else t.replace("wrong", "right") for t in TRACES]
    assert rows["messages"].to_pylist() == messages_of(expected)
    assert rows["refine_status"].to_pylist() == STATUSES
    assert rows["parent_id"].to_pylist() == [f"row {n}" for n in range(6)]
    assert rows["original_response"].to_pylist() == TRACES
    details = rows["refine_detail"].to_pylist()
    assert details[0] is details[1] is None
    assert "too long for me" in details[2]
    assert "<refined_trace>" in details[3]
    assert "limit of tokens" in details[4]
    assert rows["refine_completion_tokens"].to_pylist()[0] == 5
    assert set(rows["refine_model"].to_pylist()) == {"oracle"}
    assert told["rows_by_status"] == {s: STATUSES.count(s) for s in sorted(set(STATUSES))}
    assert told["num_requests"] == 6
    assert "whole, in order" in run("verify", "--deep", tmp_path / "out").stdout
    status = json.loads(run("status", tmp_path / "out", "--json").stdout)
    assert (status["writer"], status["num_rows_done"], status["is_finished"]) == ("refine", 6, True)
    assert not (tmp_path / "out" / ".rsr" / "answers.jsonl").exists()


def test_native_trace_that_was_touched_is_found(tmp_path, server):
    source = write(tmp_path / "rows.parquet", table())
    refine(source, tmp_path / "out", server.url)
    (tmp_path / "moved").mkdir()
    write(tmp_path / "moved" / "rows.parquet", table([*TRACES[:2], "other", *TRACES[3:]]))
    found = run("verify", "--deep", "--input", tmp_path / "moved", tmp_path / "out", exit_code=1)
    assert "messages of a native trace differs in rows 0 to 3" in found.stdout


@pytest.mark.parametrize("form", ["prompt", "json", "sharegpt", "json messages", "dictionary"])
def test_traces_are_replaced_in_whatever_form_they_stand(tmp_path, server, form):
    traces = ["all wrong", "as it was"]
    problems = ["Which?", "What?"]
    turns = [
        [{"role": "user", "content": p}, {"role": "assistant", "content": t}]
        for p, t in zip(problems, traces, strict=True)
    ]
    path, response = tmp_path / "rows.parquet", pa.array(traces)
    if form == "prompt":
        write(path, pa.table({"prompt": problems, "response": response}))
    elif form == "dictionary":
        write(path, pa.table({"prompt": problems, "response": response.dictionary_encode()}))
    elif form == "json messages":
        write(path, pa.table({"messages": [json.dumps(t) for t in turns]}))
    elif form == "sharegpt":
        write(
            path,
            pa.table(
                {
                    "conversations": [
                        [{"from": "human", "value": p}, {"from": "gpt", "value": t}]
                        for p, t in zip(problems, traces, strict=True)
                    ]
                }
            ),
        )
    else:
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(json.dumps({"messages": t}) for t in turns))
    refine(path, tmp_path / "out", server.url)
    rows = pq.read_table(tmp_path / "out" / "rows.parquet")
    told = json.dumps(rows.to_pylist())
    assert rows["refine_status"].to_pylist() == ["refined", "unchanged"]
    assert rows["parent_id"].to_pylist() == ["rows.parquet:0", "rows.parquet:1"]
    for name in ("messages", "conversations", "response"):
        if name in rows.column_names:
            value = rows[name].to_pylist()[0]
            assert "all right" in json.dumps(value)
            assert "all wrong" not in json.dumps(value)
    assert told.count("as it was") == 2
    run("verify", "--deep", tmp_path / "out")


def test_each_response_of_a_list_is_refined(tmp_path, server):
    lists = pa.table({"prompt": ["Which?"], "generations": [["all wrong", "as it was", None]]})
    source = write(tmp_path / "rows.parquet", lists)
    refine(source, tmp_path / "out", server.url, "--explode-responses", "generations")
    rows = pq.read_table(tmp_path / "out" / "rows.parquet")
    assert rows["generations"].to_pylist() == ["all right", "as it was", None]
    assert rows["refine_status"].to_pylist() == ["refined", "unchanged", "not_refinable"]
    run("verify", "--deep", tmp_path / "out")


def test_rows_that_nothing_can_be_asked_of_keep_their_trace(tmp_path, server):
    good = messages_of(["wrong"])[0]
    rows = [
        [*good, *good],
        [good[0]],
        [good[0], {"role": "assistant", "content": "  "}],
        [good[1]],
        [*good, good[0]],
        [good[0], {"role": "nobody", "content": "wrong"}],
        good,
    ]
    source = write(tmp_path / "rows.parquet", pa.table({"messages": rows}))
    refine(source, tmp_path / "out", server.url)
    out = pq.read_table(tmp_path / "out" / "rows.parquet")
    assert out["refine_status"].to_pylist() == ["not_refinable"] * 6 + ["refined"]
    assert out["messages"].to_pylist()[:6] == rows[:6]
    reasons = out["refine_detail"].to_pylist()
    for reason, expected in zip(
        reasons,
        ["2 assistant turns", "0 assistant", "empty", "no problem", "not the last", "nobody", ""],
        strict=True,
    ):
        assert expected in (reason or "")


def test_scores_and_grades_of_native_traces_are_left_out(tmp_path, server, write_scored):
    columns = {"messages": messages_of(["wrong", "fine"]), "correct": [True, False]}
    source = write_scored(tmp_path / "rows.parquet", [1.0, 2.0], columns=columns)
    refine(source, tmp_path / "out", server.url)
    rows = pq.read_table(tmp_path / "out" / "rows.parquet")
    assert not {"rsr", "rsr_status", "correct"} & set(rows.column_names)
    assert b"rsr" not in rows.schema.metadata
    run("verify", "--deep", tmp_path / "out")


def test_what_is_said_of_an_answer_holds_for_no_other_one(tmp_path, server):
    """Rows as rsr sample writes them: a repaired answer is no longer one that was cut off."""
    traces = ["It is wrong", "It is f", "ends wrong"]
    said = {"response": traces, "finish_reason": ["length", "length", "stop"]}
    made = table(traces, **said, num_tokens=pa.array([3, 4, 5], pa.int32()))
    source = write(tmp_path / "rows.parquet", made.replace_schema_metadata({"rsr_sample": "{}"}))
    refine(source, tmp_path / "out", server.url)
    rows = pq.read_table(tmp_path / "out" / "rows.parquet")
    assert rows["response"].to_pylist() == ["It is right", "It is f", "ends right"]
    assert rows["response"].to_pylist() == [m[-1]["content"] for m in rows["messages"].to_pylist()]
    assert rows["finish_reason"].to_pylist() == [None, "length", None]
    assert rows["num_tokens"].to_pylist() == [None, 4, None]
    run("verify", "--deep", tmp_path / "out")


@pytest.mark.seconds
@pytest.mark.parametrize("mode", ["style-aligned", "minimal", "from-scratch"])
def test_oracle_is_told_the_answer_only_when_asked(tmp_path, mode):
    source = write(tmp_path / "rows.parquet", table(["wrong"], answer=["the gold 42"]))
    for number, options in enumerate([(), ("--answer-column", "answer")]):
        with chat_server() as own:
            refine(source, tmp_path / f"{mode}{number}", own.url, *options, mode=mode)
            (asked,) = own.requests
        if mode == "from-scratch":
            assert ("the gold 42" in asked) == bool(options)
            assert "Problem 0?" in asked
            assert "wrong" not in asked
        else:
            assert asked == "wrong"


@pytest.mark.seconds
def test_faults_lose_nothing_and_cost_one_more_request_each(tmp_path):
    traces = [f"{n} is wrong" for n in range(60)]
    source = write(tmp_path / "rows.parquet", table(traces))
    with chat_server("429", "500", "drop", "garbage", "ok", "ok") as own:
        told = refine(source, tmp_path / "out", own.url, "--concurrency", "12", "--json")
        requests = own.requests
    rows = pq.read_table(tmp_path / "out" / "rows.parquet")
    assert rows["refine_status"].to_pylist() == ["refined"] * 60
    assert [m[-1]["content"] for m in rows["messages"].to_pylist()] == [
        f"{n} is right" for n in range(60)
    ]
    assert set(requests) == set(traces)
    assert sorted(requests.values()) == [1] * 20 + [2] * 40
    assert json.loads(told.stdout)["num_requests"] == 100


@pytest.mark.seconds
def test_server_that_falls_silent_is_asked_again(tmp_path):
    source = write(tmp_path / "rows.parquet", table(["1 is wrong", "2 is wrong"]))
    with chat_server("hang", "ok") as own:
        refine(source, tmp_path / "out", own.url, "--timeout", "2")
        assert sum(own.requests.values()) >= 3
    rows = pq.read_table(tmp_path / "out" / "rows.parquet")
    assert rows["refine_status"].to_pylist() == ["refined", "refined"]


def test_row_that_is_never_answered_keeps_its_trace_and_the_reason(tmp_path, server):
    source = write(tmp_path / "rows.parquet", table(["NEVER wrong", "wrong"]))
    refine(source, tmp_path / "out", server.url, "--retries", "2")
    rows = pq.read_table(tmp_path / "out" / "rows.parquet")
    assert rows["refine_status"].to_pylist() == ["failed", "refined"]
    assert re.match(
        "3 attempts failed, the last one: .*always broken", rows["refine_detail"][0].as_py()
    )
    assert rows["messages"].to_pylist()[0] == messages_of(["NEVER wrong"])[0]


@pytest.mark.seconds
def test_budget_ends_a_start_and_the_next_one_asks_only_the_rest(tmp_path):
    traces = [f"{n} is wrong" for n in range(50)]
    source = write(tmp_path / "rows.parquet", table(traces))
    with chat_server() as own:
        ended = refine(source, tmp_path / "out", own.url, "--max-requests", "20", exit_code=1)
        assert "--max-requests 20 is spent; the same command goes on" in ended.stderr
        assert sum(own.requests.values()) == 20
        assert not (tmp_path / "out" / "rows.parquet").exists()
        refine(source, tmp_path / "out", own.url, "--max-requests", "20", exit_code=1)
        # A line that was torn when the power went, and one of another run.
        with (tmp_path / "out" / ".rsr" / "answers.jsonl").open("ab") as journal:
            journal.write(b'{"answer": {"settings": "other"}, "blake2b": "0"}\n{"answer": {"ro')
        refine(source, tmp_path / "out", own.url, "--max-requests", "20")
        assert own.requests == dict.fromkeys(traces, 1)
    rows = pq.read_table(tmp_path / "out" / "rows.parquet")
    assert rows["refine_status"].to_pylist() == ["refined"] * 50
    run("verify", "--deep", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_run_asks_again_only_what_was_in_flight(tmp_path, sent):
    traces = [f"{n} is wrong" for n in range(90)]
    write(tmp_path / "rows.parquet", table(traces))
    with chat_server(delay_s=0.1) as own:
        command = [sys.executable, "-m", "rsr.jobs.cli", "refine", "rows.parquet", "out"]
        command += ["--mode", "minimal", "--endpoint", own.url, "--api-model", "oracle"]
        command += ["--concurrency", "4"]
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        journal = tmp_path / "out" / ".rsr" / "answers.jsonl"
        while not (journal.exists() and len(journal.read_bytes().splitlines()) > 40):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        process.send_signal(sent)
        assert process.wait(60) == (75 if sent == signal.SIGINT else -sent)
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        requests = own.requests
    assert set(requests) == set(traces)
    assert sum(requests.values()) <= 90 + 4
    rows = pq.read_table(tmp_path / "out" / "rows.parquet")
    assert rows["refine_status"].to_pylist() == ["refined"] * 90
    run("verify", "--deep", "--input", tmp_path / "rows.parquet", tmp_path / "out")


@pytest.mark.seconds
def test_server_that_refuses_the_key_ends_the_run_and_the_key_is_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    source = write(tmp_path / "rows.parquet", table(["LOCKED"]))
    with chat_server() as own:
        ended = refine(
            source, tmp_path / "out", own.url, "--api-key-variable", "MY_KEY", exit_code=1
        )
        assert own.counts()["keys"] == ["Bearer sk-very-secret"]
    assert "refuses the key in MY_KEY" in ended.stderr
    written = [p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert not any(b"sk-very-secret" in content for content in written)
    assert "sk-very-secret" not in ended.stderr + ended.stdout


def test_server_that_answers_nobody_is_given_up(tmp_path, server):
    source = write(tmp_path / "rows.parquet", table([f"NEVER {n}" for n in range(40)]))
    ended = refine(
        source, tmp_path / "out", server.url, "--retries", "0", "--concurrency", "2", exit_code=1
    )
    assert "answered none of 4 rows in a row" in ended.stderr
    assert "the same command goes on" in ended.stderr


def test_small_input_waits_for_a_server_that_is_broken(tmp_path, server):
    source = write(tmp_path / "rows.parquet", table(["NEVER 1", "NEVER 2", "NEVER 3"]))
    ended = refine(source, tmp_path / "out", server.url, "--retries", "0", exit_code=1)
    assert "answered none of 3 rows in a row" in ended.stderr
    assert not (tmp_path / "out" / "rows.parquet").exists()


def test_going_on_changes_nothing_and_other_settings_are_refused(tmp_path, server):
    source = write(tmp_path / "rows.parquet", table())
    refine(source, tmp_path / "out", server.url)
    before = (tmp_path / "out" / "rows.parquet").stat().st_mtime_ns
    told = refine(source, tmp_path / "out", server.url, "--json")
    assert json.loads(told.stdout)["num_requests"] == 0
    assert (tmp_path / "out" / "rows.parquet").stat().st_mtime_ns == before
    refused = refine(source, tmp_path / "out", server.url, mode="minimal", exit_code=2)
    assert "mode was 'style-aligned' and is now 'minimal'" in refused.stderr
    again = refine(source, tmp_path / "out", server.url, "--overwrite", "--json")
    assert json.loads(again.stdout)["num_requests"] == 6


def test_store_holds_input_and_output(tmp_path, server, s3_url):
    source = write(tmp_path / "rows.parquet", table())
    open_storage(s3_url).write("in/rows.parquet", source.read_bytes())
    refine(f"{s3_url}/in", f"{s3_url}/out", server.url)
    refine(source, tmp_path / "out", server.url)
    stored = pq.read_table(pa.BufferReader(open_storage(f"{s3_url}/out").read("rows.parquet")))
    assert stored.equals(pq.read_table(tmp_path / "out" / "rows.parquet"))


def test_no_row_with_a_trace_is_a_failure(tmp_path, server):
    source = write(tmp_path / "rows.parquet", table(["PLAIN wrong"]))
    failed = refine(source, tmp_path / "out", server.url, exit_code=1)
    assert "no row was refined: 1 no_trace" in failed.stderr


def test_file_without_rows_is_refined(tmp_path, server):
    source = write(tmp_path / "rows.parquet", table().slice(0, 0))
    refine(source, tmp_path / "out", server.url)
    assert pq.read_table(tmp_path / "out" / "rows.parquet").column_names[-1] == (
        "refine_completion_tokens"
    )


@pytest.mark.parametrize(
    ("url", "options", "reason"),
    [
        ("localhost:8000", (), "expected http://HOST:PORT/v1"),
        ("http://user:pw@localhost/v1", (), "would be written down"),
        ("http://127.0.0.1:9/v1", (), "--endpoint http://127.0.0.1:9/v1: "),
        (None, ("--answer-column", "gold"), "has no column 'gold'"),
        (None, ("--id-column", "name"), "has no column 'name'"),
        (None, ("--text-column", "problem_id"), "a text column has no problem"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_written(tmp_path, server, url, options, reason):
    made = table().set_column(2, "problem_id", pa.array(["p"] * 6))
    source = write(tmp_path / "rows.parquet", made)
    refused = refine(source, tmp_path / "out", url or server.url, *options, exit_code=2)
    assert reason in refused.stderr, refused.stderr
    assert not (tmp_path / "out").exists()
    assert os.listdir(tmp_path) == ["rows.parquet"]
