"""Nights of a command that passes over shards on a Ray cluster: faults fall into its passes.

Which pass a driver is in is what its own events say. A fault is counted for that pass while it
cannot go by: a worker is stopped in a call of it, or the driver is.
"""

import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from soak_cluster import SoakCluster
from soak_night import STOPPED, Fault, Night

CALL = "ray::_apply"
"""What Ray calls a worker that is in a call of a pass."""
LAST_EVENTS_BYTES = 16 << 10
PASS_PATIENCE_S, CALL_PATIENCE_S = 60.0, 3.0
MAX_PART_S = 0.3
"""How far into a pass a fault comes, at the most."""
STOP_S, NODE_AWAY_S = 6.0, 5.0
SMALL_PARTS = [sys.executable, str(Path(__file__).with_name("small_parts.py"))]


class PassesNight(Night):
    """A night of `rsr filter` or `rsr select` on a cluster, which outlives the drivers."""

    program = SMALL_PARTS
    fault_pause_s = (0.0, 0.2)
    max_burst = 6
    ending_patience_s = 240.0

    def __init__(
        self,
        command: str,
        passes: Sequence[str],
        options: Sequence[str],
        refused_options: Sequence[str],
        cluster: SoakCluster,
        *more: Any,
    ) -> None:
        self.command, self.passes, self.cluster = command, passes, cluster
        self._options, self._refused_options = options, refused_options
        super().__init__(*more)

    # The driver

    @property
    def name(self) -> str:
        return f"{self.command} on a cluster"

    @property
    def scored(self) -> str:
        """Where SCORED is."""
        return str(self.source)

    def _arguments(self, options: Sequence[str], output: object) -> list[str]:
        at = ["--address", self.cluster.address]
        return [self.scored, str(output), "--json", *options, *at]

    def arguments(self, output: Path) -> list[str]:
        return self._arguments(self._options, output)

    def refused_arguments(self, output: Path) -> list[str]:
        return self._arguments(self._refused_options, output)

    def environment(self) -> dict[str, str]:
        # The cluster of this process asks for no token, and takes a driver that shows one for dead.
        return super().environment() | {"RAY_AUTH_MODE": "disabled"}

    def _note_exit(self, code: int, sent: int | None = None) -> None:
        super()._note_exit(code, sent)
        assert "discovered a bug in Ray" not in self.last_words(), self.last_words()

    @property
    def events_path(self) -> Path:
        return self.output / ".rsr" / "events.jsonl"

    def current_pass(self) -> str | None:
        """The pass that the driver has begun last; None before the first."""
        for line in reversed(self._last_lines()):
            with suppress(ValueError):
                event = json.loads(line)
                if event["event"] == "pass_started":
                    return event["name"] if event["pid"] == self._pid else None
        return None

    def _last_lines(self) -> list[bytes]:
        try:
            with self.events_path.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - LAST_EVENTS_BYTES))
                return file.read().splitlines()
        except OSError:
            return []

    def has_begun(self) -> bool:
        return self.driver is not None and self.current_pass() is not None

    def num_finished(self) -> int:
        """Passes that have begun: the one before each is finished."""
        with suppress(OSError):
            return self.events_path.read_bytes().count(b'"pass_started"')
        return 0

    # Faults

    def own_faults(self) -> list[Fault]:
        """What befalls workers, nodes and the driver in a pass."""
        stops = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        return [
            Fault("worker SIGKILL", self.kill_worker, 16),
            Fault("driver SIGKILL", lambda: self.end_in_pass(signal.SIGKILL), 6),
            Fault("node killed", self.kill_node, 10),
            Fault("worker SIGSTOP", self.stop_worker, 8),
            *(Fault(f"driver {n.name}", lambda n=n: self.end_in_pass(n), 2) for n in stops),
        ]

    def in_pass(self, fault: str, inject: Callable[[], bool], passes: Sequence[str] = ()) -> bool:
        """Inject in the pass, of these or all, that is still to come and has had the fewest."""
        if not self._wait_for_pass(self._pass_to_hit(fault, passes or self.passes)):
            return False
        if self.dice.random() < 0.5:
            # Else at once: some passes are short.
            time.sleep(self.dice.uniform(0, MAX_PART_S))
        return inject()

    def count_in_pass(self, name: str, fault: str) -> None:
        self.report.faults_by_pass.setdefault(name, Counter())[fault] += 1

    def _pass_to_hit(self, fault: str, passes: Sequence[str]) -> str:
        now = self.current_pass() if self.is_driver_running() else None
        to_come = passes[passes.index(now) + 1 :] if now in passes else passes
        seen = self.report.faults_by_pass

        def cost(name: str) -> tuple[int, int, float]:
            counts = seen.get(name, Counter())
            return counts[fault], counts.total(), self.dice.random()

        return min(to_come or passes, key=cost)

    def _wait_for_pass(self, name: str) -> bool:
        """Until the driver has begun the pass; whether it did."""
        end = time.monotonic() + PASS_PATIENCE_S
        while time.monotonic() < end:
            self._look_after()
            if not self.is_driver_running():
                self.keep_driver_running()
            if self.current_pass() == name:
                return True
            time.sleep(0.002)
        return False

    def _stopped_worker(self, fault: str) -> Any:
        """A worker that is stopped in a call of a pass; None where none can be had."""
        worker = self.cluster.stop_worker(CALL, self.dice, CALL_PATIENCE_S)
        name = self.current_pass() if self.is_driver_running() else None
        if worker is None or name is None:
            if worker is not None:
                self.cluster.wake(worker)
            return None
        self.count_in_pass(name, fault)
        return worker

    def kill_worker(self) -> bool:
        def inject() -> bool:
            worker = self._stopped_worker("worker SIGKILL")
            if worker is not None:
                worker.kill()
            return worker is not None

        return self.in_pass("worker SIGKILL", inject)

    def stop_worker(self) -> bool:
        """Stop one in a call for a while, which holds up its pass."""

        def inject() -> bool:
            worker = self._stopped_worker("worker SIGSTOP")
            if worker is not None:
                self.last("worker SIGSTOP", STOP_S, lambda: self.cluster.wake(worker))
            return worker is not None

        return self.in_pass("worker SIGSTOP", inject)

    def kill_node(self) -> bool:
        """Kill a node, the one of a worker in a call if it can be; another comes in its place."""
        if self.is_lasting("node"):
            return False

        def inject() -> bool:
            worker = self._stopped_worker("node killed")
            if worker is not None:
                self.cluster.kill_node(self.dice, of=worker)
                self.cluster.wake(worker)
                self.last("node", NODE_AWAY_S, self.cluster.complete)
            return worker is not None

        return self.in_pass("node killed", inject)

    def end_in_pass(self, number: signal.Signals) -> bool:
        fault = f"driver {number.name}"
        return self.in_pass(fault, lambda: self._end_now(number, fault))

    def _end_now(self, number: signal.Signals, fault: str) -> bool:
        """Send the driver a signal while it is held still in its pass."""
        if not self.is_driver_running():
            return False
        assert self.driver is not None
        self.driver.send_signal(signal.SIGSTOP)
        name = self.current_pass()
        self.driver.send_signal(number)
        self.driver.send_signal(signal.SIGCONT)
        code = self.wait_for_driver(self.ending_patience_s, sent=number)
        self.require_stopped(number, code)
        is_done = name is not None and code == (-number if number == signal.SIGKILL else STOPPED)
        if is_done:
            self.count_in_pass(name, fault)
        return is_done

    # The night

    def output_files(self) -> dict[str, bytes]:
        """The files of OUTPUT by name, without those of the run's own."""
        return {path.name: path.read_bytes() for path in self.output.glob("*.parquet")}

    def check_round(self) -> None:
        super().check_round()
        expected = {path.name: path.read_bytes() for path in self.quiet.glob("*.parquet")}
        found = self.output_files()
        assert found.keys() == expected.keys()
        different = [name for name, content in expected.items() if found[name] != content]
        self.report.files_with_other_bytes += len(different)


class DiskPassesNight(PassesNight):
    """SCORED and OUTPUT on disks that all nodes see."""

    def faults(self) -> list[Fault]:
        common = {fault.name: fault for fault in super().faults()}
        own = self.own_faults()
        for fault in own:
            common.pop(fault.name, None)
        in_copy = [self._in_copy(common.pop(name)) for name in ("disk full", "OUTPUT immutable")]
        rest = [Fault(fault.name, fault.inject, 1) for fault in common.values()]
        return [*own[:2], in_copy[0], *own[2:], in_copy[1], *rest]

    def _in_copy(self, fault: Fault) -> Fault:
        """The same when a copy begins: before, nothing is written that would miss the disk."""

        def when_copying() -> bool:
            is_injected = self.is_driver_running() and fault.inject()
            if is_injected:
                self.count_in_pass("copy", fault.name)
            return is_injected

        return Fault(fault.name, lambda: self.in_pass(fault.name, when_copying, ["copy"]), 3)
