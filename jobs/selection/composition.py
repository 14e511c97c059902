"""What a selection is made of, against its pool: sources, length, correctness, RSR.

Sums over two scans of scored rows, one of the input and one of what was written; no other
memory of how rows were chosen. The pool is every scored row of the input.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import polars as pl

from rsr.engine.metrics import DatasetRsr
from rsr.jobs.errors import UsageError
from rsr.jobs.run.calls import Calls, answers_in_order
from rsr.jobs.selection.bundles import Bundle, bundles_of
from rsr.jobs.shards.score_columns import dataset_of, dataset_sums
from rsr.jobs.shards.scored import USUAL_CORRECT, USUAL_TEACHER, ScoredTable
from rsr.jobs.terminal import Table

MAX_PRINTED_ROWS = 30


@dataclass(frozen=True, slots=True)
class DescribingColumns:
    """Columns that a composition is told by; None where the table has no such column."""

    teacher: str | None
    correct: str | None

    @classmethod
    def of(
        cls, table: ScoredTable, teacher: str | None, correct: str | None
    ) -> "DescribingColumns":
        """The named columns, else the usual ones there are; `UsageError` if one is unfit."""
        types = table.scan.collect_schema()
        table.require([name for name in (teacher, correct) if name])
        if correct is not None and types[correct] != pl.Boolean:
            raise UsageError(
                f"column {correct!r} of {table.path} is {types[correct]}; expected Boolean"
            )
        if teacher is not None and types[teacher].is_nested():
            raise UsageError(
                f"column {teacher!r} of {table.path} is {types[teacher]}; expected one value a row"
            )
        usual_teacher = types.get(USUAL_TEACHER, pl.List)
        if teacher is None and not usual_teacher.is_nested():
            teacher = USUAL_TEACHER
        if correct is None and types.get(USUAL_CORRECT) == pl.Boolean:
            correct = USUAL_CORRECT
        return cls(teacher, correct)

    def expressions(self, table: ScoredTable) -> dict[str, pl.Expr]:
        """What `parts_of_rows` takes of each row of the table, scored or not."""
        return {
            "teacher": pl.lit(None, pl.String) if self.teacher is None else pl.col(self.teacher),
            "verdict": pl.lit(None, pl.Boolean) if self.correct is None else pl.col(self.correct),
            "tokens": pl.col("rsr_num_tokens").cast(pl.Int64),
            "rsr": table.rsr,
            "mean_rank": table.mean_rank,
            "mean_surprisal": pl.col("rsr_mean_surprisal"),
        }


@dataclass(slots=True)
class Part:
    """Sums over some scored rows; those of two sets add up.

    num_verdicts: rows that are known to be correct or not.
    """

    num_rows: int = 0
    num_tokens: int = 0
    num_correct: int = 0
    num_verdicts: int = 0
    rsr_sum: float = 0.0
    dataset: DatasetRsr = field(default_factory=DatasetRsr)

    def merge(self, other: "Part") -> None:
        self.num_rows += other.num_rows
        self.num_tokens += other.num_tokens
        self.num_correct += other.num_correct
        self.num_verdicts += other.num_verdicts
        self.rsr_sum += other.rsr_sum
        self.dataset.merge(other.dataset)

    @property
    def mean_tokens(self) -> float | None:
        return self.num_tokens / self.num_rows if self.num_rows else None

    @property
    def share_correct(self) -> float | None:
        return self.num_correct / self.num_verdicts if self.num_verdicts else None

    def to_json(self, total: "Part") -> dict[str, Any]:
        return {
            "num_rows": self.num_rows,
            "share": self.num_rows / total.num_rows if total.num_rows else None,
            "num_tokens": self.num_tokens,
            "mean_tokens": self.mean_tokens,
            "share_correct": self.share_correct,
            "mean_rsr": self.rsr_sum / self.num_rows if self.num_rows else None,
            "dataset_rsr": self.dataset.rsr,
        }


@dataclass(frozen=True, slots=True)
class Composition:
    """Parts of the selection and of its pool by teacher; only the totals without a teacher."""

    teacher_column: str | None
    selected: "Parts"
    pool: "Parts"

    @property
    def selected_total(self) -> Part:
        return _total(self.selected.values())

    @property
    def pool_total(self) -> Part:
        return _total(self.pool.values())

    @property
    def teachers(self) -> list[Any]:
        """Every teacher of the pool, the largest part of the selection first."""
        return sorted(
            self.pool,
            key=lambda t: (-self.selected.get(t, Part()).num_rows, t is None, str(t)),
        )

    def to_json(self) -> dict[str, Any]:
        selected, pool = self.selected_total, self.pool_total
        told: dict[str, Any] = {"selected": selected.to_json(selected), "pool": pool.to_json(pool)}
        if self.teacher_column is not None:
            told["teacher_column"] = self.teacher_column
            told["teachers"] = [
                {
                    "teacher": teacher,
                    "selected": self.selected.get(teacher, Part()).to_json(selected),
                    "pool": self.pool[teacher].to_json(pool),
                }
                for teacher in self.teachers
            ]
        return told

    def to_table(self) -> Table:
        """Each figure of the selection, and beside it the pool's."""
        table = Table(padding=(0, 0, 0, 1), caption_justify="left")
        table.add_column(self.teacher_column or "", overflow="fold")
        table.add_column("rows", justify="right", no_wrap=True)
        for name in ("share", "tokens", "correct", "RSR"):
            table.add_column(name, justify="right", no_wrap=True)
            table.add_column(f"pool {name}", justify="right", no_wrap=True, style="dim")
        selected, pool = self.selected_total, self.pool_total
        if self.teacher_column is not None:
            for teacher in self.teachers[:MAX_PRINTED_ROWS]:
                part = self.selected.get(teacher, Part())
                name = "(null)" if teacher is None else str(teacher)
                table.add_row(name, *_cells(part, selected, self.pool[teacher], pool))
            if (more := len(self.pool) - MAX_PRINTED_ROWS) > 0:
                table.add_row(f"… and {more:,} more")
        table.add_row("all", *_cells(selected, selected, pool, pool), style="bold")
        table.caption = "pool: all scored rows; tokens: mean per row; RSR: of the data set (Eq. 9)"
        return table


