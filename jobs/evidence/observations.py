"""What evidence is drawn from: the scored rows of one student, narrow enough to hold in memory.

Of a scored corpus only the score, its parts, teacher, problem, correctness and the named confounds
are read: some 60 bytes a row. Decides what counts as a teacher, a problem and a usable row;
knows no statistics.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

import numpy as np
import polars as pl
from numpy.typing import NDArray

from rsr.engine.metrics import DatasetRsr
from rsr.jobs.errors import UsageError, first_line
from rsr.jobs.shards.score_columns import dataset_of, dataset_sums
from rsr.jobs.shards.scored import (
    USUAL_CORRECT,
    USUAL_ID,
    USUAL_TEACHER,
    ScoredTable,
    open_scored,
)

DATASET_COLUMNS = ("mean_rank", "mean_surprisal_nats")
"""Of `Observations.rows`: what Eq. 9 sums."""

NO_PROBLEMS = "none"
"""The `--problem-column` that says: every row is a problem of its own."""


@dataclass(frozen=True, slots=True)
class ObservationColumns:
    """Columns of a scored file, by meaning. problem: None makes every row a problem of its own."""

    teacher: str = USUAL_TEACHER
    problem: str | None = "problem_id"
    confounds: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Observations:
    """The usable rows of one student.

    rows: `row` (u32, position in the table), `teacher` (Enum of `teachers`), `problem` (u32, dense,
    in the order of the problems' values), `rsr`, `mean_rank`, `mean_surprisal_nats`, `num_tokens`,
    `correct` (f64, where the column is there) and each confound (f64) as `confound_0`, …
    teachers: all there are, in order, those without a usable row too. num_rows_by_teacher: rows
    of each, usable or not. confounds: what `correct` and each `confound_…` is called.
    notes: what a reader should know of the rows that do not count.
    """

    table: ScoredTable
    columns: ObservationColumns
    student: str
    rows: pl.DataFrame
    teachers: list[str]
    num_rows_by_teacher: dict[str, int]
    confounds: dict[str, str]
    notes: list[str] = field(default_factory=list)

    @property
    def num_problems(self) -> int:
        return self.rows["problem"].n_unique()

    def problem_sums(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(P, G) sums of mean ranks and of mean surprisals in nats, of each problem and teacher."""
        cells = self.rows.group_by("problem", "teacher").agg(
            pl.col("mean_rank").sum(), pl.col("mean_surprisal_nats").sum()
        )
        row = cells["problem"].rank("dense").to_numpy().astype(np.int64) - 1
        column = cells["teacher"].to_physical().to_numpy()
        ranks = np.zeros((self.num_problems, len(self.teachers)))
        surprisals = np.zeros_like(ranks)
        ranks[row, column] = cells["mean_rank"].to_numpy()
        surprisals[row, column] = cells["mean_surprisal_nats"].to_numpy()
        return ranks, surprisals


def datasets_by_teacher(rows: pl.DataFrame) -> dict[str, DatasetRsr]:
    """The data set (Eq. 9) of each teacher that has one of these rows of `Observations`."""
    sums = rows.group_by("teacher").agg(dataset_sums(*DATASET_COLUMNS))
    return {row["teacher"]: dataset_of(row) for row in sums.iter_rows(named=True)}


def observe(
    path: str,
    columns: ObservationColumns,
    *,
    rank_clip: str | None = None,
    allow_mixed_students: bool = False,
) -> Observations:
    """Read what is needed of the scored files behind `path`.

    rank_clip: a name of `STORED_RANK_CLIPS`, or None for the run's own r_max. Raises `UsageError`
    where `open_scored` does, for a confound that is not numeric, and where no row is usable.
    """
    named = [columns.teacher, *([columns.problem] if columns.problem else []), *columns.confounds]
    table = open_scored(
        path,
        rank_clip=rank_clip,
        columns=list(dict.fromkeys(named)),
        allow_mixed_students=allow_mixed_students,
    )
    schema = table.scan.collect_schema()
    confounds = _confound_columns(schema, columns)
    has_id = USUAL_ID in schema and not schema[USUAL_ID].is_nested()
    every = _read(table, columns, confounds, has_id=has_id)
    notes = _notes(every, columns)
    labelled = every.filter(pl.col("teacher").is_not_null())
    counts = dict(labelled.group_by("teacher").len().sort("teacher").iter_rows())
    usable = labelled.filter("is_usable").drop("is_usable", "id", strict=False)
    if not len(usable):
        raise UsageError(
            f"{path}: none of {len(every):,} rows has a score and a {columns.teacher!r}: "
            "nothing to compare"
        )
    teachers = list(counts)
    return Observations(
        table=table,
        columns=columns,
        student=student_label(table),
        rows=usable.with_columns(pl.col("teacher").cast(pl.Enum(teachers))),
        teachers=teachers,
        num_rows_by_teacher=counts,
        confounds={alias: name for name, alias in confounds.items()},
        notes=notes,
    )


def student_label(table: ScoredTable) -> str:
    """The student as its run's metadata name it, without folders; the path where they do not."""
    models = [identity["settings"].get("model") for identity in table.identities]
    return PurePath(str(models[0] if models and models[0] else table.path)).name


def _confound_columns(schema: pl.Schema, columns: ObservationColumns) -> dict[str, str]:
    """Column name → alias; `UsageError` for a named one that is not numeric."""
    confounds = {}
    if USUAL_CORRECT in schema and _is_numeric(schema[USUAL_CORRECT]):
        confounds[USUAL_CORRECT] = "correct"
    for index, name in enumerate(columns.confounds):
        if not _is_numeric(schema[name]):
            raise UsageError(f"column {name!r} is {schema[name]}; a confound must be numeric")
        confounds.setdefault(name, f"confound_{index}")
    return confounds


def _is_numeric(kind: pl.DataType) -> bool:
    return kind.is_numeric() or kind == pl.Boolean


def _read(
    table: ScoredTable, columns: ObservationColumns, confounds: dict[str, str], *, has_id: bool
) -> pl.DataFrame:
    surprisal = pl.col("rsr_mean_surprisal")
    frame = table.scan.with_row_index("row").select(
        "row",
        teacher=pl.col(columns.teacher).cast(pl.String),
        problem=pl.col(columns.problem) if columns.problem else pl.lit(None, pl.Int64),
        rsr=table.rsr,
        mean_rank=table.mean_rank,
        mean_surprisal_nats=surprisal,
        num_tokens=pl.col("rsr_num_tokens"),
        is_usable=(table.is_scored & table.mean_rank.is_finite() & surprisal.is_finite()).fill_null(
            False
        ),
        **({"id": pl.col(USUAL_ID)} if has_id else {}),
        **{alias: pl.col(name).cast(pl.Float64) for name, alias in confounds.items()},
    )
    try:
        rows = frame.collect(engine="streaming")
        return rows.with_columns(problem=_dense(rows["problem"]))
    except pl.exceptions.PolarsError as error:
        raise UsageError(f"{table.path}: {first_line(error)}") from error


def _dense(problems: pl.Series) -> pl.Series:
    """Numbers from 0 in the order of the values; each null gets a number of its own, at the end."""
    numbers = problems.rank("dense").cast(pl.UInt32)
    nulls = numbers.is_null().cast(pl.UInt32).cum_sum() + pl.Series([numbers.max() or 0])
    return numbers.fill_null(nulls) - 1


def _notes(every: pl.DataFrame, columns: ObservationColumns) -> list[str]:
    notes = []
    without_teacher = every["teacher"].null_count()
    if without_teacher:
        notes.append(f"{without_teacher:,} rows without a {columns.teacher!r} are left out")
    unscored = every.filter(pl.col("teacher").is_not_null() & ~pl.col("is_usable")).height
    if unscored:
        notes.append(f"{unscored:,} rows without a score are left out")
    if "id" in every.columns:
        ids = every["id"].drop_nulls()
        if repeated := len(ids) - ids.n_unique():
            notes.append(f"{repeated:,} rows repeat the {USUAL_ID!r} of another; all of them count")
    return notes
