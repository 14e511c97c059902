"""Solve rate and pass rates of graded rows, counted on the files that were written."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from rsr.jobs.errors import UsageError

USUAL_PROBLEM_COLUMNS = ("problem_id", "prompt_hash")
"""Columns that rows of one problem share, where no other is named."""
PASS_RATE_BINS = (
    ("none correct", 0.0),
    ("up to a quarter", 0.25),
    ("up to a half", 0.5),
    ("up to three quarters", 0.75),
    ("more, not all", None),
    ("all correct", 1.0),
)
"""Names and upper edges, each inclusive, of the histogram of pass rates."""


@dataclass(frozen=True, slots=True)
class PassRates:
    """How many problems have which share of correct answers.

    column: names the problem. num_problems: with a graded answer. num_solved: with a correct one.
    histogram: problems by `PASS_RATE_BINS`. Rows of which nobody knows (`correct` is null) do not
    count.
    """

    column: str
    num_problems: int
    num_solved: int
    histogram: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        return {
            "problem_column": self.column,
            "num_problems": self.num_problems,
            "num_solved": self.num_solved,
            "pass_rates": self.histogram,
        }


def choose_problem_column(path: str, named: str | None) -> str | None:
    """The named column of a Parquet file, else the first usual one there is, else None.

    Raises `UsageError` if it is not there, or holds lists or structs.
    """
    schema = pl.scan_parquet(path, glob=False).collect_schema()
    names = [named] if named else [n for n in USUAL_PROBLEM_COLUMNS if n in schema]
    if not names:
        return None
    if named and named not in schema:
        raise UsageError(f"{path} has no column {named!r}; it has: {', '.join(schema)}")
    if schema[names[0]].is_nested():
        if named is None:
            return None
        raise UsageError(f"column {named!r} of {path} is {schema[names[0]]}; rows form no problems")
    return names[0]


def pass_rates(paths: Sequence[str], column: str) -> PassRates:
    """The pass rates of graded files; `column` must be in each."""
    rates = (
        pl.scan_parquet(list(paths), glob=False)
        .filter(pl.col("correct").is_not_null())
        .group_by(column)
        .agg(pl.col("correct").mean().alias("rate"))
        .select("rate")
        .collect(engine="streaming")["rate"]
    )
    histogram = dict.fromkeys((name for name, _ in PASS_RATE_BINS), 0)
    for rate, count in rates.value_counts().iter_rows():
        histogram[_bin_of(rate)] += count
    return PassRates(column, len(rates), int((rates > 0).sum()), histogram)


def _bin_of(rate: float) -> str:
    if rate >= 1.0:
        return PASS_RATE_BINS[-1][0]
    for name, edge in PASS_RATE_BINS[:-1]:
        if edge is None or rate <= edge:
            return name
    raise AssertionError("the last bin but one has no edge")
