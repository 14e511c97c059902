"""One contract for both storages; an object store through bad nights; locks that hold."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from faulty_proxy import FAULTS

from rsr.jobs.cli import main
from rsr.jobs.errors import Interrupted, UsageError
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.verify import verify_output
from rsr.jobs.shards.columns import TrajectoryColumns
from rsr.jobs.shards.inputs import find_inputs
from rsr.jobs.shards.json_input import stage_json
from rsr.jobs.shards.reader import iter_rows
from rsr.jobs.shards.shard import Unit, describe_shard
from rsr.jobs.storage import object_lock
from rsr.jobs.storage.base import StorageError
from rsr.jobs.storage.bucket import open_bucket
from rsr.jobs.storage.locks import HeldError, Holder
from rsr.jobs.storage.open import locate, open_storage


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    return tmp_path / "root" if request.param == "local" else request.getfixturevalue("s3_url")


def write_table(url, table, **options):
    storage, name = locate(url)
    with storage.writing(name) as temporary:
        pq.write_table(table, temporary, **options)
    return str(url)


@pytest.mark.seconds
def test_file_is_there_whole_or_not_at_all(root):
    storage = open_storage(root)
    assert storage.find("a/b.txt") is None
    assert storage.list() == []
    storage.write("a/b.txt", b"first")
    first = storage.find("a/b.txt")
    assert (first.name, first.num_bytes) == ("a/b.txt", 5)
    assert abs(first.modified_s - time.time()) < 60

    def fail_half_way():
        with storage.writing("a/b.txt") as temporary:
            temporary.write_bytes(b"half of th")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert storage.read("a/b.txt") == b"first"
    with storage.writing("a/b.txt") as temporary:
        temporary.write_bytes(b"second one")
    assert storage.read("a/b.txt") == b"second one"
    assert storage.read("a/b.txt", last_bytes=3) == b"one"
    assert storage.read("a/b.txt", last_bytes=300) == b"second one"
    assert storage.find("a/b.txt").version != first.version
    with storage.open("a/b.txt") as file:
        file.seek(7)
        assert file.read(2) == b"on"


@pytest.mark.seconds
def test_files_are_listed_and_removed_by_folder(root):
    storage = open_storage(root)
    for name in ("a/1", "a/deep/2", "ab/3", "4"):
        storage.write(name, b"x")
    assert [f.name for f in storage.list()] == ["4", "a/1", "a/deep/2", "ab/3"]
    assert [f.name for f in storage.list("a")] == ["a/1", "a/deep/2"]
    storage.remove_folder("a")
    storage.remove_folder("a")
    storage.remove("4")
    storage.remove("4")
    assert [f.name for f in storage.list()] == ["ab/3"]
    for read in (storage.read, storage.open):
        with pytest.raises(FileNotFoundError):
            read("a/1")


@pytest.mark.seconds
def test_lock_is_held_by_one(root):
    first, second = open_storage(root), open_storage(root)
    assert first.holder("lock") is None
    with first.hold("lock"):
        holder = second.holder("lock")
        with pytest.raises(HeldError) as refused, second.hold("lock"):
            pass
        assert refused.value.holder == holder
        assert f"process {holder.pid} on {holder.host} since 20" in str(refused.value)
    assert first.holder("lock") is None
    with second.hold("lock"):
        assert first.holder("lock") is not None


def test_other_schemes_are_refused_by_name():
    for url in ("ftp://host/file", "s3://"):
        with pytest.raises(UsageError, match="expected a local path or one of s3://bucket"):
            open_storage(url)


def test_inputs_are_found_on_an_object_store(s3_url):
    for name in ("a.parquet", "deep/b.parquet", "_no/c.parquet", "deep/er/d.parquet"):
        write_table(f"{s3_url}/{name}", pa.table({"text": ["x"]}))
    assert find_inputs(f"{s3_url}/a.parquet") == [(f"{s3_url}/a.parquet", "a.parquet")]
    names = ["a.parquet", "deep/b.parquet", "deep/er/d.parquet"]
    assert find_inputs(f"{s3_url}/") == [(f"{s3_url}/{n}", n) for n in names]
    for pattern, found in (
        ("*.parquet", ["a.parquet"]),
        ("**/*.parquet", ["_no/c.parquet", *names]),
        ("de*/[!c].parquet", ["deep/b.parquet"]),
        ("deep/?.parquet", ["b.parquet"]),
    ):
        assert sorted(n for _, n in find_inputs(f"{s3_url}/{pattern}")) == sorted(found)
    for pattern, message in (("none/", "no such file or folder"), ("*.pq", "no file matches")):
        with pytest.raises(UsageError, match=message):
            find_inputs(f"{s3_url}/{pattern}")
    with pytest.raises(OSError, match="no-such-bucket"):
        find_inputs("s3://no-such-bucket/x")


def test_json_lines_are_staged_on_an_object_store(s3_url):
    lines = [json.dumps({"text": f"row {i}", "n": i}) for i in range(5)]
    open_storage(s3_url).write("a.jsonl", "\n".join(lines).encode())
    stage_json(f"{s3_url}/a.jsonl", f"{s3_url}/out/a.parquet")
    batches = iter_rows(f"{s3_url}/out/a.parquet", 0, 5)
    assert [i for b in batches for i in b["n"].to_pylist()] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "fault", [pytest.param(f, marks=[pytest.mark.slow] if f == "timeout" else []) for f in FAULTS]
)
def test_fault_is_survived_without_a_lost_or_a_half_file(s3, s3_url, fault):
    storage = open_storage(s3_url)
    # Each silence costs a second.
    num_files = 2 if fault == "timeout" else 6
    contents = {f"f{i}": bytes([i]) * 50_000 for i in range(num_files)}
    with s3.faults(0.5, fault) as injected:
        for name, content in contents.items():
            storage.write(name, content)
        for name, content in contents.items():
            assert storage.read(name) == content
            with storage.open(name) as file:
                assert file.read() == content
    assert injected[fault] >= num_files // 2
    assert [f.name for f in storage.list()] == sorted(contents)


def test_large_file_goes_up_in_parts_through_faults(s3, s3_url):
    storage = open_storage(s3_url)
    content = bytes(range(256)) * (12 << 12)
    with s3.faults(0.3, "500", "lost answer", "truncated") as injected:
        with storage.writing("large") as temporary:
            temporary.write_bytes(content)
        with storage.open("large") as file:
            assert file.read() == content
    assert sum(injected.values()) >= 1


def test_store_that_stays_down_is_an_error_that_names_the_file(s3, s3_url, monkeypatch):
    storage = open_storage(s3_url)
    storage.write("kept", b"as it was")
    with monkeypatch.context() as patch:
        patch.setattr("rsr.jobs.storage.bucket.MAX_RETRIES", 1)
        patch.setattr("rsr.jobs.storage.bucket.PAUSES_S", (0.1,))
        open_bucket.cache_clear()
        with s3.faults(1.0, "500"), pytest.raises(StorageError, match=f"{s3_url}/kept.*500"):
            storage.write("kept", b"other")
    open_bucket.cache_clear()
    assert storage.read("kept") == b"as it was"


def test_write_never_says_that_a_file_is_missing(s3):
    """It is an error of the place, which is gone or has ended the upload."""
    with pytest.raises(StorageError, match="s3://no-such-bucket/file"):
        open_storage("s3://no-such-bucket").write("file", b"content")
    with pytest.raises(StorageError, match="s3://no-such-bucket/large"):
        open_storage("s3://no-such-bucket").write("large", bytes(12 << 20))


@pytest.mark.slow
def test_run_on_an_object_store_through_a_bad_night(s3, s3_url, make_run):
    table = pa.table({"text": [f"row {i}" for i in range(23)], "x": list(range(23))})
    run = make_run({"a.parquet": table, "deep/b.parquet": table.slice(3)}, root=f"{s3_url}/out")
    with s3.faults(0.35) as injected, run.output.lock():
        for shard in run.shards:
            run.finish(shard)
    assert sum(injected.values()) >= 10
    checked = verify_output(run.output, deep=True, stop=StopRequest())
    assert checked.problems == []
    assert checked.num_rows == 43
    status = CliRunner().invoke(main, ["status", f"{s3_url}/out", "--json"])
    assert json.loads(status.stdout)["is_finished"]
    # Damage is found here as on a disk, and what repairs it is named.
    name = run.shards[0].name
    content = run.output.storage.read(name)
    run.output.storage.write(name, content[:-1] + b"x")
    assert run.store.read_receipt(run.shards[0]) is None
    checked = verify_output(run.output, deep=False, stop=StopRequest())
    assert checked.repair[0] == f"aws s3 rm '{s3_url}/out/{name}'"


def test_damaged_unit_on_an_object_store_is_not_trusted(s3_url, make_run):
    run = make_run({"a.parquet": pa.table({"text": list("abcdef")})}, root=f"{s3_url}/out")
    (shard,) = run.shards
    for start in (0, 2, 4):
        run.keep(Unit(shard, start, start + 2))
    name = run.store.unit_name(Unit(shard, 2, 4))
    run.output.storage.write(name, run.output.storage.read(name)[:-5])
    assert [u.start for u, _ in run.store.kept_units(shard)] == [0, 4]


def test_input_is_read_from_an_object_store_by_row_group(s3, s3_url):
    table = pa.table({"text": [f"row {i}" for i in range(100)]})
    path = write_table(f"{s3_url}/in.parquet", table, row_group_size=9)
    shard = describe_shard(path, "in.parquet", TrajectoryColumns(text="text"), None)
    assert shard.num_rows == 100
    with s3.faults(0.2):
        rows = [t for b in iter_rows(path, 40, 77) for t in b["text"].to_pylist()]
    assert rows == table["text"].to_pylist()[40:77]


@pytest.fixture
def short_lock(monkeypatch):
    """Stores tell times in whole seconds."""
    monkeypatch.setattr(object_lock, "RENEW_S", 0.2)
    monkeypatch.setattr(object_lock, "EXPIRY_S", 3.0)


def test_lock_is_renewed_while_held(s3_url, short_lock):
    storage = open_storage(s3_url)
    with storage.hold("lock"):
        time.sleep(4.5)
        assert storage.holder("lock") is not None
        with pytest.raises(HeldError), storage.hold("lock"):
            pass


def test_lock_of_the_dead_is_taken_over_by_one(s3_url, short_lock):
    storage = open_storage(s3_url)
    storage.write("lock", b'{"pid": 1, "host": "gone", "started_s": 0}')
    time.sleep(4.5)
    assert storage.holder("lock") is None
    winners, losers, done = [], [], threading.Event()

    def contend():
        try:
            with storage.hold("lock"):
                winners.append(1)
                done.wait(20)
        except HeldError:
            losers.append(1)

    threads = [threading.Thread(target=contend) for _ in range(4)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    while len(winners) + len(losers) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    done.set()
    for thread in threads:
        thread.join()
    assert (len(winners), len(losers)) == (1, 3)


WRITE = """
import sys, time
from rsr.jobs.storage import open_storage
with open_storage(sys.argv[1]).writing("x") as temporary:
    temporary.write_bytes(b"half of it")
    print("writing", flush=True)
    time.sleep(600)
