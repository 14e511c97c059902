"""Reading the narrow columns that evidence is drawn from: every row, or those of drawn problems.

Here in one scan, or shard by shard wherever calls are made; the rows are the same. Which problems
are drawn is `drawing.py`'s to say; what the columns mean, the caller's.
"""

from collections.abc import Mapping
from functools import partial
from itertools import accumulate

import polars as pl

from rsr.jobs.errors import UsageError, first_line
from rsr.jobs.evidence.drawing import DRAW, draw_limits, draw_order, first_problems
from rsr.jobs.run.calls import Calls, CallsHere, CallsWhereSeen, answers_in_order
from rsr.jobs.run.probe import local_files
from rsr.jobs.selection import exchange
from rsr.jobs.selection.candidates import groupable
from rsr.jobs.shards.scored import ScoredTable
from rsr.jobs.shards.shard import Shard


def read_rows(
    table: ScoredTable,
    wanted: Mapping[str, pl.Expr],
    *,
    problem: str | None,
    max_rows: int,
    seed: int,
    calls: Calls | None,
) -> pl.DataFrame:
    """The wanted values of each row, with its position in the table as `row` (u64), in order.

    problem: a column; None makes every row a problem of its own. max_rows: of more rows, only
    those of the problems drawn by `seed`. Raises `UsageError` if the files cannot be read, the
    problems are no values of one column, or one that is drawn has more rows.
    """
    if table.num_rows <= max_rows:
        return _read(table, wanted) if calls is None else _by_calls(table, wanted, None, calls)
    of_problem = None if problem is None else groupable(table, problem)
    drawing = {**wanted, DRAW: draw_order(of_problem, pl.col("row"), seed)}
    drawn = pl.DataFrame()
    for limit in draw_limits(table.num_rows, max_rows):
        # Shard by shard here too: what is not drawn goes before the next one is read.
        drawn = _by_calls(table, drawing, limit, calls or CallsHere())
        if drawn.height:
            break
    drawn = first_problems(drawn, max_rows)
    if not drawn.height:
        raise UsageError(
            f"{table.path}: the problem that was drawn has more than {max_rows:,} rows: take more "
            "with --max-rows, or draw rows, not problems, with --problem-column none"
        )
    return drawn


def _read(
    table: ScoredTable, wanted: Mapping[str, pl.Expr], limit: int | None = None, first: int = 0
) -> pl.DataFrame:
    """The rows whose `DRAW` is below the limit, or every row without one.

    first: position in the whole table of the first row of this one.
    """
    position = pl.col("row").cast(pl.UInt64) + pl.lit(first, pl.UInt64)
    rows = table.scan.with_row_index("row").with_columns(row=position).select("row", **wanted)
    if limit is not None:
        rows = rows.filter(pl.col(DRAW) < pl.lit(limit, pl.UInt64))
    try:
        kept = rows.collect(engine="streaming")
    except pl.exceptions.PolarsError as error:
        raise UsageError(f"{table.path}: {first_line(error)}") from error
    return kept if limit is None else _with_own_strings(kept)


def _with_own_strings(rows: pl.DataFrame) -> pl.DataFrame:
    """The same; strings of a few rows hold the bytes of all rows that were read with them."""
    copied = pl.from_arrow(rows.to_arrow(compat_level=pl.CompatLevel.oldest()))
    assert isinstance(copied, pl.DataFrame)
    return copied


def _by_calls(
    table: ScoredTable, wanted: Mapping[str, pl.Expr], limit: int | None, calls: Calls
) -> pl.DataFrame:
    sent = table.seen_from_anywhere()
    seeing = CallsWhereSeen(local_files(sent.shards[0].path), calls)
    read = partial(_read_shard, sent, wanted, limit, exchange.hashes_of_this_machine())
    firsts = accumulate((shard.num_rows for shard in sent.shards), initial=0)
    return pl.concat(answers_in_order(seeing, read, list(zip(sent.shards, firsts, strict=False))))


def _read_shard(
    table: ScoredTable,
    wanted: Mapping[str, pl.Expr],
    limit: int | None,
    hashes: tuple[int, ...],
    item: tuple[Shard, int],
) -> pl.DataFrame:
    exchange.require_hashes(hashes)
    shard, first = item
    return _read(table.of(shard), wanted, limit, first)
