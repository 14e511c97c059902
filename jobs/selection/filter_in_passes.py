"""`rsr filter` by passes over shards, each shard looked at and copied wherever there is a core.

    count, refine, look at the limits, decide, copy, describe

The driver holds a few words a group and the rows at the limits, never an array of INPUT's length.
The rows are those of `filter.run_filter`, byte for byte. Knows nothing of Ray: whoever calls says
how a function is called on every shard.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from rsr.engine.catalogue import RSR
from rsr.jobs.errors import ShardsFailed, UsageError, first_line
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.run.folder import COMPOSITION
from rsr.jobs.run.preflight import canonical
from rsr.jobs.run.probe import local_files, probe_of, told_missing
from rsr.jobs.run.store import ChangedInputError, RunStore
from rsr.jobs.selection.boundaries import Boundaries, Counts, Limits, Narrow, find_boundaries
from rsr.jobs.selection.candidates import groupable
from rsr.jobs.selection.composition import Composition, DescribingColumns, Part, parts_of
from rsr.jobs.selection.filter import FilterOptions, require_something_to_do, told_limits
from rsr.jobs.selection.own_row import is_of_own_row
from rsr.jobs.selection.result import SelectionResult
from rsr.jobs.selection.selection import Facts, OpenedInput
from rsr.jobs.selection.subset import commit_rows, opened_subset
from rsr.jobs.shards.parquet import file_size_bytes
from rsr.jobs.shards.scored import ScoredTable, open_scored
from rsr.jobs.shards.shard import Shard
from rsr.jobs.storage import is_remote

Parts = dict[Any, Part]


def run_filter_in_passes(
    options: FilterOptions, call_each: Any, stop: StopRequest
) -> SelectionResult:
    """Write the kept rows of INPUT to OUTPUT; goes on where an earlier start stopped.

    call_each: calls a function on each item of a sequence, anywhere, and yields items with answers.
    Raises what `run_filter` raises, and `UsageError` for what passes cannot do.
    """
    require_something_to_do(options)
    # As every machine can open it, whatever its working directory; a link keeps its name.
    options = replace(options, input=_absolute(options.input), output=canonical(options.output))
    opened = OpenedInput.of(options, [options.within])
    table, narrow = opened.table, _narrow(options, opened)
    call_each = _where_seen(local_files(table.shards[0].path), call_each)
    limits = Limits(options.keep_fraction, options.keep_rows, options.token_budget)
    pool: Parts = {}
    facts: Facts = {"num_rows": table.num_rows}
    boundaries: list[Boundaries] = []

    def decide() -> float:
        found, counts = find_boundaries(narrow, limits, options.max_rsr, call_each)
        _require_candidates(table, counts)
        num_bytes, num_kept, worst = 0.0, 0, -np.inf
        looked = call_each(partial(_look_at_kept, narrow, found, opened.by), table.shards)
        for shard, (kept_here, worst_here, parts) in looked:
            num_bytes += file_size_bytes(shard.path) * kept_here / max(1, shard.num_rows)
            num_kept += kept_here
            worst = max(worst, worst_here)
            _merge_parts(pool, parts)
        if not num_kept:
            raise UsageError(
                f"none of the {counts.num_candidates:,} rows of {table.path} that fulfil the "
                f"conditions stays within {told_limits(options)}: there is nothing to write"
            )
        boundaries.append(found)
        facts.update(_facts(options, opened, counts, worst))
        return num_bytes

    with opened_subset(
        table,
        options.output,
        decide,
        stop,
        writer="filter",
        command=options.command,
        settings=options.settings,
        overwrite=options.overwrite,
    ) as store:
        with probe_of(store.folder) as probe:
            copied = _where_seen(probe, call_each)(
                partial(_copy, narrow, boundaries[0], store), table.shards
            )
            failures = [failure for _, failure in copied if failure is not None]
        if failures:
            raise ShardsFailed("\n".join(sorted(failures)))
    selected = open_scored(
        str(options.output), rank_clip=table.rank_clip, allow_mixed_students=True
    )
    parts: Parts = {}
    for _, here in call_each(partial(_parts_of_shard, selected, opened.by), selected.shards):
        _merge_parts(parts, here)
    composition = Composition(opened.by.teacher, parts, pool)
    total = composition.selected_total
    facts |= {"num_kept": total.num_rows, "num_tokens": total.num_tokens}
    result = SelectionResult(store.folder, facts, composition)
    text = json.dumps(result.to_json(), indent=2, default=str) + "\n"
    store.folder.storage.write(COMPOSITION, text.encode())
    return result


def _absolute(place: str) -> str:
    return place if is_remote(place) else os.path.abspath(place)


def _where_seen(must_see: tuple[Path, ...], call_each: Any) -> Any:
    """`call_each` that raises `UsageError` on a machine without these files."""

    def call(function: Callable[[Any], Any], items: Sequence[Any]) -> Any:
        return call_each(partial(_require_seen, must_see, function), items)

    return call


def _require_seen(must_see: tuple[Path, ...], function: Callable[[Any], Any], item: Any) -> Any:
    if (missing := told_missing(must_see)) is not None:
        raise UsageError(missing)
    return function(item)


def _narrow(options: FilterOptions, opened: OpenedInput) -> Narrow:
    table, measured = opened.table, opened.measured
    fulfils = options.conditions.expression(table)
    where = options.conditions.where
    if where is not None and not is_of_own_row(pl.sql_expr(where)):
        raise UsageError(
            f"--where {where!r} may look at other rows than its own, which a cluster cannot: leave "
            "--address out (and unset RAY_ADDRESS), or write the number in its place"
        )
    group = None
    if options.within is not None:
        group = groupable(table, options.within)
        if table.scan.collect_schema()[options.within].is_float():
            raise UsageError(
                f"--within {options.within}: a cluster does not group by floating-point numbers; "
                "leave --address out (and unset RAY_ADDRESS)"
            )
    return Narrow(
        table=table,
        score=pl.when(fulfils).then(measured.score),
        is_scored=table.is_scored,
        is_unmeasured=fulfils & measured.value.is_null(),
        group=group,
        id_column=opened.id_column,
    )


def _require_candidates(table: ScoredTable, counts: Counts) -> None:
    """Refuse a pool without candidates, as `read_candidates` does."""
    if not counts.num_scored:
        raise UsageError(
            f"none of the {table.num_rows:,} rows of {table.path} has a score; rsr_status says why"
        )
    if not counts.num_candidates and counts.num_unmeasured:
        raise UsageError(
            f"none of the {counts.num_unmeasured:,} rows of {table.path} that fulfil the "
            "conditions has a value of the metric: there is nothing to write"
        )
    if not counts.num_candidates:
        raise UsageError(
            f"none of the {counts.num_scored:,} scored rows of {table.path} fulfils the "
            "conditions: there is nothing to write"
        )


def _look_at_kept(
    narrow: Narrow, boundaries: Boundaries, by: DescribingColumns, shard: Shard
) -> tuple[int, float, Parts]:
    """How many rows of a shard are kept, the worst of their scores, and what its pool holds."""
    rows = narrow.read(shard)
    keep = boundaries.mask(shard, rows)
    kept = rows["score"].to_numpy()[keep]
    return len(kept), float(kept.max(initial=-np.inf)), _parts_of_shard(narrow.table, by, shard)


def _copy(narrow: Narrow, boundaries: Boundaries, store: RunStore, shard: Shard) -> str | None:
    """Write a shard's output unless it is there; a line about what files can do to a copy."""
    try:
        if store.read_receipt(shard) is None:
            mask = boundaries.mask(shard, narrow.read(shard))
            commit_rows(store, shard, mask, StopRequest())
    except (OSError, pa.ArrowException, pl.exceptions.PolarsError, ChangedInputError) as error:
        return f"{shard.name}: {first_line(error)}"
    return None


def _parts_of_shard(table: ScoredTable, by: DescribingColumns, shard: Shard) -> Parts:
    return parts_of(table.of(shard), by)


def _merge_parts(total: Parts, parts: Parts) -> None:
    for teacher, part in parts.items():
        total.setdefault(teacher, Part()).merge(part)


def _facts(options: FilterOptions, opened: OpenedInput, counts: Counts, worst: float) -> Facts:
    facts: Facts = {"ties_by": opened.id_column or "position"}
    if options.within is not None:
        facts["num_groups"] = counts.num_groups
    facts |= {"num_scored": counts.num_scored, "num_candidates": counts.num_candidates}
    metric = opened.measured.metric
    if metric.name == RSR:
        return facts | {"largest_rsr": worst}
    return facts | {
        "num_unmeasured": counts.num_unmeasured,
        "metric": metric.name,
        "worst_value": metric.sign * worst,
    }
