"""A night of faults by the dice: one command is started again and again until its run is done.

What can befall any command that writes a run is here; what befalls one of them alone is added by
a subclass, which also says how the command is typed. Some faults last for seconds, and others come
meanwhile; a fault whose outcome is exact lifts those first.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
from disturbed_run import heed_hangups
from soak_disk import Others, SmallDisk, snapshot

RSR = [sys.executable, "-m", "rsr.jobs.cli"]

DONE, FAILED, REFUSED, STOPPED = 0, 1, 2, 75
GROWS_WITHOUT_A_RUN = ("lock", "run.log", "events.jsonl")
"""Files below .rsr that a command may write although it goes on with nothing."""


@dataclass
class Report:
    """What a night did. setbacks: worker losses by cause, as the run's own events tell them.

    faults_by_pass: of a command that passes over shards, by the pass that it was in.
    bucket_requests: that failed, by how.
    """

    seed: int
    num_rows: int
    num_nodes: int = 1
    seconds: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    faults_by_pass: dict[str, Counter[str]] = field(default_factory=dict)
    bucket_requests: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, str] = field(default_factory=dict)
    num_rounds: int = 0
    driver_starts: int = 0
    driver_exits: Counter[str] = field(default_factory=Counter)
    setbacks: Counter[str] = field(default_factory=Counter)
    rows_lost: int = 0
    rows_duplicated: int = 0
    rows_engine_error: int = 0
    rows_with_other_bits: int = 0
    files_with_other_bytes: int = 0
    max_relative_difference: float = 0.0
    files_of_others_touched: int = 0

    def keep(self, file: Path, night: str) -> None:
        """Put this report into a file that holds one for each night."""
        reports = json.loads(file.read_text()) if file.exists() else {}
        # A report of the form that knew one command only is not kept.
        reports = {name: value for name, value in reports.items() if isinstance(value, dict)}
        reports = {name: value for name, value in reports.items() if "faults" in value}
        reports[night] = vars(self)
        file.write_text(json.dumps(reports, indent=2) + "\n")


@dataclass(frozen=True)
class Fault:
    """A kind of fault. inject: returns whether it could be; weight: how often it is drawn."""

    name: str
    inject: Callable[[], bool]
    weight: int


@dataclass(frozen=True)
class Lasting:
    """A fault that is there until `due`, by the monotonic clock, or until it is lifted."""

    name: str
    due: float
    lift: Callable[[], None]


class Night:
    """One driver after another, and what happens to them.

    OUTPUT stands in a folder that each round finds missing, and others put files into that folder
    as soon as it is there.
    """

    command: str
    program = RSR
    """What is started with the command's name."""
    lasting_s = 4.0
    """How long a full disk or a locked OUTPUT stays so."""
    fault_pause_s = (0.1, 1.5)
    max_burst = 2
    """Faults in a row before the run is left alone until it has finished something more."""
    progress_patience_s = 10.0
    """Until a fault is injected although it has not."""
    ending_patience_s = 90.0
    """For a command that is refused or told to stop."""

    def __init__(
        self, source: Path, quiet: Path, disk: SmallDisk, log: Path, report: Report
    ) -> None:
        self.source, self.quiet, self.disk, self.report = source, quiet, disk, report
        self.dice = random.Random(report.seed)
        # Not on the disk that will be full.
        self.log = log
        self.parent = disk.folder / "new"
        self.output, self.second = self.parent / "out", self.parent / "second"
        self.others = Others()
        self.others.watch(source)
        self.others.plant(disk.folder / "others")
        self.driver: subprocess.Popen[bytes] | None = None
        self.lasting: list[Lasting] = []
        self.leftovers: list[Path] = []
        self.num_finished_before = 0
        self._log_start = 0
        self._is_exit_noted = True

    # What a subclass says

    @property
    def name(self) -> str:
        """What the report is kept under."""
        return self.command

    def arguments(self, output: Path) -> list[str]:
        """The command that writes the run, without its name."""
        raise NotImplementedError

    def refused_arguments(self, output: Path) -> list[str]:
        """The same command in a form that is refused after it has made OUTPUT."""
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        # By SIGABRT Python then says where each of its threads is.
        return os.environ | {"PYTHONFAULTHANDLER": "1"}

    def has_begun(self) -> bool:
        """Whether the driver is past its preparation."""
        return self.manifest.exists() and lock_holder(self.output) == self._pid

    def num_finished(self) -> int:
        """How much the run has finished: a number that grows."""
        return len(self.files(".rsr/receipts/*.json"))

    def faults(self) -> list[Fault]:
        """The most important first: a short night takes only these."""
        return [
            Fault("input edited in place", self.edit_input, 3),
            Fault("two runs under one new parent", self.run_another, 3),
            Fault("Ctrl-C in preparation", self.interrupt_preparation, 3),
            Fault("driver SIGHUP", lambda: self.stop_driver(signal.SIGHUP), 3),
            Fault("OUTPUT immutable", self.lock_output, 3),
            Fault("disk full", self.fill_disk, 4),
            Fault("torn manifest", self.tear_manifest, 2),
            Fault("torn receipt", lambda: self.tear(".rsr/receipts/*.json"), 3),
            Fault("torn output", lambda: self.tear("*.parquet"), 3),
            Fault("driver SIGKILL", self.kill_driver, 4),
            Fault("driver SIGTERM", lambda: self.stop_driver(signal.SIGTERM), 3),
            Fault("driver SIGINT", lambda: self.stop_driver(signal.SIGINT), 3),
            Fault("half-written temporary file", self.leave_temporary_files, 3),
        ]

    # The driver

    @property
    def manifest(self) -> Path:
        return self.output / ".rsr" / "manifest.json"

    @property
    def _pid(self) -> int:
        assert self.driver is not None
        return self.driver.pid

    def start_driver(self, *more: str) -> None:
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        self.driver = self._start([*self.arguments(self.output), *more])
        self._is_exit_noted = False
        self.report.driver_starts += 1

    def _start(self, arguments: list[str]) -> subprocess.Popen[bytes]:
        command = [*self.program, self.command, *arguments]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command, stdout=log, stderr=log, env=self.environment(), preexec_fn=heed_hangups
            )

    def is_driver_running(self) -> bool:
        return self.driver is not None and self.driver.poll() is None

    def last_words(self) -> str:
        """What the latest driver has said."""
        return self.log.read_bytes()[self._log_start :].decode(errors="replace")

    def wait_for_driver(self, patience_s: float = 180, *, sent: int | None = None) -> int:
        """Until it ends by itself or by the signal that was sent; its exit code."""
        assert self.driver is not None
        try:
            code = self.driver.wait(timeout=patience_s)
        except subprocess.TimeoutExpired:
            self.driver.send_signal(signal.SIGABRT)
            self.driver.wait(timeout=30)
            raise AssertionError(f"the driver does not end:\n{self.last_words()}") from None
        self._note_exit(code, sent)
        return code

    def end_driver(self, number: signal.Signals) -> int:
        assert self.driver is not None
        self.driver.send_signal(number)
        return self.wait_for_driver(self.ending_patience_s, sent=number)

    def _note_exit(self, code: int, sent: int | None = None) -> None:
        if self._is_exit_noted:
            return
        self._is_exit_noted = True
        if code != DONE:
            self.report.driver_exits[str(code)] += 1
        expected = {DONE, FAILED, REFUSED, STOPPED, -signal.SIGKILL}
        if sent is not None and re.search("^(rsr: |{)", self.last_words(), re.MULTILINE):
            # It had said how it ended, and nobody listens to signals between that and the exit.
            expected.add(-sent)
        assert code in expected, f"the driver ended with {code}:\n{self.last_words()}"
        assert "Traceback" not in self.last_words(), self.last_words()

    def be_without_driver(self) -> None:
        """What was finished has to be looked at again by the next one."""
        if self.is_driver_running():
            self.end_driver(signal.SIGKILL)
        elif self.driver is not None:
            self._note_exit(self.driver.returncode)
        self.driver = None

    # Faults that last

    def last(self, name: str, seconds: float, lift: Callable[[], None]) -> None:
        self.lasting.append(Lasting(name, time.monotonic() + seconds, lift))

    def is_lasting(self, name: str) -> bool:
        return any(fault.name == name for fault in self.lasting)

    def lift_faults(self, now: float = float("inf")) -> None:
        """End the faults that are due at `now`: all, unless it is given."""
        for fault in [fault for fault in self.lasting if fault.due <= now]:
            self.lasting.remove(fault)
            fault.lift()

    def fill_disk(self) -> bool:
        if self.is_lasting("disk"):
            return False
        self.last("disk", self.lasting_s, self.disk.fill())
        return True

    def lock_output(self) -> bool:
        if self.is_lasting("disk") or not self.manifest.exists():
            return False
        self.last("disk", self.lasting_s, self.disk.lock(self.output))
        return True

    # Faults that hit the driver

    def kill_driver(self) -> bool:
        return self.is_driver_running() and self.end_driver(signal.SIGKILL) == -signal.SIGKILL

    def stop_driver(self, number: signal.Signals) -> bool:
        """Before the run has begun, nobody may be listening to signals yet."""
        if not (self.is_driver_running() and self.has_begun()):
            return False
        code = self.end_driver(number)
        self.require_stopped(number, code)
        return code == STOPPED

    def require_stopped(self, number: signal.Signals, code: int) -> None:
        """The exit code of a driver that was sent a signal is one of those that may be.

        What ended the run may also have come first: its own end, a disk or a bucket that fails, or
        a model that is away before any worker has loaded it, which is refused. Then the signal may
        have ended a driver that had said so and no longer listened. A SIGKILL stops nothing in
        order.
        """
        may_be = {DONE, -number} | ({FAILED} if self.lasting else set())
        if self.is_lasting("model"):
            may_be.add(REFUSED)
        if number != signal.SIGKILL:
            may_be.add(STOPPED)
        assert code in may_be, f"{number.name} ended the driver with {code}:\n{self.last_words()}"

    def interrupt_preparation(self) -> bool:
        """Ctrl-C after the driver has taken OUTPUT and before it has begun the run there."""
        self.lift_faults()
        self.be_without_driver()
        if self.dice.random() < 0.5:
            self.discard()
        is_new, was_there = not self.manifest.exists(), self.output.exists()
        self.start_driver()
        assert self.driver is not None
        if not self._pause_in_preparation(self.driver, self.output):
            return False
        self.plant_others()
        self.driver.send_signal(signal.SIGINT)
        self.driver.send_signal(signal.SIGCONT)
        code = self.wait_for_driver(self.ending_patience_s)
        if is_new and self.manifest.exists():
            return False  # it had begun by then
        assert code == STOPPED, f"Ctrl-C ended the driver with {code}:\n{self.last_words()}"
        # What a killed driver has left of a run that never began is not this one's to remove.
        assert not is_new or was_there or not self.output.exists(), (
            "a run that never began left OUTPUT behind"
        )
        self.count_touched()
        return True

    def run_another(self) -> bool:
        """A second command beside OUTPUT, refused or stopped before it has begun.

        It comes before the run, so that it is the one that makes the parent folder, or while the
        run goes.
        """
        self.lift_faults()
        comes_first, is_refused = self.dice.random() < 0.5, self.dice.random() < 0.5
        if comes_first:
            self.be_without_driver()
            self.discard()
        elif not (self.is_driver_running() and self.has_begun()):
            return False
        arguments = self.refused_arguments if is_refused else self.arguments
        second = self._start(arguments(self.second))
        try:
            was_paused = self._pause_in_preparation(second, self.second)
            if comes_first:
                self.start_driver()
                self._wait_for_lock()
            self.plant_others()
        finally:
            if not is_refused:
                second.send_signal(signal.SIGINT)
            second.send_signal(signal.SIGCONT)
            code = second.wait(timeout=self.ending_patience_s)
        if not was_paused or (self.second / ".rsr" / "manifest.json").exists():
            shutil.rmtree(self.second, ignore_errors=True)
            return False  # it had begun by then
        assert code == (REFUSED if is_refused else STOPPED), self.last_words()
        assert not self.second.exists(), "a run that never began left OUTPUT behind"
        assert lock_holder(self.output) == self._pid, "the lock of another run is gone"
        self.count_touched()
        return True

    def _pause_in_preparation(self, process: subprocess.Popen[bytes], output: Path) -> bool:
        """Stop a command as soon as it has taken its OUTPUT; whether it could be."""
        end = time.monotonic() + 60
        while lock_holder(output) != process.pid:
            if process.poll() is not None:
                return False
            assert time.monotonic() < end, f"{output} is not taken"
            time.sleep(0.001)
        process.send_signal(signal.SIGSTOP)
        return True

    def _wait_for_lock(self) -> None:
        end = time.monotonic() + 60
        while lock_holder(self.output) != self._pid:
            assert self.is_driver_running(), self.last_words()
            assert time.monotonic() < end, f"{self.output} is not taken"
            time.sleep(0.01)

    # Faults that hit files, while no driver runs that could have just read them

    def files(self, pattern: str) -> list[Path]:
        found = sorted(self.output.glob(pattern))
        return [path for path in found if path.is_file() and path.stat().st_size]

    def tear(self, pattern: str) -> bool:
        """Cut a file of OUTPUT at a random byte."""
        if not self.files(pattern):
            return False
        self.be_without_driver()
        files = self.files(pattern)
        if files:
            file = self.dice.choice(files)
            os.truncate(file, self.dice.randrange(file.stat().st_size))
        return bool(files)

    def tear_manifest(self) -> bool:
        """Cut it: the run is refused then, and the way out is the one that the refusal names."""
        if not self.manifest.exists():
            return False
        self.lift_faults()
        self.be_without_driver()
        # The last two bytes are the closing brace and a line's end, which is not missed.
        os.truncate(self.manifest, self.dice.randrange(self.manifest.stat().st_size - 2))
        before = self._run_files()
        self.start_driver()
        code, told = self.wait_for_driver(), self.last_words()
        assert code == REFUSED, f"a torn manifest ended the driver with {code}"
        assert self._run_files() == before, "a refused run has changed OUTPUT"
        if "--overwrite" in told:
            self._overwrite()
        else:
            # Nothing says any more whose such an output is.
            assert "move what is there" in told, told
            assert not all(map(self._has_receipt, self.files("*.parquet"))), told
            self.discard()
            self.driver = None
        return True

    def _has_receipt(self, output: Path) -> bool:
        return is_json(self.output / ".rsr" / "receipts" / f"{output.name}.json")

    def _overwrite(self) -> None:
        """Begin the run anew in its place."""
        self.num_finished_before = 0
        self.start_driver("--overwrite")
        end = time.monotonic() + 90
        while not is_json(self.manifest):
            assert self.is_driver_running(), self.last_words()
            assert time.monotonic() < end, "--overwrite begins no run"
            time.sleep(0.1)

    def leave_temporary_files(self) -> bool:
        """What a process killed while it wrote leaves: gone with the next start, at the latest."""
        if self.is_lasting("disk") or not self.manifest.exists():
            return False
        self.be_without_driver()
        for folder in (self.output, self.output / ".rsr", self.output / ".rsr" / "receipts"):
            if folder.is_dir():
                name = f".shard-00.parquet.{self.dice.randbytes(4).hex()}.rsr-tmp"
                self.leftovers.append(folder / name)
                self.leftovers[-1].write_bytes(b"PAR1" + self.dice.randbytes(1000))
        return True

    def edit_input(self) -> bool:
        """One byte of an input is another, and the size is the same: the run must not go on.

        Then the file is put back, bit for bit and with its times: the run goes on.
        """
        if not (self.manifest.exists() and self.num_finished()):
            return False
        self.lift_faults()
        self.be_without_driver()
        before = self._run_files()
        file = self.dice.choice([path for path in sorted(self.source.iterdir()) if path.is_file()])
        original, status = file.read_bytes(), file.stat()
        place = self._place_to_edit(original)
        try:
            with file.open("r+b") as opened:
                opened.seek(place)
                # Of a digit in JSON this makes another digit.
                opened.write(bytes([original[place] ^ 1]))
            self.start_driver()
            code = self.wait_for_driver()
        finally:
            with file.open("r+b") as opened:
                opened.write(original)
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        told = self.last_words()
        assert code in (FAILED, REFUSED), f"a run with an edited input ended with {code}:\n{told}"
        assert file.stem in told, f"{file.name} was edited, which is not said:\n{told}"
        if code == REFUSED:
            assert self._run_files() == before, "a refused run has changed OUTPUT"
        self.driver = None
        self.count_touched()
        return True

    def _place_to_edit(self, content: bytes) -> int:
        """Somewhere in the rows, not in what tells where they are."""
        is_json_lines = content.startswith(b"{")
        while True:
            place = self.dice.randrange(len(content) // 10, len(content) // 2)
            if not is_json_lines or content[place : place + 1].isdigit():
                return place

    def _run_files(self) -> dict[Path, Any]:
        seen = snapshot(self.output)
        return {
            path: look
            for path, look in seen.items()
            if path.is_file()
            and path.name not in GROWS_WITHOUT_A_RUN
            and not path.name.endswith(".rsr-tmp")
        }

    # Files of others

    def plant_others(self) -> None:
        """Somebody puts files beside OUTPUT as soon as there is a folder to put them in."""
        folder = self.parent / "others"
        is_wanted = self.parent.exists() and not self.others.watches(folder)
        if is_wanted and not self.is_lasting("disk"):
            self.others.plant(folder)

    def count_touched(self) -> None:
        touched = self.others.touched()
        places = (self.disk.folder, self.parent)
        known = {self.parent, self.output, self.second, self.disk.ballast}
        known |= {place / "others" for place in places}
        # Nor may anything be left where nobody was asked to write.
        new = [path for place in places if place.exists() for path in place.iterdir()]
        touched += [path for path in new if path not in known]
        self.report.files_of_others_touched += len(touched)
        assert not touched, f"files of others were touched: {touched}"

    # The night

    def run(self, num_faults: int, end: float, *, first: int = 0) -> None:
        """Inject that many faults, then let the run come to its end.

        A night that is too short for every kind takes those from the `first` on; any other has
        each kind at least once.
        """
        kinds = self._kinds()
        plan = (kinds[first:] + kinds[:first])[:num_faults]
        self.dice.shuffle(plan)
        weights = [kind.weight for kind in kinds]
        plan += self.dice.choices(kinds, weights, k=num_faults - len(plan))
        burst_left = 0
        while plan:
            assert time.monotonic() < end, f"{len(plan)} faults were not injected in time"
            self.keep_driver_running()
            if not burst_left:
                self._wait_for_progress()
                burst_left = self.dice.randint(1, self.max_burst)
            burst_left -= 1
            time.sleep(self.dice.uniform(*self.fault_pause_s))
            self._look_after()
            fault = plan.pop(0)
            if fault.inject():
                self.report.faults[fault.name] += 1
            else:
                plan.insert(self.dice.randrange(len(plan) + 1), fault)
        self._come_to_an_end(end)

    def _kinds(self) -> list[Fault]:
        """Those that this machine allows for."""
        reasons = {"disk full": self.disk.not_fillable, "OUTPUT immutable": self.disk.not_lockable}
        left_out = self.report.left_out
        left_out |= {name: reason for name, reason in reasons.items() if reason}
        for name, reason in left_out.items():
            print(f"left out: {name}: {reason}")
        return [fault for fault in self.faults() if fault.name not in left_out]

    def _come_to_an_end(self, end: float) -> None:
        while self.driver is None or self.driver.poll() != DONE:
            assert time.monotonic() < end, "the run does not end"
            self.keep_driver_running()
            self._look_after()
            time.sleep(0.1)
        self.check_round()

    def keep_driver_running(self) -> None:
        if self.is_driver_running():
            return
        if self.driver is not None and self.driver.returncode == DONE:
            # There are faults left, and nothing to disturb: the whole of INPUT again.
            self.check_round()
            self.discard()
        elif self.driver is not None:
            self._note_exit(self.driver.returncode)
        self.start_driver()

    def discard(self) -> None:
        """Remove the run, with the folder that it was in."""
        self.lift_faults()
        self.count_touched()
        if self.others.watches(self.parent / "others"):
            self.others.forget(self.parent / "others")
        shutil.rmtree(self.parent, ignore_errors=True)
        self.leftovers.clear()
        self.num_finished_before = 0

    def check_round(self) -> None:
        """Hold the output against its receipts, its input and the undisturbed run's."""
        self.lift_faults()
        self.report.num_rounds += 1
        assert not any(path.exists() for path in self.leftovers), "temporary files are still there"
        command = [*RSR, "verify", str(self.output), "--deep"]
        verify = subprocess.run(command, capture_output=True, text=True, timeout=180)
        assert verify.returncode == DONE, verify.stdout + verify.stderr
        expected, found = read_rows(self.quiet), self.read_output()
        ids = Counter(found["id"].to_list())
        self.report.rows_lost += len(set(expected["id"]) - set(ids))
        self.report.rows_duplicated += sum(count - 1 for count in ids.values())
        assert found["id"].to_list() == expected["id"].to_list()
        self.report.rows_with_other_bits += num_different(expected, found)
        self.count_touched()

    def read_output(self) -> pl.DataFrame:
        return read_rows(self.output)

    def _wait_for_progress(self) -> None:
        """Until something was finished since the last time."""
        patience = time.monotonic() + self.progress_patience_s
        while time.monotonic() < patience and self.is_driver_running():
            self._look_after()
            if self.num_finished() > self.num_finished_before:
                break
            time.sleep(0.1)
        self.num_finished_before = self.num_finished()

    def _look_after(self) -> None:
        self.lift_faults(time.monotonic())
        self.plant_others()

    def close(self) -> None:
        self.lift_faults()
        if self.is_driver_running():
            assert self.driver is not None
            self.driver.kill()
            self.driver.wait()


def lock_holder(output: Path) -> int | None:
    """The process that says it holds OUTPUT, read without a lock that could turn one away."""
    try:
        return int(json.loads((output / ".rsr" / "lock").read_text())["pid"])
    except (OSError, ValueError, KeyError):
        return None


def is_json(file: Path) -> bool:
    try:
        return bool(json.loads(file.read_text()))
    except (OSError, ValueError):
        return False


def read_rows(folder: Path) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(file) for file in sorted(folder.glob("*.parquet"))])


def num_different(expected: pl.DataFrame, found: pl.DataFrame) -> int:
    """How many rows differ in any column."""
    assert expected.schema == found.schema
    if expected.equals(found):
        return 0
    both = pl.DataFrame({"expected": expected.to_struct(), "found": found.to_struct()})
    return both.select(pl.col("expected").ne_missing(pl.col("found")).sum()).item()