Parts = dict[Any, Part]
"""Parts by teacher."""


def parts_by_calls(table: ScoredTable, by: DescribingColumns, calls: Calls) -> Parts:
    """`parts_of` the table from those of its bundles, which are made wherever calls are."""
    merged: Parts = {}
    for parts in answers_in_order(calls, partial(_parts_of_bundle, table, by), bundles_of(table)):
        merge_parts(merged, parts)
    return merged


def _parts_of_bundle(table: ScoredTable, by: DescribingColumns, bundle: Bundle) -> Parts:
    merged: Parts = {}
    for shard, _ in bundle.shards:
        merge_parts(merged, parts_of(table.of(shard), by))
    return merged


def merge_parts(total: Parts, parts: Parts) -> None:
    """Add `parts` to `total`, in place."""
    for teacher, part in parts.items():
        total.setdefault(teacher, Part()).merge(part)


def parts_of(table: ScoredTable, by: DescribingColumns) -> Parts:
    """Parts of the scored rows by teacher (None without one): one streaming pass."""
    return _parts(table.collect(_sums(table.scan.select(**by.expressions(table)))))


def parts_of_rows(rows: pl.DataFrame) -> Parts:
    """The same of rows that have been read, with `DescribingColumns.expressions` among others."""
    return _parts(_sums(rows.lazy()).collect())


def _sums(rows: pl.LazyFrame) -> pl.LazyFrame:
    scored = rows.filter(pl.col("rsr").is_not_null())
    return scored.group_by("teacher").agg(
        pl.col("tokens").sum().alias("num_tokens"),
        pl.col("verdict").sum().alias("num_correct"),
        pl.col("verdict").count().alias("num_verdicts"),
        pl.col("rsr").sum().alias("rsr_sum"),
        *dataset_sums("mean_rank", "mean_surprisal"),
    )


def _parts(sums: pl.DataFrame) -> Parts:
    return {
        row["teacher"]: Part(
            num_rows=row["num_trajectories"],
            num_tokens=row["num_tokens"],
            num_correct=row["num_correct"],
            num_verdicts=row["num_verdicts"],
            rsr_sum=row["rsr_sum"],
            dataset=dataset_of(row),
        )
        for row in sums.iter_rows(named=True)
    }


def _total(parts: Iterable[Part]) -> Part:
    total = Part()
    for part in parts:
        total.merge(part)
    return total


def _cells(part: Part, total: Part, pool: Part, pool_total: Part) -> Sequence[str]:
    pairs = [
        (_share(part, total), _share(pool, pool_total)),
        (_number(part.mean_tokens, ",.0f"), _number(pool.mean_tokens, ",.0f")),
        (_number(part.share_correct, ".1%"), _number(pool.share_correct, ".1%")),
        (_number(part.dataset.rsr, ".3f"), _number(pool.dataset.rsr, ".3f")),
    ]
    return [f"{part.num_rows:,}", *(cell for pair in pairs for cell in pair)]


def _share(part: Part, total: Part) -> str:
    return _number(part.num_rows / total.num_rows if total.num_rows else None, ".1%")


def _number(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)
