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
from rsr.jobs.selection.bundles import (
    Bundle,
    IdsToRead,
    RowsOfBundle,
    bundles_of,
    ids_of,
    reader_of,
    tied_ids,
)
from rsr.jobs.selection.candidates import (
    Candidates,
    candidate_columns,
    collect_columns,
    encode,
    require_some,
)
from rsr.jobs.selection.composition import (
    DescribingColumns,
    Parts,
    merge_parts,
    parts_of_shard,
)
from rsr.jobs.selection.layout import Mask, OutputFile
from rsr.jobs.selection.objectives import pareto_front
from rsr.jobs.selection.passes import (
    Decision,
    common_facts,
    copy_file,
    for_any_machine,
    require_exact_groups,
    require_own_row,
    run_by_calls,
)
from rsr.jobs.selection.ranking import ReadIds, Rows, keep_best, ranked
from rsr.jobs.selection.result import SelectionResult
from rsr.jobs.selection.select import (
    CORRECT,
    QUALITY,
    SelectOptions,
    extra_columns,
    no_finite_quality,
    nothing_admitted,
    open_for_select,
    places_of,
    quota_name,
    rows_to_rank,
)
from rsr.jobs.selection.selection import Facts, OpenedInput
from rsr.jobs.shards.scored import ScoredTable
from rsr.jobs.shards.shard import Shard

MIN_PART_ROWS, MAX_PARTS = 2 << 20, 100
"""Pieces are bundles times parts, and the driver remembers each: 20,000 at the most."""
MAX_PART_CANDIDATES = 32 << 20
"""Candidates that one call ranks: some 2 GiB."""

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


@dataclass(frozen=True, slots=True)
class Copy:
    """A file to be written, and the number in INPUT of the first row of each of its shards."""

    file: OutputFile
    first_rows: Mapping[str, int]

    @property
    def path(self) -> str:
        """What a user is told of a call that is lost."""
        return self.file.path


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


@dataclass(slots=True)
class Groups:
    """Groups of a part: of any row, of candidates."""

    num_distinct: int = 0
    num_with_candidates: int = 0

    def add(self, other: "Groups") -> None:
        self.num_distinct += other.num_distinct
        self.num_with_candidates += other.num_with_candidates


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
    num_parts = max(1, min(MAX_PARTS, table.num_rows // MIN_PART_ROWS))
    plan = Plan(
        options,
        table,
        opened.by,
        wanted | extra_columns(options, opened),
        opened.id_column if options.pick == "best" else None,
        num_parts,
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

    def copy(store: RunStore, calls: Calls, files: Sequence[OutputFile]) -> Iterator[str | None]:
        firsts = {shard.name: first for bundle in bundles for shard, first in bundle.shards}
        items = [
            Copy(file, {piece.shard.name: firsts[piece.shard.name] for piece in file.slices})
            for file in files
        ]
        given = [chosen] * len(items)
        return (line for _, line, _ in calls.scatter(partial(_copy, store), items, given, 0))

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
        parts[again[place]], given[place] = [part], []
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


def gather_bundle(plan: Plan, bundle: Bundle) -> tuple[Any, ...]:
    """Counts and pool of a bundle, then for each part its rows and the groups that have none."""
    exchange.require_hashes(plan.hashes)
    counts = Gathered()
    pool: Parts = {}
    rows, others = [], []
    for shard, first_row in bundle.shards:
        here, rows_here, others_here = _gather_shard(plan, bundle, shard, first_row)
        counts.add(here)
        rows.append(rows_here)
        others.append(others_here)
        merge_parts(pool, parts_of_shard(plan.table, plan.by, shard))
    kept = pl.concat([frame for frame in rows if frame.height] or rows[:1])
    if len(bundle.shards) > 1:
        kept = kept.filter(_can_be_chosen(plan, bundle, kept))
    pieces = exchange.split(kept, plan.num_parts)
    counts.by_part = np.array([exchange.unpacked(piece).height for piece in pieces])
    of_others = exchange.split(pl.concat(others).unique(), plan.num_parts)
    return ((counts, pool), *zip(pieces, of_others, strict=True))


def _gather_shard(
    plan: Plan, bundle: Bundle, shard: Shard, first_row: int
) -> tuple[Gathered, pl.DataFrame, pl.DataFrame]:
    """Counts; rows that can be chosen, by position; keys of groups without one, and whether they
    have a candidate.
    """
    frame = collect_columns(plan.table.of(shard), plan.wanted)
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
    rows = rows.filter(_can_be_chosen(plan, bundle, rows))
    keys = exchange.keys_of(narrow)
    # A group with a judged row has one that can be chosen: the others have none of either.
    others = narrow.filter(~pl.col("is_judged")).group_by(keys).agg(pl.col("has_candidate").any())
    return counts, rows, others.join(rows.select(keys), on=keys, how="anti")


def _can_be_chosen(plan: Plan, bundle: Bundle, rows: pl.DataFrame) -> pl.Series:
    """Which rows of a bundle may be chosen, whatever the rows of other bundles are.

    Of a group those that K others of it come before cannot; under quotas, K others of it with the
    same values of the quotas, which are full for the one if they are for the other.
    """
    everything = pl.Series(np.ones(rows.height, bool))
    if plan.needs_whole_groups or not rows.height:
        return everything
    groups, num_groups = exchange.numbered(rows)
    scores = rows["score"].to_numpy()
    if plan.options.objective == "pareto":
        return pl.Series(pareto_front(scores, rows[QUALITY].to_numpy(), groups))
    for name in plan.quotas:
        values, num_values = encode(rows[name])
        groups, num_groups = encode(pl.Series(groups.astype(np.int64) * num_values + values))
    room = plan.options.room
    crowded = np.flatnonzero(np.bincount(groups, minlength=num_groups)[groups] > room)
    if not len(crowded):
        return everything
    inside = rows[crowded]
    ranking = Rows(
        (inside[PLACE] if PLACE in rows.columns else inside["score"]).to_numpy(),
        groups=groups[crowded],
        num_groups=num_groups,
        read_ids=bundle.id_reader(plan.table, plan.id_column, inside["position"].to_numpy()),
    )
    mask = np.ones(rows.height, bool)
    mask[crowded] = keep_best(ranking, np.full(num_groups, room))
    return pl.Series(mask)


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
    numbers, num_groups = exchange.numbered(pl.concat(keys))
    groups, of_others = numbers[: rows.height], numbers[rows.height :]
    has_candidate = np.zeros(num_groups, bool)
    has_candidate[groups] = True
    if len(of_others):
        has_candidate[of_others[others["has_candidate"].to_numpy()]] = True
    found = Groups(num_groups, int(np.count_nonzero(has_candidate)))
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


def _copy(store: RunStore, item: Copy, *chosen: NDArray[np.int64]) -> tuple[Any]:
    """chosen: of each part, the ascending positions of its kept rows."""

    def rows_of(shard: Shard) -> Mask:
        first_row = item.first_rows[shard.name]
        mask = np.zeros(shard.num_rows, bool)
        for positions in chosen:
            low, high = np.searchsorted(positions, [first_row, first_row + shard.num_rows])
            mask[positions[low:high] - first_row] = True
        return mask

    return (copy_file(store, item.file, rows_of),)


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
        opened, gathered.num_scored, gathered.num_candidates, gathered.num_unmeasured, chosen.worst
    )
