"""Ray: one actor per GPU, tensor-parallel group or CPU machine, and who gets which unit.

Actors read, score and write by themselves; only unit descriptions and summaries cross the
wire. Knows nothing of the terminal: `Dispatcher.run` yields what happened.
"""

import logging
import os
import signal
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from rsr.engine.config import ScorerConfig, ScorerKind
from rsr.jobs import interrupt, score_columns
from rsr.jobs.errors import UsageError
from rsr.jobs.output import OutputFolder
from rsr.jobs.score_columns import Summary
from rsr.jobs.shards import Shard, TrajectoryColumns, TrajectoryReader, Unit

logger = logging.getLogger(__name__)

UNITS_IN_FLIGHT = 2
"""Per worker: one being scored, one waiting, so that no worker waits for the driver."""
MAX_ATTEMPTS = 3
"""Starts of one unit before it is given up; a worker's death costs its units an attempt."""
DETAILS_LOGGED = 20
"""Refused rows of one unit whose reason is logged; their status is in the output anyway."""
OBJECT_STORE_BYTES = 128 << 20
"""A local Ray's shared memory: nothing large crosses it."""


@dataclass(frozen=True, slots=True)
class WorkerJob:
    """All that a worker must know besides its units; sent once."""

    scorer: ScorerConfig
    columns: TrajectoryColumns
    output: OutputFolder
    identity: dict[str, Any]
    verbose: bool


@dataclass(frozen=True, slots=True)
class Finished:
    """A unit that is kept, or a shard that is written."""

    work: Unit | Shard
    summary: Summary


@dataclass(frozen=True, slots=True)
class Failed:
    """A unit or a shard that did not work, and why."""

    work: Unit | Shard
    error: str


class Worker:
    """Holds one student for as long as it lives."""

    def __init__(self, job: WorkerJob) -> None:
        if not job.verbose:
            _redirect_output(job.output.log_path)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
        from rsr.engine.scorer import Scorer

        self._job = job
        self._scorer = Scorer(job.scorer)
        self._reader = TrajectoryReader(job.columns)

    def ready(self) -> ScorerKind:
        """Returns once the model is loaded: how it is scored, which its LM head may decide."""
        return self._scorer.kind

    def score_unit(self, unit: Unit) -> Summary:
        """Read, score and keep one unit."""
        scores = self._scorer.score(self._reader.read(unit))
        refused = [(i, s) for i, s in enumerate(scores, unit.start) if not s.status.is_scored]
        for row, score in refused[:DETAILS_LOGGED]:
            logger.info("%s row %d: %s: %s", unit.shard.name, row, score.status, score.detail)
        frame = score_columns.to_frame(scores, token_columns=self._job.scorer.token_scores)
        return self._job.output.commit_unit(unit, frame)

    def commit_shard(self, shard: Shard) -> Summary:
        """Write the output of a shard whose units are all kept."""
        return self._job.output.commit_shard(shard, self._job.identity)


