"""`rsr select`: the best trajectories of each problem, by RSR or jointly with a quality.

Candidates of a group are ranked, its best are kept, quotas hold over the whole set. Groups may
be spread over shards. Knows the order of the steps: ranking is `ranking.py`'s, objectives are
`objectives.py`'s, quotas are `quotas.py`'s and files `subset.py`'s.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from rsr.engine.catalogue import RSR
from rsr.jobs.errors import UsageError
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.selection.candidates import (
    Candidates,
    groupable,
    id_reader,
    read_candidates,
)
from rsr.jobs.selection.layout import Mask
from rsr.jobs.selection.numbering import encode
from rsr.jobs.selection.objectives import correct_first, of_best_kind, pareto_front, weighted
from rsr.jobs.selection.quotas import Quota, admit
from rsr.jobs.selection.ranking import ReadIds, Rows, keep_best, ranked
from rsr.jobs.selection.result import SelectionResult
from rsr.jobs.selection.selection import Facts, OpenedInput, SubsetOptions, run_selection
from rsr.jobs.shards.measures import metric_named
from rsr.jobs.shards.scored import USUAL_CORRECT, ScoredTable

Objective = Literal["pareto", "weighted", "joint"]
Pick = Literal["best", "first", "random"]

DEFAULT_QUALITY_WEIGHT = 0.5
QUALITY, CORRECT = "quality", "is correct"
ROOM_FOR_ALL = 1 << 62
"""More rows than any group has."""
BYTES_PER_ROW, QUOTA_BYTES_PER_ROW = 36, 96
"""By which the process's memory grew from 10 to 100 million rows with whole numbers as groups."""

SAMPLE_INDEX = "sample_index"
"""Column of the input that says which of a problem's rows came first; else their order does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectOptions(SubsetOptions):
    """What `rsr select` is asked to do.

    group_by: column that names the problem. keep: rows of each group; None is 1, or the whole front
    where one is asked for. max_shares: columns, and the largest share of the selected rows that one
    value may have. quality_weight: of quality against RSR, from 0 to 1; None with objective joint
    asks for the front. pick: the best rows of a group, or as rejection sampling does, its first by
    `SAMPLE_INDEX`, or some by chance. seed: of that chance.
    """

    group_by: str
    keep: int | None = None
    max_shares: tuple[tuple[str, Fraction], ...] = ()
    objective: Objective | None = None
    quality_weight: float | None = None
    pick: Pick = "best"
    seed: int | None = None

    @property
    def is_front(self) -> bool:
        """Whether only rows that no other beats in both are kept."""
        is_unweighted_joint = self.objective == "joint" and self.quality_weight is None
        return self.objective == "pareto" or is_unweighted_joint

    @property
    def room(self) -> int:
        """How many rows of each group there is room for."""
        return ROOM_FOR_ALL if self.keep is None and self.is_front else self.keep or 1

    @property
    def settings(self) -> dict[str, Any]:
        """What two runs must agree on to write into one OUTPUT."""
        first = {"correct_first": self.correct_column or USUAL_CORRECT}
        return {
            "group_by": self.group_by,
            "keep": self.keep,
            "max_shares": [f"{column}={share}" for column, share in self.max_shares],
            "objective": self.objective,
            "quality_weight": self.quality_weight,
            "pick": self.pick,
            "seed": self.seed,
            **(first if self.objective == "joint" else {}),
        } | self.common_settings


def run_select(options: SelectOptions, stop: StopRequest) -> SelectionResult:
    """Write the selected rows of INPUT to OUTPUT; goes on where an earlier start stopped.

    Raises `UsageError` with OUTPUT as it was, also if nothing would be selected; `ShardsFailed` if
    a shard cannot be copied; `Interrupted` when `stop` says so.
    """
    opened = open_for_select(options)
    table = opened.table

    def read() -> Candidates:
        return read_candidates(
            table,
            options.conditions,
            opened.measured,
            group_column=options.group_by,
            extra=extra_columns(options, opened),
        )

    def choose(candidates: Candidates) -> tuple[Mask, Callable[[], Facts]]:
        keep = select_rows(options, opened, candidates)
        return keep, lambda: _facts(options, opened, candidates, keep)

    return run_selection(
        opened,
        read,
        choose,
        stop,
        writer="select",
        options=options,
        settings=options.settings,
        bytes_per_row=QUOTA_BYTES_PER_ROW if options.max_shares else BYTES_PER_ROW,
    )


def open_for_select(options: SelectOptions) -> OpenedInput:
    """INPUT, if the options make sense with it and with each other; else raises `UsageError`."""
    _require_sense(options)
    quota_columns = [column for column, _ in options.max_shares]
    opened = OpenedInput.of(options, [options.group_by, options.quality_column, *quota_columns])
    _require_quality_is_number(options, opened.table)
    _require_verdicts(options, opened)
    return opened


def extra_columns(options: SelectOptions, opened: OpenedInput) -> dict[str, pl.Expr]:
    """What choosing reads of each row besides its score and its group."""
    table = opened.table
    extra = {quota_name(column): groupable(table, column) for column, _ in options.max_shares}
    if options.quality_column is not None:
        extra[QUALITY] = pl.col(options.quality_column).cast(pl.Float64)
    if options.objective == "joint":
        extra[CORRECT] = pl.col(opened.by.correct or USUAL_CORRECT).fill_null(False)
    if options.pick == "first":
        extra[SAMPLE_INDEX] = _sample_index(table)
    return extra


def quota_name(column: str) -> str:
    """Of `Candidates.extra`: the values of a column of `--max-share-per`."""
    return f"quota of {column}"


def select_rows(options: SelectOptions, opened: OpenedInput, candidates: Candidates) -> Mask:
    """(N,) mask of the selected candidates."""
    _require_finite_quality(options, opened.table, candidates)
    places = places_of(options, 0, candidates.extra, len(candidates.scores))
    rows = rows_to_rank(options, candidates, places, id_reader(opened.table, opened.id_column))
    if options.max_shares:
        return _select_under_quotas(options, candidates, rows)
    return keep_best(rows, np.full(rows.num_groups, options.room))


def rows_to_rank(
    options: SelectOptions,
    candidates: Candidates,
    places: NDArray[np.float64] | None,
    read_ids: ReadIds | None,
) -> Rows:
    """The candidates with what the best of a group have the least of; NaN of those left out.

    places: (N,) of `places_of`. All rows of a group must be among the candidates.
    """
    assert candidates.groups is not None
    rows = Rows(
        scores=candidates.scores,
        groups=candidates.groups,
        num_groups=candidates.num_groups,
        read_ids=read_ids,
    )
    if places is not None:
        scores = np.where(candidates.is_candidate, places, np.nan)
        rows = replace(rows, scores=scores, read_ids=None)
    if options.objective is not None:
        rows = _judged(options, candidates, rows)
    return rows


def _sample_index(table: ScoredTable) -> pl.Expr:
    """Where a row comes among its problem's; 0 of all, which leaves the order of the input."""
    kind = table.scan.collect_schema().get(SAMPLE_INDEX)
    if kind is None or not kind.is_integer():
        return pl.lit(0.0)
    return pl.col(SAMPLE_INDEX).cast(pl.Float64).fill_null(float("inf"))


