"""The columns a run adds to each row: their names and types, said once, and their sums.

Builds them with Polars from trajectory scores and sums them up again. Knows nothing of files:
where the columns go is `writer.py`'s.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypedDict

import polars as pl
import pyarrow as pa

from rsr.engine.config import SecondPass
from rsr.engine.metric_sums import MetricSums, PartSums
from rsr.engine.metrics import STORED_RANK_CLIPS, DatasetRsr, TrajectoryScore
from rsr.engine.parts import NUM_QUARTERS
from rsr.engine.trajectory import EncodedTrajectory, Status

PREFIX = "rsr"
"""Every added column is `rsr` or begins with `rsr_`."""

UNSCORED = frozenset(status.value for status in Status if not status.is_scored)
MAX_REASONS = 20
OTHER_REASONS = "other reasons"
NUMBER = re.compile(r"\d[\d,.]*")
"""What differs from row to row in the same reason."""


@dataclass(frozen=True, slots=True)
class ScoreColumn:
    """A column that a run adds to each row; docs/columns.md says what it means."""

    name: str
    polars_type: Any
    arrow_type: pa.DataType


ROW_COLUMNS = (
    ScoreColumn("rsr", pl.Float64, pa.float64()),
    ScoreColumn("rsr_num_tokens", pl.Int32, pa.int32()),
    ScoreColumn("rsr_mean_rank", pl.Float64, pa.float64()),
    ScoreColumn("rsr_mean_surprisal", pl.Float64, pa.float64()),
    ScoreColumn("rsr_mean_entropy", pl.Float64, pa.float64()),
    ScoreColumn(
        "rsr_rank_sums",
        pl.Struct(dict.fromkeys(STORED_RANK_CLIPS, pl.Float64)),
        pa.struct([(name, pa.float64()) for name in STORED_RANK_CLIPS]),
    ),
    ScoreColumn("rsr_status", pl.String, pa.string()),
    ScoreColumn("rsr_detail", pl.String, pa.string()),
)

QUESTIONED_COLUMNS = ROW_COLUMNS[:-1]
"""Those that `filter`, `select`, `teachers` and the like need; they ask nothing of `rsr_detail`."""

QUARTERS = tuple(f"q{number + 1}" for number in range(NUM_QUARTERS))


def _sums_column(name: str, sums: Mapping[str, Any]) -> ScoreColumn:
    """A struct of 32-bit counts, 64-bit sums and texts, or of such structs."""

    def arrow_type(kind: Any) -> pa.DataType:
        if isinstance(kind, pl.Struct):
            return pa.struct([(field.name, arrow_type(field.dtype)) for field in kind.fields])
        if kind == pl.String:
            return pa.string()
        return pa.int32() if kind == pl.Int32 else pa.float64()

    kind = pl.Struct(dict(sums))
    return ScoreColumn(name, kind, arrow_type(kind))


_PART_SUMS = {"rank_sum": pl.Float64, "surprisal_sum": pl.Float64}

METRIC_COLUMNS = (
    _sums_column(
        "rsr_quarters", dict.fromkeys(QUARTERS, pl.Struct({"num_tokens": pl.Int32, **_PART_SUMS}))
    ),
    _sums_column("rsr_steps", {"num_steps": pl.Int32, **_PART_SUMS}),
    _sums_column(
        "rsr_sums",
        dict.fromkeys(
            (
                "surprisal_squared",
                "entropy",
                "rank_per_surprisal",
                "rank_per_entropy",
                "surprisal_per_entropy",
            ),
            pl.Float64,
        ),
    ),
    _sums_column("rsr_prompt", {"num_tokens": pl.Int32, "surprisal_sum": pl.Float64}),
)
"""What the metrics beside RSR are made of; `--metrics rsr` leaves them out, as runs of earlier
releases do."""

_SECOND_PASS = {"status": pl.String, "num_tokens": pl.Int32, **_PART_SUMS}

SECOND_PASS_COLUMNS: dict[SecondPass, ScoreColumn] = {
    "unconditional": _sums_column("rsr_unconditional", _SECOND_PASS),
    "window": _sums_column(
        "rsr_window", {**_SECOND_PASS, "num_steps": pl.Int32, "step_means_sum": pl.Float64}
    ),
}
"""What a second pass adds, and nothing else; the status is its own."""

TOKEN_COLUMNS = (
    ScoreColumn("rsr_token_ids", pl.List(pl.Int32), pa.list_(pa.int32())),
    ScoreColumn("rsr_token_ranks", pl.List(pl.Int32), pa.list_(pa.int32())),
    ScoreColumn("rsr_token_logprobs", pl.List(pl.Float32), pa.list_(pa.float32())),
)


class Kept(TypedDict):
    """What a run keeps beside `ROW_COLUMNS`: keywords of the functions below."""

    metrics: bool
    token_columns: bool


def kept_by(settings: Mapping[str, Any]) -> Kept:
    """What the settings of a run's identity say that it keeps; early ones do not name metrics."""
    return {
        "metrics": settings.get("metrics", "rsr") == "all",
        "token_columns": bool(settings["token_scores"]),
    }


