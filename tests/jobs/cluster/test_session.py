"""A Ray of a run's own: refused where it cannot live, told of in one line, and gone afterwards."""

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from disturbed_run import heed_hangups

from rsr.jobs.cluster.ray_folder import LOCK, PREFIX, ray_folder, require_token
from rsr.jobs.errors import UsageError
from rsr.jobs.run.events import read_events

PROMPT = {"role": "user", "content": "q"}


@pytest.fixture
def temporary(monkeypatch):
    """A folder of temporary files, short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.delenv("RAY_TMPDIR", raising=False)
        yield Path(folder)


HOLDER = """
import sys, time
from rsr.jobs.cluster.ray_folder import ray_folder
with ray_folder() as folder:
    (folder / "session" / "deep").mkdir(parents=True)
    print(folder, flush=True)
    time.sleep(60)
"""


def hold_elsewhere():
    """Another process with a folder of its own."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True)
    return process, Path(process.stdout.readline().strip())


def test_folder_goes_at_the_end_with_all_that_is_in_it(temporary):
    with ray_folder() as folder:
        (folder / "session" / "logs").mkdir(parents=True)
        assert folder.parent == temporary
    assert list(temporary.iterdir()) == []


def test_folder_of_a_killed_run_goes_when_the_next_begins(temporary):
    process, other = hold_elsewhere()
    with ray_folder():
        assert other.is_dir(), "its run is alive"
    process.kill()
    process.wait()
    assert other.is_dir()
    with ray_folder() as folder:
        assert list(temporary.iterdir()) == [folder]


def test_folder_that_a_process_still_works_in_stays(temporary):
    process, other = hold_elsewhere()
    process.kill()
    process.wait()
    code = "import time; time.sleep(60)"
    worker = subprocess.Popen([sys.executable, "-c", code, f"--temp-dir={other}/session"])
    # For an instant a new process has no arguments yet.
    while os.fsencode(other) not in Path(f"/proc/{worker.pid}/cmdline").read_bytes():
        time.sleep(0.01)
    with ray_folder():
        assert other.is_dir()
    worker.kill()
    worker.wait()
    with ray_folder():
        assert not other.exists()


def test_what_is_not_provably_ours_stays(temporary):
    (temporary / f"{PREFIX}unlocked").mkdir()
    (temporary / "ray" / "session_1").mkdir(parents=True)
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / LOCK).touch()
    (temporary / f"{PREFIX}link").symlink_to(elsewhere)
    before = sorted(temporary.rglob("*"))
    with ray_folder():
        pass
    assert sorted(temporary.rglob("*")) == before


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("/proc/nope", "/proc/nope cannot be written (there is no such folder): Ray keeps its"),
        ("/proc/self", "/proc/self cannot be written ("),
        (f"/tmp/{'x' * 60}", "bytes too long: Ray makes sockets below it"),
    ],
)
@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_folder_of_temporary_files_that_will_not_do(
    temporary, monkeypatch, variable, folder, message
):
    if "xxx" in folder:
        folder = str(temporary / ("x" * 60))
        Path(folder).mkdir()
    monkeypatch.setenv(variable, folder)
    with pytest.raises(UsageError) as told, ray_folder():
        pass
    assert message in str(told.value)
    assert f"set {variable if 'xxx' in folder else 'TMPDIR'} to" in str(told.value)


def test_longest_name_that_ray_takes(temporary, monkeypatch):
    # Python's own limit of a Unix socket's path, by trying.
    from rsr.jobs.cluster.ray_folder import LONGEST_SOCKET

    for num_chars in range(10, 60):
        parent = temporary / ("x" * num_chars)
        parent.mkdir()
        monkeypatch.setenv("TMPDIR", str(parent))
        try:
            with ray_folder() as folder:
                path = Path(f"{folder}{LONGEST_SOCKET}")
                path.parent.mkdir(parents=True)
                with socket.socket(socket.AF_UNIX) as listener:
                    listener.bind(str(path))
        except UsageError:
            break
    else:
        pytest.fail("no name was too long")
    assert len(f"{parent}/{PREFIX}00000000{LONGEST_SOCKET}") == 108


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_token_is_for_its_user_alone(home):
    require_token()
    path = home / ".ray" / "auth_token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    token = path.read_text()
    assert len(bytes.fromhex(token)) == 32
    require_token()
    assert path.read_text() == token
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "value"), [("RAY_AUTH_TOKEN", "secret"), ("RAY_AUTH_MODE", "disabled")]
)
def test_no_token_is_made_where_none_is_wanted(home, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    require_token()
    assert list(home.iterdir()) == []


def test_home_that_cannot_be_written(home, monkeypatch):
    monkeypatch.setenv("HOME", "/proc/nope")
    with pytest.raises(UsageError, match=r"/proc/nope/\.ray/auth_token cannot be written"):
        require_token()


# Through the command line.


def score(source, output, model, **environment):
    command = [sys.executable, "-m", "rsr.jobs.cli", "score", source, output, "--model", model]
    return subprocess.Popen(
        [*map(str, command), "--dtype", "float32", "--max-refused", "1"],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_hangups,
    )


@pytest.fixture
def source(tmp_path):
    """Rows without anything to score."""
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"messages": [[PROMPT]] * 3}), path)
    return path


