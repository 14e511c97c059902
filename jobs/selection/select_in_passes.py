"""`rsr select` by passes over shards, whose groups come together in parts.

    gather, rank, (ids, rank,) (admit,) choose, copy, describe

A bundle of shards is read at a time: of each of its rows that can still be chosen, the group's key,
what ranks it and where it stands go to the part of its group, where one call ranks all of them.
A part whose rows tie is ranked again with the ids of these rows. Under quotas, parts only order
their groups, and `admission.py` admits rows by passes over parts. The rows are those of
`select.run_select`, byte for byte.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from rsr.jobs.errors import UsageError
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.run.calls import Calls, CallsWhereSeen, Piece
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.passes import Passes
from rsr.jobs.run.probe import local_files
from rsr.jobs.run.store import RunStore
from rsr.jobs.selection import exchange
from rsr.jobs.selection.admission import Chosen, admit_by_passes, chosen_of_part
from rsr.jobs.selection.bundles import Bundle, RowsOfBundle, bundles_of, ids_of, tied_ids
from rsr.jobs.selection.candidates import candidate_columns, require_some
from rsr.jobs.selection.composition import Parts, merge_parts
from rsr.jobs.selection.gathering import Gathered, Plan, gather_bundle
from rsr.jobs.selection.layout import Mask
from rsr.jobs.selection.ordering import Groups, rank_part
from rsr.jobs.selection.passes import (
    Decision,
    FilesToCopy,
    copy_files,
    for_any_machine,
    require_exact_groups,
    require_own_row,
    run_by_calls,
)
from rsr.jobs.selection.result import SelectionResult
from rsr.jobs.selection.select import (
    SelectOptions,
    extra_columns,
    no_finite_quality,
    nothing_admitted,
    open_for_select,
)
from rsr.jobs.selection.selection import Facts, OpenedInput, common_facts
from rsr.jobs.shards.shard import Shard

MIN_PART_ROWS, MAX_PARTS = 2 << 20, 100
"""Pieces are bundles times parts, and the driver remembers each: 20,000 at the most."""
MAX_PART_CANDIDATES = 32 << 20
"""Candidates that one call ranks: some 3 GiB."""


@dataclass(frozen=True, slots=True)
class Copies(FilesToCopy):
    """Files to be written, and the number in INPUT of the first row of each of their shards."""

    first_rows: Mapping[str, int]


def run_select_in_passes(
    options: SelectOptions, calls: Calls, stop: StopRequest
) -> SelectionResult:
    """Write the selected rows of INPUT to OUTPUT; goes on where an earlier start stopped.

    Raises what `run_select` raises, and `UsageError` for what passes cannot do.
    """
    options = for_any_machine(options)
    opened = open_for_select(options)
    table = opened.table
    require_own_row(options.conditions.where)
    require_exact_groups(table, "--group-by", options.group_by)
    for column, _ in options.max_shares:
        require_exact_groups(table, "--max-share-per", column)
    wanted = candidate_columns(
        table, options.conditions, opened.measured, group_column=options.group_by
    )
    plan = Plan(
        options,
        table,
        opened.by,
        wanted | extra_columns(options, opened),
        opened.id_column if options.pick == "best" else None,
        num_parts_of(table.num_rows),
        exchange.hashes_of_this_machine(),
    )
    seeing = CallsWhereSeen(local_files(table.shards[0].path), calls)
    passes = Passes(RunFolder(options.output), seeing)
    return run_by_calls(
        opened,
        options,
        lambda: _decide(plan, opened, passes),
        passes,
        stop,
        writer="select",
        settings=options.settings,
    )


def num_parts_of(num_rows: int) -> int:
    """Parts for that many rows of INPUT."""
    return exchange.num_parts_upto(min(MAX_PARTS, num_rows // MIN_PART_ROWS))


def _decide(plan: Plan, opened: OpenedInput, passes: Passes) -> Decision:
    bundles = bundles_of(plan.table)
    gathered, pieces, pool = _gather(plan, bundles, passes.begin("gather", len(bundles)))
    require_some(
        plan.table,
        gathered.num_scored,
        gathered.num_candidates,
        gathered.num_ungrouped,
        gathered.num_unmeasured,
    )
    if not gathered.num_judged:
        raise no_finite_quality(plan.options, plan.table)
    _require_small_parts(plan, gathered)
    groups, parts = _rank(plan, bundles, pieces, passes)
    room = plan.options.room
    admission = None
    if plan.options.max_shares:
        shares = [share for _, share in plan.options.max_shares]
        read_ids = None if plan.id_column is None else partial(_read_ids, plan, bundles, passes)
        admission = admit_by_passes(plan.quotas, shares, room, parts, passes, read_ids)
        if admission is None:
            raise nothing_admitted(plan.options)
    ends = np.cumsum([shard.num_rows for shard in plan.table.shards])
    choose = partial(chosen_of_part, room, admission, plan.options.keep, ends)
    chosen: list[Piece] = []
    total = Chosen(np.zeros(len(ends), np.int64))
    calls = passes.begin("choose", plan.num_parts)
    for _, here, kept in calls.scatter(choose, range(plan.num_parts), parts, 1):
        chosen += kept
        total.add(here)
    facts = _facts(plan, opened, gathered, groups, total)

    def copy(store: RunStore, calls: Calls, files: Sequence[FilesToCopy]) -> Iterator[list[str]]:
        firsts = {shard.name: first for bundle in bundles for shard, first in bundle.shards}
        items = [
            Copies(some.files, {shard.name: firsts[shard.name] for shard in some.shards})
            for some in files
        ]
        given = [chosen] * len(items)
        return (lines for _, lines, _ in calls.scatter(partial(_copy, store), items, given, 0))

    return Decision(total.num_rows_by_shard.tolist(), facts, pool, copy)


def _gather(
    plan: Plan, bundles: Sequence[Bundle], calls: Calls
) -> tuple[Gathered, list[list[Piece]], Parts]:
    """Counts over INPUT, the pieces of each part in INPUT's order, and what the pool is made of."""
    made: list[list[Piece]] = [[] for _ in bundles]
    pools: list[Parts] = [{} for _ in bundles]
    total = Gathered()
    gather = partial(gather_bundle, plan)
    found = calls.scatter(gather, bundles, [()] * len(bundles), plan.num_parts)
    for number, (counts, pool), pieces in found:
        made[number], pools[number] = pieces, pool
        total.add(counts)
    merged: Parts = {}
    for pool in pools:
        merge_parts(merged, pool)
    return total, [list(pieces) for pieces in zip(*made, strict=True)], merged