def second_pass_of(settings: Mapping[str, Any]) -> SecondPass | None:
    """The pass of `ScorerConfig.second_pass`, from the settings of a run's identity."""
    return next((name for name in SECOND_PASS_COLUMNS if settings.get(name)), None)


def columns(*, token_columns: bool, metrics: bool = False) -> tuple[ScoreColumn, ...]:
    """The columns of a run, in order."""
    return (
        *ROW_COLUMNS,
        *(METRIC_COLUMNS if metrics else ()),
        *(TOKEN_COLUMNS if token_columns else ()),
    )


def is_score_column(name: str) -> bool:
    return name == PREFIX or name.startswith(f"{PREFIX}_")


def to_frame(
    scores: Sequence[TrajectoryScore], *, token_columns: bool, metrics: bool = False
) -> pl.DataFrame:
    """One row per score, in order."""
    values: dict[str, list[Any]] = {
        "rsr": [s.rsr for s in scores],
        "rsr_num_tokens": [s.num_tokens for s in scores],
        "rsr_mean_rank": [s.mean_rank for s in scores],
        "rsr_mean_surprisal": [s.mean_surprisal_nats for s in scores],
        "rsr_mean_entropy": [s.mean_entropy_nats for s in scores],
        "rsr_rank_sums": [s.rank_sums or None for s in scores],
        "rsr_status": [s.status.value for s in scores],
        "rsr_detail": [s.detail or None for s in scores],
    }
    if metrics:
        sums = [s.metric_sums for s in scores]
        values |= {
            "rsr_quarters": [m and _quarters(m) for m in sums],
            "rsr_steps": [m and _steps(m) for m in sums],
            "rsr_sums": [
                s.metric_sums and _sums(s.metric_sums, s.entropy_sum_nats) for s in scores
            ],
            "rsr_prompt": [m and _prompt(m) for m in sums],
        }
    if token_columns:
        values |= {
            "rsr_token_ids": [s.tokens and pl.Series(s.tokens.token_ids) for s in scores],
            "rsr_token_ranks": [s.tokens and pl.Series(s.tokens.ranks) for s in scores],
            "rsr_token_logprobs": [s.tokens and pl.Series(s.tokens.logprobs) for s in scores],
        }
    chosen = columns(token_columns=token_columns, metrics=metrics)
    return pl.DataFrame({c.name: pl.Series(c.name, values[c.name], c.polars_type) for c in chosen})


def to_second_pass_frame(
    second_pass: SecondPass, scores: Sequence[TrajectoryScore]
) -> pl.DataFrame:
    """One row per score, in order: its status, and its sums if it has a score."""
    column = SECOND_PASS_COLUMNS[second_pass]
    names = [field.name for field in column.polars_type.fields]
    sums = [_second_pass_sums(score) for score in scores]
    values = [{name: each.get(name) for name in names} for each in sums]
    return pl.DataFrame({column.name: pl.Series(column.name, values, column.polars_type)})


def _second_pass_sums(score: TrajectoryScore) -> dict[str, Any]:
    status = {"status": score.status.value}
    if not score.num_tokens:
        return status
    means = score.sequence_means_nats or (score.surprisal_sum_nats / score.num_tokens,)
    return status | {
        "num_tokens": score.num_tokens,
        "rank_sum": score.rank_sum,
        "surprisal_sum": score.surprisal_sum_nats,
        "num_steps": len(means),
        "step_means_sum": sum(means),
    }


def _quarters(sums: MetricSums) -> dict[str, Any]:
    return {
        name: {"num_tokens": part.num_tokens} | _part_sums(part)
        for name, part in zip(QUARTERS, sums.quarters, strict=True)
    }


def _steps(sums: MetricSums) -> dict[str, Any]:
    return {"num_steps": sums.step_firsts.num_tokens} | _part_sums(sums.step_firsts)


def _part_sums(part: PartSums) -> dict[str, float]:
    return {"rank_sum": part.rank_sum, "surprisal_sum": part.surprisal_sum_nats}


def _sums(sums: MetricSums, entropy_sum_nats: float | None) -> dict[str, float | None]:
    return {
        "surprisal_squared": sums.surprisal_squared_nats2,
        "entropy": entropy_sum_nats,
        "rank_per_surprisal": sums.rank_per_surprisal,
        "rank_per_entropy": sums.rank_per_entropy,
        "surprisal_per_entropy": sums.surprisal_per_entropy,
    }