@pytest.mark.ray
@pytest.mark.parametrize(
    ("name", "message"),
    [("HOME", "Ray keeps the token there"), ("TMPDIR", "Ray keeps its sockets and logs there")],
)
def test_run_where_ray_cannot_live(source, tmp_path, tiny_student, name, message):
    process = score(source, tmp_path / "out", tiny_student, **{name: "/proc/nope"})
    _, told = process.communicate(timeout=60)
    assert process.returncode == 2
    assert message in told
    assert len(told.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
def test_ray_that_is_found_and_does_not_answer(source, tmp_path, tiny_student):
    # By its name and arguments a Ray of this machine, whose head is gone.
    raylet = tmp_path / "raylet"
    shutil.copy(os.path.realpath(sys.executable), raylet)
    libraries = {
        "PYTHONHOME": sys.base_prefix,
        "LD_LIBRARY_PATH": sysconfig.get_config_var("LIBDIR"),
    }
    command = [str(raylet), "-c", "import time; time.sleep(60)", "--gcs-address=127.0.0.1:9"]
    stale = subprocess.Popen(command, env=os.environ | libraries | {"PYTHONHOME": sys.base_prefix})
    try:
        process = score(source, tmp_path / "out", tiny_student, RAY_ADDRESS="auto")
        _, told = process.communicate(timeout=50)
    finally:
        stale.kill()
        stale.wait()
    assert process.returncode == 2
    assert told.startswith("rsr: no Ray cluster answers at auto (")
    assert len(told.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.vllm
def test_run_leaves_nothing_beside_its_output(source, tmp_path, tiny_student, temporary):
    """Nor does it end well if no row has a score."""
    home = tmp_path / "home"
    home.mkdir()
    process = score(source, tmp_path / "out", tiny_student, HOME=str(home), TMPDIR=str(temporary))
    printed, told = process.communicate(timeout=300)
    assert process.returncode == 1, told
    assert "nothing was scored" in printed
    assert (
        "rsr: no row has a score: 3 no_response; rsr_status and rsr_detail in "
        in told.splitlines()[-1]
    )
    assert list(temporary.iterdir()) == []
    token = home / ".ray" / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert not list((tmp_path / "out").rglob("*probe*"))


@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.slow
def test_hangup_of_the_terminal_keeps_what_is_in_hand(tmp_path, tiny_student, temporary):
    """It reaches every process of the group, and twice: from the kernel and from the shell."""
    source = tmp_path / "rows.parquet"
    rows = [[PROMPT, {"role": "assistant", "content": f"{i} " * 100}] for i in range(3_000)]
    pq.write_table(pa.table({"messages": rows}), source)
    process = score(source, tmp_path / "out", tiny_student, TMPDIR=str(temporary))
    units = tmp_path / "out" / ".rsr" / "units"
    deadline = time.monotonic() + 200
    while not list(units.glob("*/*.scores")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    num_kept = len(list(units.glob("*/*.scores")))
    for _ in range(2):
        os.killpg(process.pid, signal.SIGHUP)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 75, told
    assert told.endswith("rsr: interrupted; the same command goes on from here\n")
    assert "lost" not in told
    assert len(list(units.glob("*/*.scores"))) > num_kept
    assert list(temporary.iterdir()) == []


PRIORITIES = """
import os
import ray
from rsr.jobs.cluster.session import ray_session
def priority():
    return os.getpriority(os.PRIO_PROCESS, 0)
with ray_session(None, verbose=False):
    of_worker = ray.get(ray.remote(priority).remote())
print(priority(), of_worker)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_workers_are_as_nice_as_the_command_that_was_typed(temporary, monkeypatch):
    """Ray's own would get a thirtieth of a core that another program uses."""
    monkeypatch.delenv("RAY_worker_niceness", raising=False)
    started = [sys.executable, "-c", PRIORITIES]
    told = subprocess.check_output(started, text=True, preexec_fn=lambda: os.nice(1))
    command, worker = map(int, told.split())
    assert worker == command == os.getpriority(os.PRIO_PROCESS, 0) + 1


ASKER = """
import os, sys
from contextlib import ExitStack
from rsr.jobs.cluster.options import ClusterOptions
from rsr.jobs.cluster.venue import Venue
from rsr.jobs.interrupt import StopRequest
with ExitStack() as held:
    venue = Venue(ClusterOptions(address=sys.argv[1]), held, StopRequest())
    answer = venue.ask(os.getpid, then=os.getpid)
print("a worker answers" if answer else "no worker answers", file=sys.stderr)
"""


class RayHead(NamedTuple):
    address: str
    process: subprocess.Popen


@pytest.fixture
def ray_head(temporary):
    """Starts a head of this test's own, in a mode of Ray's."""
    heads = []

    def start(environment):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        options = [f"--port={port}", "--num-cpus=1", "--include-dashboard=false", "--block"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", *options]
        with (temporary / "head.log").open("w") as log:
            heads.append(
                subprocess.Popen(
                    [*command, f"--temp-dir={temporary}/ray", "--disable-usage-stats"],
                    env=os.environ | environment,
                    stdout=log,
                    stderr=log,
                )
            )
        deadline = time.monotonic() + 100
        while "Ray runtime started" not in (temporary / "head.log").read_text():
            assert heads[-1].poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        return RayHead(f"127.0.0.1:{port}", heads[-1])

    yield start
    for head in heads:
        head.terminate()
        head.wait(60)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["disabled", "token"])
def test_token_is_shown_to_a_cluster_that_wants_one_and_to_no_other(home, ray_head, mode):
    require_token()
    environment = os.environ | {"HOME": str(home)}
    head = ray_head({"HOME": str(home), "RAY_AUTH_MODE": mode})
    asked = subprocess.run(
        [sys.executable, "-c", ASKER, head.address],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert asked.stderr.splitlines()[-1:] == ["a worker answers"], asked.stderr


TEXTS_RUN = Path(__file__).parents[2] / "support" / "texts_run.py"


def told_by_a_run_that_loses(process_name, root, ray, *arguments):
    """What a run says of its end, after a process of `ray` was killed during its units.

    ray: gives the process of which Ray's are children, from the run's own process. Where Ray ends
    the run without a word, it is not this process that ends.
    """
    run = subprocess.Popen(
        [sys.executable, str(TEXTS_RUN), str(root), *arguments],
        stdout=subprocess.PIPE,
        text=True,
    )
    events = root / "out" / ".rsr" / "events.jsonl"
    deadline = time.monotonic() + 200
    while not any(event["event"] == "unit_finished" for event in read_events(events)):
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    found = [p for p in ray(psutil.Process(run.pid)).children() if p.name() == process_name]
    assert len(found) == 1
    found[0].kill()
    printed, _ = run.communicate(timeout=200)
    assert run.returncode == 0, printed
    told = json.loads(printed.splitlines()[-1])
    assert not told["is_written"]
    (failure,) = told["failures"]
    assert 0 < failure["num_rows"] < 1000
    assert (told["last_event"]["event"], told["last_event"]["outcome"]) == ("run_ended", "failed")
    return failure["reason"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("process", ["raylet", "gcs_server"])
def test_ray_that_ends_ends_the_run_and_the_run_says_so(tmp_path, process):
    """Without its control store Ray ends the driver's process after a minute, without a word."""
    reason = told_by_a_run_that_loses(process, tmp_path, lambda run: run)
    assert reason.startswith(f"{process}, a process of the Ray that this run started, has ended")


@pytest.mark.ray
@pytest.mark.slow
def test_cluster_whose_head_ends_ends_the_run_and_the_run_says_so(tmp_path, home, ray_head):
    head = ray_head({"HOME": str(home), "RAY_AUTH_MODE": "disabled"})
    process = psutil.Process(head.process.pid)
    reason = told_by_a_run_that_loses("gcs_server", tmp_path, lambda _: process, head.address)
    port = head.address.rpartition(":")[-1]
    assert reason.startswith("the head of the Ray cluster, ")
    assert f":{port}, has not answered for 3" in reason
