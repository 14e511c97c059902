"""A refined trace and the native one that it was made from: which rows pair, and their tokens.

By `parent_id`, which `rsr refine` writes, where the refined stream has it: it names the native
row's id, or its file and row. Else by problem, where either stream has one row of it. Knows no
drift.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from rsr.jobs.comparison.streams import Stream
from rsr.jobs.errors import UsageError, first_line
from rsr.jobs.shards.score_columns import TOKEN_COLUMNS
from rsr.jobs.shards.scored import USUAL_CORRECT

PARENT_ID = "parent_id"
"""The column of `rsr refine` that says which row of its INPUT a row was made from."""

TOKEN_IDS, LOGPROBS = TOKEN_COLUMNS[0].name, TOKEN_COLUMNS[2].name

CHUNK_PAIRS = 256
"""Pairs whose tokens are held at a time."""


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """The scored tokens of one trajectory. ids: (T,) int32. surprisals_nats: (T,) float64."""

    ids: NDArray[np.int32]
    surprisals_nats: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Pair:
    """One refined trajectory and its native one. native_row, refined_row: in their tables."""

    problem: str
    native_row: int
    refined_row: int
    native: ScoredTokens
    refined: ScoredTokens


def why_no_tokens(stream: Stream) -> str | None:
    """Why the tokens of a stream cannot be read, and what to do about it; None if they can."""
    if {TOKEN_IDS, LOGPROBS} <= set(stream.table.schema.names):
        return None
    return f"{stream.label} has no token columns: score it with --token-columns"


def pair_rows(native: Stream, refined: Stream) -> pl.DataFrame:
    """The pairs that there are: `problem`, `native_row`, `refined_row`, in the refined order.

    A row without a score is in no pair.
    """
    ours, theirs = _keyed(native, refined)
    is_whole = pl.col("native_is_scored") & pl.col("refined_is_scored")
    paired = theirs.join(ours.drop("problem"), on="key", how="inner", maintain_order="left")
    return paired.filter(is_whole).select("problem", "native_row", "refined_row")


def pair_all_rows(native: Stream, refined: Stream) -> pl.DataFrame:
    """Every row of the refined stream with its native one: `refined_row`, `native_row`, `correct`,
    and `is_scored`, whether both have a score.

    Raises `UsageError` if a refined row pairs with none, or with more than one.
    """
    ours, theirs = _keyed(native, refined, (USUAL_CORRECT,))
    paired = theirs.join(ours.drop("problem"), on="key", how="left", maintain_order="left")
    if missing := paired["native_row"].null_count():
        how = _keys(native, refined)[2]
        raise UsageError(
            f"{missing:,} of {len(paired):,} rows of {refined.table.path} pair with no one row of "
            f"{native.table.path} by {how}: without it they cannot be gated"
        )
    is_whole = pl.col("native_is_scored") & pl.col("refined_is_scored")
    return paired.with_columns(is_whole.alias("is_scored"))


def _keys(native: Stream, refined: Stream) -> tuple[str | None, str, str]:
    """The columns that name a row of each stream, and in words how they pair.

    None stands for the native row's file and place in it.
    """
    if PARENT_ID not in refined.table.schema.names:
        return native.on, refined.on, f"{native.on}, once in either"
    if native.id_column in native.table.schema.names:
        return native.id_column, PARENT_ID, f"{PARENT_ID} and {native.id_column}"
    return None, PARENT_ID, f"{PARENT_ID}, and file and row"


def _keyed(
    native: Stream, refined: Stream, of_refined: Sequence[str] = ()
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Of each stream every row's number, problem, `key` and whether it has a score.

    A native row that no key tells from others is left out, a refined one has none. of_refined:
    further columns of the refined stream.
    """
    *keys, _ = _keys(native, refined)
    frames = []
    for stream, key, name in zip((native, refined), keys, ("native", "refined"), strict=True):
        chosen = stream.table.scan.with_row_index(f"{name}_row").select(
            f"{name}_row",
            stream.problem.alias("problem"),
            (pl.lit(None) if key is None else pl.col(key)).cast(pl.String).alias("key"),
            stream.is_usable.alias(f"{name}_is_scored"),
            *(of_refined if stream is refined else ()),
        )
        try:
            frames.append(chosen.collect(engine="streaming").sort(f"{name}_row"))
        except pl.exceptions.PolarsError as error:
            raise UsageError(f"{stream.table.path}: {first_line(error)}") from error
    ours, theirs = frames
    if keys[0] is None:
        places = [f"{s.name}:{row}" for s in native.table.shards for row in range(s.num_rows)]
        ours = ours.with_columns(pl.Series("key", places, pl.String))
    # A key that two rows share says of neither which one is meant; of one native row there may be
    # several refined ones, where it is named as their parent.
    ours = ours.filter(pl.col("key").is_not_null() & pl.col("key").is_unique())
    if PARENT_ID not in refined.table.schema.names:
        own = pl.when(pl.col("key").is_unique()).then(pl.col("key"))
        theirs = theirs.with_columns(own.alias("key"))
    return ours, theirs


def read_pairs(native: Stream, refined: Stream, rows: pl.DataFrame) -> Iterator[Pair]:
    """The pairs of `pair_rows`, or some of them, in their order."""
    for part in rows.iter_slices(CHUNK_PAIRS):
        ours = _tokens(native, part["native_row"])
        theirs = _tokens(refined, part["refined_row"])
        for row in part.iter_rows(named=True):
            numbers = row["native_row"], row["refined_row"]
            yield Pair(row["problem"], *numbers, ours[numbers[0]], theirs[numbers[1]])


def _tokens(stream: Stream, rows: pl.Series) -> dict[int, ScoredTokens]:
    positions = rows.unique().sort().to_numpy().astype(np.int64)
    ids, logprobs = (stream.table.read_at(name, positions) for name in (TOKEN_IDS, LOGPROBS))
    return {
        int(position): ScoredTokens(
            np.asarray(row_ids, np.int32), 0.0 - np.asarray(row_logprobs, np.float64)
        )
        for position, row_ids, row_logprobs in zip(positions, ids, logprobs, strict=True)
    }
