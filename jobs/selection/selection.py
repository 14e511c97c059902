"""What `rsr filter` and `rsr select` share: their options, their input, and the course of a run.

    read, choose, copy, describe

What is described is measured on the written files, not remembered, so that a run that went on
says the same as one that never stopped. Knows nothing of how rows are chosen.
"""

import json
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from rsr.engine.catalogue import RSR, Metric
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.run.folder import COMPOSITION
from rsr.jobs.run.manifest import JsonObject
from rsr.jobs.run.memory import require_memory
from rsr.jobs.run.preflight import refusing_what_cannot_be_reached
from rsr.jobs.run.whole import require_finished
from rsr.jobs.selection.candidates import Candidates, Conditions, choose_id_column
from rsr.jobs.selection.composition import Composition, DescribingColumns, Part, parts_of
from rsr.jobs.selection.layout import Mask
from rsr.jobs.selection.result import SelectionResult
from rsr.jobs.selection.subset import SubsetPlace, write_subset
from rsr.jobs.shards.measures import Measure, measure, metric_named
from rsr.jobs.shards.scored import ScoredTable, open_scored

Facts = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class SubsetOptions:
    """The options that `rsr filter` and `rsr select` share.

    conditions: of rows that may be chosen. metric: what ranks them, by its name in the
    catalogue. quality_column: higher is better, for what takes one. id_column: orders rows of equal
    score; None is `id` where there is one. rank_clip: a name of `STORED_RANK_CLIPS`; None is the
    run's own r_max. teacher_column, correct_column: what the result is described by. rows_per_file:
    of OUTPUT; None is the files of INPUT. overwrite: discard an earlier subset in OUTPUT. command:
    what was typed.
    """

    input: str
    output: Path | str
    conditions: Conditions = field(default_factory=Conditions)
    metric: str = RSR
    quality_column: str | None = None
    id_column: str | None = None
    rank_clip: str | None = None
    teacher_column: str | None = None
    correct_column: str | None = None
    allow_mixed_students: bool = False
    rows_per_file: int | None = None
    overwrite: bool = False
    command: tuple[str, ...] = ()

    def place(self, writer: str, settings: JsonObject) -> SubsetPlace:
        """Where the rows go. writer: the `rsr` command; settings: all that decide which rows."""
        return SubsetPlace(
            output=self.output,
            writer=writer,
            settings=settings,
            command=self.command,
            rows_per_file=self.rows_per_file,
            overwrite=self.overwrite,
        )

    @property
    def common_settings(self) -> dict[str, Any]:
        """The options on which two runs must agree to write into one OUTPUT."""
        return {
            "where": self.conditions.where,
            "min_tokens": self.conditions.min_tokens,
            "max_tokens": self.conditions.max_tokens,
            "required": list(self.conditions.required),
            "id_column": self.id_column,
            "rank_clip": self.rank_clip,
            "metric": self.metric,
            "quality_column": self.quality_column,
        }


@dataclass(frozen=True, slots=True)
class OpenedInput:
    """A scored table that is open for a selection, and how its rows are ranked.

    measured: what ranks rows. id_column: as named or found; None leaves positions to order rows
    of equal score.
    """

    table: ScoredTable
    measured: Measure
    by: DescribingColumns
    id_column: str | None

    @classmethod
    def of(cls, options: SubsetOptions, columns: Iterable[str | None]) -> Self:
        """INPUT, where these columns must be, each None aside; raises `UsageError` if it is unfit.

        Nothing but footers is read.
        """
        named = [*columns, options.id_column, *options.conditions.required]
        with refusing_what_cannot_be_reached():
            require_finished(options.input)
            table = open_scored(
                options.input,
                rank_clip=options.rank_clip,
                columns=[name for name in named if name],
                allow_mixed_students=options.allow_mixed_students,
            )
        by = DescribingColumns.of(table, options.teacher_column, options.correct_column)
        takes_quality = "quality" in metric_named(options.metric).needs
        measured = measure(
            table,
            options.metric,
            quality_column=options.quality_column if takes_quality else None,
        )
        return cls(table, measured, by, choose_id_column(table, options.id_column))


def run_selection(
    opened: OpenedInput,
    read: Callable[[], Candidates],
    choose: Callable[[Candidates], tuple[Mask, Callable[[], Facts]]],
    stop: StopRequest,
    *,
    writer: str,
    options: SubsetOptions,
    settings: JsonObject,
    bytes_per_row: int,
) -> SelectionResult:
    """Write what `choose` keeps of the candidates that `read` finds, and describe it.

    writer: the `rsr` command. settings: what two starts must agree on to write into one OUTPUT.
    choose: gives the choice, and what counts the facts of it, which is done beside the copying.
    bytes_per_row: of memory, that reading and choosing take at least. Raises what `write_subset`
    raises, what `read` and `choose` do, and `UsageError` where memory is too small.
    """
    table, by = opened.table, opened.by
    require_memory(
        table.num_rows * bytes_per_row,
        f"rsr {writer} of the {table.num_rows:,} rows of {table.path}",
        "give --address local, whose calls hold no such arrays, or a cluster's --address",
    )
    pool: list[Future[dict[Any, Part]]] = []
    counted: list[Future[Facts]] = []
    with ThreadPoolExecutor(1) as aside:

        def read_and_choose() -> Mask:
            candidates = read()
            # Choosing keeps one core busy: the others describe the pool meanwhile.
            pool.append(aside.submit(parts_of, table, by))
            keep, count = choose(candidates)
            metric = opened.measured.metric
            counted.append(aside.submit(lambda: count() | _facts(candidates, keep, metric)))
            return keep

        folder = write_subset(table, options.place(writer, settings), read_and_choose, stop)
        selected = open_scored(
            str(options.output), rank_clip=table.rank_clip, allow_mixed_students=True
        )
        composition = Composition(by.teacher, parts_of(selected, by), pool[0].result())
    total = composition.selected_total
    facts = {"num_rows": table.num_rows} | counted[0].result()
    facts |= {"num_kept": total.num_rows, "num_tokens": total.num_tokens}
    result = SelectionResult(folder, facts, composition)
    text = json.dumps(result.to_json(), indent=2, default=str) + "\n"
    folder.storage.write(COMPOSITION, text.encode())
    return result


def _facts(candidates: Candidates, keep: Mask, metric: Metric) -> Facts:
    return common_facts(
        metric,
        candidates.num_scored,
        candidates.num_candidates,
        candidates.num_unmeasured,
        float(candidates.scores[keep].max()),
    )


def common_facts(
    metric: Metric, num_scored: int, num_candidates: int, num_unmeasured: int, worst: float
) -> Facts:
    """What is told of every selection. worst: of the scores that are kept."""
    facts: Facts = {"num_scored": num_scored, "num_candidates": num_candidates}
    if metric.name == RSR:
        # Which of two zeros is the largest depends on their order: minus zero is zero.
        return facts | {"largest_rsr": worst + 0.0}
    return facts | {
        "num_unmeasured": num_unmeasured,
        "metric": metric.name,
        "worst_value": metric.sign * worst + 0.0,
    }
