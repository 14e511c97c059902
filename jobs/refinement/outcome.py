"""What became of a row's trace: the words of it, and the columns that a run adds."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

import polars as pl
import pyarrow as pa

from rsr.jobs.shards.score_columns import Summary

Mode = Literal["style-aligned", "minimal", "from-scratch"]
MAX_DETAIL_CHARACTERS = 1000


class RefineStatus(StrEnum):
    """The values of the output column `refine_status`; all but the first keep the native trace."""

    REFINED = "refined"
    UNCHANGED = "unchanged"
    """The oracle found nothing to change."""
    NO_TRACE = "no_trace"
    """The reply holds no trace between the tags that it was asked for."""
    CUT_OFF = "cut_off"
    """The reply reached its limit of tokens."""
    REFUSED = "refused"
    """The oracle or its server does not take this row."""
    FAILED = "failed"
    """The server did not answer this row within its attempts, or it broke every worker."""
    NOT_REFINABLE = "not_refinable"
    """The row has not exactly one response of one text: nothing was asked."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one row's trace.

    text: the refined trace, None where the native one is kept. detail: why, where it is kept.
    prompt_tokens, completion_tokens: of the request that was answered, as the oracle counts.
    """

    status: RefineStatus
    text: str | None = None
    detail: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None

    def to_json(self) -> list[Any]:
        return [
            self.status.value,
            self.text,
            self.detail,
            self.prompt_tokens,
            self.completion_tokens,
        ]

    @classmethod
    def parse(cls, values: Any) -> "Outcome":
        """The outcome that `to_json` wrote; raises `ValueError` or `TypeError` if it did not."""
        status, *others = values
        return cls(RefineStatus(status), *others)


PARENT_ID, ORIGINAL = "parent_id", "original_response"
ADDED_FIELDS: "tuple[pa.Field[Any], ...]" = (
    pa.field(PARENT_ID, pa.string()),
    pa.field(ORIGINAL, pa.string()),
    pa.field("refine_status", pa.string()),
    pa.field("refine_detail", pa.string()),
    pa.field("refine_mode", pa.string()),
    pa.field("refine_model", pa.string()),
    pa.field("refine_prompt_tokens", pa.int64()),
    pa.field("refine_completion_tokens", pa.int64()),
)
"""The columns that a run adds, in order, after the one whose traces it replaces."""
ADDED_COLUMNS = tuple(field.name for field in ADDED_FIELDS)

_FRAME = {
    "text": pl.String,
    "refine_status": pl.String,
    "refine_detail": pl.String,
    "refine_prompt_tokens": pl.Int64,
    "refine_completion_tokens": pl.Int64,
}


def to_frame(outcomes: Sequence[Outcome]) -> pl.DataFrame:
    """One row per outcome, in order: what a unit keeps."""
    values = [
        (o.text, o.status.value, _short(o.detail), o.prompt_tokens, o.completion_tokens)
        for o in outcomes
    ]
    return pl.DataFrame(values, schema=_FRAME, orient="row")


def summary_of(frame: pl.DataFrame) -> Summary:
    """num_tokens: of the oracle's replies, as far as it counts them."""
    counts = frame.group_by("refine_status").len().sort("refine_status")
    return Summary(
        num_rows=len(frame),
        num_tokens=int(frame["refine_completion_tokens"].sum()),
        rows_by_status=dict(counts.iter_rows()),
    )


def _short(text: str | None) -> str | None:
    if text is None:
        return None
    return text[:MAX_DETAIL_CHARACTERS].encode("utf-8", "backslashreplace").decode()