"""


def test_process_that_is_killed_while_it_writes_leaves_no_temporary_file(s3_url, tmp_path):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    command = [sys.executable, "-c", WRITE, s3_url]
    environment = os.environ | {"TMPDIR": str(temporary)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout.readline() == b"writing\n"
        process.kill()
    assert list(temporary.iterdir()) == []
    assert open_storage(s3_url).find("x") is None


HOLD = """
import sys, time
from rsr.jobs.storage import open_storage
with open_storage(sys.argv[1]).hold("lock"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_lock_of_a_process_that_was_killed_on_this_machine_is_free_at_once(s3_url):
    storage = open_storage(s3_url)
    with subprocess.Popen([sys.executable, "-c", HOLD, s3_url], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(HeldError, match=str(process.pid)), storage.hold("lock"):
            pass
        process.kill()
    assert storage.holder("lock") is None
    with storage.hold("lock"):
        assert storage.holder("lock").pid == os.getpid()


@pytest.mark.parametrize("changed", [{"host": "other"}, {"processes": "other"}, {"processes": ""}])
def test_lock_of_a_process_that_cannot_be_looked_for_is_not_taken_over(s3_url, changed):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    holder = replace(Holder.this_process(), pid=ended.pid)
    assert holder.is_dead
    storage = open_storage(s3_url)
    storage.write("lock", replace(holder, **changed).to_json().encode())
    with pytest.raises(HeldError), storage.hold("lock"):
        pass


def test_run_whose_lock_was_taken_over_stops(s3_url, short_lock):
    storage, stop = open_storage(s3_url), StopRequest()
    before = signal.getsignal(signal.SIGTERM)
    with stop.listening(), storage.hold("lock"):
        assert signal.getsignal(signal.SIGTERM) != before
        storage.write("lock", b'{"pid": 2, "host": "other", "started_s": 0}')
        with pytest.raises(Interrupted):
            stop.wait(10)
        # The new holder's lock is left alone.
    assert b"other" in storage.read("lock")
    assert signal.getsignal(signal.SIGTERM) == before


def test_second_run_on_an_object_store_is_refused_with_who_has_it(s3_url):
    output = RunFolder(f"{s3_url}/out")
    refused = pytest.raises(UsageError, match=r"is being written by process \d+ on")
    with output.lock(), refused, RunFolder(f"{s3_url}/out").lock():
        pass
