"""A night in a few minutes: a Ray cluster of three nodes, real vLLM, and faults by the dice.

The short version runs with the suite; `make soak` injects 60 faults or more and keeps the report.
RSR_SOAK_FAULTS, RSR_SOAK_SEED and RSR_SOAK_REPORT (a file to write it to) say otherwise.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rsr.jobs.run.events import read_events

RSR = [sys.executable, "-m", "rsr.jobs.cli"]
NUM_FAULTS = int(os.environ.get("RSR_SOAK_FAULTS", "6"))
SEED = int(os.environ.get("RSR_SOAK_SEED", "0"))
REPORT = os.environ.get("RSR_SOAK_REPORT")
IS_LONG = NUM_FAULTS > 20

NUM_SHARDS, ROWS_PER_SHARD = (8, 512) if IS_LONG else (3, 512)
NUM_NODES = 3
UNIT_TIMEOUT_S = 25
STOP_S = 60
"""Longer than the deadline of a unit, so that only a deadline helps."""
DISK_FULL_S = 8
FAULT_PAUSE_S = (0.2, 3.0)
MAX_BURST = 8 if IS_LONG else 2
"""Faults in a row before the run is left alone until it has finished another unit."""
PROGRESS_PATIENCE_S = 40
"""Until a fault is injected although it has not."""
OUTPUT_DISK_MIB = 256
CLOCK_JUMPS_S = (3 * 3600, -86_400, 40 * 86_400)
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")
MAX_SECONDS = 3600 if IS_LONG else 550
MAX_RELATIVE_DIFFERENCE = 1e-5
"""Of a unit that was halved: another batch, other last bits. Whole units must be equal."""

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(MAX_SECONDS + 300),
]


def write_input(folder: Path) -> Path:
    dice = random.Random(1)
    folder.mkdir()
    for shard in range(NUM_SHARDS):
        rows = []
        for row in range(ROWS_PER_SHARD):
            words = " ".join(str(dice.randrange(10_000)) for _ in range(dice.randrange(20, 90)))
            rows.append({"id": shard * ROWS_PER_SHARD + row, "prompt": "Count:", "response": words})
        pq.write_table(pa.Table.from_pylist(rows), folder / f"shard-{shard:02d}.parquet")
    return folder


@dataclass
class Report:
    seed: int
    num_nodes: int
    num_rows: int
    seconds: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, str] = field(default_factory=dict)
    num_rounds: int = 0
    driver_starts: int = 0
    driver_exits: Counter[str] = field(default_factory=Counter)
    setbacks: Counter[str] = field(default_factory=Counter)
    rows_lost: int = 0
    rows_duplicated: int = 0
    rows_engine_error: int = 0
    rows_with_other_bits: int = 0
    max_relative_difference: float = 0.0


class Soak:
    """One driver after another on one cluster, while faults are injected."""

    def __init__(
        self,
        source: Path,
        output: Path,
        model: Path,
        undisturbed: psutil.Popen,
        quiet: Path,
        report: Report,
    ) -> None:
        from ray.cluster_utils import Cluster

        self.source, self.output, self.model, self.report = source, output, model, report
        self.undisturbed, self.quiet = undisturbed, quiet
        self.dice = random.Random(report.seed)
        # Not on the disk that will be full.
        self.faketime_file, self.driver_log = (
            source.parent / name for name in ("faketime", "driver.log")
        )
        self.faketime_file.write_text("+0")
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 1,
                "object_store_memory": 80 << 20,
                "include_dashboard": False,
            },
        )
        self.nodes = [self._add_node() for _ in range(NUM_NODES - 1)]
        self.driver: subprocess.Popen | None = None
        self.waking: list[tuple[float, psutil.Process]] = []
        self.ballast_until: float | None = None
        self.num_finished_before = 0

    def _add_node(self):
        return self.cluster.add_node(num_cpus=1, object_store_memory=80 << 20)

    # The driver

    def start_driver(self) -> None:
        environment = dict(os.environ)
        if FAKETIME.exists():
            environment |= {
                "LD_PRELOAD": str(FAKETIME),
                "FAKETIME_TIMESTAMP_FILE": str(self.faketime_file),
                "FAKETIME_NO_CACHE": "1",
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            }
        command = [
            *RSR, "score", str(self.source), str(self.output), "--model", str(self.model),
            "--json", "--address", self.cluster.address, "--unit-timeout", str(UNIT_TIMEOUT_S),
        ]  # fmt: skip
        with self.driver_log.open("ab") as log:
            self.driver = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        self.report.driver_starts += 1

    def is_driver_running(self) -> bool:
        return self.driver is not None and self.driver.poll() is None

    def _has_driver_begun(self) -> bool:
        """Before, nobody listens to signals yet."""
        assert self.driver is not None
        return any(
            event["event"] == "run_started" and event["pid"] == self.driver.pid
            for event in read_events(self.output / ".rsr" / "events.jsonl")
        )

    def end_driver(self, number: signal.Signals) -> int:
        assert self.driver is not None
        self.driver.send_signal(number)
        code = self.driver.wait(timeout=90)
        if code < 0:
            self.report.driver_exits[str(code)] += 1
        return code

    # Faults; each returns whether it could be injected

    def _a_worker(self) -> psutil.Process | None:
        workers = []
        for process in psutil.Process().children(recursive=True):
            try:
                if self.undisturbed in process.parents():
                    continue
                command = process.cmdline()
                if (
                    command
                    and command[0].startswith("ray::Worker")
                    and process.status() != "stopped"
                ):
                    workers.append(process)
            except psutil.Error:
                continue
        return self.dice.choice(sorted(workers, key=lambda p: p.pid)) if workers else None

    def _signal_a_worker(self, number: signal.Signals) -> psutil.Process | None:
        worker = self._a_worker()
        if worker is not None:
            worker.send_signal(number)
        return worker

    def kill_worker(self) -> bool:
        return self._signal_a_worker(signal.SIGKILL) is not None

    def crash_engine(self) -> bool:
        # The engine runs in its worker's process: this is what its native code does when it fails.
        return self._signal_a_worker(signal.SIGSEGV) is not None

    def stop_worker(self) -> bool:
        worker = self._signal_a_worker(signal.SIGSTOP)
        if worker is not None:
            self.waking.append((time.monotonic() + STOP_S, worker))
        return worker is not None

    def kill_driver(self) -> bool:
        return self.is_driver_running() and self.end_driver(signal.SIGKILL) == -signal.SIGKILL

    def terminate_driver(self) -> bool:
        if not (self.is_driver_running() and self._has_driver_begun()):
            return False
        code = self.end_driver(signal.SIGTERM)
        assert code in (75, 0), f"a terminated driver ended with {code}"
        return True

    def kill_node(self) -> bool:
        node = self.nodes.pop(self.dice.randrange(len(self.nodes)))
        self.cluster.remove_node(node, allow_graceful=False)
        self.nodes.append(self._add_node())
        return True

    def _tear(self, pattern: str) -> bool:
        """Cut a file at a random byte, while no driver runs that could have just read it."""
        if not self._files(pattern):
            return False
        if self.is_driver_running():
            self.end_driver(signal.SIGKILL)
        # What was finished has to be looked at again.
        self.driver = None
        files = self._files(pattern)
        if files:
            file = self.dice.choice(files)
            os.truncate(file, self.dice.randrange(file.stat().st_size))
        return bool(files)

    def _files(self, pattern: str) -> list[Path]:
        found = sorted(self.output.glob(pattern))
        return [path for path in found if path.is_file() and path.stat().st_size]

    def tear_unit(self) -> bool:
        return self._tear(".rsr/units/*/*.scores")

    def tear_receipt(self) -> bool:
        return self._tear(".rsr/receipts/*.json")

    def leave_temporary_file(self) -> bool:
        folder = self.dice.choice([self.output, self.output / ".rsr" / "receipts"])
        if not folder.is_dir() or self.ballast_until is not None:
            return False
        shard, token = self.dice.randrange(NUM_SHARDS), self.dice.randbytes(4).hex()
        name = f".shard-{shard:02d}.parquet.{token}.rsr-tmp"
        (folder / name).write_bytes(b"PAR1" + self.dice.randbytes(1000))
        return True

    def fill_disk(self) -> bool:
        ballast = self.output.parent / "ballast"
        with ballast.open("ab") as file:
            try:
                while True:
                    os.write(file.fileno(), bytes(1 << 20))
            except OSError:
                pass
        self.ballast_until = time.monotonic() + DISK_FULL_S
        return True

    def jump_clock(self) -> bool:
        self.faketime_file.write_text(f"{self.dice.choice(CLOCK_JUMPS_S):+d}")
        return True

    def kinds(self) -> list[tuple[str, Callable[[], bool], int]]:
        """Name, injector and weight of each that this machine allows for."""
        kinds = [
            ("worker SIGKILL", self.kill_worker, 14),
            ("engine SIGSEGV", self.crash_engine, 9),
            ("worker SIGSTOP", self.stop_worker, 6),
            ("node killed", self.kill_node, 6),
            ("driver SIGKILL", self.kill_driver, 4),
            ("driver SIGTERM", self.terminate_driver, 3),
            ("torn unit", self.tear_unit, 3),
            ("torn receipt", self.tear_receipt, 3),
            ("half-written temporary file", self.leave_temporary_file, 5),
            ("disk full", self.fill_disk, 4),
            ("clock jump", self.jump_clock, 5),
        ]
        left_out = self.report.left_out
        if not os.path.ismount(self.output.parent):
            left_out["disk full"] = "no tmpfs could be mounted"
        if not FAKETIME.exists():
            left_out["clock jump"] = f"{FAKETIME} is not installed"
        return [kind for kind in kinds if kind[0] not in left_out]

    # The run

    def run(self, num_faults: int, end: float) -> None:
        """Inject that many faults, each kind at least once; then let the run come to its end."""
        kinds = self.kinds()
        plan = self.dice.sample(kinds, k=min(num_faults, len(kinds)))
        plan += self.dice.choices(kinds, [w for *_, w in kinds], k=num_faults - len(plan))
        burst_left = 0
        while plan:
            assert time.monotonic() < end, f"{len(plan)} faults were not injected in time"
            self._keep_driver_running()
            if not burst_left:
                self._wait_for_progress()
                burst_left = self.dice.randint(1, MAX_BURST)
            burst_left -= 1
            time.sleep(self.dice.uniform(*FAULT_PAUSE_S))
            self._clean_up_after_faults()
            name, inject, _ = plan.pop(0)
            if inject():
                self.report.faults[name] += 1
            else:
                plan.insert(self.dice.randrange(len(plan) + 1), (name, inject, 0))
        self._come_to_an_end(end)

    def _come_to_an_end(self, end: float) -> None:
        while self.driver is None or self.driver.poll() != 0:
            assert time.monotonic() < end, "the run does not end"
            self._keep_driver_running()
            self._clean_up_after_faults()
            time.sleep(0.5)

    def _keep_driver_running(self) -> None:
        if self.is_driver_running():
            return
        if self.driver is not None and self.driver.returncode == 0:
            self.begin_round()
        elif self.driver is not None and self.driver.returncode > 0:
            self.report.driver_exits[str(self.driver.returncode)] += 1
        self.start_driver()

    def begin_round(self) -> None:
        """The whole of INPUT again: there are faults left, and nothing to disturb."""
        self.check_round()
        shutil.rmtree(self.output)
        self.num_finished_before = 0

    def check_round(self) -> None:
        """Hold the output against its receipts, its input and the undisturbed run's."""
        report = self.report
        report.num_rounds += 1
        for event in read_events(self.output / ".rsr" / "events.jsonl"):
            if event["event"] == "worker_lost":
                report.setbacks[event["cause"]] += 1
        verify = subprocess.run(
            [*RSR, "verify", str(self.output), "--deep"],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert verify.returncode == 0, verify.stdout + verify.stderr
        assert self.undisturbed.wait(timeout=300) == 0
        expected, scored = read_scores(self.quiet), read_scores(self.output)
        ids = Counter(scored["id"].to_list())
        report.rows_lost += len(set(expected["id"]) - set(ids))
        report.rows_duplicated += sum(count - 1 for count in ids.values())
        report.rows_engine_error += (scored["rsr_status"] == "engine_error").sum()
        assert scored["id"].to_list() == expected["id"].to_list()
        for name in ("rsr", "rsr_mean_rank", "rsr_mean_surprisal"):
            difference = ((scored[name] - expected[name]) / expected[name]).abs()
            assert not difference.is_null().any()
            report.rows_with_other_bits += int((difference > 0).sum()) if name == "rsr" else 0
            report.max_relative_difference = max(report.max_relative_difference, difference.max())

    def _wait_for_progress(self) -> None:
        """Until a unit was finished since the last time."""
        patience = time.monotonic() + PROGRESS_PATIENCE_S
        while time.monotonic() < patience and self.is_driver_running():
            self._clean_up_after_faults()
            finished = self._num_finished()
            if finished > self.num_finished_before:
                break
            time.sleep(0.25)
        self.num_finished_before = self._num_finished()

    def _num_finished(self) -> int:
        events = read_events(self.output / ".rsr" / "events.jsonl")
        return sum(event["event"] == "unit_finished" for event in events)

    def _clean_up_after_faults(self) -> None:
        now = time.monotonic()
        for due, process in list(self.waking):
            if due <= now:
                self.waking.remove((due, process))
                if process.is_running():
                    process.send_signal(signal.SIGCONT)
        if self.ballast_until is not None and self.ballast_until <= now:
            (self.output.parent / "ballast").unlink()
            self.ballast_until = None

    def close(self) -> None:
        if self.is_driver_running():
            self.end_driver(signal.SIGKILL)
        if self.undisturbed.poll() is None:
            self.undisturbed.kill()
        self.cluster.shutdown()


def read_scores(folder: Path) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(file) for file in sorted(folder.glob("*.parquet"))])


