"""The metrics of `engine/catalogue.py`, bound to a scored table: expressions, and what is lacking.

What a metric is stands in the catalogue; which columns its parts are in stands here. Files of
earlier releases, or of `--metrics rsr`, lack some columns: a metric made of those is refused in one
line that says how to get it.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl

from rsr.engine.catalogue import (
    BY_NAME,
    METRICS,
    RSR,
    Metric,
    Need,
    casl_columns,
    first_token_weight,
)
from rsr.engine.metrics import MIN_SURPRISAL_SUM_NATS
from rsr.jobs.errors import UsageError
from rsr.jobs.shards.score_columns import QUARTERS, SECOND_PASS_COLUMNS
from rsr.jobs.shards.scored import ScoredTable

COLUMN_OF_NEED: dict[Need, str] = {
    "quarters": "rsr_quarters",
    "steps": "rsr_steps",
    "sums": "rsr_sums",
    "prompt": "rsr_prompt",
    "unconditional": SECOND_PASS_COLUMNS["unconditional"].name,
    "window": SECOND_PASS_COLUMNS["window"].name,
}


@dataclass(frozen=True, slots=True)
class StoredColumns:
    """The `catalogue.StoredValues` of a scored table, as expressions over its columns."""

    table: ScoredTable
    quality_column: str | None = None
    first_token_weight: float = float("nan")

    @property
    def num_tokens(self) -> pl.Expr:
        return pl.col("rsr_num_tokens").cast(pl.Float64)

    @property
    def mean_rank(self) -> pl.Expr:
        return self.table.mean_rank

    @property
    def mean_surprisal(self) -> pl.Expr:
        return pl.col("rsr_mean_surprisal")

    @property
    def mean_entropy(self) -> pl.Expr:
        return pl.col("rsr_mean_entropy")

    def mean_rank_at(self, rank_clip: str) -> pl.Expr:
        return pl.col("rsr_rank_sums").struct.field(rank_clip) / self.num_tokens

    def quarter_tokens(self, quarter: int) -> pl.Expr:
        return _positive(_field("rsr_quarters", QUARTERS[quarter], "num_tokens"))

    def quarter_surprisal(self, quarter: int) -> pl.Expr:
        surprisal = _field("rsr_quarters", QUARTERS[quarter], "surprisal_sum")
        return pl.when(self.quarter_tokens(quarter).is_not_null()).then(surprisal)

    @property
    def num_steps(self) -> pl.Expr:
        return _positive(_field("rsr_steps", "num_steps"))

    @property
    def step_surprisal(self) -> pl.Expr:
        return pl.when(self.num_steps.is_not_null()).then(_field("rsr_steps", "surprisal_sum"))

    @property
    def num_later_tokens(self) -> pl.Expr:
        return _positive(pl.col("rsr_num_tokens") - _field("rsr_steps", "num_steps"))

    @property
    def mean_surprisal_squared(self) -> pl.Expr:
        return _field("rsr_sums", "surprisal_squared") / self.num_tokens

    @property
    def mean_rank_per_surprisal(self) -> pl.Expr:
        return _field("rsr_sums", "rank_per_surprisal") / self.num_tokens

    @property
    def mean_rank_per_entropy(self) -> pl.Expr:
        return _field("rsr_sums", "rank_per_entropy") / self.num_tokens

    @property
    def mean_surprisal_per_entropy(self) -> pl.Expr:
        return _field("rsr_sums", "surprisal_per_entropy") / self.num_tokens

    @property
    def mean_prompt_surprisal(self) -> pl.Expr:
        return _field("rsr_prompt", "surprisal_sum") / _positive(_field("rsr_prompt", "num_tokens"))

    @property
    def unconditional_surprisal(self) -> pl.Expr:
        num_tokens = _field("rsr_unconditional", "num_tokens")
        # Of other tokens, as of a row that was truncated in one pass alone, nothing follows.
        are_same = num_tokens == pl.col("rsr_num_tokens")
        mean = _field("rsr_unconditional", "surprisal_sum") / self.num_tokens
        return pl.when(are_same & (mean > 0)).then(mean)

    @property
    def num_windows(self) -> pl.Expr:
        return _positive(_field("rsr_window", "num_steps"))

    @property
    def window_means_sum(self) -> pl.Expr:
        return _field("rsr_window", "step_means_sum")

    @property
    def quality(self) -> pl.Expr:
        assert self.quality_column is not None, "not_stored says that it is needed"
        return pl.col(self.quality_column).cast(pl.Float64)


def _field(column: str, *names: str) -> pl.Expr:
    expression = pl.col(column)
    for name in names:
        expression = expression.struct.field(name)
    return expression


def _positive(count: pl.Expr) -> pl.Expr:
    """A count as f64; null where there is none of it."""
    return pl.when(count > 0).then(count.cast(pl.Float64))


@dataclass(frozen=True, slots=True)
class Measure:
    """A metric of a scored table, as f64 expressions that are null in rows that do not have it.

    numerator, denominator: parts of the ratio whose sums give a data set's value. value: of the
    row alone.
    """

    metric: Metric
    numerator: pl.Expr
    denominator: pl.Expr
    value: pl.Expr

    @property
    def score(self) -> pl.Expr:
        """What orders rows, the best lowest."""
        return self.value if self.metric.direction == "lower" else -self.value


def metric_named(name: str) -> Metric:
    """Raises `UsageError` where the catalogue has no such metric."""
    if (metric := BY_NAME.get(name)) is None:
        raise UsageError(f"there is no metric {name!r}; expected one of {', '.join(BY_NAME)}")
    return metric


def not_stored(table: ScoredTable, metric: Metric, quality_column: str | None = None) -> str | None:
    """Why `table` cannot give `metric`, and what to do about it; None where it can."""
    settings = [identity["settings"] for identity in table.identities]
    for need in metric.needs:
        if need == "quality":
            if quality_column is None:
                return "it needs --quality-column"
        elif need == "entropy":
            if any(not each.get("entropy", True) for each in settings):
                return "it was scored with --no-entropy; score it again with --entropy"
        elif (column := COLUMN_OF_NEED[need]) not in table.schema.names:
            if need in SECOND_PASS_COLUMNS:
                option = {"unconditional": "--unconditional", "window": "--window STEPS"}[need]
                return f"it needs a second pass: rsr score {table.path} OUTPUT {option} …"
            return (
                f"it has no {column}, as from an earlier release or --metrics rsr; score it again "
                "with --metrics all"
            )
        elif need == "prompt" and any(not each.get("prompt_metrics") for each in settings):
            return "it was scored without the prompts; score it again with --prompt-metrics"
    return None


def measure(table: ScoredTable, name: str, *, quality_column: str | None = None) -> Measure:
    """The named metric of `table`. Reads it once where the metric is fitted to the corpus.

    Raises `UsageError` where `table` does not store what it is made of, and for a quality column
    that is missing or holds no numbers.
    """
    metric = metric_named(name)
    if quality_column is not None:
        table.require([quality_column])
        kind = table.scan.collect_schema()[quality_column]
        if not (kind.is_numeric() or kind == pl.Boolean):
            raise UsageError(
                f"column {quality_column!r} of {table.path} is {kind}; expected numbers, higher "
                "being better"
            )
    if (why := not_stored(table, metric, quality_column)) is not None:
        raise UsageError(f"{table.path} cannot give the metric {name}: {why}")
    if name == RSR:
        # As it is stored, to the last bit.
        surprisal = pl.col("rsr_mean_surprisal")
        is_whole = table.is_scored & table.mean_rank.is_finite() & surprisal.is_finite()
        mean_rank, surprisal = (pl.when(is_whole).then(e) for e in (table.mean_rank, surprisal))
        return Measure(metric, mean_rank, surprisal, table.rsr)
    columns = StoredColumns(table, quality_column)
    if name == "aslec_casl":
        columns = StoredColumns(table, quality_column, _fitted_weight(table, columns))
    numerator, denominator = (
        part if isinstance(part, pl.Expr) else pl.lit(part, pl.Float64)
        for part in metric.ratio(columns)
    )
    ratio_of_row = numerator / pl.max_horizontal(denominator, MIN_SURPRISAL_SUM_NATS)
    value = metric.finish(ratio_of_row)
    has_it = (table.is_scored & value.is_finite() & denominator.is_finite()).fill_null(False)
    numerator, denominator, value = (
        pl.when(has_it).then(e) for e in (numerator, denominator, value)
    )
    return Measure(metric, numerator, denominator, value)


def stored_measures(
    table: ScoredTable, *, quality_column: str | None = None
) -> tuple[list[Measure], dict[str, str]]:
    """Every metric that `table` can give, in the catalogue's order, and of the others why not."""
    lacking = {m.name: not_stored(table, m, quality_column) for m in METRICS}
    given = [
        measure(table, name, quality_column=quality_column)
        for name, why in lacking.items()
        if why is None
    ]
    return given, {name: why for name, why in lacking.items() if why is not None}


def _fitted_weight(table: ScoredTable, columns: StoredColumns) -> float:
    """γ of ASLEC-CASL over the scored rows that have all it fits: two passes, constant memory."""
    fitted = casl_columns(columns)
    whole = pl.all_horizontal(pl.col(*fitted).is_finite()).fill_null(False)
    rows = table.scan.filter(table.is_scored.fill_null(False)).select(**fitted).filter(whole)
    means = rows.select(pl.all().mean()).collect(engine="streaming").row(0, named=True)
    if None in means.values():
        return float("nan")
    centred = [pl.col(name) - mean for name, mean in means.items()]
    products = [
        (a * b).sum().alias(f"{i} {j}")
        for i, a in enumerate(centred)
        for j, b in enumerate(centred)
    ]
    sums = rows.select(products).collect(engine="streaming").row(0)
    return first_token_weight(np.array(sums).reshape(len(fitted), len(fitted)))
