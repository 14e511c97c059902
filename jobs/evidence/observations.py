"""What evidence is drawn from: the scored rows of one student, narrow enough to hold in memory.

Of a scored corpus only the score, its parts, teacher, problem, correctness and the named confounds
are read: some 60 bytes a row, and several times that while they are ranked. Of a corpus with more
rows than should be held, those of problems that `reading.py` draws. Decides what counts as a
teacher, a problem and a usable row; knows no statistics.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

import numpy as np
import polars as pl
from numpy.typing import NDArray

from rsr.engine.catalogue import BY_NAME, LENGTH, RSR, SURPRISAL, Metric
from rsr.engine.metrics import DatasetRsr
from rsr.engine.model_folder import end_of_path
from rsr.jobs.errors import UsageError, first_line
from rsr.jobs.evidence.drawing import MAX_ROWS
from rsr.jobs.evidence.reading import read_rows
from rsr.jobs.run.calls import Calls
from rsr.jobs.run.memory import require_memory
from rsr.jobs.run.whole import unfinished_run
from rsr.jobs.shards.measures import Measure, measure
from rsr.jobs.shards.score_columns import dataset_of, dataset_sums
from rsr.jobs.shards.scored import (
    USUAL_CORRECT,
    USUAL_ID,
    USUAL_TEACHER,
    ScoredTable,
    open_scored,
)

DATASET_COLUMNS = ("mean_rank", "mean_surprisal_nats")
"""Columns of `Observations.rows` that Eq. 9 sums."""

PEAK_BYTES_PER_ROW = 240
"""By which the memory of `rsr teachers` grew from 1.6 to 10 million rows, with whole numbers as
problems and ids of some bytes: of these rows 60 to 100 stay, and what is ranked comes on top."""

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

    rows: `row` (u64, position in the table), `teacher` (Enum of `teachers`), `problem` (u32, dense,
    in the order of the problems' values), `rsr`, `mean_rank`, `mean_surprisal_nats`, `num_tokens`,
    `correct` (f64, where the column is there) and each confound (f64) as `confound_0`, …; where
    `metric` is not RSR also its `numerator`, `denominator` and `value`.
    teachers: all there are, in order, those without a usable row too. num_rows_by_teacher: rows
    of each, usable or not. confounds: what `correct` and each `confound_…` is called.
    notes: what a reader should know of the rows that do not count. metric: what teachers are
    compared by. is_drawn: whether there are more rows, of which none of all these was read.
    """

    table: ScoredTable
    columns: ObservationColumns
    student: str
    rows: pl.DataFrame
    teachers: list[str]
    num_rows_by_teacher: dict[str, int]
    confounds: dict[str, str]
    notes: list[str] = field(default_factory=list)
    metric: Metric = BY_NAME[RSR]
    is_drawn: bool = False

    @property
    def ratio_columns(self) -> tuple[str, str]:
        """Columns of `rows` whose sums' ratio is the metric's value of a data set."""
        return DATASET_COLUMNS if self.metric.name == RSR else ("numerator", "denominator")

    @property
    def value_column(self) -> str:
        """The column of `rows` that holds the metric of a trajectory."""
        return "rsr" if self.metric.name == RSR else "value"

    @property
    def metric_label(self) -> str:
        """What the metric is called in a sentence."""
        return "RSR" if self.metric.name == RSR else self.metric.name

    @property
    def num_problems(self) -> int:
        return self.rows["problem"].n_unique()

    def problem_sums(self, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(P, G) sums of a metric's numerators and denominators, of each problem and teacher.

        Of RSR these are mean ranks and mean surprisals in nats (Eq. 9). name: of `metric`, or RSR,
        length or surprisal. Signs are turned so that of two ratios the lower one is the better.
        """
        above, below = {
            RSR: DATASET_COLUMNS,
            LENGTH: ("num_tokens", None),
            SURPRISAL: ("mean_surprisal_nats", None),
            self.metric.name: self.ratio_columns,
        }[name]
        cells = self.rows.group_by("problem", "teacher").agg(
            above=pl.col(above).cast(pl.Float64).sum() * BY_NAME[name].sign,
            below=pl.len().cast(pl.Float64) if below is None else pl.col(below).sum(),
        )
        row = cells["problem"].rank("dense").to_numpy().astype(np.int64) - 1
        column = cells["teacher"].to_physical().to_numpy()
        numerators = np.zeros((self.num_problems, len(self.teachers)))
        denominators = np.zeros_like(numerators)
        numerators[row, column] = cells["above"].to_numpy()
        denominators[row, column] = cells["below"].to_numpy()
        return numerators, denominators


def datasets_by_teacher(rows: pl.DataFrame) -> dict[str, DatasetRsr]:
    """The data set (Eq. 9) of each teacher that has one of these rows of `Observations`."""
    sums = rows.group_by("teacher").agg(dataset_sums(*DATASET_COLUMNS))
    return {row["teacher"]: dataset_of(row) for row in sums.iter_rows(named=True)}


def observe(
    path: str,
    columns: ObservationColumns,
    *,
    rank_clip: str | None = None,
    metric: str = RSR,
    quality_column: str | None = None,
    allow_mixed_students: bool = False,
    max_rows: int = MAX_ROWS,
    seed: int = 0,
    calls: Calls | None = None,
) -> Observations:
    """Read what is needed of the scored files behind `path`.

    rank_clip: a name of `STORED_RANK_CLIPS`, or None for the run's own r_max. metric,
    quality_column: as `measure` takes them. max_rows: where there are more, only the rows of
    problems drawn by `seed` are kept, about so many. calls: read shard by shard where these are
    made; the rows come to the caller, and are those that it would have read itself. Raises
    `UsageError` where `open_scored` and `measure` do, for a confound that is not numeric, where
    memory has no room, and where no row is usable.
    """
    named = [columns.teacher, *([columns.problem] if columns.problem else []), *columns.confounds]
    table = open_scored(
        path,
        rank_clip=rank_clip,
        columns=list(dict.fromkeys(named)),
        allow_mixed_students=allow_mixed_students,
    )
    num_held = min(table.num_rows, max_rows)
    require_memory(
        num_held * PEAK_BYTES_PER_ROW,
        f"ranking and drawing among {num_held:,} rows of {path}",
        "take fewer with --max-rows, or `rsr metrics --by`, which holds no rows",
    )
    schema = table.scan.collect_schema()
    confounds = _confound_columns(schema, columns)
    has_id = USUAL_ID in schema and not schema[USUAL_ID].is_nested()
    measured = measure(table, metric, quality_column=quality_column)
    wanted = _narrow_columns(table, columns, measured, confounds, has_id=has_id)
    every = read_rows(
        table, wanted, problem=columns.problem, max_rows=max_rows, seed=seed, calls=calls
    )
    is_drawn = table.num_rows > max_rows
    try:
        every = every.with_columns(problem=_dense(every["problem"]))
    except pl.exceptions.PolarsError as error:
        raise UsageError(f"{path}: {first_line(error)}") from error
    unfinished = unfinished_run(path)
    notes = [] if unfinished is None else [f"{unfinished}: the others do not count yet"]
    if is_drawn:
        notes.append(_note_on_drawing(every, table))
    notes += _notes(every, columns)
    labelled = every.filter(pl.col("teacher").is_not_null())
    counts = dict(labelled.group_by("teacher").len().sort("teacher").iter_rows())
    usable = labelled.filter("is_usable").drop("is_scored", "is_usable", "id", strict=False)
    if not len(usable):
        raise UsageError(
            f"{path}: none of {len(every):,} rows has "
            f"{'a score' if metric == RSR else f'the metric {metric}'} and a "
            f"{columns.teacher!r}: nothing to compare"
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
        metric=measured.metric,
        is_drawn=is_drawn,
    )


def student_label(table: ScoredTable) -> str:
    """The student as its run's metadata name it, without folders; the path where they do not."""
    models = [identity["settings"].get("model") for identity in table.identities]
    return PurePath(end_of_path(str(models[0] if models and models[0] else table.path))).name


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


def _narrow_columns(
    table: ScoredTable,
    columns: ObservationColumns,
    measured: Measure,
    confounds: dict[str, str],
    *,
    has_id: bool,
) -> dict[str, pl.Expr]:
    """What is read of each row, by the names of `Observations.rows` and a few more."""
    surprisal = pl.col("rsr_mean_surprisal")
    is_usable = table.is_scored & table.mean_rank.is_finite() & surprisal.is_finite()
    of_metric = {}
    if measured.metric.name != RSR:
        is_usable &= measured.value.is_not_null()
        of_metric = {
            "numerator": measured.numerator,
            "denominator": measured.denominator,
            "value": measured.value,
        }
    return {
        "teacher": pl.col(columns.teacher).cast(pl.String),
        "problem": pl.col(columns.problem) if columns.problem else pl.lit(None, pl.Int64),
        "rsr": table.rsr,
        "mean_rank": table.mean_rank,
        "mean_surprisal_nats": surprisal,
        "num_tokens": pl.col("rsr_num_tokens"),
        "is_scored": table.is_scored.fill_null(False),
        "is_usable": is_usable.fill_null(False),
        **of_metric,
        **({"id": pl.col(USUAL_ID)} if has_id else {}),
        **{alias: pl.col(name).cast(pl.Float64) for name, alias in confounds.items()},
    }


def _dense(problems: pl.Series) -> pl.Series:
    """Numbers from 0 in the order of the values; each null gets a number of its own, at the end."""
    numbers = problems.rank("dense").cast(pl.UInt32)
    nulls = numbers.is_null().cast(pl.UInt32).cum_sum() + pl.Series([numbers.max() or 0])
    return numbers.fill_null(nulls) - 1


def _note_on_drawing(drawn: pl.DataFrame, table: ScoredTable) -> str:
    return (
        f"compared are {drawn.height:,} of {table.num_rows:,} rows, all those of "
        f"{drawn['problem'].n_unique():,} problems drawn at random: --max-rows takes more, and "
        "rsr metrics --by sums over every row"
    )


def _notes(every: pl.DataFrame, columns: ObservationColumns) -> list[str]:
    notes = []
    without_teacher = every["teacher"].null_count()
    if without_teacher:
        notes.append(f"{without_teacher:,} rows without a {columns.teacher!r} are left out")
    unusable = every.filter(pl.col("teacher").is_not_null() & ~pl.col("is_usable"))
    without_metric = int(unusable["is_scored"].sum())
    if unscored := len(unusable) - without_metric:
        notes.append(f"{unscored:,} rows without a score are left out")
    if without_metric:
        notes.append(f"{without_metric:,} scored rows without this metric are left out")
    if "id" in every.columns:
        ids = every["id"].drop_nulls()
        if repeated := len(ids) - ids.n_unique():
            notes.append(f"{repeated:,} rows repeat the {USUAL_ID!r} of another; all of them count")
    return notes
