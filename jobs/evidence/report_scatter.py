"""RSR of single trajectories against their surprisal and their length, as charts of the report.

Few points share one chart, in which colour and shape tell teachers apart. Of many points each
teacher has a panel of its own, all at one scale, since marks that overlap can no longer be told
apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import polars as pl

from rsr.jobs.evidence.charts import MUTED, TEACHER_COLOURS, TEACHER_SHAPES
from rsr.jobs.evidence.observations import Observations
from rsr.jobs.evidence.report_charts import POINTS, RSR_FORMAT, sized_spec

EDGE_SHARE = 0.005
"""Share of trajectories at either end of an axis that are drawn at its edge."""

PANELS_FROM = 1_000
"""Number of points from which on each teacher has a panel of its own."""

MARGIN_SHARE = 0.04
"""Of an axis, beyond its outermost points: a mark at the edge is drawn whole."""

CHART_PX, PANEL_PX = 360, 200
OTHERS = "other teachers"


@dataclass(frozen=True, slots=True)
class Mark:
    """How a teacher is drawn. sign: the shape as a character, for a legend in text."""

    teacher: str
    colour: str
    shape: str
    sign: str


@dataclass(frozen=True, slots=True)
class Axis:
    """What RSR is drawn against: a field of the points."""

    field: str
    title: str
    is_logarithmic: bool = False


AXES = (
    Axis("surprisal", "mean surprisal, nats"),
    Axis("tokens", "length, tokens", is_logarithmic=True),
)


@dataclass(frozen=True, slots=True)
class Scatter:
    """At most so many trajectories, drawn at random, and how they are laid out.

    points: teacher, shown (the name of its mark), rsr, rank, surprisal and tokens. spans: lowest
    and highest value that each axis shows, by field; points beyond stand at the edge. medians: of
    the points, by field.
    """

    points: pl.DataFrame
    marks: list[Mark]
    spans: dict[str, tuple[float, float]]
    medians: dict[str, float]

    @property
    def num_beyond(self) -> int:
        beyond = [~pl.col(field).is_between(*span) for field, span in self.spans.items()]
        return int(self.points.select(pl.any_horizontal(beyond).sum()).item())

    @property
    def has_panels(self) -> bool:
        return len(self.points) >= PANELS_FROM and len(self.marks) > 1

    @property
    def layout(self) -> list[tuple[Axis, dict[str, Mark | None]]]:
        """The names of each axis' charts, with the one teacher that a chart shows."""
        if self.has_panels:
            return [
                (axis, {f"{axis.field}-{i}": mark for i, mark in enumerate(self.marks)})
                for axis in AXES
            ]
        return [(axis, {axis.field: None}) for axis in AXES]

    def data(self) -> dict[str, list[dict[str, Any]]]:
        """The points by the name of their data set: those of each panel, or all of them."""
        if not self.has_panels:
            return {POINTS: self.points.to_dicts()}
        return {
            self._panel_points(mark): self.points.filter(shown=mark.teacher).to_dicts()
            for mark in self.marks
        }

    def charts(self) -> dict[str, dict[str, Any]]:
        """The specification of every chart, by its name."""
        return {
            name: self._chart(axis) if mark is None else self._panel(axis, mark)
            for axis, charts in self.layout
            for name, mark in charts.items()
        }

    def _chart(self, axis: Axis) -> dict[str, Any]:
        return sized_spec(
            self._marks(POINTS, axis, len(self.points)).encode(
                x=self._x(axis, num_ticks=6).title(axis.title),
                y=self._y(num_ticks=8).title("RSR"),
                **self._looks(),
            ),
            height=CHART_PX,
            description=f"RSR against {axis.title}, of {len(self.points):,} trajectories",
        )

    def _panel(self, axis: Axis, mark: Mark) -> dict[str, Any]:
        name = self._panel_points(mark)
        num_points = len(self.points) // len(self.marks)
        x = self._x(axis, num_ticks=4).title(None)
        y = self._y(num_ticks=4).title(None)
        medians = (
            alt.Chart(alt.NamedData(name=name))
            # One row, for one line.
            .transform_aggregate(num="count()")
            .transform_calculate(x=str(self.medians[axis.field]), y=str(self.medians["rsr"]))
            .mark_rule(color=MUTED, strokeDash=[3, 3], aria=False)
        )
        return sized_spec(
            alt.layer(
                # Below the marks, which a pointer should find.
                medians.encode(x=x),
                medians.encode(y=y),
                self._marks(name, axis, num_points).encode(
                    x=x,
                    y=y,
                    color=alt.value(mark.colour),
                    shape=alt.value(mark.shape),
                    tooltip=TOOLTIP,
                ),
            ),
            height=PANEL_PX,
            description=f"RSR against {axis.title}, of {mark.teacher}",
        )

    def _panel_points(self, mark: Mark) -> str:
        return f"{POINTS}-{self.marks.index(mark)}"

    def _marks(self, data: str, axis: Axis, number: int) -> alt.Chart:
        """Few marks are large and dense enough to tell colours apart; many must not become one."""
        crowding = 100 / max(100, number)
        return (
            alt.Chart(alt.NamedData(name=data))
            .transform_calculate(x=self._clamped(axis.field), y=self._clamped("rsr"))
            .mark_point(
                size=max(10.0, 90 * crowding**0.5),
                opacity=max(0.2, 0.85 * crowding**0.25),
                filled=True,
                strokeWidth=0,
                # The tables say it to who cannot see; thousands of labels would not.
                aria=False,
            )
        )

    def _clamped(self, field: str) -> str:
        low, high = self.spans[field]
        return f"clamp(datum.{field}, {low}, {high})"

    def _looks(self) -> dict[str, Any]:
        names = [mark.teacher for mark in self.marks]
        colours = alt.Scale(domain=names, range=[mark.colour for mark in self.marks])
        shapes = alt.Scale(domain=names, range=[mark.shape for mark in self.marks])
        return {
            "color": alt.Color("shown:N", legend=None, scale=colours),
            "shape": alt.Shape("shown:N", legend=None, scale=shapes),
            "tooltip": TOOLTIP,
        }

    def _x(self, axis: Axis, *, num_ticks: int) -> alt.X:
        span = self.spans[axis.field]
        kind = "log" if axis.is_logarithmic else "linear"
        x = alt.X("x:Q").scale(type=kind, domain=_widened(span, axis), nice=False)
        if axis.is_logarithmic:
            return x.axis(values=_round_numbers(*span), format="~s")
        return x.axis(tickCount=num_ticks)

    def _y(self, *, num_ticks: int) -> alt.Y:
        y = alt.Y("y:Q").scale(domain=_widened(self.spans["rsr"]), nice=False)
        return y.axis(tickCount=num_ticks)


