"""The first pass of `rsr select` on a cluster: what a bundle of shards sends to each part.

Of each row that can still be chosen, whatever the rows of other bundles are, the group's key, what
ranks it and where it stands. Knows nothing of where parts are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from rsr.jobs.selection import exchange
from rsr.jobs.selection.bundles import Bundle
from rsr.jobs.selection.composition import DescribingColumns, Parts, merge_parts, parts_of_rows
from rsr.jobs.selection.numbering import encode
from rsr.jobs.selection.objectives import pareto_front
from rsr.jobs.selection.ranking import Rows, keep_best
from rsr.jobs.selection.select import CORRECT, QUALITY, SelectOptions, places_of, quota_name
from rsr.jobs.shards.scored import ScoredTable

PLACE = "place"
"""What ranks a row where that is not its score."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What calls are told. wanted: what is read of each row, as `candidate_columns` has it.

    hashes: of the machine that made the plan.
    """

    options: SelectOptions
    table: ScoredTable
    by: DescribingColumns
    wanted: Mapping[str, pl.Expr]
    id_column: str | None
    num_parts: int
    hashes: tuple[int, ...]

    @property
    def needs_whole_groups(self) -> bool:
        """Whether the rank of a candidate depends on every other one of its group."""
        options = self.options
        if options.objective == "pareto":
            return options.keep is not None or bool(options.max_shares)
        return options.objective is not None

    @property
    def quotas(self) -> list[str]:
        """Columns of the exchanged rows, one a quota."""
        return [quota_name(column) for column, _ in self.options.max_shares]


@dataclass(slots=True)
class Gathered:
    """Counts over a bundle's rows. num_unjudged: candidates without a finite quality, where
    there is one. num_judged: candidates that ranking takes. by_part: rows that go to each part.
    """

    num_scored: int = 0
    num_unmeasured: int = 0
    num_candidates: int = 0
    num_ungrouped: int = 0
    num_unjudged: int = 0
    num_judged: int = 0
    by_part: NDArray[np.int64] | int = 0

    def add(self, other: "Gathered") -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


def gather_bundle(plan: Plan, bundle: Bundle) -> tuple[Any, ...]:
    """Counts and pool of a bundle, then for each part its rows and the groups that have none."""
    exchange.require_hashes(plan.hashes)
    counts = Gathered()
    pool: Parts = {}
    rows, others = [], []
    for shard, first_row in bundle.shards:
        table = plan.table.of(shard)
        frame = table.collect(table.scan.select(**plan.wanted, **plan.by.expressions(table)))
        merge_parts(pool, parts_of_rows(frame))
        here, rows_here, others_here = _gather_shard(plan, frame, first_row)
        counts.add(here)
        rows.append(rows_here)
        others.append(others_here)
    kept = pl.concat([frame for frame in rows if frame.height] or rows[:1])
    kept = kept.filter(_can_be_chosen(plan, bundle, kept))
    parts = exchange.split(kept, plan.num_parts)
    counts.by_part = np.array([part.height for part in parts])
    of_others = exchange.split(pl.concat(others).unique(), plan.num_parts)
    pieces = zip(map(exchange.packed, parts), map(exchange.packed, of_others), strict=True)
    return ((counts, pool), *pieces)


def _gather_shard(
    plan: Plan, frame: pl.DataFrame, first_row: int
) -> tuple[Gathered, pl.DataFrame, pl.DataFrame]:
    """Counts; rows that ranking takes, by position; keys of groups without one, and whether they
    have a candidate.

    frame: every row of the shard, with what is wanted.
    """
    places = places_of(plan.options, first_row, frame, frame.height)
    is_scored_row = frame["score"].is_not_nan()
    has_group = frame["group"].is_not_null()
    is_candidate = is_scored_row & has_group
    is_unjudged = is_judged = is_candidate
    if QUALITY in frame.columns:
        is_unjudged = is_candidate & ~frame[QUALITY].is_finite().fill_null(False)
    if plan.options.objective is not None:
        is_judged = is_candidate & ~is_unjudged
    counts = Gathered(
        num_scored=int(frame["is_scored"].sum()),
        num_unmeasured=int(frame["is_unmeasured"].sum()) if "is_unmeasured" in frame.columns else 0,
        num_candidates=int(is_candidate.sum()),
        num_ungrouped=int((is_scored_row & ~has_group).sum()),
        num_unjudged=int(is_unjudged.sum()) if QUALITY in frame.columns else 0,
        num_judged=int(is_judged.sum()),
    )
    judged_by = [name for name in (QUALITY, CORRECT) if name in frame.columns]
    narrow = frame.select("score", *(judged_by if plan.options.objective else []))
    narrow = narrow.with_columns(
        *(frame[name].hash(exchange.HASH_SEEDS[0]).alias(name) for name in plan.quotas),
        *([pl.Series(PLACE, places)] if places is not None else []),
        position=first_row + pl.int_range(frame.height, dtype=pl.Int64),
        has_candidate=is_candidate,
        is_judged=is_judged,
    ).filter(has_group)
    narrow = exchange.with_keys(narrow, frame["group"].filter(has_group))
    rows = narrow.filter("is_judged").drop("has_candidate", "is_judged")
    keys = exchange.keys_of(narrow)
    others = narrow.filter(~pl.col("is_judged")).group_by(keys).agg(pl.col("has_candidate").any())
    # Joined twice, so that the many rows are looked up among the few: others are few as a rule.
    shared = rows.select(keys).join(others, on=keys, how="semi")
    return counts, rows, others.join(shared, on=keys, how="anti")


def _can_be_chosen(plan: Plan, bundle: Bundle, rows: pl.DataFrame) -> pl.Series:
    """Which rows of a bundle may be chosen, whatever the rows of other bundles are.

    Of a group those that K others of it come before cannot; under quotas, K others of it with the
    same values of the quotas, which are full for the one if they are for the other.
    """
    mask = np.ones(rows.height, bool)
    room = 1 if plan.options.objective == "pareto" else plan.options.room
    if plan.needs_whole_groups or not len(crowded := exchange.crowded(rows, room)):
        return pl.Series(mask)
    inside = rows[crowded]
    groups, num_groups = exchange.numbered(inside)
    if plan.options.objective == "pareto":
        scores, qualities = inside["score"].to_numpy(), inside[QUALITY].to_numpy()
        mask[crowded] = pareto_front(scores, qualities, groups)
        return pl.Series(mask)
    for name in plan.quotas:
        values, num_values = encode(inside[name])
        groups, num_groups = encode(pl.Series(groups.astype(np.int64) * num_values + values))
    ranking = Rows(
        (inside[PLACE] if PLACE in rows.columns else inside["score"]).to_numpy(),
        groups=groups,
        num_groups=num_groups,
        read_ids=bundle.id_reader(plan.table, plan.id_column, inside["position"].to_numpy()),
    )
    mask[crowded] = keep_best(ranking, np.full(num_groups, room))
    return pl.Series(mask)
