"""Scoring as a worker does it, step by step, with a stand-in for the engine and no Ray."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rsr.engine.config import ScorerConfig
from rsr.engine.metrics import TrajectoryScore, score_tokens
from rsr.engine.trajectory import Status, TokenScores, Trajectory
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

    def score(self, trajectories: Sequence[Trajectory]) -> list[TrajectoryScore]:
        import numpy as np

        def of(num_tokens: int) -> TrajectoryScore:
            tokens = TokenScores(
                token_ids=np.arange(num_tokens, dtype=np.int32),
                ranks=np.full(num_tokens, 2, dtype=np.int32),
                logprobs=np.full(num_tokens, -1.0, dtype=np.float32),
                entropies=np.ones(num_tokens, dtype=np.float32),
            )
            return score_tokens(tokens, status=Status.OK, rank_clip=100, keep_tokens=False)

        return [of(len(trajectory.text or "")) for trajectory in trajectories]


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


def test_user_is_told_of_a_head_that_needs_the_other_scorer(job):
    assert "the LM head of m is not a plain matrix" in job.open(None).notice
