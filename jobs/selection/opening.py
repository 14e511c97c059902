"""What `rsr filter` and `rsr select` are both asked, and what both open for it.

Knows nothing of how rows are chosen or copied.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from rsr.jobs.scored import ScoredTable, open_scored
from rsr.jobs.selection.candidates import Conditions, choose_id_column
from rsr.jobs.selection.composition import DescribingColumns


@dataclass(frozen=True, slots=True, kw_only=True)
class SubsetOptions:
    """conditions: of rows that may be chosen. id_column: orders rows of equal score; None is
    `id` where there is one. rank_clip: a name of `STORED_RANK_CLIPS`; None is the run's own r_max.
    teacher_column, correct_column: what the result is described by. overwrite: discard an earlier
    subset in OUTPUT.
    """

    input: str
    output: Path
    conditions: Conditions = field(default_factory=Conditions)
    id_column: str | None = None
    rank_clip: str | None = None
    teacher_column: str | None = None
    correct_column: str | None = None
    allow_mixed_students: bool = False
    overwrite: bool = False

    @property
    def common_settings(self) -> dict[str, Any]:
        """Of these, what two runs must agree on to write into one OUTPUT."""
        return {
            "where": self.conditions.where,
            "min_tokens": self.conditions.min_tokens,
            "max_tokens": self.conditions.max_tokens,
            "required": list(self.conditions.required),
            "id_column": self.id_column,
            "rank_clip": self.rank_clip,
        }


@dataclass(frozen=True, slots=True)
class OpenedInput:
    """id_column: as named or found; None leaves positions to order rows of equal score."""

    table: ScoredTable
    by: DescribingColumns
    id_column: str | None

    @classmethod
    def of(cls, options: SubsetOptions, columns: Iterable[str | None]) -> Self:
        """INPUT, where these columns must be, each None aside; raises `UsageError` if it is unfit.

        Nothing but footers is read.
        """
        named = [*columns, options.id_column, *options.conditions.required]
        table = open_scored(
            options.input,
            rank_clip=options.rank_clip,
            columns=[name for name in named if name],
            allow_mixed_students=options.allow_mixed_students,
        )
        by = DescribingColumns.of(table, options.teacher_column, options.correct_column)
        return cls(table, by, choose_id_column(table, options.id_column))