def _rank(
    plan: Plan, bundles: Sequence[Bundle], gathered: list[list[Piece]], passes: Passes
) -> tuple[Groups, list[list[Piece]]]:
    """The groups of all parts, and the ordered rows of each.

    gathered: the pieces of each part, which are let go as soon as its rows are ordered.
    """
    groups = Groups()
    parts: list[list[Piece]] = [[] for _ in gathered]
    tied: dict[int, Piece] = {}
    rank = partial(rank_part, plan, len(bundles))
    calls = passes.begin("rank", len(parts))
    for number, (here, has_ties), (part, of_tied) in calls.scatter(
        rank, range(len(parts)), gathered, 2
    ):
        groups.add(here)
        if has_ties:
            tied[number] = of_tied
        else:
            parts[number], gathered[number] = [part], []
    if not tied:
        return groups, parts
    assert plan.id_column is not None
    ids: list[list[Piece]] = [[] for _ in bundles]
    read = partial(tied_ids, plan.table, plan.id_column)
    given = [list(tied.values())] * len(bundles)
    calls = passes.begin("ids", len(bundles))
    for bundle_number, _, made in calls.scatter(read, bundles, given, len(tied)):
        ids[bundle_number] = made
    again = list(tied)
    given = [[*gathered[n], *found] for n, found in zip(again, zip(*ids, strict=True), strict=True)]
    calls = passes.begin("rank", len(again))
    for place, _, (part, _) in calls.scatter(rank, again, given, 2):
        number = again[place]
        parts[number], gathered[number], given[place] = [part], [], []
    return groups, parts


def _read_ids(
    plan: Plan, bundles: Sequence[Bundle], passes: Passes, positions: NDArray[np.int64]
) -> pl.Series:
    """Ids of the rows at these ascending numbers in INPUT, which are not many."""
    assert plan.id_column is not None
    ends = [bundle.end for bundle in bundles]
    spans = np.split(positions, np.searchsorted(positions, ends[:-1]))
    items = [RowsOfBundle(*pair) for pair in zip(bundles, spans, strict=True) if len(pair[1])]
    found = [pl.Series()] * len(items)
    calls = passes.begin("ids", len(items))
    read = partial(ids_of, plan.table, plan.id_column)
    for number, ids, _ in calls.scatter(read, items, [()] * len(items), 0):
        found[number] = ids
    return pl.concat(found)


def _require_small_parts(plan: Plan, gathered: Gathered) -> None:
    largest = int(np.max(gathered.by_part))
    if largest <= MAX_PART_CANDIDATES:
        return
    why = (
        f"--objective {plan.options.objective} ranks a candidate among all of its group"
        if plan.needs_whole_groups
        else f"so many can still be chosen with --keep {plan.options.keep or 1}"
    )
    raise UsageError(
        f"one worker would have to rank {largest:,} candidates, and ranks at most "
        f"{MAX_PART_CANDIDATES:,}: {why}, and some groups of {plan.options.group_by} are very "
        "large; limit the candidates, or leave --address out (and unset RAY_ADDRESS)"
    )


def _copy(store: RunStore, item: Copies, *chosen: NDArray[np.int64]) -> tuple[Any]:
    """chosen: of each part, the ascending positions of its kept rows."""

    def rows_of(shard: Shard) -> Mask:
        first_row = item.first_rows[shard.name]
        mask = np.zeros(shard.num_rows, bool)
        for positions in chosen:
            low, high = np.searchsorted(positions, [first_row, first_row + shard.num_rows])
            mask[positions[low:high] - first_row] = True
        return mask

    return (copy_files(store, item, rows_of),)


def _facts(
    plan: Plan,
    opened: OpenedInput,
    gathered: Gathered,
    groups: Groups,
    chosen: Chosen,
) -> Facts:
    options = plan.options
    facts: Facts = {
        "ties_by": opened.id_column or "position",
        "num_groups": groups.num_with_candidates,
        "num_groups_without_row": groups.num_distinct - chosen.num_groups,
        "num_ungrouped": gathered.num_ungrouped,
        "num_unjudged": gathered.num_unjudged,
    }
    if options.objective == "joint":
        facts["num_kept_wrong"] = chosen.num_wrong
    if options.pick != "best":
        facts |= {"picked": options.pick, "ties_by": None}
    if options.keep is not None and options.keep > 1:
        facts["num_groups_short"] = groups.num_distinct - chosen.num_groups_complete
    return facts | common_facts(
        opened.measured.metric,
        gathered.num_scored,
        gathered.num_candidates,
        gathered.num_unmeasured,
        chosen.worst,
    )
