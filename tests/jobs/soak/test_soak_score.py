"""Nights of `rsr score`: a Ray cluster of three nodes, real vLLM, and faults by the dice."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import polars as pl
import psutil
import pytest
from soak_cluster import SoakCluster
from soak_disk import SmallDisk
from soak_night import RSR, Fault, Night, Report, read_rows

from rsr.jobs.run.events import read_events

ROWS_PER_SHARD = 512
NUM_SHARDS_LONG, NUM_SHARDS_SHORT = 8, 3
NUM_NODES, NUM_WORKERS = 3, 2
"""A node more than workers: there is room for that of a node that is killed. A worker's start takes
fifteen seconds of a core, most of a night."""
WORKERS = ["--workers", str(NUM_WORKERS)]
"""Said, since the borders of units, which decide last bits, follow the workers that a run begins
with: a node may be away when a round begins."""
UNIT_TIMEOUT_S = 25
STOP_S = 60
"""Longer than the deadline of a unit, so that only a deadline helps."""
MODEL_AWAY_S = 12
"""Long enough for a worker to be lost, and for its successor to look for the model in vain."""
CLOCK_JUMPS_S = (3 * 3600, -86_400, 40 * 86_400)
FAKETIME = os.environ.get("RSR_FAKETIME", "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")
"""The library that jumps clocks: of Debian's package libfaketime, or another build of it."""
SHORT_SECONDS, LONG_SECONDS = 1500, 3600
MAX_RELATIVE_DIFFERENCE = 1e-5
"""Of a unit that was halved: another batch, other last bits. Whole units must be equal."""

SHARE = 60 / 320
"""Of all faults of a long soak."""
SHORT_FAULTS = 8

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(LONG_SECONDS + 300),
]


def write_input(folder: Path, num_shards: int) -> Path:
    """JSON lines: the run reads a staged copy, and what is edited is not the copy."""
    dice = random.Random(1)
    folder.mkdir()
    for shard in range(num_shards):
        with (folder / f"shard-{shard:02d}.jsonl").open("w") as file:
            for row in range(shard * ROWS_PER_SHARD, (shard + 1) * ROWS_PER_SHARD):
                words = " ".join(str(dice.randrange(10_000)) for _ in range(dice.randrange(20, 90)))
                print(json.dumps({"response": words, "prompt": "Count:", "id": row}), file=file)
    return folder


