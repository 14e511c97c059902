"""Which rows of a scored table may be chosen, as the narrow arrays that choosing needs.

Side conditions are Polars expressions over the whole table; what comes back is a few bytes a
row, whatever else the table holds. Ids are only read where equal scores need them. Knows
nothing of limits, quotas or output.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from rsr.engine.catalogue import RSR
from rsr.jobs.errors import UsageError, first_line
from rsr.jobs.selection.numbering import encode
from rsr.jobs.selection.ranking import ReadIds
from rsr.jobs.shards.measures import Measure
from rsr.jobs.shards.scored import USUAL_ID, ScoredTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What a scored row must be to take part.

    where: a Polars SQL expression, true. min_tokens, max_tokens: scored tokens, inclusive.
    required: Boolean columns, true. Null is not true.
    """

    where: str | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    required: tuple[str, ...] = ()

    def expression(self, table: ScoredTable) -> pl.Expr:
        """Whether a row is scored and fulfils them; `UsageError` if that cannot be asked."""
        types = table.scan.collect_schema()
        parts = [table.is_scored]
        if self.min_tokens is not None:
            parts.append(pl.col("rsr_num_tokens") >= self.min_tokens)
        if self.max_tokens is not None:
            parts.append(pl.col("rsr_num_tokens") <= self.max_tokens)
        for name in self.required:
            if types[name] != pl.Boolean:
                raise UsageError(
                    f"column {name!r} of {table.path} is {types[name]}; expected Boolean. "
                    "Say what is required of it with --where"
                )
            parts.append(pl.col(name))
        if self.where is not None:
            parts.append(_where(self.where, table))
        return pl.all_horizontal(*(part.fill_null(False) for part in parts))


def _where(text: str, table: ScoredTable) -> pl.Expr:
    try:
        expression = pl.sql_expr(text)
        kind = table.scan.select(expression).collect_schema().dtypes()
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise UsageError(
            f"--where {text!r}: {first_line(error)}; columns: {', '.join(table.schema.names)}"
        ) from error
    if kind != [pl.Boolean]:
        raise UsageError(f"--where {text!r} is {kind[0]}; expected a condition, true or false")
    return expression


