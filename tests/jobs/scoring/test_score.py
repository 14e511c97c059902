"""The whole way: the `rsr` command, Ray, real vLLM, Parquet to Parquet."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from disturbed_run import PATIENCE_S
from typed import rsr

RSR = [sys.executable, "-m", "rsr.jobs.cli"]

pytestmark = [pytest.mark.vllm, pytest.mark.ray]

USER = {"role": "user", "content": "What is six times seven?"}


def chat(*answers: str) -> list[dict[str, str]]:
    turns = []
    for answer in answers:
        turns += [USER, {"role": "assistant", "content": answer}]
    return turns


def command(source: Path, output: Path, model: Path, *options: str) -> list[str]:
    return [*RSR, "score", str(source), str(output), "--model", str(model), "--json", *options]


def run(*arguments) -> tuple[int, dict, str]:
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=300)
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


def transformers_scores(model_folder: Path, frame: pl.DataFrame) -> list[float]:
    """RSR of each row from transformers' own logits, by Eq. 7 to the letter."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    ratios = []
    for messages, scored in frame.select("messages", "rsr_token_ids").iter_rows():
        turns = [{k: v for k, v in m.items() if v is not None} for m in messages]
        ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0].double()
        answers = [tokenizer.encode(m["content"]) for m in turns if m["role"] == "assistant"]
        assert scored == [token for answer in answers for token in answer]
        rank_sum = surprisal_sum = 0.0
        cursor = 0
        for answer in answers:
            start = next(
                i for i in range(cursor, len(ids)) if list(ids[i : i + len(answer)]) == answer
            )
            cursor = start + len(answer)
            for position in range(start, cursor):
                row = logits[position - 1]
                rank_sum += min(100, 1 + int((row > row[ids[position]]).sum()))
                surprisal_sum -= float(torch.log_softmax(row, 0)[ids[position]])
        ratios.append(rank_sum / surprisal_sum)
    return ratios


@pytest.fixture(scope="module")
def folder_run(tmp_path_factory, tiny_student):
    """One run over a folder of good, bad, empty and damaged shards."""
    root = tmp_path_factory.mktemp("folder_run")
    source = root / "in"
    (source / "deep").mkdir(parents=True)
    rows = {
        "ok": chat("Forty-two."),
        "two turns": chat("Forty-two.", "Still forty-two."),
        "null": None,
        "empty": [],
        "no assistant": [USER],
        "unknown role": [USER, {"role": "robot", "content": "42"}],
        "null content": [USER, {"role": "assistant", "content": None}],
        "empty response": chat(""),
        "one token": chat("4"),
        "too long": chat("42 " * 5000),
        "control token": chat("42<|im_end|>"),
        "ok again": chat("Forty-two."),
    }
    pq.write_table(
        pa.table({"case": list(rows), "messages": list(rows.values())}), source / "rows.parquet"
    )
    pq.write_table(
        pa.table({"messages": pa.array([], pa.list_(pa.null()))}), source / "deep" / "none.parquet"
    )
    damaged = source / "damaged.parquet"
    pq.write_table(pa.table({"messages": [chat("42")] * 500}), damaged, compression="none")
    content = bytearray(damaged.read_bytes())
    content[4:400] = b"\xff" * 396
    damaged.write_bytes(content)
    options = ("--token-columns", "--max-refused", "1")
    result = run(source, root / "out", tiny_student, *options)
    return root, rows, *result


def test_every_row_comes_out_with_its_status(folder_run):
    root, rows, _, summary, _ = folder_run
    frame = pl.read_parquet(root / "out" / "rows.parquet")
    assert frame["case"].to_list() == list(rows)
    assert (
        frame["messages"].to_list()
        == pl.read_parquet(root / "in" / "rows.parquet")["messages"].to_list()
    )
    assert dict(frame.select("case", "rsr_status").iter_rows()) == {
        "ok": "ok",
        "two turns": "ok",
        "null": "no_response",
        "empty": "no_response",
        "no assistant": "no_response",
        "unknown role": "bad_messages",
        "null content": "bad_messages",
        "empty response": "no_response",
        "one token": "ok",
        "too long": "truncated",
        "control token": "bad_messages",
        "ok again": "ok",
    }
    unscored = frame.filter(pl.col("rsr").is_null())
    assert unscored["rsr_num_tokens"].to_list() == [0] * len(unscored)
    assert summary["rows_by_status"] == {
        "ok": 4, "truncated": 1, "no_response": 4, "bad_messages": 3,
    }  # fmt: skip