TOOLTIP = [
    alt.Tooltip("teacher:N"),
    alt.Tooltip("rsr:Q", title="RSR", format=RSR_FORMAT),
    alt.Tooltip("rank:Q", title="mean rank", format=".2f"),
    alt.Tooltip("surprisal:Q", title="mean surprisal, nats", format=RSR_FORMAT),
    alt.Tooltip("tokens:Q", title="tokens", format=","),
]


def draw_scatter(
    observations: Observations, teachers: Sequence[str], *, max_points: int, seed: int
) -> Scatter:
    """Draw at most `max_points` trajectories, rounded to what a reader can see.

    teachers: those that have a trajectory, in the order of the page.
    """
    rows = observations.rows
    names = _shown_names(teachers)
    teacher = pl.col("teacher").cast(pl.String)
    points = (
        rows.sample(min(max_points, len(rows)), seed=seed)
        .sort("row")
        .select(
            teacher=teacher,
            shown=teacher.replace(names),
            rsr=pl.col("rsr").round(4),
            rank=pl.col("mean_rank").round(3),
            surprisal=pl.col("mean_surprisal_nats").round(4),
            tokens="num_tokens",
        )
    )
    fields = ("rsr", *(axis.field for axis in AXES))
    return Scatter(
        points,
        _teacher_marks(list(dict.fromkeys(names.values()))),
        spans={field: _span(points[field]) for field in fields},
        medians={field: float(points.select(pl.median(field)).item()) for field in fields},
    )


def _shown_names(teachers: Sequence[str]) -> dict[str, str]:
    """Teacher → the name of its mark; those after the first few share one."""
    most = len(TEACHER_COLOURS)
    kept = len(teachers) if len(teachers) <= most else most - 1
    return {name: name if i < kept else OTHERS for i, name in enumerate(teachers)}


def _teacher_marks(names: Sequence[str]) -> list[Mark]:
    looks = zip(names, TEACHER_COLOURS, TEACHER_SHAPES.items(), strict=False)
    marks = [Mark(name, colour, shape, sign) for name, colour, (shape, sign) in looks]
    if names[-1] == OTHERS:
        marks[-1] = Mark(OTHERS, MUTED, "circle", TEACHER_SHAPES["circle"])
    return marks


def _span(values: pl.Series) -> tuple[float, float]:
    low, high = (float(values.quantile(q, "nearest") or 0) for q in (EDGE_SHARE, 1 - EDGE_SHARE))
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def _widened(span: tuple[float, float], axis: Axis | None = None) -> list[float]:
    low, high = span
    if axis is not None and axis.is_logarithmic:
        factor = (high / low) ** MARGIN_SHARE
        return [low / factor, high * factor]
    margin = (high - low) * MARGIN_SHARE
    return [low - margin, high + margin]


def _round_numbers(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each decade within; 1 alone where these are many."""
    decades = [10**power for power in range(10)]
    within = [d * digit for d in decades for digit in (1, 2, 5) if low <= d * digit <= high]
    return within if len(within) <= 5 else [d for d in decades if low <= d <= high]
