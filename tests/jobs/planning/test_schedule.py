"""Runs on paper against the dispatcher, on workers that take their time by a clock of their own."""

import itertools
import random

import pytest
from paper_pool import PaperPool

from rsr.jobs.cluster.dispatcher import Dispatcher
from rsr.jobs.cluster.work import WorkQueue
from rsr.jobs.planning.schedule import CuttableShard, PaperRun
from rsr.jobs.shards.parquet import RowGroup
from rsr.jobs.shards.shard import Shard, Unit, cut_units

ROWS_OF_GROUP = 1000
IDEAL_SECONDS = 600.0


def files_of(row_bytes: list[int], num_files: int) -> tuple[list[CuttableShard], dict]:
    """Files of rows of these lengths, and by file where each row's bytes begin."""
    files, offsets = [], {}
    for number in range(num_files):
        rows = row_bytes[number::num_files]
        parts = [rows[low : low + ROWS_OF_GROUP] for low in range(0, len(rows), ROWS_OF_GROUP)]
        groups = [RowGroup(len(part), sum(part)) for part in parts]
        name = f"{number}.parquet"
        files.append(CuttableShard(Shard(name, name, len(rows), sum(rows), "f"), groups))
        offsets[name] = [0, *itertools.accumulate(rows)]
    return files, offsets


def dispatch(files, offsets, num_workers, seconds_per_byte):
    """Seconds of the dispatcher's run of units cut as `PaperRun` cuts them."""
    limits = PaperRun(files, seconds_per_byte, 0.0).on(num_workers).limits
    units = [
        unit
        for file in files
        for unit in cut_units(
            file.shard, max_rows=limits.max_rows, max_bytes=limits.max_bytes, groups=file.groups
        )
    ]

    def seconds_of(unit: Unit) -> float:
        ends = offsets[unit.shard.name]
        return (ends[unit.stop] - ends[unit.start]) * seconds_per_byte

    pool = PaperPool(num_places=num_workers, seconds_of=seconds_of)
    queue = WorkQueue({file.shard.name: file.shard for file in files}, units)
    dispatcher = Dispatcher(pool, queue, clock=lambda: pool.now)
    for _ in itertools.chain(dispatcher.until_ready(num_workers), dispatcher.run()):
        pass
    assert not queue.unwritten_shards()
    return pool.now


@pytest.mark.seconds
@pytest.mark.parametrize("num_files", [1, 7])
@pytest.mark.parametrize(
    ("num_rows", "mean_bytes", "num_workers", "least_share"),
    [
        pytest.param(5_000, 48_000, 64, 0.94, id="long rows"),
        pytest.param(100_000, 400, 64, 0.97, id="short rows"),
        pytest.param(5_000, 400, 8, 0.95, id="few short rows"),
        pytest.param(5_000, 48_000, 1, 0.99, id="one worker"),
    ],
)
def test_workers_are_busy_and_the_plan_says_how_long(
    num_rows, mean_bytes, num_workers, least_share, num_files
):
    dice = random.Random(num_rows + num_files)
    rows = [int(mean_bytes * dice.lognormvariate(-0.08, 0.4)) + 1 for _ in range(num_rows)]
    files, offsets = files_of(rows, num_files)
    seconds_per_byte = IDEAL_SECONDS * num_workers / sum(rows)
    seconds = dispatch(files, offsets, num_workers, seconds_per_byte)
    assert IDEAL_SECONDS / seconds >= least_share
    planned = PaperRun(files, seconds_per_byte, 0.0).on(num_workers)
    assert planned.seconds == pytest.approx(seconds, rel=0.1)
    assert planned.share_busy == pytest.approx(IDEAL_SECONDS / planned.seconds)
