"""What the dispatcher itself costs: units per second, its memory, and how even it keeps workers.

`throughput`: real files and real Ray workers with a stand-in for the engine that takes no time.
`makespan`: 64 workers that only sleep, 2 s ± 50 % a unit, against the shortest possible run.
`long rows`, `short rows`: 64 that sleep for each row by its length, 5,000 rows of 48 kB or
1,000,000 of 400 bytes, in the units that a run on 64 GPUs is cut into, and how long `rsr plan`
takes that to be. All check what came out before a number counts, and append a row to a CSV file.
"""

import csv
import random
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import click
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from rsr.benchmarks.harness import resident_bytes
from rsr.engine.config import ScorerConfig, ScorerKind
from rsr.engine.metrics import TrajectoryScore, score_tokens
from rsr.engine.trajectory import EncodedTrajectory, Status, TokenScores, Trajectory
from rsr.jobs.cluster.answers import Done, Placed, Ready
from rsr.jobs.cluster.dispatcher import Dispatcher
from rsr.jobs.cluster.job import UnitJob
from rsr.jobs.cluster.pool import RayPool
from rsr.jobs.cluster.session import Room, ray_session
from rsr.jobs.cluster.work import CommitShard, Task, WorkQueue
from rsr.jobs.planning.schedule import CuttableShard, PaperRun
from rsr.jobs.run.events import Tally
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.manifest import Identity
from rsr.jobs.run.store import RunStore
from rsr.jobs.scoring.job import ScoringJob
from rsr.jobs.shards.columns import TrajectoryColumns
from rsr.jobs.shards.parquet import RowGroup
from rsr.jobs.shards.score_columns import Summary
from rsr.jobs.shards.shard import Shard, Unit, cut_units, describe_shard

COLUMNS = TrajectoryColumns(text="text")
IDENTITY = Identity({"token_scores": False})
STAND_IN_ROOM = Room({"num_cpus": 0.001})
"""What a worker that only sleeps asks Ray for: this machine has room for hundreds."""
ROWS_OF_GROUP = 10_000
MEMORY_SECONDS = 0.1
"""Between two looks at the driver's memory."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement; what does not apply is None."""

    benchmark: str
    num_units: int
    num_workers: int
    seconds: float
    units_per_s: float
    driver_mib_at_start: float
    driver_mib_peak_growth: float
    ideal_seconds: float | None
    share_of_ideal: float | None
    planned_seconds: float | None = None
    ray: str = ray.__version__


class NoEngine:
    """Scores a text by its length, in no time."""

    kind: ScorerKind = "kernel"
    max_num_batched_tokens: int | None = None

    def __init__(self, _config: ScorerConfig) -> None:
        pass

    def encode(self, trajectories: Sequence[Trajectory]) -> list[EncodedTrajectory]:
        return [
            EncodedTrajectory([0] * len(trajectory.text or ""), [], Status.OK)
            for trajectory in trajectories
        ]

    def score_encoded(self, encoded: Sequence[EncodedTrajectory]) -> list[TrajectoryScore]:
        return [self._score(len(row.token_ids)) for row in encoded]

    def _score(self, num_tokens: int) -> TrajectoryScore:
        tokens = TokenScores(
            token_ids=np.zeros(num_tokens, dtype=np.int32),
            ranks=np.full(num_tokens, 2, dtype=np.int32),
            logprobs=np.full(num_tokens, -1.0, dtype=np.float32),
            entropies=np.ones(num_tokens, dtype=np.float32),
        )
        return score_tokens(tokens, status=Status.OK, rank_clip=100, keep_tokens=False)