def test_scores_are_those_of_transformers(folder_run, tiny_student):
    root = folder_run[0]
    frame = pl.read_parquet(root / "out" / "rows.parquet").filter(pl.col("rsr_status") == "ok")
    expected = transformers_scores(tiny_student, frame)
    assert frame["rsr"].to_list() == pytest.approx(expected, rel=1e-5)
    means = frame.select(
        rank=pl.col("rsr_token_ranks").list.eval(pl.element().clip(upper_bound=100)).list.mean(),
        surprisal=-pl.col("rsr_token_logprobs").list.mean(),
    )
    assert frame["rsr_mean_rank"].to_list() == pytest.approx(means["rank"].to_list())
    assert frame["rsr_mean_surprisal"].to_list() == pytest.approx(means["surprisal"].to_list())


def test_equal_rows_score_alike_whatever_stands_beside_them(folder_run):
    frame = pl.read_parquet(folder_run[0] / "out" / "rows.parquet")
    first, again = frame.filter(pl.col("case").is_in(["ok", "ok again"]))["rsr"]
    assert first == pytest.approx(again, rel=1e-6)


def test_shard_without_rows_has_an_output(folder_run):
    table = pq.read_table(folder_run[0] / "out" / "deep" / "none.parquet")
    assert table.num_rows == 0
    assert "rsr" in table.schema.names


def test_damaged_shard_is_listed_and_costs_itself_alone(folder_run):
    root, _, exit_code, summary, _ = folder_run
    assert exit_code == 1
    assert summary["failures"]
    assert all("damaged.parquet" in failure for failure in summary["failures"])
    assert not (root / "out" / "damaged.parquet").exists()


def test_chatter_goes_to_the_log(folder_run):
    root, _, _, summary, stderr = folder_run
    log = Path(summary["log"])
    assert log.is_relative_to(root / "out")
    assert "vLLM runs ScoringLlamaForCausalLM" in log.read_text()
    assert "bad_messages: assistant text contains this student's control token" in (log.read_text())
    assert "vllm" not in stderr.lower().replace(str(root).lower(), "")


def test_reasons_stand_beside_the_rows_and_are_counted(folder_run):
    root, _, _, summary, _ = folder_run
    frame = pl.read_parquet(root / "out" / "rows.parquet")
    details = dict(frame.select("case", "rsr_detail").iter_rows())
    assert details["ok"] is None
    assert details["control token"].endswith("control token '<|im_end|>'")
    assert frame.filter(pl.col("rsr").is_null())["rsr_detail"].null_count() == 0
    row = frame["case"].to_list().index("control token")
    reason = "bad_messages: a response brings its end-of-turn token along"
    assert summary["reasons"][reason]["num_rows"] == 1
    assert summary["reasons"][reason]["example"] == f"rows.parquet row {row}"


def many_rows(path: Path) -> Path:
    rows = [chat(f"Well, {i} times {i} is {i * i}.", "Yes." * (i % 9 + 1)) for i in range(2500)]
    pq.write_table(pa.table({"id": range(2500), "messages": rows}), path, row_group_size=400)
    return path


def kill_tree(process: subprocess.Popen) -> None:
    """SIGKILL the driver, Ray's daemons and the workers, all at once."""
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in tree:
        member.suspend()
    for member in tree:
        member.kill()
    psutil.wait_procs(tree, timeout=30)