def _prompt(sums: MetricSums) -> dict[str, Any] | None:
    prompt = sums.prompt
    if prompt is None:
        return None
    return {"num_tokens": prompt.num_tokens, "surprisal_sum": prompt.surprisal_sum_nats}


def to_arrow(frame: pl.DataFrame) -> pa.Table:
    """`frame` with the Arrow types above instead of Polars' large ones."""
    known = (*columns(token_columns=True, metrics=True), *SECOND_PASS_COLUMNS.values())
    types = {column.name: column.arrow_type for column in known}
    schema = pa.schema([pa.field(name, types[name]) for name in frame.columns])
    return frame.to_arrow().cast(schema)


def dataset_sums(
    mean_rank: str = "rsr_mean_rank", mean_surprisal: str = "rsr_mean_surprisal"
) -> list[pl.Expr]:
    """What Eq. 9 sums over scored rows, for `select` or for `agg` of a group; see `dataset_of`."""
    return [
        pl.len().alias("num_trajectories"),
        pl.col(mean_rank).sum().alias("mean_rank_sum"),
        pl.col(mean_surprisal).sum().alias("mean_surprisal_sum_nats"),
    ]


def dataset_of(sums: Mapping[str, Any]) -> DatasetRsr:
    """The data set of a row of `dataset_sums`, whatever else the row holds."""
    return DatasetRsr(**{part.name: sums[part.name] for part in fields(DatasetRsr)})


@dataclass(slots=True)
class Reason:
    """Why some rows have no score. example: one of them. hint: what may help, or ""."""

    num_rows: int
    example: str
    hint: str = ""

    def told(self, name: str, *, with_count: bool = True) -> str:
        """One line of it. name: as in `Summary.reasons`."""
        line = f"{self.num_rows:,} {name}" if with_count else name
        line += f" (as {self.example})"
        return f"{line}: {self.hint}" if self.hint else line


def told_reasons(reasons: Mapping[str, Reason]) -> list[str]:
    """Lines on why rows have no score, the most frequent reason first."""
    by_count = sorted(reasons.items(), key=lambda item: -item[1].num_rows)
    return [reason.told(name) for name, reason in by_count]


@dataclass(slots=True)
class Summary:
    """What a run says of any set of scored rows; summaries of two sets add up.

    reasons: why rows have no score, by status and reason in words; no more than `MAX_REASONS`, and
    the rest under `OTHER_REASONS`.
    """

    num_rows: int = 0
    num_tokens: int = 0
    rows_by_status: dict[str, int] = field(default_factory=dict)
    dataset: DatasetRsr = field(default_factory=DatasetRsr)
    reasons: dict[str, Reason] = field(default_factory=dict)

    @classmethod
    def of(cls, frame: pl.DataFrame) -> "Summary":
        scored = frame.filter(pl.col("rsr").is_not_null())
        by_status = frame.group_by("rsr_status").len().sort("rsr_status")
        return cls(
            num_rows=len(frame),
            num_tokens=int(frame["rsr_num_tokens"].sum()),
            rows_by_status=dict(by_status.iter_rows()),
            dataset=dataset_of(scored.select(dataset_sums()).row(0, named=True)),
        )

    @property
    def rows_without_score(self) -> dict[str, int]:
        """Those of `rows_by_status` that are not scored, though `rsr score` was to do it."""
        counts = self.rows_by_status.items()
        return {status: count for status, count in counts if status in UNSCORED}

    def merge(self, other: "Summary") -> None:
        self.num_rows += other.num_rows
        self.num_tokens += other.num_tokens
        for status, count in other.rows_by_status.items():
            self.rows_by_status[status] = self.rows_by_status.get(status, 0) + count
        self.dataset.merge(other.dataset)
        for name, reason in other.reasons.items():
            self._count(name, reason)

    def count_reasons(
        self, scores: Sequence[TrajectoryScore | EncodedTrajectory], shard: str, first_row: int
    ) -> None:
        """Count why rows have no score, or would have none. scores: of consecutive rows."""
        for row, score in enumerate(scores, first_row):
            if not score.status.is_scored:
                reason = score.reason or NUMBER.sub("N", score.detail)
                name = f"{score.status}: {reason}" if reason else str(score.status)
                self._count(name, Reason(1, f"{shard} row {row}", score.hint))

    def _count(self, name: str, reason: Reason) -> None:
        if name not in self.reasons and len(self.reasons) >= MAX_REASONS:
            name = OTHER_REASONS
        if (known := self.reasons.get(name)) is None:
            self.reasons[name] = replace(reason)
        else:
            known.num_rows += reason.num_rows
