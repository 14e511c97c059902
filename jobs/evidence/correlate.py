"""Does a metric tell which teacher trains better? Correlated over teachers, averaged over students.

Source: arXiv 2601.14249v5, App. A.7: one coefficient for each student over its teachers; the
signed coefficients are averaged, and the absolute value is taken of that average, so that a metric
that points one way for one student and the other way for the next gains nothing.
Knows tables and columns; that a column is RSR or an accuracy is the caller's business.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from rsr.jobs.errors import UsageError, first_line
from rsr.jobs.evidence.bootstrap import interval, resampling_weights
from rsr.jobs.selection.midranks import midranks

MIN_ROWS = 3
"""Two points always correlate perfectly."""

CHUNK_ELEMENTS = 4 << 20
"""Elements of a permutation or bootstrap matrix held at a time."""

READERS: dict[str, Callable[[Path], pl.DataFrame]] = {
    ".csv": pl.read_csv,
    ".parquet": pl.read_parquet,
    ".pq": pl.read_parquet,
    ".jsonl": pl.read_ndjson,
    ".ndjson": pl.read_ndjson,
}


@dataclass(frozen=True, slots=True)
class Coefficient:
    """One kind of correlation of one metric, averaged over groups.

    mean: of the signed coefficients. absolute: |mean|, what metrics are ranked by. p_value:
    two-sided, by permuting the target within groups. low, high: bootstrap interval of `mean`;
    None where resampling never gave a defined coefficient. by_group: signed.
    """

    mean: float
    absolute: float
    p_value: float
    low: float | None
    high: float | None
    by_group: dict[str, float]


@dataclass(frozen=True, slots=True)
class MetricCorrelation:
    """The correlation of one metric with the target, over `num_rows` rows."""

    metric: str
    spearman: Coefficient
    pearson: Coefficient
    num_rows: int


@dataclass(frozen=True, slots=True)
class Difference:
    """How much better than another metric one is: |Spearman| of `metric` less that of `other`.

    Of the rows that have both. low, high: bootstrap interval over the same draws of rows for both;
    None where resampling never gave both coefficients. share_better: of the draws in which both are
    defined, those in which `metric` has the larger one.
    """

    metric: str
    other: str
    difference: float
    low: float | None
    high: float | None
    share_better: float | None
    num_rows: int


@dataclass(frozen=True, slots=True)
class Correlations:
    """How well metrics predict a target.

    metrics: highest |Spearman| first. differences: of the first metric asked for with each
    other one. notes: rows and groups that were left out, and why.
    """

    target: str
    by: str | None
    metrics: list[MetricCorrelation]
    differences: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class CorrelateOptions:
    """What `rsr correlate` is asked to do.

    metrics, target: numeric columns. by: column of the groups; None makes all rows one group.
    """

    metrics: Sequence[str]
    target: str
    by: str | None = None
    num_permutations: int = 10_000
    num_draws: int = 1_000
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Group:
    """One student's rows: (N,) metric and (N,) target, both finite and not constant."""

    name: str
    metric: NDArray[np.float64]
    target: NDArray[np.float64]


