"""`rsr filter` by passes over shards, each shard looked at and copied wherever there is a core.

    count, refine, look at the limits, copy, describe

The driver holds a few words a group and the rows at the limits, never an array of INPUT's length.
The rows are those of `filter.run_filter`, byte for byte. Knows nothing of Ray: whoever calls says
how a function is called on every shard.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import polars as pl
from numpy.typing import NDArray

from rsr.engine.catalogue import RSR
from rsr.jobs.errors import UsageError
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.run.calls import Calls, CallsWhereSeen, Piece
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.passes import Passes
from rsr.jobs.run.probe import local_files
from rsr.jobs.run.store import RunStore
from rsr.jobs.selection.boundaries import Beside, Counts, Kept, Limits, Narrow, find_kept
from rsr.jobs.selection.bundles import Bundle, bundles_of
from rsr.jobs.selection.candidates import groupable, require_some
from rsr.jobs.selection.composition import Parts, merge_parts, parts_of_rows
from rsr.jobs.selection.filter import FilterOptions, require_something_to_do, told_limits
from rsr.jobs.selection.layout import Mask
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
from rsr.jobs.selection.selection import Facts, OpenedInput, common_facts


def run_filter_in_passes(
    options: FilterOptions, calls: Calls, stop: StopRequest
) -> SelectionResult:
    """Write the kept rows of INPUT to OUTPUT; goes on where an earlier start stopped.

    Raises what `run_filter` raises, and `UsageError` for what passes cannot do.
    """
    require_something_to_do(options)
    options = for_any_machine(options)
    opened = OpenedInput.of(options, [options.within])
    narrow = _narrow(options, opened)
    seeing = CallsWhereSeen(local_files(opened.table.shards[0].path), calls)
    passes = Passes(RunFolder(options.output), seeing)
    return run_by_calls(
        opened,
        options,
        lambda: _decide(options, opened, narrow, passes),
        passes,
        stop,
        writer="filter",
        settings=options.settings,
    )


def _decide(
    options: FilterOptions, opened: OpenedInput, narrow: Narrow, passes: Passes
) -> Decision:
    table = opened.table
    limits = Limits(options.keep_fraction, options.keep_rows, options.token_budget)
    describe = Beside(opened.by.expressions(table), parts_of_rows)
    bundles = bundles_of(table)
    counts, kept = find_kept(narrow, bundles, limits, options.max_rsr, passes, describe)
    require_some(table, counts.num_scored, counts.num_candidates, 0, counts.num_unmeasured)
    pool: Parts = {}
    for parts in kept.beside:
        merge_parts(pool, parts)
    if not any(kept.num_rows):
        raise UsageError(
            f"none of the {counts.num_candidates:,} rows of {table.path} that fulfil the "
            f"conditions stays within {told_limits(options)}: there is nothing to write"
        )

    def copy(store: RunStore, calls: Calls, files: Sequence[FilesToCopy]) -> Iterator[list[str]]:
        items, given = _copies(bundles, kept, files)
        return (lines for _, lines, _ in calls.scatter(partial(_copy, store), items, given, 0))

    return Decision(kept.num_rows, _facts(options, opened, counts, kept.worst), pool, copy)


def _narrow(options: FilterOptions, opened: OpenedInput) -> Narrow:
    table, measured = opened.table, opened.measured
    fulfils = options.conditions.expression(table)
    require_own_row(options.conditions.where)
    group = None
    if options.within is not None:
        group = groupable(table, options.within)
        require_exact_groups(table, "--within", options.within)
    return Narrow(
        table=table,
        score=pl.when(fulfils).then(measured.score),
        is_scored=table.is_scored,
        # Every scored row has an RSR.
        is_unmeasured=None if measured.metric.name == RSR else fulfils & measured.value.is_null(),
        group=group,
        id_column=opened.id_column,
        has_budget=options.token_budget is not None,
    )


@dataclass(frozen=True, slots=True)
class Sure:
    """Where a shard's mask is. number: of the bundle's among the given. first: the bit of its first
    row. winners: rows that are kept besides.
    """

    number: int
    first: int
    winners: NDArray[np.int64]

    def mask(self, bits: Sequence[NDArray[np.uint8]], num_rows: int) -> Mask:
        """(num_rows,) mask of the kept rows. bits: of each given bundle, its rows a bit each."""
        skipped, start = divmod(self.first, 8)
        unpacked = np.unpackbits(bits[self.number][skipped:], count=start + num_rows)
        mask: Mask = unpacked[start:].astype(bool)
        mask[self.winners] = True
        return mask


@dataclass(frozen=True, slots=True)
class Copies(FilesToCopy):
    """Files to be written, and where the mask of each of their shards is, by name."""

    masks: Mapping[str, Sure]


def _copies(
    bundles: Sequence[Bundle], kept: Kept, files: Sequence[FilesToCopy]
) -> tuple[list[Copies], list[list[Piece]]]:
    """The files, and the pieces that each call takes: masks of the bundles that its rows are in."""
    places = {
        shard.name: (number, first_row - bundle.first_row)
        for number, bundle in enumerate(bundles)
        for shard, first_row in bundle.shards
    }
    items: list[Copies] = []
    given: list[list[Piece]] = []
    for some in files:
        names = [shard.name for shard in some.shards]
        numbers = list(dict.fromkeys(places[name][0] for name in names))
        masks = {}
        for name in names:
            number, first = places[name]
            winners = kept.winners.get(name, np.zeros(0, np.int64))
            masks[name] = Sure(numbers.index(number), first, winners)
        items.append(Copies(some.files, masks))
        given.append([kept.masks[number] for number in numbers])
    return items, given


def _copy(store: RunStore, item: Copies, *bits: NDArray[np.uint8]) -> tuple[list[str]]:
    return (copy_files(store, item, lambda s: item.masks[s.name].mask(bits, s.num_rows)),)


def _facts(options: FilterOptions, opened: OpenedInput, counts: Counts, worst: float) -> Facts:
    facts: Facts = {"ties_by": opened.id_column or "position"}
    if options.within is not None:
        facts["num_groups"] = counts.num_groups
    return facts | common_facts(
        opened.measured.metric,
        counts.num_scored,
        counts.num_candidates,
        counts.num_unmeasured,
        worst,
    )