@pytest.fixture(autouse=True)
def own_ray_folder(monkeypatch):
    """Nobody else's Ray on this machine is to find this cluster, nor it theirs."""
    # Short: the paths of Ray's sockets may be no longer than 107 bytes.
    with tempfile.TemporaryDirectory(prefix="rsr", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs that can be filled without harm, or a plain folder where none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={OUTPUT_DISK_MIB}m"]
    mounted = subprocess.run(["mount", *options, "tmpfs", str(folder)], capture_output=True)
    yield folder
    if mounted.returncode == 0:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_nights_cost_no_row(tmp_path, small_disk, tiny_student):
    started = time.monotonic()
    source = write_input(tmp_path / "in")
    quiet = tmp_path / "quiet"
    # Beside the first driver, while that starts; on a Ray of its own, which faults pass over.
    undisturbed = psutil.Popen(
        [*RSR, "score", str(source), str(quiet), "--model", str(tiny_student), "--json"],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    report = Report(SEED, NUM_NODES, NUM_SHARDS * ROWS_PER_SHARD)
    soak = Soak(source, small_disk / "out", tiny_student, undisturbed, quiet, report)
    try:
        soak.run(NUM_FAULTS, started + MAX_SECONDS)
        soak.check_round()
    finally:
        soak.close()
        report.seconds = round(time.monotonic() - started, 1)
        print(json.dumps(vars(report), indent=2))
        print(soak.driver_log.read_text()[-5000:])
    assert report.faults.total() == NUM_FAULTS
    assert report.rows_lost == report.rows_duplicated == report.rows_engine_error == 0
    assert report.max_relative_difference <= MAX_RELATIVE_DIFFERENCE
    if REPORT:
        Path(REPORT).write_text(json.dumps(vars(report), indent=2) + "\n")
