"""Streams side by side: what each costs the student to adapt to, and what it is said to be worth.

Only problems that every stream has count: otherwise streams would differ by which problems were
solvable, which is the first thing that refinement changes. Claims nothing of training, which
nothing here has done. Knows nothing of terminals.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from rsr.engine.catalogue import BY_NAME, RSR, Metric
from rsr.jobs.comparison.drift import Drift, DriftOptions, measure_drift
from rsr.jobs.comparison.streams import FLOOR, PERPLEXITY, Stream, shared_metrics
from rsr.jobs.errors import UsageError
from rsr.jobs.evidence.bootstrap import interval, ratios, resampled_ratios
from rsr.jobs.evidence.observations import student_label

NEAR_FLOOR = 1.1
"""RSR over its floor, which is a mean rank, up to which text is said to sit on the floor; ours."""

PARADOX = (
    "arXiv 2606.16152 found, training Qwen2.5-Math-1.5B with DFT, that of its three main streams "
    "those of lower perplexity trained better, against what reward models said of them. Its own "
    "exceptions: a style-aligned stream of higher perplexity trained better than the native one, "
    "and under plain SFT so did the oracle's own solutions. Nothing was trained here"
)
"""What a reader may know of the numbers; the finding is the paper's, under its training."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95 % bootstrap interval over problems; None where there is none."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class ComparedMetric:
    """One quantity of every stream. values: by label, in the order of the streams. differences:
    the other streams' less that of the native one, over the same draws of problems.
    """

    metric: Metric
    values: dict[str, Estimate]
    differences: dict[str, Estimate]

    def to_json(self) -> dict[str, Any]:
        return {
            "metric": self.metric.name,
            "direction": self.metric.direction,
            "unit": self.metric.unit,
            "values": {label: asdict(e) for label, e in self.values.items()},
            "differences": {label: asdict(e) for label, e in self.differences.items()},
        }


@dataclass(frozen=True, slots=True)
class StreamComparison:
    """Streams on the problems that all of them have; the first stream is the native one.

    num_problems, num_rows: that count, rows by label. num_left_out: problems that some stream has
    and another lacks. drifts: of each other stream from the native one, by label. lacking: metrics
    that are not stored, and why.
    """

    student: str
    on: str
    streams: list[str]
    num_problems: int
    num_left_out: int
    num_rows: dict[str, int]
    metrics: list[ComparedMetric]
    drifts: dict[str, Drift] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    lacking: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "student": self.student,
            "on": self.on,
            "streams": self.streams,
            "num_problems": self.num_problems,
            "num_problems_left_out": self.num_left_out,
            "num_rows": self.num_rows,
            "metrics": [m.to_json() for m in self.metrics],
            "drift": {label: drift.to_json() for label, drift in self.drifts.items()},
            "warnings": self.warnings,
            "notes": self.notes,
            "not_stored": self.lacking,
        }

    @property
    def left_out_sentence(self) -> str:
        """Say on which problems the streams are compared, and how many were left out."""
        return (
            f"compared on the {self.num_problems:,} problems that all {len(self.streams)} streams "
            f"have; {self.num_left_out:,} that not all of them have are left out"
        )


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """How streams are compared.

    num_draws: of the bootstrap. drift: what to look at of pairs; None leaves drift out.
    """

    num_draws: int = 1_000
    seed: int = 0
    drift: DriftOptions | None = field(default_factory=DriftOptions)


def compare_streams(streams: Sequence[Stream], options: StreamOptions) -> StreamComparison:
    """The first stream beside the others, on the problems that all of them have.

    Raises `UsageError` if they have no problem in common.
    """
    names, lacking = shared_metrics(streams)
    columns = list(dict.fromkeys(column for stream in streams for column in stream.columns))
    tables = [stream.sums(names) for stream in streams]
    shared, num_problems = _shared(tables)
    if not len(shared):
        paths = ", ".join(stream.table.path for stream in streams)
        raise UsageError(
            f"no {streams[0].on!r} has a scored row in each of {paths}: nothing to compare"
        )
    aligned = [
        pl.DataFrame({"problem": shared}).join(t, on="problem", how="left", maintain_order="left")
        for t in tables
    ]
    metrics = _measure(streams, aligned, [*names, *columns], options)
    comparison = StreamComparison(
        student=student_label(streams[0].table),
        on=streams[0].on,
        streams=[stream.label for stream in streams],
        num_problems=len(shared),
        num_left_out=num_problems - len(shared),
        num_rows={s.label: int(t["num_rows"].sum()) for s, t in zip(streams, aligned, strict=True)},
        metrics=metrics,
        warnings=_warnings(streams, metrics),
        notes=[*_notes(streams), PARADOX],
        lacking=lacking,
    )
    if options.drift is not None:
        for other in streams[1:]:
            drift = measure_drift(streams[0], other, shared, options.drift)
            if isinstance(drift, str):
                comparison.notes.insert(0, drift)
            else:
                comparison.drifts[other.label] = drift
    return comparison


