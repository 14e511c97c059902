"""The columns that a run adds to each row: their names, types and sums."""

from collections.abc import Sequence
from typing import Any

import polars as pl
import pyarrow as pa

from rsr.jobs.grading.grades import Grade
from rsr.jobs.shards.score_columns import Summary

MAX_TEXT_CHARACTERS = 1000
"""Characters that are kept of an extracted answer or a reason: enough to compare by eye."""

GRADE_FIELDS: "tuple[pa.Field[Any], ...]" = (
    pa.field("grade_status", pa.string()),
    pa.field("grade_extracted", pa.string()),
    pa.field("grade_detail", pa.string()),
    pa.field("correct", pa.bool_()),
)
"""The columns that a run adds, in order."""
GRADE_COLUMNS = tuple(column.name for column in GRADE_FIELDS)


def is_grade_column(name: str) -> bool:
    return name in GRADE_COLUMNS


def to_frame(grades: Sequence[Grade]) -> pl.DataFrame:
    """One row per grade, in order."""
    return pl.DataFrame(
        {
            "grade_status": [grade.status.value for grade in grades],
            "grade_extracted": [_short(grade.extracted) for grade in grades],
            "grade_detail": [_short(grade.detail) for grade in grades],
            "correct": [grade.correct for grade in grades],
        },
        schema={
            "grade_status": pl.String,
            "grade_extracted": pl.String,
            "grade_detail": pl.String,
            "correct": pl.Boolean,
        },
    )


def to_arrow(frame: pl.DataFrame) -> pa.Table:
    """`frame` with the types of `GRADE_FIELDS`."""
    return frame.to_arrow().cast(pa.schema(GRADE_FIELDS))


def summary_of(frame: pl.DataFrame) -> Summary:
    counts = frame.group_by("grade_status").len().sort("grade_status")
    return Summary(num_rows=len(frame), rows_by_status=dict(counts.iter_rows()))


def _short(text: str | None) -> str | None:
    """The text as UTF-8 can hold it, no longer than `MAX_TEXT_CHARACTERS`."""
    if text is None:
        return None
    return text[:MAX_TEXT_CHARACTERS].encode("utf-8", "backslashreplace").decode()
