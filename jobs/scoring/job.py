"""Scoring as a job of the cluster: trajectories in, score columns out.

Opens one student for each worker. Does not know Ray, nor which worker it runs in.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from rsr.engine.config import ScorerConfig, ScorerKind
from rsr.engine.facts import StudentFacts
from rsr.engine.metrics import TrajectoryScore
from rsr.engine.trajectory import EncodedTrajectory, Status, Trajectory
from rsr.jobs.cluster.student import cause_of_engine_error, quick_imports
from rsr.jobs.inspection.reading import Reading
from rsr.jobs.run.events import Cause
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.store import RunStore
from rsr.jobs.scoring.columns import added_columns
from rsr.jobs.scoring.commit import commit_scored_shard
from rsr.jobs.scoring.first_rows import look_at_rows
from rsr.jobs.shards.columns import TrajectoryColumns
from rsr.jobs.shards.reader import TrajectoryReader
from rsr.jobs.shards.score_columns import Summary
from rsr.jobs.shards.shard import Shard, Unit
from rsr.jobs.storage.hub import stay_offline_without_hub
from rsr.kernels import tuned_tiles

logger = logging.getLogger(__name__)

DETAILS_LOGGED = 20
"""Refused rows of one unit whose reason is logged; their status is in the output anyway."""


class Engine(Protocol):
    """What a worker needs of `rsr.engine.Scorer`."""

    @property
    def kind(self) -> ScorerKind: ...

    @property
    def max_num_batched_tokens(self) -> int | None: ...

    def encode(self, trajectories: Sequence[Trajectory]) -> list[EncodedTrajectory]: ...

    def score_encoded(self, encoded: Sequence[EncodedTrajectory]) -> list[TrajectoryScore]: ...


def open_scorer(config: ScorerConfig) -> Engine:
    # vLLM takes seconds to import, and the driver never needs it.
    from rsr.engine.allocator import keep_freed_memory
    from rsr.engine.scorer import Scorer

    # This process opens one model and ends with it.
    keep_freed_memory()
    # What vLLM says goes into the run's log.
    return Scorer(config, verbose=True)


@dataclass(frozen=True, slots=True)
class ScoringJob:
    """The `UnitJob` of `rsr score`.

    store: what is kept, and for which settings. must_see: local paths that every machine must have.
    tuned_tiles: text of the user's file of tiles, which other machines do not have. open_engine:
    loads the student.
    """

    scorer: ScorerConfig
    columns: TrajectoryColumns
    store: RunStore
    must_see: tuple[Path, ...] = ()
    tuned_tiles: str | None = None
    open_engine: Callable[[ScorerConfig], Engine] = open_scorer

    @property
    def name(self) -> str:
        return self.scorer.model

    @property
    def folder(self) -> RunFolder:
        return self.store.folder

    @property
    def max_num_batched_tokens(self) -> int | None:
        return self.scorer.max_num_batched_tokens

    def open(self, max_num_batched_tokens: int | None) -> "ScoringWork":
        tuned_tiles.adopt(self.tuned_tiles)
        config = replace(self.scorer, max_num_batched_tokens=max_num_batched_tokens)
        return ScoringWork(self, self.open_engine(config))

    def cause_of(self, error: Exception) -> Cause:
        return cause_of_engine_error(error)


@dataclass(frozen=True, slots=True)
class UnitRows:
    """A unit's rows as the engine takes them. encoded: None where encoding raised."""

    trajectories: list[Trajectory]
    encoded: list[EncodedTrajectory] | None


class ScoringWork:
    """The `OpenJob` of `rsr score`: a loaded student, and a reader of trajectories."""

    def __init__(self, job: ScoringJob, engine: Engine) -> None:
        self._job, self._engine = job, engine
        self._reader = TrajectoryReader(job.columns)

    @property
    def max_num_batched_tokens(self) -> int | None:
        return self._engine.max_num_batched_tokens

    @property
    def notice(self) -> str | None:
        if self._engine.kind == self._job.scorer.scorer:
            return None
        return (
            f"the LM head of {self._job.name} is not a plain matrix: scoring with vLLM's "
            "prompt_logprobs, which counts ties against the target and gives no entropy"
        )

    def find(self, unit: Unit) -> Summary | None:
        return self._job.store.unit_summary(unit)

    def read(self, unit: Unit) -> UnitRows:
        """Read and encode the unit, while the engine scores another."""
        trajectories = self._reader.read(unit)
        try:
            return UnitRows(trajectories, self._engine.encode(trajectories))
        except Exception as error:
            # To be raised again by `run`: the rows can be read, and one of them is to blame.
            logger.info("a unit's rows cannot be encoded: %s", error)
            return UnitRows(trajectories, None)

    def run(self, unit: Unit, rows: UnitRows) -> list[TrajectoryScore]:
        encoded = rows.encoded
        if encoded is None:
            encoded = self._engine.encode(rows.trajectories)
        scores = self._engine.score_encoded(encoded)
        refused = [(i, s) for i, s in enumerate(scores, unit.start) if not s.status.is_scored]
        for row, score in refused[:DETAILS_LOGGED]:
            logger.info("%s row %d: %s: %s", unit.shard.name, row, score.status, score.detail)
        return scores

    def keep(self, unit: Unit, results: list[TrajectoryScore]) -> Summary:
        added = added_columns(self._job.store.identity.settings)
        frame = added.to_frame(results)
        summary = added.summary_of(results, frame)
        summary.count_reasons(results, unit.shard.name, unit.start)
        self._job.store.commit_unit(unit, frame, summary)
        return summary

    def refuse(self, unit: Unit, reason: str) -> Summary:
        logger.info("%s row %d is refused: %s", unit.shard.name, unit.start, reason)
        rank_clip = self._job.scorer.rank_clip
        score = TrajectoryScore(Status.ENGINE_ERROR, rank_clip=rank_clip, detail=reason)
        return self.keep(unit, [score])

    def commit(self, shard: Shard) -> Summary:
        return commit_scored_shard(self._job.store, shard)


def look_at_student(
    config: ScorerConfig, units: Sequence[Unit], columns: TrajectoryColumns
) -> tuple[StudentFacts, Reading]:
    """What `config` makes of the model, and the model's tokenizer of the first rows of `units`.

    Raises ValueError for a model that cannot be used.
    """
    stay_offline_without_hub(config.model)
    with quick_imports():
        from rsr.engine.student import open_student

        student = open_student(config)
    return student.facts, look_at_rows(student, units, columns)