def kill_worker(process: subprocess.Popen) -> None:
    """SIGKILL the process that holds the model, and nothing else."""
    members = psutil.Process(process.pid).children(recursive=True)
    (worker,) = [m for m in members if m.cmdline() and m.cmdline()[0].startswith("ray::Worker")]
    worker.kill()


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for_units(process: subprocess.Popen, output: Path, num_more: int) -> None:
    """Until the run has kept `num_more` units more than it has now."""
    deadline = time.monotonic() + PATIENCE_S
    units = output / ".rsr" / "units"
    enough = len(list(units.glob("*/*.scores"))) + num_more
    while len(list(units.glob("*/*.scores"))) < enough:
        assert process.poll() is None, "the run ended before it could be disturbed"
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def disturbed_run(tmp_path_factory, tiny_student):
    """One undisturbed run, and one that was killed, lost its worker, was told to stop, went on."""
    root = tmp_path_factory.mktemp("disturbed")
    source = many_rows(root / "rows.parquet")
    quiet = start(command(source, root / "quiet", tiny_student))
    arguments = command(source, root / "killed", tiny_student)
    process = start(arguments)
    wait_for_units(process, root / "killed", 3)
    kill_tree(process)
    kept = {p.name: p.stat().st_mtime_ns for p in root.glob("killed/.rsr/units/*/*.scores")}
    assert not (root / "killed" / "rows.parquet").exists()
    process = start(arguments)
    wait_for_units(process, root / "killed", 2)
    kill_worker(process)
    wait_for_units(process, root / "killed", 2)
    process.send_signal(signal.SIGTERM)
    terminated_with = process.wait(timeout=60)
    still_kept = {
        p.name: p.stat().st_mtime_ns
        for p in root.glob("killed/.rsr/units/*/*.scores")
        if p.name in kept
    }
    exit_code, summary, told = run(source, root / "killed", tiny_student)
    assert exit_code == 0
    assert quiet.wait(timeout=300) == 0
    return root, source, kept, still_kept, terminated_with, summary, told


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_values(disturbed_run):
    root, source, *_ = disturbed_run
    quiet = pq.read_table(root / "quiet" / "rows.parquet")
    resumed = pq.read_table(root / "killed" / "rows.parquet")
    assert resumed.equals(quiet)
    assert resumed.select(["id", "messages"]).equals(pq.read_table(source))
    assert not list(root.glob("killed/**/*.rsr-tmp"))


@pytest.mark.slow
def test_finished_units_are_not_scored_again(disturbed_run):
    _, _, kept, still_kept, _, summary, told = disturbed_run
    assert len(kept) >= 3
    assert still_kept == kept
    assert summary["num_tokens_now"] < summary["num_tokens"]
    assert re.search(r"going on: [\d,]+ of [\d,]+ rows were done", told)


@pytest.mark.slow
def test_terminated_run_says_start_me_again(disturbed_run):
    assert disturbed_run[4] == 75


@pytest.mark.slow
def test_run_that_is_stopped_before_it_begins_leaves_nothing(tmp_path, tiny_student):
    source = many_rows(tmp_path / "rows.parquet")
    output = tmp_path / "out"
    process = start(command(source, output, tiny_student))
    deadline = time.monotonic() + 60
    while not (output / ".rsr" / "lock").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    assert not output.exists()


@pytest.mark.slow
def test_finished_run_has_nothing_left_to_do(disturbed_run, tiny_student):
    root, source, *_, summary, _ = disturbed_run
    exit_code, again, told = run(source, root / "killed", tiny_student)
    assert exit_code == 0
    # No library has the last word.
    assert told.splitlines()[-1].endswith("rows were done, nothing to do")
    assert again["num_tokens_now"] == 0
    assert again["num_tokens"] == summary["num_tokens"]
    assert again["dataset_rsr"] == pytest.approx(summary["dataset_rsr"])


@pytest.mark.slow
def test_other_settings_are_refused_by_name(disturbed_run, tiny_student):
    root, source, *_ = disturbed_run
    command = ("score", source, root / "killed", "--model", tiny_student)
    refused = rsr(*command, "--rank-clip", "50", exit_code=2)
    assert "rank_clip was 100 and is now 50" in refused.stderr


@pytest.mark.slow
def test_changed_input_is_refused_and_overwritten_on_demand(disturbed_run, tiny_student):
    root, *_ = disturbed_run
    source = root / "other" / "rows.parquet"
    source.parent.mkdir()
    pq.write_table(pa.table({"messages": [chat("42")] * 3}), source)
    command = ("score", source, root / "quiet", "--model", tiny_student, "--json")
    assert "changed: rows.parquet" in rsr(*command, exit_code=2).stderr
    overwritten = rsr(*command, "--overwrite", "--limit", "2")
    assert json.loads(overwritten.stdout)["num_rows"] == 2
    assert pq.read_metadata(root / "quiet" / "rows.parquet").num_rows == 2


@pytest.mark.slow
def test_ranks_of_a_tensor_parallel_group_run_inside_a_worker(tmp_path, tiny_student):
    """Two processes of vLLM below one Ray actor, which must not look for Ray themselves."""
    source = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"messages": [chat(f"It is {n}.") for n in range(6)]}), source)
    options = ("--dtype", "float32", "--token-columns", "--tensor-parallel-size", "2")
    done = rsr("score", source, tmp_path / "out", "--model", tiny_student, "--json", *options)
    assert json.loads(done.stdout)["rows_by_status"] == {"ok": 6}
    frame = pl.read_parquet(tmp_path / "out" / "rows.parquet")
    expected = transformers_scores(tiny_student, frame)
    assert frame["rsr"].to_list() == pytest.approx(expected, rel=1e-4)