def _shared(tables: Sequence[pl.DataFrame]) -> tuple[pl.Series, int]:
    """The problems that every table has, in order, and how many any has."""
    every = pl.concat([table["problem"] for table in tables])
    counts = every.value_counts(name="num_streams")
    shared = counts.filter(pl.col("num_streams") == len(tables))["problem"].sort()
    return shared, len(counts)


def _measure(
    streams: Sequence[Stream],
    aligned: Sequence[pl.DataFrame],
    names: Sequence[str],
    options: StreamOptions,
) -> list[ComparedMetric]:
    """Every quantity of every stream, over one and the same set of draws.

    aligned: of each stream, its sums of the shared problems in one order.
    """
    given = {m.metric.name: m.metric for s in streams for m in s.measures(())}
    metrics = [BY_NAME.get(name) or given[name] for name in names]
    above, below = (_parts(aligned, names, part) for part in ("numerator", "denominator"))
    draws = resampled_ratios(above, below, num_draws=options.num_draws, seed=options.seed)
    of_all = ratios(above.sum(axis=0), below.sum(axis=0))
    compared = []
    for number, metric in enumerate(metrics):
        values, drawn = {}, {}
        for index, stream in enumerate(streams):
            column = number * len(streams) + index
            drawn[stream.label] = metric.finish(draws[:, column])
            values[stream.label] = _estimate(metric.finish(of_all[column]), drawn[stream.label])
        compared.append(ComparedMetric(metric, values, _differences(values, drawn)))
    return compared


def _parts(aligned: Sequence[pl.DataFrame], names: Sequence[str], part: str) -> NDArray[np.float64]:
    """(P, metrics × streams) sums; 0 where a stream has none of a quantity."""
    columns = [
        table[f"{part} {name}"].fill_null(0.0).to_numpy()
        if f"{part} {name}" in table.columns
        else np.zeros(len(table))
        for name in names
        for table in aligned
    ]
    return np.stack(columns, axis=1).astype(np.float64)


def _differences(
    values: dict[str, Estimate], drawn: dict[str, NDArray[np.float64]]
) -> dict[str, Estimate]:
    native, *others = values
    base = values[native].value
    found = {}
    for label in others:
        value = values[label].value
        difference = np.nan if base is None or value is None else value - base
        found[label] = _estimate(difference, drawn[label] - drawn[native])
    return found


def _estimate(value: float, draws: NDArray[np.float64]) -> Estimate:
    if not np.isfinite(value):
        return Estimate(None)
    low, high = interval(draws) or (None, None)
    return Estimate(float(value), low, high)


def _warnings(streams: Sequence[Stream], metrics: Sequence[ComparedMetric]) -> list[str]:
    by_name = {m.metric.name: m for m in metrics}
    native, *others = (stream.label for stream in streams)
    rsr, perplexity = (by_name[name] for name in (RSR, PERPLEXITY))
    floor = by_name[FLOOR].values[native].value
    own = rsr.values[native].value
    warnings = []
    if floor is not None and own is not None and own <= NEAR_FLOOR * floor:
        warnings.append(
            f"{native} sits on RSR's floor: its RSR of {own:.3f} is within "
            f"{NEAR_FLOOR - 1:.0%} of 1 / mean surprisal, {floor:.3f}, which no text of its "
            "surprisal can go below; RSR says little of it"
        )
    for other in others:
        value = rsr.values[other].value
        if floor is not None and value is not None and floor > value:
            warnings.append(
                f"{native} cannot have a lower RSR than {other}: RSR's floor at its surprisal is "
                f"{floor:.3f}, above the {value:.3f} of {other}, whatever its ranks are"
            )
        by_cost, by_rsr = perplexity.differences[other].value, rsr.differences[other].value
        if by_cost is not None and by_rsr is not None and by_cost * by_rsr < 0:
            cheaper, lower = (native, other) if by_cost > 0 else (other, native)
            warnings.append(
                f"perplexity and RSR disagree: {cheaper} has the lower perplexity, {lower} the "
                "lower RSR"
            )
    return warnings


def _notes(streams: Sequence[Stream]) -> list[str]:
    notes = []
    for stream in streams:
        is_usable = stream.table.scan.select(stream.is_usable.sum()).collect(engine="streaming")
        if left_out := stream.table.num_rows - is_usable.item():
            notes.append(
                f"{left_out:,} rows of {stream.label} without a score or a {stream.on!r} are "
                "left out"
            )
    return notes
