"""`rsr filter`: the rows of a corpus with the lowest RSR, within exact limits.

Scored rows that fulfil the side conditions are ranked by RSR, or by another metric, all together or
within groups; every limit keeps a prefix of that ranking, and the shortest holds. Knows the order
of the steps: ranking is `ranking.py`'s, files are `subset.py`'s.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from rsr.engine.catalogue import RSR
from rsr.jobs.errors import UsageError
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.selection.candidates import Candidates, id_reader, read_candidates
from rsr.jobs.selection.layout import Mask
from rsr.jobs.selection.ranking import Rows, keep_best, share_of
from rsr.jobs.selection.result import SelectionResult
from rsr.jobs.selection.selection import Facts, OpenedInput, SubsetOptions, run_selection
from rsr.jobs.shards.measures import metric_named

BYTES_PER_ROW, GROUPED_BYTES_PER_ROW = 23, 77
"""By which the process's memory grew from 10 to 100 million rows with eight short names of groups;
see docs/selection.md."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterOptions(SubsetOptions):
    """What `rsr filter` is asked to do.

    max_rsr: largest RSR, inclusive. keep_fraction: of the rows that fulfil `conditions`, rounded
    half up; keep_rows: rows; token_budget: scored tokens; each of every group of `within`.
    """

    max_rsr: float | None = None
    keep_fraction: Fraction | None = None
    keep_rows: int | None = None
    token_budget: int | None = None
    within: str | None = None

    @property
    def limits(self) -> dict[str, Any]:
        return {
            "max_rsr": self.max_rsr,
            "keep_fraction": None if self.keep_fraction is None else str(self.keep_fraction),
            "keep_rows": self.keep_rows,
            "token_budget": self.token_budget,
        }

    @property
    def settings(self) -> dict[str, Any]:
        """What two runs must agree on to write into one OUTPUT."""
        return self.limits | {"within": self.within} | self.common_settings


def run_filter(options: FilterOptions, stop: StopRequest) -> SelectionResult:
    """Write the kept rows of INPUT to OUTPUT; goes on where an earlier start stopped.

    Raises `UsageError` with OUTPUT as it was, also if nothing would be kept; `ShardsFailed` if a
    shard cannot be copied; `Interrupted` when `stop` says so.
    """
    require_something_to_do(options)
    opened = OpenedInput.of(options, [options.within])
    table = opened.table

    def read() -> Candidates:
        return read_candidates(
            table,
            options.conditions,
            opened.measured,
            group_column=options.within,
            null_is_group=True,
            with_tokens=options.token_budget is not None,
        )

    def choose(candidates: Candidates) -> tuple[Mask, Callable[[], Facts]]:
        keep = keep_rows(options, opened, candidates)
        if not keep.any():
            raise UsageError(
                f"none of the {candidates.num_candidates:,} rows of {table.path} that fulfil the "
                f"conditions stays within {told_limits(options)}: there is nothing to write"
            )
        return keep, lambda: _facts(options, opened, candidates)

    return run_selection(
        opened,
        read,
        choose,
        stop,
        writer="filter",
        options=options,
        settings=options.settings,
        bytes_per_row=BYTES_PER_ROW if options.within is None else GROUPED_BYTES_PER_ROW,
    )


def _facts(options: FilterOptions, opened: OpenedInput, candidates: Candidates) -> Facts:
    facts: Facts = {"ties_by": opened.id_column or "position"}
    if options.within is not None:
        facts["num_groups"] = candidates.num_groups_of(candidates.is_candidate)
    return facts


def keep_rows(options: FilterOptions, opened: OpenedInput, candidates: Candidates) -> Mask:
    """(N,) mask of the candidates that every limit keeps."""
    rows = Rows(
        scores=candidates.scores,
        groups=candidates.groups,
        num_groups=candidates.num_groups,
        num_tokens=candidates.num_tokens,
        read_ids=id_reader(opened.table, opened.id_column),
    )
    max_rows = None
    if options.keep_fraction is not None:
        max_rows = share_of(rows.group_sizes(), options.keep_fraction)
    if options.keep_rows is not None:
        most = np.full(rows.num_groups, options.keep_rows)
        max_rows = most if max_rows is None else np.minimum(max_rows, most)
    keep = keep_best(rows, max_rows, options.token_budget)
    if options.max_rsr is not None:
        keep &= candidates.scores <= options.max_rsr
    return keep


def require_something_to_do(options: FilterOptions) -> None:
    if options.max_rsr is not None and options.metric != RSR:
        raise UsageError(
            f"--max-rsr is a threshold of RSR, and the rows are ranked by {options.metric}: limit "
            "them with --keep-fraction, --keep-rows or --token-budget"
        )
    if options.quality_column is not None and "quality" not in metric_named(options.metric).needs:
        raise UsageError(
            f"--quality-column says nothing to --metric {options.metric}: leave it out"
        )
    grouped = (options.keep_fraction, options.keep_rows, options.token_budget)
    if options.within is not None and all(value is None for value in grouped):
        raise UsageError(
            "--within says where --keep-fraction, --keep-rows or --token-budget count; give one"
        )
    conditions = options.conditions
    asked = (*options.limits.values(), conditions.where, conditions.min_tokens)
    if all(value is None for value in (*asked, conditions.max_tokens)):
        raise UsageError(
            "nothing to filter by: give at least one of --max-rsr, --keep-fraction, --keep-rows, "
            "--token-budget, --where, --min-tokens and --max-tokens"
        )


def told_limits(options: FilterOptions) -> str:
    return ", ".join(
        f"--{name.replace('_', '-')} {value}"
        for name, value in options.limits.items()
        if value is not None
    )