def read_table(path: Path) -> pl.DataFrame:
    """The table, by its suffix; `UsageError` if there is none, or it cannot be read or is empty."""
    reader = READERS.get(path.suffix)
    if reader is None:
        raise UsageError(f"{path}: expected a table ending in {', '.join(READERS)}")
    if not path.is_file():
        raise UsageError(f"no such file: {path}")
    try:
        table = reader(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UsageError(f"{path} cannot be read: {first_line(error)}") from error
    if not len(table):
        raise UsageError(f"{path} has no rows")
    return table


def correlate(table: pl.DataFrame, options: CorrelateOptions) -> Correlations:
    """Correlate each metric with the target, within groups, and average.

    Rows whose metric or target is null, NaN or infinite do not count; nor do groups of fewer than
    MIN_ROWS rows left, or in which either is constant. Each is told in `notes`. Raises
    `UsageError` for a missing or non-numeric column, or where no group is left.
    """
    _check_columns(table, options)
    notes: list[str] = []
    if num_repeated := len(table) - len(table.unique()):
        notes.append(f"{num_repeated} rows repeat another row entirely; all of them count")
    metrics = [_correlate_metric(table, metric, options, notes) for metric in options.metrics]
    metrics.sort(key=lambda m: (-m.spearman.absolute, m.metric))
    first, *others = dict.fromkeys(options.metrics)
    differences = [_difference(table, first, other, options) for other in others]
    return Correlations(
        options.target,
        options.by,
        metrics,
        [d for d in differences if d is not None],
        list(dict.fromkeys(notes)),
    )


def _difference(
    table: pl.DataFrame, metric: str, other: str, options: CorrelateOptions
) -> Difference | None:
    """The difference of two metrics; None where no group has both."""
    has_both = pl.all_horizontal(
        pl.col(name).cast(pl.Float64).is_finite().fill_null(False) for name in (metric, other)
    )
    both = [
        {g.name: g for g in _groups(table.filter(has_both), name, options, [])}
        for name in (metric, other)
    ]
    shared = [name for name in both[0] if name in both[1]]
    if not shared:
        return None
    of_metric, of_other = (
        [
            Group(g.name, midranks(g.metric), midranks(g.target))
            for g in map(groups.get, shared)
            if g
        ]
        for groups in both
    )
    # Groups of the same sizes, and one seed: both see the same draws.
    draws = [_bootstrap_means(groups, options, ranks=True) for groups in (of_metric, of_other)]
    drawn = np.abs(draws[0]) - np.abs(draws[1])
    means = [
        abs(np.mean([pearson(g.metric, g.target) for g in groups]))
        for groups in (of_metric, of_other)
    ]
    bounds, known = interval(drawn), drawn[np.isfinite(drawn)]
    return Difference(
        metric=metric,
        other=other,
        difference=float(means[0] - means[1]),
        low=bounds[0] if bounds else None,
        high=bounds[1] if bounds else None,
        share_better=float((known > 0).mean()) if len(known) else None,
        num_rows=sum(len(g.metric) for g in of_metric),
    )


def _check_columns(table: pl.DataFrame, options: CorrelateOptions) -> None:
    there = ", ".join(table.columns)
    for name in [*options.metrics, options.target, *([options.by] if options.by else [])]:
        if name not in table.columns:
            raise UsageError(f"the table has no column {name!r}; it has: {there}")
    for name in [*options.metrics, options.target]:
        kind = table.schema[name]
        if not (kind.is_numeric() or kind == pl.Boolean):
            raise UsageError(f"column {name!r} is {kind}; expected numbers")
    if options.target in options.metrics:
        raise UsageError(f"{options.target!r} is the target and a metric at once")


def _correlate_metric(
    table: pl.DataFrame, metric: str, options: CorrelateOptions, notes: list[str]
) -> MetricCorrelation:
    groups = _groups(table, metric, options, notes)
    if not groups:
        raise UsageError(
            f"no correlation of {metric!r} with {options.target!r}: " + "; ".join(notes)
        )
    ranked = [Group(g.name, midranks(g.metric), midranks(g.target)) for g in groups]
    return MetricCorrelation(
        metric=metric,
        spearman=_coefficient(ranked, options, ranks=True),
        pearson=_coefficient(groups, options, ranks=False),
        num_rows=sum(len(g.metric) for g in groups),
    )


def _groups(
    table: pl.DataFrame, metric: str, options: CorrelateOptions, notes: list[str]
) -> list[Group]:
    label = pl.col(options.by).cast(pl.String) if options.by else pl.lit("all")
    chosen = table.select(
        group=label,
        metric=pl.col(metric).cast(pl.Float64),
        target=pl.col(options.target).cast(pl.Float64),
    )
    finite = pl.all_horizontal(pl.col("metric", "target").is_finite().fill_null(False))
    kept = chosen.filter(finite & pl.col("group").is_not_null())
    if left_out := len(chosen) - len(kept):
        notes.append(f"{metric}: {left_out} of {len(chosen)} rows have no usable value")
    groups = []
    for (name,), rows in kept.group_by("group", maintain_order=True):
        group = Group(str(name), rows["metric"].to_numpy(), rows["target"].to_numpy())
        if len(rows) < MIN_ROWS:
            notes.append(f"{metric}: {name} left out, {len(rows)} rows where {MIN_ROWS} are needed")
        elif np.ptp(group.metric) == 0 or np.ptp(group.target) == 0:
            notes.append(f"{metric}: {name} left out, a column is constant there")
        else:
            groups.append(group)
    return groups


def _coefficient(groups: list[Group], options: CorrelateOptions, *, ranks: bool) -> Coefficient:
    by_group = {g.name: pearson(g.metric, g.target) for g in groups}
    mean = float(np.mean(list(by_group.values())))
    bounds = interval(_bootstrap_means(groups, options, ranks=ranks))
    return Coefficient(
        mean=mean,
        absolute=abs(mean),
        p_value=_permutation_p(groups, abs(mean), options),
        low=bounds[0] if bounds else None,
        high=bounds[1] if bounds else None,
        by_group=by_group,
    )


def pearson(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Pearson's coefficient of two (N,) columns; NaN where either is constant."""
    x, y = _standardised(x), _standardised(y)
    return float(np.clip(x @ y, -1, 1))


def spearman(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Spearman's coefficient, ties sharing their mean rank; NaN where either is constant."""
    return pearson(midranks(x), midranks(y))


def _standardised(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centred and of unit length; NaN where constant."""
    if np.ptp(values) == 0:
        return np.full(len(values), np.nan)
    # Scaled first: squares of very small or large values leave float64's range.
    centred: NDArray[np.float64] = values / np.abs(values).max()
    centred -= centred.mean()
    centred /= np.abs(centred).max()
    centred /= np.sqrt(centred @ centred)
    return centred


def _permutation_p(groups: list[Group], observed: float, options: CorrelateOptions) -> float:
    """Share of permutations, the observed order among them, with an average as far from 0."""
    rng = np.random.default_rng(options.seed)
    means = np.zeros(options.num_permutations)
    for group in groups:
        x, y = _standardised(group.metric), _standardised(group.target)
        chunk = max(1, CHUNK_ELEMENTS // len(x))
        for start in range(0, len(means), chunk):
            stop = min(start + chunk, len(means))
            permuted = rng.permuted(np.tile(y, (stop - start, 1)), axis=1)
            means[start:stop] += permuted @ x
    # Sums of the same numbers in another order must not pass for a smaller coefficient.
    as_far = np.abs(means / len(groups)) >= observed - 1e-12
    return float((1 + as_far.sum()) / (1 + len(means)))


def _bootstrap_means(
    groups: list[Group], options: CorrelateOptions, *, ranks: bool
) -> NDArray[np.float64]:
    """(B,) averages over groups of coefficients over rows drawn with replacement in each group.

    NaN where a draw leaves a group constant: its coefficient is not defined there.
    """
    rng = np.random.default_rng(options.seed)
    means = np.zeros(options.num_draws)
    for group in groups:
        chunk = max(1, CHUNK_ELEMENTS // len(group.metric))
        for start in range(0, len(means), chunk):
            stop = min(start + chunk, len(means))
            weights = resampling_weights(rng, stop - start, len(group.metric))
            x, y = (
                (_weighted_midranks(v, weights) if ranks else np.broadcast_to(v, weights.shape))
                for v in (group.metric, group.target)
            )
            means[start:stop] += _weighted_pearson(x, y, weights)
    return means / len(groups)


def _weighted_midranks(
    values: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(B, N) midranks in each draw, where value n occurs weights[b, n] times."""
    distinct, codes = np.unique(values, return_inverse=True)
    counts = np.zeros((len(weights), len(distinct)))
    for index, code in enumerate(codes):
        counts[:, code] += weights[:, index]
    return (np.cumsum(counts, axis=1) - (counts - 1) / 2)[:, codes]


def _weighted_pearson(
    x: NDArray[np.float64], y: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(B,) coefficients of (B, N) columns whose rows count (B, N) times; NaN where constant."""
    drawn = weights > 0
    varies = np.ones(len(weights), dtype=bool)
    for values in (x, y):
        lowest = np.where(drawn, values, np.inf).min(axis=1)
        varies &= lowest < np.where(drawn, values, -np.inf).max(axis=1)
    total = weights.sum(axis=1, keepdims=True)
    x = x - (weights * x).sum(axis=1, keepdims=True) / total
    y = y - (weights * y).sum(axis=1, keepdims=True) / total
    products = (weights * x * y).sum(axis=1)
    lengths = np.sqrt((weights * x * x).sum(axis=1) * (weights * y * y).sum(axis=1))
    coefficients = np.full(len(weights), np.nan)
    np.divide(products, lengths, out=coefficients, where=varies)
    return coefficients
