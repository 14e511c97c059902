"""The second pass of `rsr select` on a cluster: the rows of a part, each group's best first.

A part has all rows that were gathered of its groups. Knows nothing of shards.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from rsr.jobs.selection import exchange
from rsr.jobs.selection.bundles import IdsToRead, reader_of
from rsr.jobs.selection.candidates import Candidates
from rsr.jobs.selection.gathering import PLACE, Plan
from rsr.jobs.selection.ranking import ReadIds, Rows, keep_best, ranked
from rsr.jobs.selection.select import CORRECT, rows_to_rank


@dataclass(slots=True)
class Groups:
    """Groups of a part: of any row, of candidates."""

    num_distinct: int = 0
    num_with_candidates: int = 0

    def add(self, other: "Groups") -> None:
        self.num_distinct += other.num_distinct
        self.num_with_candidates += other.num_with_candidates


def rank_part(plan: Plan, num_bundles: int, _: int, *pieces: Any) -> tuple[Any, ...]:
    """What groups a part has, and whether its rows tie; the rows in the order in which they are to
    be taken, group after group; and if they tie the numbers in INPUT of those whose ids order them.

    pieces: of each bundle, its rows and the groups that have none; then, where they have been read,
    of each bundle the ids of the rows that tie.
    """
    gathered, ids = pieces[:num_bundles], pieces[num_bundles:]
    rows = exchange.joined([of_rows for of_rows, _ in gathered])
    others = exchange.joined([of_others for _, of_others in gathered])
    keys = [frame.select(exchange.keys_of(frame)) for frame in (rows, others) if frame.height]
    nothing = exchange.packed(pl.DataFrame()), np.zeros(0, np.int64)
    if not keys:
        return ((Groups(), False), *nothing)
    numbers, num_groups = exchange.numbered(pl.concat(keys), plan.num_parts)
    groups, of_others = numbers[: rows.height], numbers[rows.height :]
    has_candidate = np.zeros(num_groups, bool)
    has_candidate[groups] = True
    if len(of_others):
        has_candidate[of_others[others["has_candidate"].to_numpy()]] = True
    is_group = np.zeros(num_groups, bool)
    is_group[numbers] = True
    found = Groups(int(np.count_nonzero(is_group)), int(np.count_nonzero(has_candidate)))
    if not rows.height:
        return ((found, False), *nothing)
    candidates = Candidates(
        scores=rows["score"].to_numpy(),
        groups=groups,
        num_groups=num_groups,
        num_tokens=None,
        extra=rows,
        num_scored=rows.height,
    )
    places = rows[PLACE].to_numpy() if PLACE in rows.columns else None
    positions = rows["position"].to_numpy()
    unread = IdsToRead(positions)
    read_ids: ReadIds | None = None
    if plan.id_column is not None:
        read_ids = reader_of(ids, positions) if ids else unread
    ranking = rows_to_rank(plan.options, candidates, places, read_ids)
    ordered = _in_order(plan, rows, ranking)
    if len(unread.positions):
        return (found, True), exchange.packed(pl.DataFrame()), unread.positions
    return (found, False), exchange.packed(ordered), np.zeros(0, np.int64)


def _in_order(plan: Plan, rows: pl.DataFrame, ranking: Rows) -> pl.DataFrame:
    """The rows that can be taken, best first in each group: under quotas all, else the best."""
    takes_part = ~np.isnan(ranking.scores)
    if not plan.options.max_shares:
        takes_part = keep_best(ranking, np.full(ranking.num_groups, plan.options.room))
        order = np.flatnonzero(takes_part)
        assert ranking.groups is not None
        order = order[np.argsort(ranking.groups[order], kind="stable")]
    else:
        order = ranked(ranking, np.flatnonzero(takes_part))
    columns = {
        "group": ranking.groups[order] if ranking.groups is not None else None,
        "rank_score": ranking.scores[order],
        **({} if ranking.second_scores is None else {"second": ranking.second_scores[order]}),
    }
    carried = ["score", "position", *plan.quotas]
    carried += [CORRECT] if CORRECT in rows.columns else []
    return rows.select(carried)[order].with_columns(**{k: pl.Series(v) for k, v in columns.items()})
