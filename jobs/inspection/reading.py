"""What a student makes of many rows, in numbers: for `rsr inspect`, and for a plan's sample."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rsr.engine.trajectory import EncodedTrajectory, Status
from rsr.jobs.shards.score_columns import Summary


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of some rows. name: a status, with a reason if they have no score. share: of all
    rows. example: one of them, or "". hint: what may help, or ""."""

    num_rows: int
    share: float
    name: str
    example: str = ""
    hint: str = ""


@dataclass(slots=True)
class Reading:
    """How many rows a student reads and how much of them, and why not the others.

    max_model_len: of the student, in tokens. summary: rows by status, scored tokens, and why rows
    have no score. num_tokens: that the student reads. num_cut: that it would read as well of
    truncated rows, were it not for `max_model_len`. notes: rows by what was done to them before
    they were rendered.
    """

    max_model_len: int
    summary: Summary = field(default_factory=Summary)
    num_tokens: int = 0
    num_cut: int = 0
    notes: Counter[str] = field(default_factory=Counter)

    def add(self, rows: Sequence[EncodedTrajectory], shard: str, first_row: int) -> None:
        """Count consecutive rows of a shard."""
        self.summary.count_reasons(rows, shard, first_row)
        by_status = self.summary.rows_by_status
        for row in rows:
            by_status[row.status.value] = by_status.get(row.status.value, 0) + 1
            self.summary.num_rows += 1
            self.summary.num_tokens += row.num_scored
            self.num_tokens += row.num_tokens
            self.num_cut += row.num_cut if row.status is Status.TRUNCATED else 0
            self.notes.update(row.notes)

    @property
    def num_refused(self) -> int:
        return sum(self.summary.rows_without_score.values())

    @property
    def num_truncated(self) -> int:
        return self.summary.rows_by_status.get(Status.TRUNCATED.value, 0)

    @property
    def share_of_rows_truncated(self) -> float:
        return self.num_truncated / max(1, self.summary.num_rows)

    @property
    def share_of_tokens_cut(self) -> float:
        """The share of tokens that are cut, of the tokens of all rows that are scored."""
        return self.num_cut / max(1, self.num_tokens + self.num_cut)

    def outcomes(self) -> list[Outcome]:
        """The rows by status and reason, the most frequent first."""
        num_rows = self.summary.num_rows
        outcomes = [
            Outcome(count, count / num_rows, status)
            for status, count in self.summary.rows_by_status.items()
            if status not in self.summary.rows_without_score
        ]
        outcomes += [
            Outcome(reason.num_rows, reason.num_rows / num_rows, name, reason.example, reason.hint)
            for name, reason in self.summary.reasons.items()
        ]
        return sorted(outcomes, key=lambda outcome: -outcome.num_rows)

    def facts(self) -> list[tuple[str, str]]:
        """What else there is to say of rows that are scored: a heading each, or "", and a line."""
        scored = self.summary.num_tokens
        share = scored / max(1, self.num_tokens)
        changes = [
            ("" if number else "changed first", f"{told_rows(count)}: {note}")
            for number, (note, count) in enumerate(self.notes.most_common())
        ]
        return [
            ("tokens", f"{self.num_tokens:,}, of which {scored:,} ({share:.1%}) are scored"),
            (
                "truncated",
                f"{told_rows(self.num_truncated)} ({self.share_of_rows_truncated:.1%}), without "
                f"{self.num_cut:,} tokens ({self.share_of_tokens_cut:.1%}) beyond the first "
                f"{self.max_model_len:,}"
                if self.num_truncated
                else f"no row is cut to the longest sequence of {self.max_model_len:,} tokens",
            ),
            *changes,
        ]

    def to_json(self) -> dict[str, Any]:
        """The object `summary` of `rsr inspect --json`."""
        return {
            "num_rows": self.summary.num_rows,
            "rows_by_status": self.summary.rows_by_status,
            "reasons": {name: asdict(reason) for name, reason in self.summary.reasons.items()},
            "num_tokens": self.num_tokens,
            "num_scored": self.summary.num_tokens,
            "truncated": {
                "num_rows": self.num_truncated,
                "share_of_rows": self.share_of_rows_truncated,
                "num_tokens": self.num_cut,
                "share_of_tokens": self.share_of_tokens_cut,
            },
            "notes": dict(self.notes.most_common()),
        }


def told_rows(number: int) -> str:
    return f"{number:,} row{'s' * (number != 1)}"