def places_of(
    options: SelectOptions, first_row: int, extra: pl.DataFrame, num_rows: int
) -> NDArray[np.float64] | None:
    """(num_rows,) scores of which the lowest are picked; None where the best are.

    first_row: the number in INPUT of the first of these rows. By chance: numpy's PCG64 draws one
    number a row of INPUT, candidate or not, so that other conditions change no row's number.
    """
    if options.pick == "random":
        chance = np.random.PCG64(options.seed or 0).advance(first_row)
        return np.random.Generator(chance).random(num_rows)
    if options.pick == "first":
        indices: NDArray[np.float64] = extra[SAMPLE_INDEX].to_numpy()
        return np.minimum(indices, np.finfo(np.float64).max)
    return None


def _judged(options: SelectOptions, candidates: Candidates, rows: Rows) -> Rows:
    """`rows` with the objective as their score and RSR as the second."""
    quality = candidates.extra[QUALITY].to_numpy()
    positions = np.flatnonzero(candidates.is_candidate & np.isfinite(quality))
    assert rows.groups is not None
    fit, judged, groups = candidates.scores[positions], quality[positions], rows.groups[positions]
    weight = DEFAULT_QUALITY_WEIGHT if options.quality_weight is None else options.quality_weight
    scores = np.full(len(quality), np.nan)
    if options.objective == "joint":
        is_correct = candidates.extra[CORRECT].to_numpy()[positions]
        # Correct rows are compared with each other, and so are the others.
        kinds = 2 * groups + ~is_correct
        scores[positions] = correct_first(weighted(fit, judged, kinds, weight), is_correct)
        front = of_best_kind(groups, is_correct)
    else:
        kinds, front = groups, np.ones(len(positions), bool)
        scores[positions] = weighted(fit, judged, groups, weight)
    if options.is_front:
        front &= pareto_front(fit, judged, kinds)
        scores[positions[~front]] = np.nan
    return Rows(
        scores,
        groups=rows.groups,
        num_groups=rows.num_groups,
        second_scores=candidates.scores,
        read_ids=rows.read_ids,
    )


