"""Which rows are looked at where there are more than a process should hold: whole problems' rows.

A problem is drawn by a hash of its value, so that each shard can be read alone, wherever it is, and
all of them agree. Problems count in the order of their hashes until their rows are too many: what
is drawn hangs on the rows, the seed and the version of Polars, and on nothing else.
"""

import polars as pl

MAX_ROWS = 2_000_000
"""Rows that are held unless another number is asked for: about a GiB while they are cut out and
ranked, of 10 as of 30 million rows."""

DRAW = "draw"
"""The column of a problem's place in the order of drawing, u64."""

MARGINS = (1.25, 10.0)
"""By how much more rows are read than are wanted, since problems have different numbers of rows;
the second one where there was no problem among them."""


def draw_limits(num_rows: int, max_rows: int) -> list[int]:
    """The `DRAW` below which rows are read; the next one where there is none, and last all."""
    shares = [margin * max_rows / num_rows for margin in MARGINS]
    return [*(int(2**64 * share) for share in shares if share < 1), (1 << 64) - 1]


def draw_order(problem: pl.Expr | None, row: pl.Expr, seed: int) -> pl.Expr:
    """`DRAW` of each row. row: its number; a row without a problem is a problem of its own."""
    # With another seed, or row 7 would stand beside the problem whose number is 7.
    of_row = row.hash(seed + (1 << 32))
    if problem is None:
        return of_row
    return pl.when(problem.is_null()).then(of_row).otherwise(problem.hash(seed))


def first_problems(rows: pl.DataFrame, max_rows: int) -> pl.DataFrame:
    """The rows of the problems first in order, as many as have up to `max_rows` in all.

    Rows stay in their order; the column `DRAW` goes.
    """
    sizes = rows.group_by(DRAW).len().sort(DRAW)
    last = sizes.filter(pl.col("len").cum_sum() <= max_rows)[DRAW].max()
    # Nothing is below null.
    return rows.filter(pl.col(DRAW) <= pl.lit(last, pl.UInt64)).drop(DRAW)
