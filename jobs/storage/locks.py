"""Holding a folder: one process at a time, and everybody else can read who it is.

Knows local files and the kernel's locks; the same promise on an object store is
`object_lock.py`'s.
"""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

PATIENCE_S = 1.0
"""A look at who holds a lock takes it for an instant: not a reason to refuse a run."""
OPEN_TRIES = 10


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lock. started_s: Unix time.

    processes: tells which processes `pid` is one of, as `_processes_here` does; empty if unknown.
    """

    pid: int
    host: str
    started_s: float
    processes: str = ""

    @classmethod
    def this_process(cls) -> "Holder":
        return cls(os.getpid(), socket.gethostname(), time.time(), _processes_here())

    @property
    def is_dead(self) -> bool:
        """Whether it was a process beside this one and has ended; False where nobody can tell."""
        is_beside = self.host == socket.gethostname() and self.processes == _processes_here()
        if not (is_beside and self.processes):
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False

    @classmethod
    def parse(cls, text: str) -> "Holder":
        """A lock's content; what cannot be read is still somebody."""
        try:
            values = json.loads(text)
            return cls(
                int(values["pid"]),
                str(values["host"]),
                float(values["started_s"]),
                str(values.get("processes", "")),
            )
        except (ValueError, KeyError, TypeError):
            return cls(0, "unknown", 0.0)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def __str__(self) -> str:
        started = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(self.started_s))
        return f"process {self.pid} on {self.host} since {started}"


def _processes_here() -> str:
    """A name for the processes that share their ids with this one: the kernel's start, and the
    container within it. Empty where the system does not say.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


class HeldError(Exception):
    """Another process holds the lock."""

    def __init__(self, holder: Holder) -> None:
        super().__init__(str(holder))
        self.holder = holder


@contextmanager
def hold_local(path: Path) -> Iterator[None]:
    """Hold the file for this process; the kernel lets go of it however the process ends.

    The holder may remove the file while it holds it; whoever waited then makes a new one.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        with _open(path) as file:
            _lock(file, deadline)
            if not _is_at(file, path):
                continue
            file.truncate(0)
            file.write(Holder.this_process().to_json())
            file.flush()
            yield
            return


def _open(path: Path) -> TextIO:
    for _ in range(OPEN_TRIES):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Between the two, a run that was refused may take its empty folders back.
        with suppress(FileNotFoundError):
            return path.open("a+")
    return path.open("a+")


def _is_at(file: TextIO, path: Path) -> bool:
    """Whether the open file is the one that stands under this name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(file: TextIO, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.seek(0)
                raise HeldError(Holder.parse(file.read())) from None
        time.sleep(PATIENCE_S / 10)


def find_local_holder(path: Path) -> Holder | None:
    """Who holds the file, if anybody does."""
    try:
        with path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return Holder.parse(file.read())
    except (FileNotFoundError, NotADirectoryError):
        pass
    return None
