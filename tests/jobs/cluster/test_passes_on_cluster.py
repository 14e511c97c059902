"""Commands that pass over shards, on a Ray cluster of two cores: as on one machine."""

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from click.testing import CliRunner

import rsr.jobs
from rsr.jobs.cli import main
from rsr.jobs.cluster.calls import CallsLost, calls_on_cluster
from rsr.jobs.errors import Interrupted
from rsr.jobs.interrupt import StopRequest

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def scored(tmp_path_factory, write_scored) -> Path:
    rng = np.random.default_rng(5)
    folder = tmp_path_factory.mktemp("corpus") / "in"
    for number in range(4):
        rsr = rng.choice([1.0, 1.5, 2.0, 2.5, 3.0], 200) + rng.choice([0.0, 1e-9], 200)
        columns = {
            "id": [f"{row:03d}" for row in rng.permutation(200)],
            "teacher": rng.choice(["a", "b", "c"], 200),
            "problem_id": rng.choice([f"problem {p}" for p in range(50)], 200),
            "correct": rng.random(200) < 0.6,
            "prompt": ["why?"] * 200,
            "response": ["because"] * 200,
        }
        write_scored(folder / f"{number}.parquet", rsr, columns=columns)
    return folder


def run(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def written(output: Path) -> dict[str, bytes]:
    kept = (output / ".rsr" / "kept").rglob("*")
    files = [*output.glob("*.parquet"), *(path for path in kept if path.is_file())]
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    "arguments",
    [
        ["filter", "--keep-fraction", "0.3", "--within", "teacher"],
        ["select", "--group-by", "problem_id", "--require", "correct", "--keep", "2"],
        ["select", "--group-by", "problem_id", "--max-share-per", "teacher=0.35"],
    ],
)
def test_same_files_as_on_one_machine(tmp_path, scored, address, arguments):
    command, *options = arguments
    run(command, scored, tmp_path / "one", *options)
    run(command, scored, tmp_path / "many", *options, "--address", address)
    assert written(tmp_path / "many") == written(tmp_path / "one")
    run("verify", tmp_path / "many", "--deep")


@pytest.mark.slow
def test_local_is_a_ray_of_its_own(tmp_path, scored, monkeypatch):
    """Whatever cluster the environment names."""
    monkeypatch.setenv("RAY_ADDRESS", "nowhere:6379")
    command = ["select", scored, tmp_path / "local", "--group-by", "problem_id", "--keep", "2"]
    run(*command, "--address", "local")
    passed = (tmp_path / "local" / ".rsr" / "events.jsonl").read_text()
    assert passed.count("pass_started") > 1
    monkeypatch.delenv("RAY_ADDRESS")
    command[2] = tmp_path / "one"
    run(*command)
    assert written(tmp_path / "local") == written(tmp_path / "one")


@pytest.mark.slow
def test_same_from_python(tmp_path, scored, address):
    one, many = tmp_path / "one", tmp_path / "many"
    for output, at in ((one, None), (many, address)):
        rsr.jobs.filter(scored, output / "f", keep_fraction=0.3, within="teacher", address=at)
        rsr.jobs.select(scored, output / "s", group_by="problem_id", keep=2, address=at)
    assert written(many / "f") == written(one / "f")
    assert written(many / "s") == written(one / "s")
    assert rsr.jobs.teachers(scored, draws=50, address=address).to_json() == (
        rsr.jobs.teachers(scored, draws=50).to_json()
    )


@pytest.mark.slow
def test_same_evidence_as_on_one_machine(tmp_path, scored, address):
    at = ["--address", address]
    teachers = ["teachers", scored, "--json", "--draws", "50"]
    assert run(*teachers, *at) == run(*teachers)
    run("report", scored, tmp_path / "one.html", "--selection", scored / "0.parquet")
    run("report", scored, tmp_path / "many.html", "--selection", scored / "0.parquet", *at)
    assert (tmp_path / "many.html").read_text() == (tmp_path / "one.html").read_text()


def test_a_call_that_takes_its_worker_with_it_ends_the_run(address):
    with (
        calls_on_cluster(address, StopRequest()) as calls,
        pytest.raises(CallsLost, match="a worker was lost 4 times over 7"),
    ):
        # As a shard does that takes more memory than there is.
        list(calls(os._exit, [7]))


def test_a_call_whose_worker_is_frozen_is_made_once_more(address, tmp_path, monkeypatch):
    """Ray knows of no such worker: its process lives."""
    monkeypatch.setattr("rsr.jobs.cluster.calls.MIN_LATE_SECONDS", 2.0)
    monkeypatch.setattr("rsr.jobs.cluster.calls.LATE_FACTOR", 1)
    marker = tmp_path / "frozen"

    def square(number):
        if number == 3 and not marker.exists():
            marker.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        return number**2

    try:
        with calls_on_cluster(address, StopRequest()) as calls:
            assert sorted(calls(square, range(6))) == [(n, n**2) for n in range(6)]
            assert psutil.Process(int(marker.read_text())).status() == psutil.STATUS_STOPPED
    finally:
        with suppress(ProcessLookupError):
            os.kill(int(marker.read_text()), signal.SIGKILL)


def test_a_call_that_is_late_twice_ends_the_run(address, monkeypatch):
    for name in ("MIN_LATE_SECONDS", "MOST_SECONDS"):
        monkeypatch.setattr(f"rsr.jobs.cluster.calls.{name}", 1.0)
    with (
        calls_on_cluster(address, StopRequest()) as calls,
        pytest.raises(CallsLost, match="600: no worker has answered for"),
    ):
        list(calls(time.sleep, [600]))


def test_calls_end_with_a_run_that_is_told_to_stop(address):
    stop = StopRequest()
    ends = threading.Event()

    def tell_when_busy() -> None:
        while not (busy_workers() or ends.wait(0.1)):
            pass
        os.kill(os.getpid(), signal.SIGINT)

    teller = threading.Thread(target=tell_when_busy)
    teller.start()
    with stop.listening(), pytest.raises(Interrupted), calls_on_cluster(address, stop) as calls:
        list(calls(time.sleep, [600, 601]))
    ends.set()
    teller.join()
    deadline = time.monotonic() + 30
    while busy_workers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert busy_workers() == []


def busy_workers() -> list[int]:
    """Processes below this one that are in a call."""
    busy = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::_apply"):
                busy.append(process.pid)
    return busy
