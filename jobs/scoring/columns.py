"""The columns that one run adds: all score columns, or the one of a second pass."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import polars as pl
import pyarrow as pa

from rsr.engine.metrics import TrajectoryScore
from rsr.jobs.shards import score_columns
from rsr.jobs.shards.score_columns import ScoreColumn, Summary
from rsr.jobs.shards.writer import METADATA_KEY


@dataclass(frozen=True, slots=True)
class AddedColumns:
    """What a run of certain settings writes beside INPUT's own columns.

    metadata_key: of a file's metadata, where the run's identity stands. columns: in order.
    replaces: whether a column of INPUT with that name gives way. to_frame: one row per score.
    """

    metadata_key: bytes
    columns: tuple[ScoreColumn, ...]
    replaces: Callable[[str], bool]
    to_frame: Callable[[Sequence[TrajectoryScore]], pl.DataFrame]
    is_second_pass: bool

    @property
    def schema(self) -> pa.Schema:
        return pa.schema([(column.name, column.arrow_type) for column in self.columns])

    def summary_of(self, scores: Sequence[TrajectoryScore], frame: pl.DataFrame) -> Summary:
        """frame: of `scores`."""
        if self.is_second_pass:
            frame = score_columns.to_frame(scores, token_columns=False)
        return Summary.of(frame)


def added_columns(settings: Mapping[str, Any]) -> AddedColumns:
    """settings: of the run's identity."""
    second_pass = score_columns.second_pass_of(settings)
    if second_pass is None:
        kept = score_columns.kept_by(settings)
        return AddedColumns(
            METADATA_KEY,
            score_columns.columns(**kept),
            score_columns.is_score_column,
            partial(score_columns.to_frame, **kept),
            is_second_pass=False,
        )
    column = score_columns.SECOND_PASS_COLUMNS[second_pass]
    return AddedColumns(
        column.name.encode(),
        (column,),
        column.name.__eq__,
        partial(score_columns.to_second_pass_frame, second_pass),
        is_second_pass=True,
    )
