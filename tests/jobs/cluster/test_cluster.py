"""Ray for real, with a stand-in for the engine: deaths, hangs and errors by the text of a row."""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from rsr.engine.config import ScorerConfig
from rsr.engine.metrics import TrajectoryScore, score_tokens
from rsr.engine.trajectory import Status, TokenScores, Trajectory
from rsr.jobs.cluster.options import ClusterOptions
from rsr.jobs.cluster.run import RunReport, join_cluster, run_on_cluster
from rsr.jobs.cluster.work import WorkQueue
from rsr.jobs.cluster.worker import WorkerJob
from rsr.jobs.errors import UsageError
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.run.events import read_events
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.manifest import Identity
from rsr.jobs.run.progress import Progress
from rsr.jobs.run.store import RunStore
from rsr.jobs.shards.columns import TrajectoryColumns
from rsr.jobs.shards.score_columns import Summary
from rsr.jobs.shards.shard import cut_units, describe_shard

pytestmark = pytest.mark.ray

COLUMNS = TrajectoryColumns(text="text")
IDENTITY = Identity({"token_scores": False})


class StandIn:
    """Scores a text by its length, and does what some texts say instead."""

    kind = "kernel"

    def __init__(self, config: ScorerConfig) -> None:
        self.max_num_batched_tokens = config.max_num_batched_tokens or 8192

    def score(self, trajectories: Sequence[Trajectory]) -> list[TrajectoryScore]:
        return [self._score(trajectory.text or "") for trajectory in trajectories]

    def _score(self, text: str) -> TrajectoryScore:
        import numpy as np

        match text.split():
            case ["die"]:
                os.kill(os.getpid(), signal.SIGKILL)
            case ["raise"]:
                raise RuntimeError("raised by a row")
            case ["hang-once", marker] if not Path(marker).exists():
                Path(marker).touch()
                os.kill(os.getpid(), signal.SIGSTOP)
            case ["at-most", tokens] if self.max_num_batched_tokens > int(tokens):
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
            case ["sleep", seconds]:
                time.sleep(float(seconds))
        num_tokens = len(text)
        tokens = TokenScores(
            token_ids=np.arange(num_tokens, dtype=np.int32),
            ranks=np.full(num_tokens, 2, dtype=np.int32),
            logprobs=np.full(num_tokens, -1.0, dtype=np.float32),
            entropies=np.ones(num_tokens, dtype=np.float32),
        )
        return score_tokens(tokens, status=Status.OK, rank_clip=100, keep_tokens=False)


class Unloadable(StandIn):
    def __init__(self, config: ScorerConfig) -> None:
        raise ValueError("weights of an unknown shape")


def run_texts(
    root: Path,
    texts: Sequence[str],
    *,
    unit_rows: int = 8,
    open_engine: type = StandIn,
    must_see: tuple[Path, ...] = (),
    **options,
) -> tuple[RunReport, pa.Table | None, list[dict]]:
    source = root / "rows.parquet"
    pq.write_table(pa.table({"id": range(len(texts)), "text": list(texts)}), source)
    folder = RunFolder(root / "out")
    shard = describe_shard(str(source), "rows.parquet", COLUMNS, None)
    job = WorkerJob(
        scorer=ScorerConfig(model="stand-in"),
        columns=COLUMNS,
        store=RunStore.of(folder, IDENTITY),
        must_see=must_see,
        open_engine=open_engine,
    )
    folder.state.mkdir(parents=True)
    with join_cluster(ClusterOptions(num_workers=2, **options)) as cluster:
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
def test_poison_row_is_refused_and_the_rest_is_scored(tmp_path, poison):
    texts = [f"text {i}" for i in range(40)]
    texts[21] = poison
    report, table, events = run_texts(tmp_path, texts, unit_rows=2)
    assert table is not None
    assert table["id"].to_pylist() == list(range(40))
    statuses = table["rsr_status"].to_pylist()
    assert statuses.pop(21) == "engine_error"
    assert set(statuses) == {"ok"}
    assert table["rsr"][21].as_py() is None
    assert [f.where for f in report.failures] == ["rows.parquet row 21"]
    # A unit whose answer was on its way when the process died may be suspected once, not twice.
    blamed = [e for e in events if e["event"] == "unit_failed" and e["attempts"] > 1]
    assert all(e["start"] <= 21 < e["stop"] for e in blamed)
    assert events[-1]["event"] == "run_ended"
    assert events[-1]["outcome"] == "failed"


def test_out_of_memory_shrinks_the_batch_and_goes_on(tmp_path):
    report, table, events = run_texts(tmp_path, ["text", "at-most 4096", "text"] * 8)
    assert table is not None
    assert set(table["rsr_status"].to_pylist()) == {"ok"}
    assert not report.failures
    shrunk = [e for e in events if e["event"] == "batch_shrunk"]
    assert {e["tokens_now"] for e in shrunk} == {4096}
    assert report.setbacks["out_of_memory"] >= 1


def test_stopped_worker_is_killed_after_the_deadline_and_its_unit_scored(tmp_path):
    texts = ["text"] * 30 + [f"hang-once {tmp_path / 'hung'}"] + ["text"] * 30
    report, table, events = run_texts(tmp_path, texts, unit_timeout_s=3.0)
    assert table is not None
    assert set(table["rsr_status"].to_pylist()) == {"ok"}
    assert not report.failures
    assert [e["cause"] for e in events if e["event"] == "worker_lost"] == ["timeout"]


def test_model_that_cannot_be_loaded_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"stand-in cannot be run.*weights of an unknown shape"):
        run_texts(tmp_path, ["text"], open_engine=Unloadable)


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


def test_reading_and_writing_overlap_scoring(tmp_path):
    _, table, events = run_texts(tmp_path, ["sleep 0.2"] * 20, unit_rows=1)
    assert table is not None
    finished = [e for e in events if e["event"] == "unit_finished"]
    started = next(e for e in events if e["event"] == "worker_started")
    assert len(finished) == 20
    assert started["node"] == finished[0]["node"]
    assert all(0.2 <= e["seconds"] < 0.4 for e in finished)
