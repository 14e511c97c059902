"""Filter and select with SCORED and OUTPUT on an object store: the same rows as on a disk."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from faulty_proxy import FAULTS, IS_FULL_SCALE
from pickled_calls import PickledCalls

from rsr.jobs.cli import main
from rsr.jobs.errors import UsageError
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.selection.filter import FilterOptions
from rsr.jobs.selection.filter_in_passes import run_filter_in_passes
from rsr.jobs.shards.scored import open_scored
from rsr.jobs.storage import StorageError, open_storage
from rsr.jobs.storage.bucket import open_bucket

NUM_SHARDS, NUM_ROWS = 6, 300


def run(*arguments, exit_code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == exit_code, result.output + result.stderr
    return result


@pytest.fixture
def corpora(tmp_path, write_scored, s3_url):
    """The same corpus on a disk and on the store."""
    local = tmp_path / "scored"
    remote = open_storage(f"{s3_url}/scored")
    for shard in range(NUM_SHARDS):
        rows = range(shard * NUM_ROWS, (shard + 1) * NUM_ROWS)
        path = local / f"part {shard % 2}" / f"s{shard:03d}.parquet"
        columns = {
            "id": [f"row {row}" for row in rows],
            "problem": [row % 97 for row in rows],
            "teacher": [f"teacher {row % 3}" for row in rows],
            "pad": [os.urandom(64) for _ in rows],
        }
        scores = [None if row % 11 == 0 else (row * 7919 % 1009) / 100 for row in rows]
        write_scored(path, scores, columns=columns, row_group_size=50)
        remote.write(path.relative_to(local).as_posix(), path.read_bytes())
    return local, f"{s3_url}/scored"


def files(storage):
    """Output files by name, as tables."""
    return {
        file.name: pq.read_table(pa.BufferReader(storage.read(file.name)))
        for file in storage.list()
        if not file.name.startswith(".rsr/")
    }


def approximately(told):
    """The same, but for the last bits of floats."""
    if isinstance(told, dict):
        return {key: approximately(value) for key, value in told.items()}
    if isinstance(told, list):
        return [approximately(value) for value in told]
    return pytest.approx(told) if isinstance(told, float) else told


COMMANDS = {
    "filter": ["--keep-fraction", "0.3", "--within", "teacher"],
    "select": ["--group-by", "problem", "--keep", "2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_same_rows_as_on_a_disk_through_a_bad_night(tmp_path, s3, s3_url, corpora, command):
    local, remote = corpora
    options = COMMANDS[command]
    told = json.loads(run(command, local, tmp_path / "out", *options, "--json").stdout)
    with s3.faults(0.12) as injected:
        there = json.loads(run(command, remote, f"{s3_url}/out", *options, "--json").stdout)
    assert sum(injected.values()) > 10
    assert told.pop("output") != there.pop("output")
    # Sums over files are made in whatever order they arrive.
    assert told.pop("composition") == approximately(there.pop("composition"))
    assert told == there
    expected = files(open_storage(tmp_path / "out"))
    assert files(open_storage(f"{s3_url}/out")) == expected
    for output in (tmp_path / "out", f"{s3_url}/out"):
        (status,) = map(json.loads, run("status", output, "--json").stdout.splitlines())
        assert status["is_finished"]
        assert status["num_rows_written"] == told["num_kept"]
        assert run("verify", output, "--deep").stdout.strip().endswith("and as in INPUT")


def test_store_that_fails_while_it_is_read_is_an_error_of_the_place(s3, corpora, monkeypatch):
    """And none of usage, which nobody would try again; nor one that nobody expects."""
    table = open_scored(corpora[1])
    with monkeypatch.context() as patch:
        patch.setattr("rsr.jobs.storage.bucket.MAX_RETRIES", 1)
        patch.setattr("rsr.jobs.storage.bucket.PAUSES_S", (0.1,))
        open_bucket.cache_clear()
        with s3.faults(1.0, "500"):
            for read in (
                lambda: table.collect(table.scan.select("rsr")),
                lambda: table.read_at("id", np.zeros(1, np.int64)),
            ):
                with pytest.raises(StorageError, match=r"s3://bucket/.*500"):
                    read()
    open_bucket.cache_clear()
    assert table.collect(table.scan.select("rsr")).height == NUM_SHARDS * NUM_ROWS


def test_run_that_passes_refuse_leaves_nothing_anywhere(s3_url, corpora, tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    options = FilterOptions(input=corpora[1], output=f"{s3_url}/out", max_rsr=-1.0)
    with pytest.raises(UsageError, match="there is nothing to write"):
        run_filter_in_passes(options, PickledCalls(), StopRequest())
    assert open_storage(f"{s3_url}/out").list() == []
    assert list(temporary.iterdir()) == []


@pytest.mark.slow
def test_from_a_store_to_a_disk_and_back(tmp_path, s3_url, corpora):
    local, remote = corpora
    options = COMMANDS["select"]
    run("select", local, tmp_path / "out", *options)
    run("select", remote, tmp_path / "down", *options)
    run("select", local, f"{s3_url}/up", *options)
    expected = files(open_storage(tmp_path / "out"))
    assert files(open_storage(tmp_path / "down")) == expected
    assert files(open_storage(f"{s3_url}/up")) == expected
    run("verify", f"{s3_url}/up", "--deep")


@pytest.mark.slow
def test_killed_copy_goes_on(tmp_path, s3, s3_url, corpora):
    local, remote = corpora
    options = COMMANDS["filter"]
    run("filter", local, tmp_path / "out", *options)
    command = [sys.executable, "-m", "rsr.jobs.cli", "filter", remote, f"{s3_url}/out", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    output = open_storage(f"{s3_url}/out")
    while process.poll() is None and not output.list(".rsr/receipts"):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {file.name: file.version for file in output.list() if file.name.endswith(".parquet")}
    # The lock of the dead is taken over when it has not been renewed for long enough.
    output.remove(".rsr/lock")
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert files(output) == files(open_storage(tmp_path / "out"))
    receipts = {name.removeprefix(".rsr/receipts/").removesuffix(".json") for name in finished}
    kept = {file.name: file.version for file in output.list() if file.name in receipts}
    assert sum(finished.get(name) == version for name, version in kept.items()) >= 1
    run("verify", f"{s3_url}/out", "--deep")


# At full scale, which takes an hour, 2,000 small objects and one of 1 GiB.
NUM_SMALL, SMALL_ROWS = 2_000 if IS_FULL_SCALE else 48, 20
LARGE_GROUPS, GROUP_ROWS, PAD_BYTES = 16 if IS_FULL_SCALE else 1, 1_024, 64 << 10
FAULT_SHARE_AT_SCALE = 0.01


@pytest.fixture
def patient_remote(s3_url, monkeypatch):
    """The store's corpus by a client that waits until the tests' server has joined 1 GiB."""
    with monkeypatch.context() as patch:
        patch.setenv("AWS_TIMEOUT", "600s")
        open_bucket.cache_clear()
        remote = open_storage(f"{s3_url}/scored")
    open_bucket.cache_clear()
    return remote


@pytest.fixture
def large_corpora(tmp_path, write_scored, s3_url, patient_remote):
    """Many small shards and a large one, on a disk and on the store."""
    local, remote = tmp_path / "scored", patient_remote
    dice = np.random.default_rng(0)
    shards = [(f"{i % 20:02d}/s{i:04d}", SMALL_ROWS, 64) for i in range(NUM_SMALL)]
    shards.append(("large", LARGE_GROUPS * GROUP_ROWS, PAD_BYTES))
    for number, (name, num_rows, pad_bytes) in enumerate(shards):
        pads = pa.array([dice.bytes(pad_bytes) for _ in range(num_rows)], pa.binary())
        columns = {
            "id": [f"{name}-{row}" for row in range(num_rows)],
            "problem": dice.integers(0, 5_000, num_rows),
            "teacher": [f"teacher {(number + row) % 3}" for row in range(num_rows)],
            "pad": pads,
        }
        scores = dice.uniform(1, 9, num_rows).tolist()
        options = {"row_group_size": GROUP_ROWS, "compression": "none"}
        path = write_scored(local / f"{name}.parquet", scores, columns=columns, **options)
        remote.write(f"{name}.parquet", path.read_bytes())
    assert path.stat().st_size > LARGE_GROUPS * GROUP_ROWS * PAD_BYTES
    return local, f"{s3_url}/scored"


@pytest.mark.slow
@pytest.mark.timeout(7200 if IS_FULL_SCALE else 1200)
@pytest.mark.parametrize("command", COMMANDS)
def test_many_objects_and_a_large_one(tmp_path, s3, s3_url, large_corpora, command):
    local, remote = large_corpora
    options = COMMANDS[command]
    run(command, local, tmp_path / "out", *options)
    words = [sys.executable, "-m", "rsr.jobs.cli", command, remote, f"{s3_url}/out", *options]
    output = open_storage(f"{s3_url}/out")
    with s3.faults(FAULT_SHARE_AT_SCALE) as injected:
        killed = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while killed.poll() is None and len(output.list(".rsr/receipts")) < NUM_SMALL // 4:
            time.sleep(0.5)
        killed.send_signal(signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL, "it was done before it could be killed"
        finished = {f.name: f.version for f in output.list(".rsr/receipts")}
        output.remove(".rsr/lock")
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    assert len(injected) == len(FAULTS) if IS_FULL_SCALE else injected
    kept = {f.name: f.version for f in output.list(".rsr/receipts") if f.name in finished}
    assert kept == finished, "what was finished before was copied again"
    expected = sorted((tmp_path / "out").rglob("*.parquet"))
    assert len(expected) == NUM_SMALL + 1
    for path in expected:
        found = output.read(path.relative_to(tmp_path / "out").as_posix())
        assert pq.read_table(pa.BufferReader(found)).equals(pq.read_table(path)), path
    run("verify", f"{s3_url}/out")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["filter", "select"])
def test_store_that_cannot_be_reached_is_one_line(tmp_path, corpora, monkeypatch, command):
    local, _ = corpora
    options = COMMANDS[command]
    for places in ((local, "s3://nosuchbucket/out"), ("s3://nosuchbucket/scored", tmp_path / "o")):
        result = run(command, *places, *options, exit_code=2)
        assert len(result.stderr.splitlines()) == 1, result.stderr
        assert "s3://nosuchbucket" in result.stderr
        assert not (tmp_path / "o").exists()
    result = run(command, local, "s4://bucket/out", *options, exit_code=2)
    assert "expected a local path or one of s3://bucket/" in result.stderr


def test_selection_that_was_changed_is_found(tmp_path, corpora):
    local, _ = corpora
    out = tmp_path / "out"
    run("select", local, out, *COMMANDS["select"])
    path = next(p for p in sorted(out.rglob("*.parquet")) if len(pl.read_parquet(p)) > 1)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"x")
    found = json.loads(run("verify", out, "--json", exit_code=1).stdout)
    assert [problem["file"] for problem in found["problems"]] == [path.relative_to(out).as_posix()]
    assert found["repair"][0] == f"rm '{path}'"
    path.unlink()
    run("select", local, out, *COMMANDS["select"])
    assert path.read_bytes() == content
    run("verify", out, "--deep")
