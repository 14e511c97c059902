"""What happens in a run, told as it happens: to the terminal, to Ray's metrics, to a file.

`EventLog` appends to OUTPUT/.rsr/events.jsonl: one JSON object a line, one write a line. This is
its schema: `event` (snake case of a class below), `time` (ISO 8601, UTC, by the wall clock), and
that class's fields. Durations are in seconds by a clock that nobody sets. Lines are for reading:
what a resumed run trusts are receipts. Knows nothing of who listens.
"""

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, Self

logger = logging.getLogger(__name__)


class Tally(Protocol):
    """The counts of a set of finished rows, whatever a run does to its rows; a dataclass."""

    @property
    def num_rows(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def rows_by_status(self) -> Mapping[str, int]: ...


class Cause(StrEnum):
    """Why something did not work."""

    CRASH = "crash"
    """The worker's process ended by itself or by a signal."""
    TIMEOUT = "timeout"
    """Past its deadline: the worker was killed."""
    ENGINE = "engine"
    """The engine raised an error."""
    MEMORY = "out_of_memory"
    """The accelerator's memory, the machine's, or the KV cache."""
    BUSY = "device_busy"
    """Another process, perhaps one that is ending, holds the accelerator's memory."""
    NODE = "node_lost"
    """The machine left the cluster."""
    INPUT = "input"
    """Rows could not be read."""
    OUTPUT = "output"
    """A result could not be written."""
    SETUP = "setup"
    """The machine lacks what a worker needs."""


class Next(StrEnum):
    """What is done about a piece of work that did not work."""

    AGAIN = "again"
    """Queued as before: it was not its fault."""
    AGAIN_LATER = "again_later"
    """Queued after a pause."""
    AGAIN_ALONE = "again_alone"
    """Next for a worker that has nothing else in hand, so that a loss is its own."""
    HALVED = "halved"
    """Its halves are tried alone."""
    ROW_REFUSED = "row_refused"
    """It is one row: kept as refused, without a result (`rsr_status` engine_error)."""
    GIVEN_UP = "given_up"
    """Listed at the end of the run; the same command tries it again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted:
    """The event of a run whose workers are about to start.

    num_rows, num_units: still to be scored. num_workers: that fit now. host, pid: the driver.
    """

    model: str
    num_rows: int
    num_units: int
    num_workers: int
    host: str
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PassStarted:
    """The event of a pass of `rsr filter` or `rsr select` on a cluster that is about to begin.

    name: as docs/selection.md has it. num_calls: over shards, bundles of them or parts. host, pid:
    the driver.
    """

    name: str
    num_calls: int
    host: str
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStarted:
    """The event of a worker that has loaded its model.

    seconds: from its process's first words to a loaded model. node: host name.

    notice: what the user should know about how this worker works.
    """

    worker: int
    node: str
    pid: int
    seconds: float
    max_num_batched_tokens: int | None
    notice: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLost:
    """Another takes its place where there is room for one."""

    worker: int
    node: str
    cause: Cause
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NoWorkerReady:
    """No worker is ready or loading, and none was for `seconds`.

    seconds_left: until the run is given up. reason: why the last start failed.
    """

    seconds: float
    seconds_left: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchShrunk:
    """Workers started from now on take fewer tokens in one prefill step."""

    worker: int
    tokens_before: int
    tokens_now: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitFinished:
    """Rows [start, stop) of a shard are kept. seconds: in the engine."""

    shard: str
    start: int
    stop: int
    worker: int
    node: str
    seconds: float
    summary: Tally


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitFailed:
    """Rows [start, stop) of a shard were not kept. attempts: that counted against them."""

    shard: str
    start: int
    stop: int
    worker: int
    node: str
    cause: Cause
    reason: str
    attempts: int
    next: Next


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardWritten:
    """The shard's output and receipt are there."""

    shard: str
    worker: int
    node: str
    seconds: float
    summary: Tally


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFailed:
    """The shard's output was not written."""

    shard: str
    worker: int
    node: str
    cause: Cause
    reason: str
    attempts: int
    next: Next


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnded:
    """The event of a run that ends, whatever the reason.

    outcome: done, failed (something is missing or unscored) or interrupted.
    """

    outcome: str
    num_rows: int
    num_tokens: int
    seconds: float
    num_failures: int


Event = (
    RunStarted
    | PassStarted
    | WorkerStarted
    | WorkerLost
    | NoWorkerReady
    | BatchShrunk
    | UnitFinished
    | UnitFailed
    | ShardWritten
    | ShardFailed
    | RunEnded
)


def to_json(event: Event, time: datetime) -> dict[str, Any]:
    """The object that stands for `event` in the file."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(event).__name__).lower()
    return {"event": name, "time": time.isoformat(timespec="milliseconds"), **asdict(event)}


class EventLog:
    """Appends events to a file; a context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._is_silent = False

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(self._path, flags, 0o644)
        size = os.fstat(self._descriptor).st_size
        # An earlier driver may have died within its last line.
        if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
            self._append(b"\n")
        return self

    def __exit__(self, *_exception: object) -> None:
        assert self._descriptor is not None
        os.close(self._descriptor)
        self._descriptor = None

    def write(self, event: Event) -> None:
        self._append(json.dumps(to_json(event, datetime.now(UTC))).encode() + b"\n")

    def _append(self, line: bytes) -> None:
        assert self._descriptor is not None, "an event log is written while it is open"
        try:
            os.write(self._descriptor, line)
        except OSError as error:
            # A full disk must stop no run for the sake of its diary.
            if not self._is_silent:
                logger.warning("%s cannot be written, events are lost: %s", self._path, error)
            self._is_silent = True
        else:
            self._is_silent = False


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Every whole line of an event log; none if there is no such file."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and "event" in event:
                yield event
