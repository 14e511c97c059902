"""Commands in processes of their own, disturbed while they run and looked at afterwards."""

import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

PATIENCE_S = 900
"""For a run's first units, on a machine that has much else to do."""


def start_until_units(
    arguments: Sequence[str], output: Path, num_units: int
) -> "subprocess.Popen[bytes]":
    """A run that has kept `num_units` units more than there were."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    enough = len(units(output)) + num_units
    deadline = time.monotonic() + PATIENCE_S
    while len(units(output)) < enough:
        assert process.poll() is None, "the run ended before it could be disturbed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def units(output: Path) -> dict[str, int]:
    """Finished units by name, with the times at which they were written."""
    return {p.name: p.stat().st_mtime_ns for p in output.glob(".rsr/units/*/*.scores")}


def kill_tree(process: "subprocess.Popen[bytes]") -> None:
    """End a process and all that it started, none of which gets to say a last word."""
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in tree:
        member.suspend()
    for member in tree:
        member.kill()
    psutil.wait_procs(tree, timeout=30)


def heed_hangups() -> None:
    """Undo what `nohup` does to its children, should the tests themselves run under it."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
