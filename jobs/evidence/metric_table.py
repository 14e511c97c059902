"""Every metric of a scored corpus, of all its rows or of each teacher's: one pass, sums alone.

What a metric is stands in `engine/catalogue.py`. Knows nothing of terminals.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from rsr.engine.catalogue import Metric
from rsr.engine.metrics import MIN_SURPRISAL_SUM_NATS
from rsr.jobs.errors import UsageError, first_line
from rsr.jobs.run.calls import Calls, answers_in_order
from rsr.jobs.shards.measures import Measure
from rsr.jobs.shards.scored import USUAL_ID, ScoredTable
from rsr.jobs.shards.shard import Shard
from rsr.jobs.storage.atomic import write_text_atomically

TABLE_FILE, ROWS_FILE = "metrics.csv", "rows.parquet"

ALL = "all"
"""The one group of a table that is not told by a column."""


@dataclass(frozen=True, slots=True)
class MetricRow:
    """One metric of every group. values: of its data set; None where no row has it. num_rows: rows
    that have it. agreement: Kendall's τ-b of the groups' order, best first, with that by the
    table's first metric; None where either knows no order.
    """

    metric: Metric
    values: dict[str, float | None]
    num_rows: dict[str, int]
    agreement: float | None = None

    @property
    def best(self) -> str | None:
        """The group that suits the student best; None where no group has a value."""
        known = self.comparable
        return min((value, group) for group, value in known.items())[1] if known else None

    @property
    def comparable(self) -> dict[str, float]:
        """Values of the groups that have one, lower being better, to 12 digits.

        Sums over shards end in other last bits than sums over rows, which must not part groups
        that are equal.
        """
        known = {group: value for group, value in self.values.items() if value is not None}
        return {group: float(f"{self.metric.sign * value:.12g}") for group, value in known.items()}

    def to_json(self) -> dict[str, Any]:
        return {
            "metric": self.metric.name,
            "direction": self.metric.direction,
            "unit": self.metric.unit,
            "values": self.values,
            "num_rows": self.num_rows,
            "best": self.best,
            "agreement": self.agreement,
        }


@dataclass(frozen=True, slots=True)
class MetricTable:
    """Metrics of groups of rows, as `rsr metrics` shows them.

    by: the column of the groups, or None. lacking: metrics that are not stored, and why.
    """

    by: str | None
    groups: list[str]
    rows: list[MetricRow]
    lacking: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "by": self.by,
            "groups": self.groups,
            "metrics": [row.to_json() for row in self.rows],
            "not_stored": self.lacking,
        }

    def to_frame(self) -> pl.DataFrame:
        """One row for each group, a column for each metric: what `rsr correlate` reads."""
        columns: dict[str, list[Any]] = {self.by or ALL: self.groups}
        columns |= {row.metric.name: [row.values[g] for g in self.groups] for row in self.rows}
        return pl.DataFrame(columns)


def metric_table(
    table: ScoredTable,
    measures: Sequence[Measure],
    *,
    by: str | None = None,
    lacking: dict[str, str] | None = None,
    calls: Calls | None = None,
) -> MetricTable:
    """The metrics of each value of the column `by`, null aside, over the rows that have them.

    calls: sum shard by shard where these are made; the sums may differ in their last digits.
    """
    if calls is None:
        sums = _sums(table, measures, by)
    else:
        parts = answers_in_order(calls, partial(_sums_of_shard, table, measures, by), table.shards)
        sums = pl.concat(parts).group_by("group", maintain_order=True).agg(pl.all().sum())
    by_group = {row["group"]: row for row in sums.sort("group").iter_rows(named=True)}
    rows = [metric_row(m.metric, by_group) for m in measures]
    return MetricTable(by, list(by_group), with_agreement(rows), lacking or {})


def _sums(table: ScoredTable, measures: Sequence[Measure], by: str | None) -> pl.DataFrame:
    """What `metric_row` takes, a row for each group."""
    group = pl.lit(ALL) if by is None else pl.col(by).cast(pl.String)
    parts = {
        f"{kind} {m.metric.name}": expression
        for m in measures
        for kind, expression in (("numerator", m.numerator), ("denominator", m.denominator))
    }
    sums = [pl.col(name).sum() for name in parts]
    sums += [pl.col(f"numerator {m.metric.name}").count().alias(m.metric.name) for m in measures]
    rows = table.scan.select(group=group, **parts).filter(pl.col("group").is_not_null())
    try:
        return rows.group_by("group").agg(sums).collect(engine="streaming")
    except pl.exceptions.PolarsError as error:
        raise UsageError(f"{table.path} cannot be read: {first_line(error)}") from error


def _sums_of_shard(
    table: ScoredTable, measures: Sequence[Measure], by: str | None, shard: Shard
) -> pl.DataFrame:
    return _sums(table.of(shard), measures, by)


def metric_row(metric: Metric, by_group: dict[str, dict[str, Any]]) -> MetricRow:
    """A metric's row, of each group's `numerator NAME`, `denominator NAME` and count `NAME`."""
    values: dict[str, float | None] = {}
    for group, sums in by_group.items():
        values[group] = None
        if sums[metric.name]:
            denominator = max(sums[f"denominator {metric.name}"], MIN_SURPRISAL_SUM_NATS)
            values[group] = float(metric.finish(sums[f"numerator {metric.name}"] / denominator))
    return MetricRow(metric, values, {g: sums[metric.name] for g, sums in by_group.items()})


def write_metrics(
    table: ScoredTable, measures: Sequence[Measure], told: MetricTable, folder: Path
) -> None:
    """Write `told`, and the metrics of each row, to `folder`; each file whole or not at all.

    Raises `UsageError` if it cannot be written. Streams: rows are never held all at once.
    """
    named = [name for name in (USUAL_ID, told.by) if name in table.schema.names]
    rows = table.scan.with_row_index("row").select(
        "row",
        *(pl.col(name) for name in dict.fromkeys(named)),
        **{f"metric_{m.metric.name}": m.value for m in measures},
    )
    part = folder / f".{ROWS_FILE}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        rows.sink_parquet(part)
        part.replace(folder / ROWS_FILE)
        write_text_atomically(folder / TABLE_FILE, told.to_frame().write_csv())
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UsageError(f"{folder} cannot be written: {first_line(error)}") from error
    finally:
        part.unlink(missing_ok=True)


def with_agreement(rows: Sequence[MetricRow]) -> list[MetricRow]:
    """The same, each with its agreement with the first."""
    return [MetricRow(row.metric, row.values, row.num_rows, _kendall(rows[0], row)) for row in rows]


def _kendall(one: MetricRow, other: MetricRow) -> float | None:
    """τ-b over the groups that have both, signs turned so that lower is better in both."""
    of_one, of_other = one.comparable, other.comparable
    pairs = [(of_one[group], of_other[group]) for group in of_one if group in of_other]
    concordant = untied_one = untied_other = 0
    for index, (a, b) in enumerate(pairs):
        for c, d in pairs[:index]:
            order_one, order_other = (a > c) - (a < c), (b > d) - (b < d)
            concordant += order_one * order_other
            untied_one += order_one != 0
            untied_other += order_other != 0
    if not untied_one or not untied_other:
        return None
    return float(concordant / (untied_one * untied_other) ** 0.5)


def told_agreement(rows: Sequence[MetricRow]) -> str:
    """Whether the metrics name one best teacher, in a sentence."""
    by_best: dict[str, list[str]] = {}
    for row in rows:
        if row.best is not None:
            by_best.setdefault(row.best, []).append(row.metric.name)
    if len(by_best) == 1:
        (best,) = by_best
        return f"the metrics agree on the best teacher: {best}"
    told = "; ".join(f"{best} by {', '.join(names)}" for best, names in by_best.items())
    return f"the metrics disagree on the best teacher: {told}"