def _select_under_quotas(options: SelectOptions, candidates: Candidates, rows: Rows) -> Mask:
    assert rows.groups is not None
    overall = Rows(rows.scores, second_scores=rows.second_scores, read_ids=rows.read_ids)
    best_first = ranked(overall, np.flatnonzero(~np.isnan(rows.scores)))
    quotas = []
    for column, share in options.max_shares:
        values, num_values = encode(candidates.extra[quota_name(column)])
        values[values < 0] = num_values
        quotas.append(Quota(values[best_first], num_values + 1, share))
    admitted = admit(rows.groups[best_first], options.room, quotas)
    if not admitted.any():
        raise nothing_admitted(options)
    keep_mask: NDArray[np.bool_] = np.zeros(len(rows.scores), bool)
    keep_mask[best_first[admitted]] = True
    return keep_mask


def nothing_admitted(options: SelectOptions) -> UsageError:
    """That the quotas leave no row."""
    told = ", ".join(f"{column}={float(share):g}" for column, share in options.max_shares)
    return UsageError(
        f"no selection meets --max-share-per {told}: too few different values among the "
        "candidates; allow larger shares"
    )


def _require_finite_quality(
    options: SelectOptions, table: ScoredTable, candidates: Candidates
) -> None:
    if options.objective is None:
        return
    if not (candidates.is_candidate & np.isfinite(candidates.extra[QUALITY].to_numpy())).any():
        raise no_finite_quality(options, table)


def no_finite_quality(options: SelectOptions, table: ScoredTable) -> UsageError:
    """That joint selection has nothing to judge by."""
    return UsageError(
        f"no candidate of {table.path} has a finite value in --quality-column "
        f"{options.quality_column}"
    )


def _facts(
    options: SelectOptions, opened: OpenedInput, candidates: Candidates, keep: Mask
) -> Facts:
    num_unjudged = 0
    if options.quality_column is not None:
        is_judged = np.isfinite(candidates.extra[QUALITY].to_numpy())
        num_unjudged = int(np.count_nonzero(candidates.is_candidate & ~is_judged))
    facts: Facts = {
        "ties_by": opened.id_column or "position",
        "num_groups": candidates.num_groups_of(candidates.is_candidate),
        "num_groups_without_row": candidates.num_distinct_groups - candidates.num_groups_of(keep),
        "num_ungrouped": candidates.num_ungrouped,
        "num_unjudged": num_unjudged,
    }
    if options.objective == "joint":
        is_correct = candidates.extra[CORRECT].to_numpy()
        facts["num_kept_wrong"] = int(np.count_nonzero(keep & ~is_correct))
    if options.pick != "best":
        facts |= {"picked": options.pick, "ties_by": None}
    if options.keep is not None and options.keep > 1:
        num_complete = int(np.count_nonzero(candidates.count_groups(keep) >= options.keep))
        facts["num_groups_short"] = candidates.num_distinct_groups - num_complete
    return facts


def _require_sense(options: SelectOptions) -> None:
    if options.pick != "best":
        if options.objective is not None or options.metric != RSR or options.quality_column:
            raise UsageError(
                f"--pick {options.pick} takes rows whatever they score: leave out --metric, "
                "--objective and --quality-column"
            )
        if options.max_shares:
            raise UsageError(f"--max-share-per goes with --pick best, not {options.pick}")
    if options.seed is not None and options.pick != "random":
        raise UsageError("--seed goes with --pick random")
    joint = {
        "--quality-column": options.quality_column,
        "--objective": options.objective,
    }
    is_for_metric = "quality" in metric_named(options.metric).needs and options.objective is None
    if any(joint.values()) and not all(joint.values()) and not is_for_metric:
        raise UsageError("joint selection needs both --quality-column and --objective")
    if options.quality_weight is not None and options.objective is None:
        raise UsageError("--quality-weight needs --quality-column and --objective")


def _require_quality_is_number(options: SelectOptions, table: ScoredTable) -> None:
    if options.quality_column is None:
        return
    kind = table.scan.collect_schema()[options.quality_column]
    if not kind.is_numeric():
        raise UsageError(
            f"column {options.quality_column!r} of {table.path} is {kind}; expected numbers, "
            "higher being better"
        )


def _require_verdicts(options: SelectOptions, opened: OpenedInput) -> None:
    if options.objective == "joint" and opened.by.correct is None:
        raise UsageError(
            f"--objective joint puts correct rows first, and {opened.table.path} has no Boolean "
            f"column {USUAL_CORRECT!r}: name the verdicts with --correct-column, or take weighted "
            "or pareto, which ask for none"
        )
