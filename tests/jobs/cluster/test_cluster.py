"""Ray for real, with a job that stands in for scoring: deaths, hangs and errors by a row's text."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from rsr.jobs.cluster.options import ClusterOptions
from rsr.jobs.cluster.run import RunReport, join_cluster, run_on_cluster
from rsr.jobs.cluster.work import WorkQueue
from rsr.jobs.errors import UsageError
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

pytestmark = pytest.mark.ray

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


@pytest.mark.parametrize("poison", ["die", "raise"])
def test_poison_row_is_refused_and_the_rest_is_finished(tmp_path, poison):
    texts = [f"text {i}" for i in range(40)]
    texts[21] = poison
    report, table, events = run_texts(tmp_path, texts, unit_rows=2)
    assert table is not None
    expected: list[int | None] = [len(text) for text in texts]
    expected[21] = None
    assert table["length"].to_pylist() == expected
    assert [f.where for f in report.failures] == ["rows.parquet row 21"]
    (summary,) = report.written
    assert summary.rows_by_status == {"ok": 39, "refused": 1}
    assert report.notices == {"lengths are of characters"}
    # A unit whose answer was on its way when the process died may be suspected once, not twice.
    blamed = [e for e in events if e["event"] == "unit_failed" and e["attempts"] > 1]
    assert all(e["start"] <= 21 < e["stop"] for e in blamed)
    assert events[-1]["event"] == "run_ended"
    assert events[-1]["outcome"] == "failed"


def test_out_of_memory_shrinks_the_batch_and_goes_on(tmp_path):
    report, table, events = run_texts(tmp_path, ["text", "at-most 4096", "text"] * 8)
    assert table is not None
    assert None not in table["length"].to_pylist()
    assert not report.failures
    shrunk = [e for e in events if e["event"] == "batch_shrunk"]
    assert {e["tokens_now"] for e in shrunk} == {4096}
    assert report.setbacks["out_of_memory"] >= 1


def test_stopped_worker_is_killed_after_the_deadline_and_its_unit_run_again(tmp_path):
    texts = ["text"] * 30 + [f"hang-once {tmp_path / 'hung'}"] + ["text"] * 30
    report, table, events = run_texts(tmp_path, texts, unit_timeout_s=3.0)
    assert table is not None
    assert None not in table["length"].to_pylist()
    assert not report.failures
    assert [e["cause"] for e in events if e["event"] == "worker_lost"] == ["timeout"]


def test_model_that_cannot_be_loaded_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"stand-in cannot be run.*weights of an unknown shape"):
        run_texts(tmp_path, ["text"], is_whole=False)


def test_machine_that_does_not_see_the_files_is_refused(tmp_path):
    nowhere = tmp_path / "on" / "another" / "disk"
    with pytest.raises(UsageError, match=f"has no {nowhere}: every machine"):
        run_texts(tmp_path, ["text"], must_see=(nowhere,))
    assert not list(tmp_path.glob("out/.rsr/probe-*"))


def test_cluster_that_does_not_answer_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"no Ray cluster answers at 127\.0\.0\.1:1"):
        run_texts(tmp_path, ["text"], address="127.0.0.1:1")


@pytest.mark.parametrize("address", ["ray://head:10001", "head", "http://head:8265"])
def test_address_of_another_kind_is_refused(tmp_path, address):
    with pytest.raises(UsageError, match=r"expected auto, or host:port|no Ray cluster answers"):
        run_texts(tmp_path, ["text"], address=address)


def test_reading_and_writing_overlap_the_engine(tmp_path):
    _, table, events = run_texts(tmp_path, ["sleep 0.2"] * 20, unit_rows=1)
    assert table is not None
    finished = [e for e in events if e["event"] == "unit_finished"]
    started = next(e for e in events if e["event"] == "worker_started")
    assert len(finished) == 20
    assert started["node"] == finished[0]["node"]
    assert all(0.2 <= e["seconds"] < 0.4 for e in finished)


@contextmanager
def when_a_start_has_failed(log: Path, then: Callable[[], object]) -> Iterator[None]:
    """Calls `then` as soon as the event log says that a worker could not be set up."""
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(0.05):
            if any(event.get("cause") == "setup" for event in read_events(log)):
                then()
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def texts_that_move(model: Path) -> list[str]:
    """In their middle, the model's folder is moved away and the worker killed."""
    model.mkdir()
    return [*["text"] * 20, f"move-and-die-once {model}", *["text"] * 19]


@pytest.mark.slow
def test_model_folder_that_goes_with_a_worker_and_comes_back_costs_no_row(tmp_path):
    model, log = tmp_path / "model", tmp_path / "out" / ".rsr" / "events.jsonl"
    texts = texts_that_move(model)
    with when_a_start_has_failed(log, lambda: Path(f"{model}.away").rename(model)):
        report, table, events = run_texts(
            tmp_path, texts, num_workers=1, must_see=(model,), unit_rows=4
        )
    assert table is not None
    assert table["length"].to_pylist() == [len(text) for text in texts]
    assert not report.failures
    lost = [e["cause"] for e in events if e["event"] == "worker_lost"]
    assert lost[:2] == ["crash", "setup"]
    assert events[-1]["outcome"] == "done"


@pytest.mark.slow
def test_model_folder_that_stays_away_ends_the_run_with_the_reason(tmp_path):
    model = tmp_path / "model"
    report, table, events = run_texts(
        tmp_path,
        texts_that_move(model),
        num_workers=1,
        must_see=(model,),
        unit_rows=4,
        # A process must have time to start; longer only makes the test longer.
        start_timeout_s=45.0,
    )
    assert table is None
    assert report.unwritten == ["rows.parquet"]
    (failure,) = report.failures
    assert f"has no {model}" in failure.reason
    assert report.num_rows + failure.num_rows == 40
    # Units in hand behind the one that moved it may have been finished before or not.
    assert report.num_rows >= 12
    assert events[-1]["outcome"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize("process", ["raylet", "gcs_server"])
def test_ray_that_ends_ends_the_run_and_the_run_says_so(tmp_path, process):
    """Without its control store Ray ends the driver's process after a minute, without a word."""

    def kill_once_a_unit_is_finished() -> None:
        events = tmp_path / "out" / ".rsr" / "events.jsonl"
        while not any(event["event"] == "unit_finished" for event in read_events(events)):
            time.sleep(0.1)
        (found,) = ray._private.worker.global_worker.node.all_processes[process]
        found.process.kill()

    killer = threading.Thread(target=kill_once_a_unit_is_finished, daemon=True)
    killer.start()
    report, table, events = run_texts(tmp_path, ["sleep 0.5"] * 1000, unit_rows=1)
    assert table is None
    (failure,) = report.failures
    assert failure.reason.startswith(f"{process}, a process of the Ray that this run started, has")
    assert 0 < failure.num_rows < 1000
    assert (events[-1]["event"], events[-1]["outcome"]) == ("run_ended", "failed")
