"""Scoring as a worker does it, step by step, with a stand-in for the engine and no Ray."""

import asyncio
import importlib.util
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rsr.engine.config import ScorerConfig
from rsr.engine.metrics import TrajectoryScore, score_tokens
from rsr.engine.trajectory import EncodedTrajectory, Status, TokenScores, Trajectory
from rsr.jobs.cluster.answers import Done, Failed, Placed, Ready
from rsr.jobs.cluster.work import RunUnit
from rsr.jobs.cluster.worker import Worker
from rsr.jobs.run.events import Cause
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.manifest import Identity
from rsr.jobs.run.store import RunStore
from rsr.jobs.scoring.job import ScoringJob
from rsr.jobs.shards.columns import TrajectoryColumns
from rsr.jobs.shards.shard import Shard, Unit, describe_shard

COLUMNS = TrajectoryColumns(text="text")


class LengthScorer:
    """Scores a text by its length."""

    kind = "prompt-logprobs"

    def __init__(self, config: ScorerConfig) -> None:
        self.max_num_batched_tokens = config.max_num_batched_tokens

    def encode(self, trajectories: Sequence[Trajectory]) -> list[EncodedTrajectory]:
        return [
            EncodedTrajectory([0] * len(trajectory.text or ""), [], Status.OK)
            for trajectory in trajectories
        ]

    def score_encoded(self, encoded: Sequence[EncodedTrajectory]) -> list[TrajectoryScore]:
        import numpy as np

        def of(num_tokens: int) -> TrajectoryScore:
            tokens = TokenScores(
                token_ids=np.arange(num_tokens, dtype=np.int32),
                ranks=np.full(num_tokens, 2, dtype=np.int32),
                logprobs=np.full(num_tokens, -1.0, dtype=np.float32),
                entropies=np.ones(num_tokens, dtype=np.float32),
            )
            return score_tokens(tokens, status=Status.OK, rank_clip=100, keep_tokens=False)

        return [of(len(row.token_ids)) for row in encoded]


@pytest.fixture
def job(tmp_path: Path) -> ScoringJob:
    store = RunStore.of(RunFolder(tmp_path / "out"), Identity({"token_scores": False}))
    return ScoringJob(ScorerConfig(model="m"), COLUMNS, store, open_engine=LengthScorer)


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    table = pa.table({"id": [0, 1, 2], "text": ["a", "bb", "ccc"]})
    pq.write_table(table, tmp_path / "rows.parquet")
    return describe_shard(str(tmp_path / "rows.parquet"), "rows.parquet", COLUMNS, None)


def test_units_that_are_kept_make_the_shard_and_a_refused_row_has_no_score(job, shard, tmp_path):
    opened = job.open(512)
    first, second = Unit(shard, 0, 2), Unit(shard, 2, 3)
    assert opened.find(first) is None
    kept = opened.keep(first, opened.run(first, opened.read(first)))
    assert opened.find(first) == kept
    assert opened.refuse(second, "it kills").rows_by_status == {"engine_error": 1}
    summary = opened.commit(shard)
    assert (summary.num_rows, summary.num_tokens) == (3, 3)
    written = pq.read_table(tmp_path / "out" / "rows.parquet").to_pydict()
    assert written["text"] == ["a", "bb", "ccc"]
    assert written["rsr_num_tokens"][:2] == [1, 2]
    assert written["rsr_status"] == ["ok", "ok", "engine_error"]
    assert written["rsr"][2] is None


def test_memory_is_what_a_smaller_step_can_mend(job):
    assert job.open(512).max_num_batched_tokens == 512
    assert job.cause_of(RuntimeError("CUDA out of memory. Tried to")) is Cause.MEMORY
    assert job.cause_of(RuntimeError("an illegal instruction")) is Cause.ENGINE


BUSY = (
    "Free memory on device cuda:0 (3.1/79.2 GiB) on startup is less than desired GPU memory "
    "utilization (0.9, 71.28 GiB). Decrease GPU memory utilization or reduce GPU memory used by "
    "other processes."
)
LOST_RANK = (
    "WorkerProc initialization failed due to an exception in a background process. See stack "
    "trace for root cause."
)


def test_start_that_may_work_a_little_later_is_told_from_one_that_will_not(job):
    """In vLLM's words, which a later version must still have."""
    assert job.cause_of(ValueError(BUSY)) is Cause.BUSY
    assert job.cause_of(Exception(LOST_RANK)) is Cause.CRASH
    assert job.cause_of(ValueError("no such architecture")) is Cause.ENGINE
    wrapped = RuntimeError("the engine did not start")
    wrapped.__cause__ = ValueError(BUSY)
    assert job.cause_of(wrapped) is Cause.BUSY


@pytest.mark.vllm
def test_vllm_still_says_so():
    folder = Path(importlib.util.find_spec("vllm").origin).parent
    assert "Free memory on device" in (folder / "v1/worker/utils.py").read_text()
    told = (folder / "v1/executor/multiproc_executor.py").read_text()
    assert "initialization failed due to an exception in a " in told


def test_user_is_told_of_a_head_that_needs_the_other_scorer(job):
    assert "the LM head of m is not a plain matrix" in job.open(None).notice


def answers_of(job: ScoringJob, units: Sequence[Unit]) -> list[Done | Failed]:
    """What a worker that was sent all of `units` at once answers."""

    async def work() -> list[Done | Failed]:
        worker = Worker()
        assert isinstance(await worker.introduce(job, (), True), Placed)
        assert isinstance(await worker.load(None), Ready)
        return await asyncio.gather(*(worker.do(RunUnit(unit)) for unit in units))

    return asyncio.run(work())


class PatientScorer(LengthScorer):
    """Scores a unit of one row once the next one, of two rows, is encoded."""

    def __init__(self, config: ScorerConfig) -> None:
        super().__init__(config)
        self.next_is_encoded = threading.Event()

    def encode(self, trajectories: Sequence[Trajectory]) -> list[EncodedTrajectory]:
        encoded = super().encode(trajectories)
        if len(trajectories) == 2:
            self.next_is_encoded.set()
        return encoded

    def score_encoded(self, encoded: Sequence[EncodedTrajectory]) -> list[TrajectoryScore]:
        if len(encoded) == 1 and not self.next_is_encoded.wait(30):
            raise RuntimeError("the next unit was not encoded meanwhile")
        return super().score_encoded(encoded)


def test_next_unit_is_read_and_encoded_while_one_is_scored(job, shard):
    units = [Unit(shard, 0, 1), Unit(shard, 1, 3)]
    answers = answers_of(replace(job, open_engine=PatientScorer), units)
    assert [answer.summary.num_rows for answer in answers] == [1, 2]


class AllergicScorer(LengthScorer):
    def encode(self, trajectories: Sequence[Trajectory]) -> list[EncodedTrajectory]:
        if any(trajectory.text == "bb" for trajectory in trajectories):
            raise ValueError("it cannot stand this row")
        return super().encode(trajectories)


def test_row_that_cannot_be_encoded_is_suspected_as_one_that_cannot_be_scored(job, shard):
    """Of a unit that cannot be read, all rows would be given up."""
    units = [Unit(shard, 0, 2), Unit(shard, 2, 3)]
    failed, done = answers_of(replace(job, open_engine=AllergicScorer), units)
    assert (failed.cause, failed.reason) == (
        Cause.ENGINE,
        "ValueError: it cannot stand this row",
    )
    assert done.summary.num_rows == 1