class ScoreNight(Night):
    """A night on one cluster, which outlives the drivers and loses workers and nodes."""

    command = "score"
    lasting_s = 8.0
    fault_pause_s = (0.2, 3.0)
    progress_patience_s = 40.0

    def __init__(
        self,
        source: Path,
        quiet: Path,
        disk: SmallDisk,
        log: Path,
        report: Report,
        *,
        model: Path,
        undisturbed: psutil.Popen,
    ) -> None:
        super().__init__(source, quiet, disk, log, report)
        self.model, self.undisturbed = model, undisturbed
        self.faketime_file = log.with_name("faketime")
        self.faketime_file.write_text("+0")
        self.no_clock_jumps = self._why_no_clock_jumps()
        self.unread = log.with_name("unread.jsonl")
        self.unread.write_text('{"text of no": "known column"}\n')
        self.cluster = SoakCluster(NUM_NODES)
        self.has_halved = False

    # The driver

    def _arguments(self, source: Path, output: Path) -> list[str]:
        return [
            str(source), str(output), "--model", str(self.model), "--json", *WORKERS,
            "--address", self.cluster.address, "--unit-timeout", str(UNIT_TIMEOUT_S),
        ]  # fmt: skip

    def arguments(self, output: Path) -> list[str]:
        return self._arguments(self.source, output)

    def refused_arguments(self, output: Path) -> list[str]:
        return self._arguments(self.unread, output)

    def environment(self) -> dict[str, str]:
        # The cluster of this process asks for no token. A driver that shows one also asks for one,
        # and the cluster takes it for dead.
        environment = super().environment() | {"RAY_AUTH_MODE": "disabled"}
        return environment if self.no_clock_jumps else environment | self._faketime()

    def _faketime(self) -> dict[str, str]:
        return {
            "LD_PRELOAD": FAKETIME,
            "FAKETIME_TIMESTAMP_FILE": str(self.faketime_file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    def _why_no_clock_jumps(self) -> str:
        """Why the clock cannot be made to jump here; "" if it can."""
        if not Path(FAKETIME).exists():
            return f"{FAKETIME} is not installed"
        sleep = [sys.executable, "-c", "import time; time.sleep(0.01)"]
        done = subprocess.run(sleep, env={**os.environ, **self._faketime()}, capture_output=True)
        # So it is with 0.9.10 and Python 3.11: any sleep is an invalid argument.
        return f"nothing can sleep under {FAKETIME}" if done.returncode else ""

    def _events(self) -> list[dict]:
        return list(read_events(self.output / ".rsr" / "events.jsonl"))

    def has_begun(self) -> bool:
        return any(
            event["event"] == "run_started" and event["pid"] == self._pid
            for event in self._events()
        )

    def num_finished(self) -> int:
        return sum(event["event"] == "unit_finished" for event in self._events())

    def faults(self) -> list[Fault]:
        common = {fault.name: fault for fault in super().faults()}
        if self.no_clock_jumps:
            self.report.left_out["clock jump"] = self.no_clock_jumps
        own = [
            Fault("model folder away", self.move_model_away, 5),
            Fault("worker SIGKILL", self.kill_worker, 14),
            # The engine runs in its worker's process: this is what its native code does when it
            # fails.
            Fault("engine SIGSEGV", self.crash_engine, 9),
            Fault("worker SIGSTOP", self.stop_worker, 6),
            Fault("node killed", self.kill_node, 6),
            Fault("torn unit", lambda: self.tear(".rsr/units/*/*.scores"), 3),
            Fault("clock jump", self.jump_clock, 5),
        ]
        # A short night: what befalls workers, and of the rest what takes a cluster to show.
        first = [common.pop(name) for name in SHORT_COMMON_FAULTS]
        return [*own[:2], *first, *own[2:], *common.values()]

    # Faults that hit workers

    def _a_worker(self) -> psutil.Process | None:
        workers = self.cluster.workers("ray::Worker")
        return self.dice.choice(workers) if workers else None

    def _signal_a_worker(self, number: signal.Signals) -> psutil.Process | None:
        worker = self._a_worker()
        if worker is not None:
            worker.send_signal(number)
        return worker

    def kill_worker(self) -> bool:
        return self._signal_a_worker(signal.SIGKILL) is not None

    def crash_engine(self) -> bool:
        return self._signal_a_worker(signal.SIGSEGV) is not None

    def stop_worker(self) -> bool:
        worker = self._signal_a_worker(signal.SIGSTOP)
        if worker is None:
            return False

        def wake() -> None:
            if worker.is_running():
                worker.send_signal(signal.SIGCONT)

        self.last("worker SIGSTOP", STOP_S, wake)
        return True

    def move_model_away(self) -> bool:
        """Move the model's folder away and kill a worker, whose successors find no model there."""
        if self.is_lasting("model") or self._a_worker() is None:
            return False
        away = self.model.with_name("away")
        self.model.rename(away)
        self.last("model", MODEL_AWAY_S, lambda: away.rename(self.model))
        self.kill_worker()
        return True

    def kill_node(self) -> bool:
        self.cluster.kill_node(self.dice)
        self.cluster.complete()
        return True

    def jump_clock(self) -> bool:
        self.faketime_file.write_text(f"{self.dice.choice(CLOCK_JUMPS_S):+d}")
        return True

    # The night

    def discard(self) -> None:
        self._count_setbacks()
        super().discard()

    def _count_setbacks(self) -> None:
        for event in self._events():
            if event["event"] == "worker_lost":
                self.report.setbacks[event["cause"]] += 1
            self.has_halved |= event.get("next") == "halved"

    def check_round(self) -> None:
        assert self.undisturbed.wait(timeout=300) == 0
        super().check_round()
        expected, found = read_rows(self.quiet), read_rows(self.output)
        self.report.rows_engine_error += (found["rsr_status"] == "engine_error").sum()
        for name in ("rsr", "rsr_mean_rank", "rsr_mean_surprisal"):
            difference = ((found[name] - expected[name]) / expected[name]).abs()
            assert not difference.is_null().any()
            largest = max(self.report.max_relative_difference, difference.max())
            self.report.max_relative_difference = largest
        assert input_columns(found).equals(input_columns(expected))

    def close(self) -> None:
        super().close()
        self._count_setbacks()
        if self.undisturbed.poll() is None:
            self.undisturbed.kill()
        self.cluster.shutdown()


SHORT_COMMON_FAULTS = (
    "input edited in place",
    "two runs under one new parent",
    "Ctrl-C in preparation",
    "driver SIGHUP",
    "OUTPUT immutable",
    "disk full",
)


def input_columns(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.select("response", "prompt", "id")


@pytest.fixture(autouse=True)
def own_ray(monkeypatch):
    """Nobody else's Ray on this machine is to find this cluster, nor it theirs."""
    # Short: the paths of Ray's sockets may be no longer than 107 bytes.
    with tempfile.TemporaryDirectory(prefix="rsr", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        # Nor is it to ask for a token because a run that an earlier test of this process made did.
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        yield


def test_nights_cost_no_row(tmp_path, soak_disk, soak_length, tiny_student, telling):
    started = time.monotonic()
    num_shards = NUM_SHARDS_LONG if soak_length.is_long else NUM_SHARDS_SHORT
    source = write_input(tmp_path / "in", num_shards)
    quiet = tmp_path / "quiet"
    # Beside the first driver, while that starts; on a Ray of its own, which faults pass over.
    undisturbed = psutil.Popen(
        [*RSR, "score", str(source), str(quiet), "--model", str(tiny_student), *WORKERS],
        stdout=subprocess.DEVNULL,
    )
    # Other tests share the student, and this one moves it away.
    model = Path(shutil.copytree(tiny_student, tmp_path / "model"))
    report = Report(soak_length.seed, num_shards * ROWS_PER_SHARD, NUM_NODES)
    night = ScoreNight(
        source, quiet, soak_disk, tmp_path / "log", report, model=model, undisturbed=undisturbed
    )
    if soak_length.is_long:
        night.max_burst = 16
    num_faults = soak_length.num_faults(SHARE, SHORT_FAULTS)
    with telling(night):
        night.run(num_faults, started + (LONG_SECONDS if soak_length.is_long else SHORT_SECONDS))
    assert report.faults.total() == num_faults
    assert report.rows_lost == report.rows_duplicated == report.rows_engine_error == 0
    assert report.files_of_others_touched == 0
    assert report.max_relative_difference <= MAX_RELATIVE_DIFFERENCE
    # Only a unit that was halved may differ at all.
    assert night.has_halved or report.rows_with_other_bits == 0
