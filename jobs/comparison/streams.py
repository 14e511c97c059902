"""A scored stream of trajectories, reduced to sums of each problem: what comparisons are made of.

Decides what counts as a row and a problem of a stream, and which quantities there are. Knows no
statistics.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath

import polars as pl

from rsr.engine.catalogue import BY_NAME, LENGTH, MEAN, RSR, Metric
from rsr.jobs.errors import UsageError, first_line
from rsr.jobs.shards.measures import Measure, measure, not_stored
from rsr.jobs.shards.scored import (
    USUAL_CORRECT,
    USUAL_ID,
    ScoredTable,
    open_scored,
    require_one_student,
)

PERPLEXITY = "perplexity"
FLOOR = "rsr_floor"

COMPARED = (
    PERPLEXITY,
    "perplexity_mean",
    "perplexity_q1",
    "perplexity_q2",
    "perplexity_q3",
    "perplexity_q4",
    RSR,
    FLOOR,
    LENGTH,
)
"""What is compared wherever it is stored: adaptation cost, RSR and what it could be, length."""


@dataclass(frozen=True, slots=True)
class Stream:
    """One scored stream of trajectories.

    label: what it is called. columns: whose means are compared beside the metrics: correctness and
    qualities. on: the column that tells its problems. id_column: what a refined stream's
    `parent_id` names rows of this one by, where it is there.
    """

    label: str
    table: ScoredTable
    columns: tuple[str, ...]
    on: str
    id_column: str = USUAL_ID

    @property
    def is_usable(self) -> pl.Expr:
        """Whether a row counts: it has a finite score and a problem."""
        is_finite = self.table.mean_rank.is_finite() & pl.col("rsr_mean_surprisal").is_finite()
        is_scored = self.table.is_scored & is_finite & pl.col(self.on).is_not_null()
        return is_scored.fill_null(False)

    @property
    def problem(self) -> pl.Expr:
        """The row's problem as text, so that streams that store it in other types compare."""
        return pl.col(self.on).cast(pl.String)

    def measures(self, names: Sequence[str]) -> list[Measure]:
        """Those of the catalogue, then the means of `columns`."""
        given = [measure(self.table, name) for name in names]
        return [*given, *(_mean_of(column) for column in self.columns)]

    def sums(self, names: Sequence[str]) -> pl.DataFrame:
        """One row for each problem: `problem`, `num_rows`, and `numerator X` and `denominator X`
        of each measure X, summed over the problem's rows that count.

        Raises `UsageError` if a file cannot be read.
        """
        parts = {
            f"{part} {m.metric.name}": expression
            for m in self.measures(names)
            for part, expression in (("numerator", m.numerator), ("denominator", m.denominator))
        }
        sums = (
            self.table.scan.filter(self.is_usable)
            .select(self.problem.alias("problem"), **parts)
            .group_by("problem")
            .agg(pl.len().alias("num_rows"), *(pl.col(name).sum() for name in parts))
            .sort("problem")
        )
        try:
            return sums.collect(engine="streaming")
        except pl.exceptions.PolarsError as error:
            raise UsageError(f"{self.table.path} cannot be read: {first_line(error)}") from error


def open_streams(
    paths: Sequence[str],
    *,
    on: str,
    id_column: str = USUAL_ID,
    quality_columns: Sequence[str] = (),
    rank_clip: str | None = None,
    allow_mixed_students: bool = False,
) -> list[Stream]:
    """The scored streams behind `paths`, the first of which is the native one.

    id_column: of the native stream. quality_columns: numeric columns, of which a stream that has
    none of a name shows none. Raises `UsageError` where `open_scored` does, if streams are of
    different students or if a column is missing or not of numbers.
    """
    tables = [
        open_scored(
            path, rank_clip=rank_clip, columns=[on], allow_mixed_students=allow_mixed_students
        )
        for path in paths
    ]
    if not allow_mixed_students:
        identities = tuple(identity for table in tables for identity in table.identities)
        require_one_student(replace(tables[0], path=" and ".join(paths), identities=identities))
    _require_one_clip(tables)
    for table in tables:
        kind = table.scan.collect_schema()[on]
        if kind.is_nested():
            raise UsageError(f"column {on!r} of {table.path} is {kind}; expected ids of problems")
    for column in quality_columns:
        if all(column not in table.schema.names for table in tables):
            tables[0].require([column])
    labels = _labels(paths)
    return [
        Stream(label, table, _numeric_columns(table, quality_columns), on, id_column)
        for label, table in zip(labels, tables, strict=True)
    ]


def shared_metrics(streams: Sequence[Stream]) -> tuple[list[str], dict[str, str]]:
    """The names of `COMPARED` that every stream stores, and of the others why not."""
    lacking: dict[str, str] = {}
    for name in COMPARED:
        for stream in streams:
            if (why := not_stored(stream.table, BY_NAME[name])) is not None:
                lacking.setdefault(name, f"{stream.label}: {why}")
    return [name for name in COMPARED if name not in lacking], lacking


def _require_one_clip(tables: Sequence[ScoredTable]) -> None:
    """Raises `UsageError` if streams of their runs' own r_max have different ones."""
    if tables[0].rank_clip is not None:
        return
    clips = {str(i["settings"].get("rank_clip") or "none") for t in tables for i in t.identities}
    if len(clips) > 1:
        raise UsageError(
            f"the streams were scored at r_max {' and '.join(sorted(clips))}; choose one with "
            "--rank-clip"
        )


def _labels(paths: Sequence[str]) -> list[str]:
    """The last part of each path, or the whole paths where these are not distinct."""
    names = [PurePath(path).name or path for path in paths]
    if len(set(names)) == len(names):
        return names
    if len(set(paths)) == len(paths):
        return list(paths)
    raise UsageError(f"{next(p for p in paths if paths.count(p) > 1)} is named more than once")


def _numeric_columns(table: ScoredTable, quality_columns: Sequence[str]) -> tuple[str, ...]:
    schema = table.scan.collect_schema()
    found = []
    for name in dict.fromkeys((USUAL_CORRECT, *quality_columns)):
        if name not in schema:
            continue
        if schema[name].is_numeric() or schema[name] in (pl.Boolean, pl.Null):
            found.append(name)
        elif name in quality_columns:
            raise UsageError(
                f"column {name!r} of {table.path} is {schema[name]}; expected numbers, higher "
                "being better"
            )
    return tuple(found)


def _mean_of(column: str) -> Measure:
    """The mean of a column over the rows that have a finite value of it."""
    value = pl.col(column).cast(pl.Float64)
    value = pl.when(value.is_finite()).then(value)
    metric = Metric(
        column,
        f"column {column}",
        MEAN,
        "higher",
        "",
        "a column of the streams",
        lambda _: (value, 1.0),
    )
    return Measure(metric, value, pl.when(value.is_not_null()).then(1.0), value)