def _redirect_output(log_path: Path) -> None:
    """Send this process's and its children's chatter to the run's log."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(descriptor, stream.fileno())
    os.close(descriptor)


@contextmanager
def ray_session(*, verbose: bool) -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS names, else start Ray on this machine; leave it after."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    local: dict[str, Any] = {}
    if not os.environ.get("RAY_ADDRESS"):
        local = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    handlers = {number: signal.getsignal(number) for number in interrupt.SIGNALS}
    ray.init(
        log_to_driver=verbose,
        logging_level=logging.INFO if verbose else logging.ERROR,
        **local,
    )
    # Ray puts a handler of its own in the driver's place, which knows nothing of exit codes.
    for number, handler in handlers.items():
        signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()


def worker_resources(
    num_workers: int | None, tensor_parallel_size: int
) -> tuple[int, dict[str, float]]:
    """How many workers, and what each asks Ray for; `UsageError` if there is not enough."""
    total = ray.cluster_resources()
    num_gpus = int(total.get("GPU", 0))
    if not num_gpus:
        num_workers = num_workers or 1
        # Ray gives a worker as many OpenMP threads as CPUs.
        return num_workers, {"num_cpus": max(1, int(total.get("CPU", 1)) // num_workers)}
    if num_workers is None:
        num_workers = num_gpus // tensor_parallel_size
    needed = max(1, num_workers) * tensor_parallel_size
    if needed > num_gpus:
        raise UsageError(
            f"{max(1, num_workers)} workers of {tensor_parallel_size} GPUs need {needed}; there "
            f"are {num_gpus}"
        )
    return num_workers, {"num_gpus": tensor_parallel_size, "num_cpus": 1}


class Dispatcher:
    """Hands units to workers in order, and complete shards to whoever is free first.

    scorers: how the workers that are ready score.
    """

    def __init__(self, job: WorkerJob, *, num_workers: int, resources: dict[str, float]) -> None:
        self._job = job
        self._resources = resources
        self.scorers: set[ScorerKind] = set()
        self._workers = [self._new_worker() for _ in range(num_workers)]

    def _new_worker(self) -> ActorHandle:
        return ray.remote(Worker).options(**self._resources).remote(self._job)

    def wait_until_ready(self) -> Iterator[None]:
        """Yields about once a second until every worker has loaded the model.

        Raises `UsageError` with the reason if one cannot.
        """
        pending = [worker.ready.remote() for worker in self._workers]
        try:
            while pending:
                ready, pending = ray.wait(pending, timeout=1.0)
                self.scorers.update(ray.get(ready))
                yield
        except RayError as error:
            model, log = self._job.scorer.model, self._job.output.log_path
            reason = _message_lines(error)[-1]
            raise UsageError(f"{model} cannot be run: {reason} (more in {log})") from error

    def run(
        self, units: Sequence[Unit], unfinished: dict[str, Shard]
    ) -> Iterator[Finished | Failed | None]:
        """Score `units`, commit every shard of `unfinished` once all its units are kept.

        unfinished: the shards without output, by name. Yields each unit and each shard once,
        finished or given up, and None about once a second in between.
        """
        missing: dict[str, set[Unit]] = {name: set() for name in unfinished}
        for unit in units:
            missing[unit.shard.name].add(unit)
        work: deque[Unit | Shard] = deque(
            shard for name, shard in unfinished.items() if not missing[name]
        )
        work.extend(units)
        attempts: dict[Unit | Shard, int] = {}
        in_flight: dict[Any, _Assignment] = {}
        while work or in_flight:
            self._fill(work, in_flight)
            done, _ = ray.wait(list(in_flight), num_returns=1, timeout=1.0)
            if not done:
                yield None
                continue
            assignment = in_flight.pop(done[0])
            outcome, item = self._collect(done[0], assignment), assignment.item
            if isinstance(outcome, Failed):
                attempts[item] = attempts.get(item, 0) + 1
                if attempts[item] < MAX_ATTEMPTS:
                    logger.warning("%s; trying again", outcome.error)
                    work.appendleft(item)
                    continue
            elif isinstance(item, Unit):
                missing[item.shard.name].discard(item)
                if not missing[item.shard.name]:
                    work.appendleft(item.shard)
            yield outcome

    def _fill(
        self,
        work: deque[Unit | Shard],
        in_flight: dict[Any, "_Assignment"],
    ) -> None:
        load = [0] * len(self._workers)
        for assignment in in_flight.values():
            load[assignment.slot] += 1
        while work and min(load) < UNITS_IN_FLIGHT:
            slot = load.index(min(load))
            item = work.popleft()
            worker = self._workers[slot]
            if isinstance(item, Unit):
                reference = worker.score_unit.remote(item)
            else:
                reference = worker.commit_shard.remote(item)
            in_flight[reference] = _Assignment(item, slot, worker)
            load[slot] += 1

    def _collect(self, reference: Any, assignment: "_Assignment") -> Finished | Failed:
        item = assignment.item
        try:
            return Finished(item, ray.get(reference))
        except RayTaskError as error:
            return Failed(item, f"{_label(item)}: {_message_lines(error)[-1]}")
        # A dead worker has many names: a crash, a lost node, the memory monitor.
        except RayError as error:
            # Its other unit reports the same death: only the first report replaces it.
            if self._workers[assignment.slot] is assignment.worker:
                self._workers[assignment.slot] = self._new_worker()
            return Failed(item, f"{_label(item)}: its worker died: {_message_lines(error)[0]}")


@dataclass(frozen=True, slots=True)
class _Assignment:
    """What is in flight, and with whom."""

    item: Unit | Shard
    slot: int
    worker: ActorHandle


def _label(item: Unit | Shard) -> str:
    if isinstance(item, Unit):
        return f"{item.shard.name} rows {item.start} to {item.stop - 1}"
    return item.name


def _message_lines(error: Exception) -> list[str]:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines or [repr(error)]
