"""`rsr filter` by passes over shards, each shard looked at and copied wherever there is a core.

    count, refine, look at the limits, decide, copy, describe

The driver holds a few words a group and the rows at the limits, never an array of INPUT's length.
The rows are those of `filter.run_filter`, byte for byte. Knows nothing of Ray: whoever calls says
how a function is called on every shard.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
import polars as pl

from rsr.jobs.errors import UsageError
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.run.calls import Calls, CallsWhereSeen, answers_in_order
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.passes import Passes
from rsr.jobs.run.probe import local_files
from rsr.jobs.run.store import RunStore
from rsr.jobs.selection.boundaries import Boundaries, Counts, Limits, Narrow, find_boundaries
from rsr.jobs.selection.candidates import groupable, require_some
from rsr.jobs.selection.composition import (
    DescribingColumns,
    Parts,
    merge_parts,
    parts_of_shard,
)
from rsr.jobs.selection.filter import FilterOptions, require_something_to_do, told_limits
from rsr.jobs.selection.passes import (
    Decision,
    common_facts,
    copy_shard,
    for_any_machine,
    require_exact_groups,
    require_own_row,
    run_by_calls,
)
from rsr.jobs.selection.result import SelectionResult
from rsr.jobs.selection.selection import Facts, OpenedInput
from rsr.jobs.shards.parquet import file_size_bytes
from rsr.jobs.shards.shard import Shard


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
    found, counts = find_boundaries(narrow, limits, options.max_rsr, passes)
    require_some(table, counts.num_scored, counts.num_candidates, 0, counts.num_unmeasured)
    num_bytes, num_kept, worst = 0.0, 0, -np.inf
    pool: Parts = {}
    look = partial(_look_at_kept, narrow, found, opened.by)
    calls = passes.begin("decide", len(table.shards))
    looked = zip(table.shards, answers_in_order(calls, look, table.shards), strict=True)
    for shard, (kept_here, worst_here, parts) in looked:
        num_bytes += file_size_bytes(shard.path) * kept_here / max(1, shard.num_rows)
        num_kept += kept_here
        worst = max(worst, worst_here)
        merge_parts(pool, parts)
    if not num_kept:
        raise UsageError(
            f"none of the {counts.num_candidates:,} rows of {table.path} that fulfil the "
            f"conditions stays within {told_limits(options)}: there is nothing to write"
        )

    def copy(store: RunStore, calls: Calls) -> Iterator[str | None]:
        return (line for _, line in calls(partial(_copy, narrow, found, store), table.shards))

    return Decision(num_bytes, _facts(options, opened, counts, worst), pool, copy)


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
        is_unmeasured=fulfils & measured.value.is_null(),
        group=group,
        id_column=opened.id_column,
    )


def _look_at_kept(
    narrow: Narrow, boundaries: Boundaries, by: DescribingColumns, shard: Shard
) -> tuple[int, float, Parts]:
    """How many rows of a shard are kept, the worst of their scores, and what its pool holds."""
    rows = narrow.read(shard)
    keep = boundaries.mask(shard, rows)
    kept = rows["score"].to_numpy()[keep]
    return len(kept), float(kept.max(initial=-np.inf)), parts_of_shard(narrow.table, by, shard)


def _copy(narrow: Narrow, boundaries: Boundaries, store: RunStore, shard: Shard) -> str | None:
    return copy_shard(store, shard, lambda: boundaries.mask(shard, narrow.read(shard)))


def _facts(options: FilterOptions, opened: OpenedInput, counts: Counts, worst: float) -> Facts:
    facts: Facts = {"ties_by": opened.id_column or "position"}
    if options.within is not None:
        facts["num_groups"] = counts.num_groups
    return facts | common_facts(
        opened, counts.num_scored, counts.num_candidates, counts.num_unmeasured, worst
    )