class Sleepers:
    """Many workers in one process: each does one unit at a time, by sleeping.

    seconds_of_unit: by the unit's first row.
    """

    def __init__(self, seconds_of_unit: Mapping[int, float]) -> None:
        import asyncio
        from collections import defaultdict

        self._seconds = seconds_of_unit
        self._turns: dict[int, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def introduce(self, worker: int, *_job: object) -> Placed:
        return Placed(node="sleepers", pid=worker)

    async def load(self, _worker: int, _max_num_batched_tokens: int | None) -> Ready:
        return Ready(seconds=0.0, max_num_batched_tokens=None)

    async def do(self, worker: int, task: Task) -> Done:
        import asyncio

        if isinstance(task, CommitShard):
            return Done(summary=Summary(num_rows=task.shard.num_rows), seconds=0.0)
        seconds = self._seconds[task.unit.start]
        async with self._turns[worker]:
            await asyncio.sleep(seconds)
        return Done(summary=Summary(num_rows=task.unit.num_rows), seconds=seconds)


class _Seat:
    """One of the workers of a `Sleepers` process, called as a Ray actor of its own is."""

    def __init__(self, host: Any, worker: int) -> None:
        for name in ("introduce", "load", "do"):
            setattr(self, name, _SeatMethod(getattr(host, name), worker))


class _SeatMethod:
    def __init__(self, method: Any, worker: int) -> None:
        self._method, self._worker = method, worker

    def remote(self, *arguments: Any) -> Any:
        return self._method.remote(self._worker, *arguments)


class SleeperPool(RayPool):
    """Workers that share a few processes; the calls are Ray's all the same."""

    def __init__(
        self, seconds_of_unit: Mapping[int, float], num_workers: int, num_hosts: int
    ) -> None:
        super().__init__(cast(UnitJob[Tally], None), STAND_IN_ROOM)
        self._num_workers = num_workers
        options = {"num_cpus": 0, "max_concurrency": 1000}
        self._hosts = [
            ray.remote(Sleepers).options(**options).remote(seconds_of_unit)
            for _ in range(num_hosts)
        ]

    @property
    def num_places(self) -> int:
        return self._num_workers

    def _hire(self, worker: int) -> Any:
        return _Seat(self._hosts[worker % len(self._hosts)], worker)


class _MemoryWatch:
    """The growth of this process's memory while it is watched."""

    def __enter__(self) -> "_MemoryWatch":
        self.start_bytes = self.peak_bytes = resident_bytes()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(MEMORY_SECONDS):
            self.peak_bytes = max(self.peak_bytes, resident_bytes())


def _timed(
    name: str, pool: RayPool, queue: WorkQueue, num_workers: int, ideal_seconds: float | None
) -> Row:
    """Run `queue` to its end; the clock starts when every worker is ready."""
    dispatcher = Dispatcher(pool, queue, num_workers=num_workers)
    num_units = queue.num_units
    # The dispatcher goes on with its first worker; here all are to begin together.
    for _ in dispatcher.until_ready(num_workers):
        pass
    with _MemoryWatch() as memory:
        started = time.perf_counter()
        for _ in dispatcher.run():
            pass
        seconds = time.perf_counter() - started
    if failures := queue.failures():
        raise click.ClickException(f"not measured: {failures[0]}")
    return Row(
        benchmark=name,
        num_units=num_units,
        num_workers=num_workers,
        seconds=round(seconds, 2),
        units_per_s=round(num_units / seconds, 1),
        driver_mib_at_start=round(memory.start_bytes / 2**20, 1),
        driver_mib_peak_growth=round((memory.peak_bytes - memory.start_bytes) / 2**20, 1),
        ideal_seconds=None if ideal_seconds is None else round(ideal_seconds, 2),
        share_of_ideal=None if ideal_seconds is None else round(ideal_seconds / seconds, 4),
    )


def measure_throughput(num_units: int, num_workers: int, num_shards: int) -> Row:
    """Units of one row through real workers and real files."""
    with tempfile.TemporaryDirectory() as folder, ray_session(None, verbose=False):
        shards = [_write_shard(Path(folder), n, num_units // num_shards) for n in range(num_shards)]
        job = ScoringJob(
            scorer=ScorerConfig(model="none"),
            columns=COLUMNS,
            store=RunStore.of(RunFolder(Path(folder) / "out"), IDENTITY),
            open_engine=NoEngine,
        )
        queue = WorkQueue({s.name: s for s in shards}, [u for s in shards for u in _rows(s)])
        pool = RayPool(job, STAND_IN_ROOM)
        row = _timed("throughput", pool, queue, num_workers, None)
        for shard in shards:
            written = pl.read_parquet(Path(folder) / "out" / shard.name)
            lengths = written["text"].str.len_chars().to_list()
            if written["rsr_num_tokens"].to_list() != lengths or len(lengths) != shard.num_rows:
                raise click.ClickException(f"not measured: {shard.name} came out wrong")
    return row


def measure_makespan(num_units: int, num_workers: int, mean_seconds: float, seed: int) -> Row:
    """Units of `mean_seconds` ± 50 % on workers that sleep."""
    dice = random.Random(seed)
    seconds = {unit: mean_seconds * dice.uniform(0.5, 1.5) for unit in range(num_units)}
    shard = Shard("none", "none", num_units, num_units, "")
    return _timed_asleep("makespan", shard, _rows(shard), seconds, num_workers)


def measure_feeding(
    name: str, num_rows: int, mean_bytes: int, num_workers: int, ideal_seconds: float, seed: int
) -> Row:
    """One file of rows of random length, in the units of a run on `num_workers` GPUs.

    ideal_seconds: that the workers would take if none ever waited.
    """
    dice = np.random.default_rng(seed)
    # About half of the rows between two thirds of their median and one and a half of it.
    row_bytes = np.ceil(mean_bytes * dice.lognormal(-0.18, 0.6, num_rows)).astype(np.int64)
    ends = np.concatenate([[0], np.cumsum(row_bytes)])
    groups = [
        RowGroup(stop - start, int(ends[stop] - ends[start]))
        for start, stop in pairwise([*range(0, num_rows, ROWS_OF_GROUP), num_rows])
    ]
    shard = Shard("none", "none", num_rows, int(ends[-1]), "")
    seconds_per_byte = ideal_seconds * num_workers / shard.num_bytes
    plan = PaperRun([CuttableShard(shard, groups)], seconds_per_byte, 0.0).on(num_workers)
    units = cut_units(
        shard, max_rows=plan.limits.max_rows, max_bytes=plan.limits.max_bytes, groups=groups
    )
    seconds = {u.start: float(ends[u.stop] - ends[u.start]) * seconds_per_byte for u in units}
    row = _timed_asleep(name, shard, units, seconds, num_workers)
    return replace(row, planned_seconds=round(plan.seconds, 2))


def _timed_asleep(
    name: str, shard: Shard, units: list[Unit], seconds: Mapping[int, float], num_workers: int
) -> Row:
    with ray_session(None, verbose=False):
        pool = SleeperPool(seconds, num_workers, num_hosts=4)
        queue = WorkQueue({shard.name: shard}, units)
        return _timed(name, pool, queue, num_workers, sum(seconds.values()) / num_workers)


def _write_shard(folder: Path, number: int, num_rows: int) -> Shard:
    path = folder / f"{number}.parquet"
    texts = [f"row {number} {row} " + "x" * (row % 50) for row in range(num_rows)]
    pq.write_table(pa.table({"text": texts}), path)
    return describe_shard(str(path), path.name, COLUMNS, None)


def _rows(shard: Shard) -> list[Unit]:
    return [Unit(shard, row, row + 1) for row in range(shard.num_rows)]


@click.command()
@click.option("--units", default=10_000, show_default=True, help="Of the throughput benchmark.")
@click.option("--workers", default=2, show_default=True, help="Of the throughput benchmark.")
@click.option("--sleepers", default=64, show_default=True, help="Workers of the other benchmarks.")
@click.option("--units-per-sleeper", default=32, show_default=True)
@click.option("--mean-seconds", default=2.0, show_default=True, help="Of a sleeper's unit, ± 50 %.")
@click.option(
    "--ideal-seconds",
    default=60.0,
    show_default=True,
    help="Of the runs of long and of short rows, if no worker ever waited.",
)
@click.option(
    "--only",
    "chosen",
    multiple=True,
    type=click.Choice(["throughput", "makespan", "long rows", "short rows"]),
    help="May be repeated. Default: all.",
)
@click.option("--seed", default=0, show_default=True)
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), help="Append the rows to it.")
def main(
    units: int,
    workers: int,
    sleepers: int,
    units_per_sleeper: int,
    mean_seconds: float,
    ideal_seconds: float,
    chosen: tuple[str, ...],
    seed: int,
    csv_path: Path | None,
) -> None:
    """Measure the dispatcher with stand-ins for what it dispatches to."""
    measurements: dict[str, Callable[[], Row]] = {
        "throughput": lambda: measure_throughput(units, workers, num_shards=10),
        "makespan": lambda: measure_makespan(
            sleepers * units_per_sleeper, sleepers, mean_seconds, seed
        ),
        "long rows": lambda: measure_feeding(
            "long rows", 5_000, 48_000, sleepers, ideal_seconds, seed
        ),
        "short rows": lambda: measure_feeding(
            "short rows", 1_000_000, 400, sleepers, ideal_seconds, seed
        ),
    }
    for name in chosen or measurements:
        row = asdict(measurements[name]())
        click.echo("\n".join(f"{name:24}{value}" for name, value in row.items()) + "\n")
        if csv_path is not None:
            is_new = not csv_path.exists()
            with csv_path.open("a", newline="") as file:
                writer = csv.DictWriter(file, list(row))
                if is_new:
                    writer.writeheader()
                writer.writerow(row)


if __name__ == "__main__":
    main()
