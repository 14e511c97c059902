"""Scoring as a step of somebody else's pipeline: tables of rows in, the same with scores out.

Knows neither Ray nor files: `ray.data.Dataset.map_batches` makes one for each actor.
"""

from dataclasses import asdict
from typing import Self

import pyarrow as pa

from rsr.engine.config import ScorerConfig
from rsr.jobs.errors import UsageError
from rsr.jobs.scoring.columns import added_columns
from rsr.jobs.scoring.job import Engine
from rsr.jobs.shards import score_columns
from rsr.jobs.shards.columns import TrajectoryColumns, choose_columns
from rsr.jobs.shards.reader import trajectories_of


class ScoreBatches:
    """A callable that adds score columns to a table of trajectories; making one loads a student.

    For `map_batches(ScoreBatches, fn_constructor_args=(config,), batch_format="pyarrow",
    concurrency=N, num_gpus=1)`. Prompts that rows of a batch share are computed once; some hundred
    rows fill the prefill steps. Raises what `Scorer` does.
    """

    def __init__(self, config: ScorerConfig, columns: TrajectoryColumns | None = None) -> None:
        # vLLM takes seconds to import: only whoever scores should wait for it.
        from rsr.engine.scorer import Scorer

        self._config = config
        self._columns = columns or TrajectoryColumns()
        self._scorer: Engine = Scorer(config)

    @classmethod
    def over(
        cls, engine: Engine, config: ScorerConfig, columns: TrajectoryColumns | None = None
    ) -> Self:
        """One over a scorer that is open already."""
        made = cls.__new__(cls)
        made._config, made._columns, made._scorer = config, columns or TrajectoryColumns(), engine
        return made

    def __call__(self, batch: pa.Table) -> pa.Table:
        """`batch` with the columns that `rsr score` writes behind its own, row by row.

        Raises `UsageError` where it has no trajectories or has score columns already.
        """
        added = added_columns(asdict(self._config))
        taken = [name for name in batch.column_names if added.replaces(name)]
        if taken:
            raise UsageError(f"the batch has a column {taken[0]!r} already; drop it first")
        columns = choose_columns(batch.schema, self._columns, "the batch")
        scores = self._scorer.score_encoded(
            self._scorer.encode(
                [t for b in batch.to_batches() for t in trajectories_of(b, columns)]
            )
        )
        beside = score_columns.to_arrow(added.to_frame(scores))
        for field, column in zip(beside.schema, beside.columns, strict=True):
            batch = batch.append_column(field, column)
        return batch
