"""A run on Ray whose job stands in for scoring: a row's text says what happens to its worker.

As a program, it runs 1,000 rows of half a second each, and prints what the run says of its end.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from ray import cloudpickle

from rsr.jobs.cluster.options import ClusterOptions
from rsr.jobs.cluster.run import RunReport, join_cluster, run_on_cluster
from rsr.jobs.cluster.work import WorkQueue
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.run.events import Cause, read_events
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.manifest import Identity
from rsr.jobs.run.progress import Progress
from rsr.jobs.run.store import RunStore
from rsr.jobs.shards.columns import TrajectoryColumns
from rsr.jobs.shards.score_columns import Summary
from rsr.jobs.shards.shard import Shard, Unit, cut_units, describe_shard
from rsr.jobs.storage.hashing import HashingFile
from rsr.jobs.terminal import Console

# Ray's workers do not find this module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

COLUMNS = TrajectoryColumns(text="text")


@dataclass(frozen=True)
class LengthJob:
    """Measures texts, and does what some of them say instead. is_whole: whether it opens."""

    store: RunStore
    must_see: tuple[Path, ...] = ()
    is_whole: bool = True
    name: str = "stand-in"
    max_num_batched_tokens: int | None = None

    @property
    def folder(self) -> RunFolder:
        return self.store.folder

    def open(self, max_num_batched_tokens: int | None) -> "OpenLengthJob":
        if not self.is_whole:
            raise ValueError("weights of an unknown shape")
        return OpenLengthJob(self, max_num_batched_tokens or 8192)

    def cause_of(self, error: Exception) -> Cause:
        return Cause.MEMORY if "out of memory" in str(error) else Cause.ENGINE


@dataclass
class OpenLengthJob:
    job: LengthJob
    max_num_batched_tokens: int
    notice: str | None = "lengths are of characters"

    def find(self, unit: Unit) -> Summary | None:
        return self.job.store.unit_summary(unit)

    def read(self, unit: Unit) -> list[str]:
        rows = pl.scan_parquet(unit.shard.path).slice(unit.start, unit.num_rows)
        return rows.collect()["text"].to_list()

    def run(self, unit: Unit, rows: list[str]) -> list[int]:
        return [self._length(text) for text in rows]

    def _length(self, text: str) -> int:
        match text.split():
            case ["die"]:
                os.kill(os.getpid(), signal.SIGKILL)
            case ["raise"]:
                raise RuntimeError("raised by a row")
            case ["move-and-die-once", folder] if not Path(f"{folder}.moved").exists():
                Path(folder).rename(f"{folder}.away")
                Path(f"{folder}.moved").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            case ["hang-once", marker] if not Path(marker).exists():
                Path(marker).touch()
                os.kill(os.getpid(), signal.SIGSTOP)
            case ["at-most", tokens] if self.max_num_batched_tokens > int(tokens):
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
            case ["sleep", seconds]:
                time.sleep(float(seconds))
        return len(text)

    def keep(self, unit: Unit, results: Sequence[int | None]) -> Summary:
        by_status = {"ok": sum(n is not None for n in results), "refused": results.count(None)}
        num_tokens = sum(filter(None, results))
        summary = Summary(len(results), num_tokens, {k: n for k, n in by_status.items() if n})
        table = pl.DataFrame({"length": list(results)}, schema={"length": pl.Int64})
        self.job.store.commit_unit(unit, table, summary)
        return summary

    def refuse(self, unit: Unit, reason: str) -> Summary:
        return self.keep(unit, [None])

    def commit(self, shard: Shard) -> Summary:
        summary = Summary()
        tables = []
        for unit, receipt in self.job.store.covering_units(shard):
            summary.merge(receipt.summary)
            tables.append(self.job.store.read_unit(unit))

        def write(sink: HashingFile) -> Summary:
            pq.write_table(pl.concat(tables).to_arrow(), sink)
            return summary

        return self.job.store.publish(shard, write)


def run_texts(
    root: Path,
    texts: Sequence[str],
    *,
    unit_rows: int = 8,
    is_whole: bool = True,
    must_see: tuple[Path, ...] = (),
    num_workers: int = 2,
    **options,
) -> tuple[RunReport[Summary], pa.Table | None, list[dict]]:
    source = root / "rows.parquet"
    pq.write_table(pa.table({"id": range(len(texts)), "text": list(texts)}), source)
    folder = RunFolder(root / "out")
    shard = describe_shard(str(source), "rows.parquet", COLUMNS, None)
    job = LengthJob(RunStore.of(folder, Identity({})), must_see, is_whole)
    folder.state.mkdir(parents=True)
    with join_cluster(ClusterOptions(num_workers=num_workers, **options)) as cluster:
        report = run_on_cluster(
            job,
            WorkQueue({shard.name: shard}, cut_units(shard, max_rows=unit_rows, max_bytes=1 << 30)),
            cluster,
            num_rows=len(texts),
            kept=Summary(),
            progress=Progress(Console(quiet=True)),
            stop=StopRequest(),
        )
    written = root / "out" / shard.name
    table = pq.read_table(written) if written.exists() else None
    return report, table, list(read_events(folder.events_path))


def main(root: str, address: str | None = None) -> None:
    texts = ["sleep 0.5"] * 1000
    report, table, events = run_texts(Path(root), texts, unit_rows=1, address=address)
    told = {
        "is_written": table is not None,
        "failures": [{"num_rows": f.num_rows, "reason": f.reason} for f in report.failures],
        "last_event": events[-1],
    }
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
