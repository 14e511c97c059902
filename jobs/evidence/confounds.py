"""What else a metric goes with: length, surprisal, correctness, and any column a user names.

Spearman's coefficient of RSR, or of another metric, with each, over all rows and within problems,
and warnings where a result may say less than it seems to. The thresholds are conventions, stated
here and in `docs/evidence.md`; a warning never changes a number. Knows nothing of files.
"""

from dataclasses import dataclass, replace

import numpy as np
import polars as pl
from numpy.typing import NDArray

from rsr.engine.catalogue import LENGTH, SURPRISAL
from rsr.jobs.evidence.bootstrap import ratios
from rsr.jobs.evidence.observations import Observations

STRONG = 0.5
"""The |Spearman| from which on RSR may be a stand-in for the confound."""

WEAK = 0.1
"""Below this |Spearman|, a sign says nothing."""

MOVED = 0.2
"""A coefficient that moves by this much without one teacher rests on that teacher."""

SHORT_TOKENS = 32
"""Shorter responses have noisy scores: a single odd token moves RSR by several per cent."""

SHORT_SHARE = 0.1
"""The share of short responses from which on they are worth a warning."""


MOMENTS = [
    pl.len().cast(pl.Float64).alias("n"),
    pl.col("x").sum(),
    pl.col("y").sum(),
    (pl.col("x") * pl.col("x")).sum().alias("xx"),
    (pl.col("y") * pl.col("y")).sum().alias("yy"),
    (pl.col("x") * pl.col("y")).sum().alias("xy"),
]
"""What Pearson's coefficient needs; those of two sets of rows add up, and subtract."""


@dataclass(frozen=True, slots=True)
class Confound:
    """Spearman's coefficients of the metric with one column; None where it is constant or absent.

    overall: over all rows that have the value. within_problem: of ranks within each problem.
    without_teacher: `overall` with the same ranks, but without one teacher's rows.
    """

    name: str
    num_rows: int
    overall: float | None
    within_problem: float | None
    without_teacher: dict[str, float | None]


def measure_confounds(observations: Observations) -> list[Confound]:
    """The metric against length, surprisal, correctness and the named columns, in this order.

    Against itself it is not measured.
    """
    columns = {"num_tokens": LENGTH, "mean_surprisal_nats": SURPRISAL, **observations.confounds}
    return [
        _measure(observations, column, name)
        for column, name in columns.items()
        if name != observations.metric.name
    ]


def _measure(observations: Observations, column: str, name: str) -> Confound:
    rows = observations.rows.select(
        "teacher",
        "problem",
        metric=pl.col(observations.value_column),
        value=pl.col(column).cast(pl.Float64),
    ).filter(pl.col("value").is_finite())
    by_teacher = _ranked(rows).group_by("teacher").agg(MOMENTS)
    moments = {teacher: _row(by_teacher, teacher) for teacher in by_teacher["teacher"]}
    total = sum(moments.values(), np.zeros(len(MOMENTS)))
    within = _ranked_within_problem(rows).select(MOMENTS)
    return Confound(
        name=name,
        num_rows=len(rows),
        overall=_pearson(total),
        within_problem=_pearson(within.to_numpy()[0]) if len(rows) else None,
        without_teacher={
            teacher: _pearson(total - own) for teacher, own in sorted(moments.items())
        },
    )


def _row(by_teacher: pl.DataFrame, teacher: str) -> NDArray[np.float64]:
    row: NDArray[np.float64] = (
        by_teacher.filter(pl.col("teacher") == teacher).drop("teacher").to_numpy()[0]
    )
    return row


def _ranked(rows: pl.DataFrame) -> pl.DataFrame:
    """Midranks of metric and value over all rows, centred."""
    middle = (pl.len() + 1) / 2
    return rows.select(
        "teacher", x=pl.col("metric").rank() - middle, y=pl.col("value").rank() - middle
    )


def _ranked_within_problem(rows: pl.DataFrame) -> pl.DataFrame:
    """Midranks within each problem, centred, as shares of its rows; single rows say nothing."""
    size = pl.len().over("problem")
    middle = (size + 1) / 2
    return rows.filter(size > 1).select(
        x=(pl.col("metric").rank().over("problem") - middle) / size,
        y=(pl.col("value").rank().over("problem") - middle) / size,
    )


def _pearson(moments: NDArray[np.float64]) -> float | None:
    n, x, y, xx, yy, xy = moments
    if n < 2:
        return None
    x_variance, y_variance = xx - x * x / n, yy - y * y / n
    # What is left of a constant column is rounding.
    if x_variance <= 1e-9 * xx or y_variance <= 1e-9 * yy:
        return None
    return float(np.clip((xy - x * y / n) / np.sqrt(x_variance * y_variance), -1, 1))


def warn_of_confounds(observations: Observations, measured: list[Confound]) -> list[str]:
    """One sentence for each way in which the result may be something else than it seems."""
    warnings = _warn_of_short_responses(observations)
    for confound in measured:
        # Surprisal is RSR's own denominator: that they go together is no finding.
        if confound.name != SURPRISAL:
            warnings += _warn_of(confound, observations.metric_label)
    return warnings


def _warn_of(confound: Confound, metric: str) -> list[str]:
    overall, within = confound.overall, confound.within_problem
    if overall is None:
        return []
    warnings = []
    if abs(overall) >= STRONG:
        warnings.append(
            f"{metric} goes with {confound.name} (Spearman {overall:+.2f}): "
            "compare teachers at equal values of it before concluding anything"
        )
    if within is not None and overall * within < 0 and min(abs(overall), abs(within)) >= WEAK:
        warnings.append(
            f"{metric} goes with {confound.name} one way overall ({overall:+.2f}) and the other "
            f"way within problems ({within:+.2f}): the problems differ, not the responses"
        )
    moved = {t: rho for t, rho in confound.without_teacher.items() if rho is not None}
    if moved:
        teacher, rho = max(moved.items(), key=lambda item: abs(item[1] - overall))
        if abs(rho - overall) >= MOVED:
            warnings.append(
                f"{metric}'s correlation with {confound.name} rests on {teacher}: "
                f"{overall:+.2f} with it, {rho:+.2f} without"
            )
    return warnings


def _warn_of_short_responses(observations: Observations) -> list[str]:
    rows = observations.rows
    long = rows.filter(pl.col("num_tokens") >= SHORT_TOKENS)
    share = 1 - len(long) / len(rows)
    warnings = []
    if share >= SHORT_SHARE:
        warnings.append(
            f"{share:.0%} of the responses have fewer than {SHORT_TOKENS} scored tokens: "
            f"their {observations.metric_label} is noisy"
        )
    best, best_of_long = (
        _best_teacher(replace(observations, rows=of_length)) for of_length in (rows, long)
    )
    if share and best_of_long and best != best_of_long:
        warnings.append(
            f"without responses of fewer than {SHORT_TOKENS} tokens the best teacher is "
            f"{best_of_long}, not {best}"
        )
    return warnings


def _best_teacher(observations: Observations) -> str | None:
    """The one whose data set has the best value of the metric; None where there is no row."""
    above, below = (
        part.sum(axis=0) for part in observations.problem_sums(observations.metric.name)
    )
    by_value = zip(ratios(above, below).tolist(), observations.teachers, strict=True)
    known = [(value, teacher) for value, teacher in by_value if not np.isnan(value)]
    return min(known)[1] if known else None