@dataclass(frozen=True, slots=True)
class Candidates:
    """Rows of a table by position; only where `scores` is not NaN does a row take part.

    scores: (N,) f64, lower is better: RSR at the table's rank clip, or another metric's. groups:
    (N,) int32 in [0, num_groups), or None without a group column. num_tokens: (N,) int32 where
    asked for. extra: (N, …) what else was asked for. num_scored: rows that count as scored, before
    conditions. num_distinct_groups: groups that any row is of, scored or not. num_ungrouped:
    candidates left out since their group is null. num_unmeasured: rows that fulfil the conditions,
    left out since the metric is not defined there.
    """

    scores: NDArray[np.float64]
    groups: NDArray[np.int32] | None
    num_groups: int
    num_tokens: NDArray[np.int32] | None
    extra: pl.DataFrame
    num_scored: int
    num_distinct_groups: int = 1
    num_ungrouped: int = 0
    num_unmeasured: int = 0

    @property
    def is_candidate(self) -> NDArray[np.bool_]:
        return ~np.isnan(self.scores)

    @property
    def num_candidates(self) -> int:
        return int(np.count_nonzero(self.is_candidate))

    def num_groups_of(self, chosen: NDArray[np.bool_]) -> int:
        """Groups that any row of the (N,) mask `chosen` is of."""
        assert self.groups is not None
        return _num_distinct(self.groups[chosen], self.num_groups)

    def count_groups(self, chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
        """(num_groups,) rows of each group in the (N,) mask `chosen`."""
        assert self.groups is not None
        return np.bincount(self.groups[chosen], minlength=self.num_groups)


def read_candidates(
    table: ScoredTable,
    conditions: Conditions,
    measured: Measure,
    *,
    group_column: str | None = None,
    null_is_group: bool = False,
    with_tokens: bool = False,
    extra: Mapping[str, pl.Expr] | None = None,
) -> Candidates:
    """Read what choosing needs: one pass over the narrow columns, in order.

    measured: what orders rows. null_is_group: rows whose group is null form one, else they take no
    part. extra: other expressions to evaluate, by names of the caller's.

    Raises `UsageError` if a column or condition is unfit, or if no row is scored, or none
    fulfils the conditions.
    """
    may_lack = measured.metric.name != RSR
    wanted = candidate_columns(table, conditions, measured, group_column=group_column)
    if with_tokens:
        wanted["num_tokens"] = pl.col("rsr_num_tokens")
    extra = extra or {}
    frame = collect_columns(table, wanted | dict(extra))
    num_scored = int(frame["is_scored"].sum())
    num_unmeasured = int(frame["is_unmeasured"].sum()) if may_lack else 0
    scores = frame["score"].to_numpy()
    groups, num_groups, num_ungrouped, num_distinct = None, 1, 0, 1
    if group_column is not None:
        groups, num_groups = encode(frame["group"])
        is_null = groups < 0
        if not is_null.any():
            num_distinct = _num_distinct(groups, num_groups)
        else:
            num_distinct = _num_distinct(groups[~is_null], num_groups)
            if null_is_group:
                groups[is_null] = num_groups
                num_groups += 1
            else:
                num_ungrouped = int(np.count_nonzero(is_null & ~np.isnan(scores)))
                scores = np.where(is_null, np.nan, scores)
                groups[is_null] = 0
    num_candidates = int(np.count_nonzero(~np.isnan(scores)))
    require_some(table, num_scored, num_candidates, num_ungrouped, num_unmeasured)
    return Candidates(
        scores=scores,
        groups=groups,
        num_groups=max(1, num_groups),
        num_tokens=frame["num_tokens"].to_numpy() if with_tokens else None,
        extra=frame.select(list(extra)),
        num_scored=num_scored,
        num_distinct_groups=num_distinct,
        num_ungrouped=num_ungrouped,
        num_unmeasured=num_unmeasured,
    )


def _num_distinct(groups: NDArray[np.int32], num_groups: int) -> int:
    seen = np.zeros(num_groups, bool)
    seen[groups] = True
    return int(np.count_nonzero(seen))


def candidate_columns(
    table: ScoredTable, conditions: Conditions, measured: Measure, *, group_column: str | None
) -> dict[str, pl.Expr]:
    """What is read of each row: `score`, NaN of what is no candidate, `is_scored`, and as asked.

    Raises `UsageError` if a column or condition is unfit.
    """
    fulfils = conditions.expression(table)
    scores_of_candidates = pl.when(fulfils).then(measured.score)
    wanted = {"score": scores_of_candidates.fill_null(float("nan")), "is_scored": table.is_scored}
    # Every scored row has an RSR.
    if measured.metric.name != RSR:
        wanted["is_unmeasured"] = fulfils & measured.value.is_null()
    if group_column is not None:
        wanted["group"] = groupable(table, group_column)
    return wanted


def collect_columns(table: ScoredTable, wanted: Mapping[str, pl.Expr]) -> pl.DataFrame:
    """Every row in order; raises what `ScoredTable.collect` raises."""
    return table.collect(table.scan.select(**wanted))


def require_some(
    table: ScoredTable,
    num_scored: int,
    num_candidates: int,
    num_ungrouped: int,
    num_unmeasured: int,
) -> None:
    """Raises `UsageError` unless the table has a scored row, and a candidate."""
    if not num_scored:
        raise UsageError(
            f"none of the {table.num_rows:,} rows of {table.path} has a score; rsr_status says why"
        )
    if num_candidates:
        return
    if num_unmeasured:
        raise UsageError(
            f"none of the {num_unmeasured:,} rows of {table.path} that fulfil the conditions "
            "has a value of the metric: there is nothing to write"
        )
    ungrouped = f"; {num_ungrouped:,} have no group" if num_ungrouped else ""
    raise UsageError(
        f"none of the {num_scored:,} scored rows of {table.path} fulfils the conditions"
        f"{ungrouped}: there is nothing to write"
    )


def groupable(table: ScoredTable, column: str) -> pl.Expr:
    """The column as values that `encode` takes; `UsageError` if it has none."""
    kind = table.scan.collect_schema()[column]
    if kind.is_nested() or kind == pl.Object:
        raise UsageError(f"column {column!r} of {table.path} is {kind}; rows of it form no groups")
    return pl.col(column).cast(pl.String) if kind in (pl.Categorical, pl.Enum) else pl.col(column)


def choose_id_column(table: ScoredTable, named: str | None) -> str | None:
    """The named column, else `id` if there is one that has an order; None leaves positions.

    Raises `UsageError` if the named column is unfit.
    """
    if named is None and table.schema.names.count(USUAL_ID) != 1:
        return None
    column = named or USUAL_ID
    if (kind := table.scan.collect_schema()[column]).is_nested():
        if named is None:
            return None
        raise UsageError(f"column {column!r} of {table.path} is {kind}; ids must have an order")
    return column


def id_reader(table: ScoredTable, column: str | None) -> ReadIds | None:
    """Reads that column at ascending positions."""
    if column is None:
        return None
    return lambda positions: table.read_at(column, positions)
