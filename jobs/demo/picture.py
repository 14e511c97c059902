"""The demonstration's picture: what Rank-Surprisal Ratio picks out, on one scatter plot.

Every trajectory is a point, mean surprisal against mean clipped rank, so its RSR (Eq. 7) is the
slope of the line from the origin to it, and lines of equal RSR fan out from there. Computes no
score. Run as a module, it draws a finished demonstration again:

    python -m rsr.jobs.demo.picture demo docs/demo.svg
"""

import sys
from pathlib import Path
from typing import Any

import altair as alt
import polars as pl

from rsr.jobs.storage.atomic import atomic_path

WIDTH_PX, HEIGHT_PX = 740, 430
FONT = "DejaVu Sans, Verdana, sans-serif"
INK, MUTED = "#222222", "#6b6b6b"
COLOURS = {
    "spelled_out": "#007A5A",
    "equations_only": "#B87800",
    "self_checking": "#0072B2",
    "wandering": "#B0558A",
    "terse": "#5F6B00",
    "foreign_register": "#C24E00",
}
"""Okabe and Ito's hues, darkened to be read as text; each label repeats what its colour says."""

LOW_RSR, HIGH_RSR = 3, 6
"""Slopes that bound the two shaded corners."""
LOW_COLOUR, HIGH_COLOUR = "#0072B2", "#C24E00"
RSR_LINES = (2, 3, 4, 5, 6, 8)
MARGIN = 1.1
"""Axes end this much beyond the outermost point."""


def draw(scored: pl.DataFrame, target: Path) -> None:
    """Write the picture to `target`, as its suffix says: `.svg` or `.png`.

    scored: rows with `teacher` and the row score columns; those without a score are left out.
    """
    chart = _chart(scored)
    with atomic_path(target) as temporary:
        chart.save(str(temporary), format=target.suffix.lstrip("."), scale_factor=2)


def _chart(scored: pl.DataFrame) -> alt.LayerChart:
    points = (
        scored.drop_nulls("rsr")
        .select("teacher", surprisal="rsr_mean_surprisal", rank="rsr_mean_rank")
        .sort("teacher", "surprisal", "rank")
    )
    frame = Frame(points)
    layers = [*frame.corners(), *frame.rsr_lines(), *frame.teachers(points), *frame.captions()]
    return (
        alt.layer(*layers)
        .properties(
            width=WIDTH_PX,
            height=HEIGHT_PX,
            padding={"left": 8, "top": 12, "right": 12, "bottom": 8},
            title=alt.Title(
                "Rank-Surprisal Ratio is a slope: the flatter, the better for this student",
                subtitle="A dot is one worked solution, a name with its RSR one style of working. "
                "Made-up problems; the student is SmolLM2-135M-Instruct.",
            ),
        )
        .configure(background="white", font=FONT)
        .configure_axis(grid=False, labelFontSize=13, titleFontSize=14, titleFontWeight="normal")
        .configure_title(
            fontSize=18, subtitleFontSize=13, subtitleColor=MUTED, anchor="start", offset=14
        )
        .configure_view(stroke=None)
    )


class Frame:
    """Axes that hold all points, and the layers that are placed by them."""

    def __init__(self, points: pl.DataFrame) -> None:
        self._right = points.select(pl.max("surprisal")).item() * MARGIN
        self._top = points.select(pl.max("rank")).item() * MARGIN
        self._x = alt.X(
            "surprisal:Q",
            title="how unfamiliar: mean surprisal of a token, in nats",
            **_scale(self._right, step=1),
        )
        self._y = alt.Y(
            "rank:Q",
            title="how far down the student's list: mean rank, clipped",
            **_scale(self._top, step=5),
        )

    def _end_of_line(self, rsr: float) -> tuple[float, float]:
        """Where the line of this RSR leaves the frame."""
        return min(self._right, self._top / rsr), min(self._top, rsr * self._right)

    def corners(self) -> list[alt.Chart]:
        """Shades everything below LOW_RSR and everything above HIGH_RSR."""
        low_x, low_y = self._end_of_line(LOW_RSR)
        high_x, high_y = self._end_of_line(HIGH_RSR)
        below = [(0.0, 0.0, 0.0), (low_x, 0.0, low_y), (self._right, 0.0, low_y)]
        above = [(0.0, 0.0, self._top), (high_x, high_y, self._top)]
        return [self._area(below, LOW_COLOUR), self._area(above, HIGH_COLOUR)]

    def _area(self, outline: list[tuple[float, float, float]], colour: str) -> alt.Chart:
        rows = pl.DataFrame(outline, schema=["surprisal", "rank", "upper"], orient="row")
        chart = alt.Chart(rows).mark_area(color=colour, opacity=0.1)
        return chart.encode(x=self._x, y=self._y, y2="upper:Q")

    def rsr_lines(self) -> list[alt.Chart]:
        """Lines of equal RSR from the origin, each labelled where it ends."""
        ends = pl.DataFrame(
            [(f"RSR {rsr}", *self._end_of_line(rsr)) for rsr in RSR_LINES],
            schema=["label", "surprisal", "rank"],
            orient="row",
        )
        origins = ends.with_columns(surprisal=0.0, rank=0.0)
        lines = alt.Chart(pl.concat([origins, ends])).mark_line(
            color=MUTED, strokeWidth=1, strokeDash=[4, 4], opacity=0.6
        )
        labels = alt.Chart(ends).mark_text(color=MUTED, fontSize=13, align="left", dx=5)
        return [
            lines.encode(x=self._x, y=self._y, detail="label:N"),
            labels.encode(x=self._x, y=self._y, text="label:N"),
        ]

    def teachers(self, points: pl.DataFrame) -> list[alt.Chart]:
        """A dot for each trajectory; a larger one, named, where its teacher's data set lies."""
        colour = alt.Color("teacher:N", legend=None).scale(
            domain=list(COLOURS), range=list(COLOURS.values())
        )
        # The slope of the mean point is Σ mean rank / Σ mean surprisal: Eq. 9.
        means = (
            points.group_by("teacher")
            .mean()
            .sort("teacher")
            .with_columns(
                label=pl.format(
                    "{}  {}",
                    pl.col("teacher").str.replace_all("_", " "),
                    (pl.col("rank") / pl.col("surprisal")).round(1),
                )
            )
        )
        at = {"x": self._x, "y": self._y}
        dots = alt.Chart(points).mark_circle(size=45, opacity=0.4)
        centres = alt.Chart(means).mark_circle(size=190, opacity=1, stroke="white", strokeWidth=2)
        name = {"fontSize": 16, "fontWeight": "bold", "align": "right", "dx": -14, "dy": -12}
        halo = alt.Chart(means).mark_text(**name, stroke="white", strokeWidth=4, strokeJoin="round")
        return [
            dots.encode(**at, color=colour),
            centres.encode(**at, color=colour),
            halo.encode(**at, text="label:N"),
            alt.Chart(means).mark_text(**name).encode(**at, color=colour, text="label:N"),
        ]

    def captions(self) -> list[alt.Chart]:
        """What the two corners mean."""
        low = "LOW RSR: surprising, yet among\nthe student's own top choices"
        high = "HIGH RSR: far from anything\nthe student would say"
        return [
            self._caption(low, self._right, 0.0, LOW_COLOUR, align="right", dx=-10, dy=-44),
            self._caption(high, 0.0, self._top, HIGH_COLOUR, align="left", dx=14, dy=10),
        ]

    def _caption(self, text: str, x: float, y: float, colour: str, **mark: Any) -> alt.Chart:
        rows = pl.DataFrame({"surprisal": [x], "rank": [y], "text": [text]})
        chart = alt.Chart(rows).mark_text(
            color=colour, fontSize=15, fontStyle="italic", lineBreak="\n", baseline="top", **mark
        )
        return chart.encode(x=self._x, y=self._y, text="text:N")


def _scale(end: float, *, step: int) -> dict[str, Any]:
    """An axis from 0 to `end`, marked at every `step`."""
    values = list(range(0, int(end) + 1, step))
    return {
        "scale": alt.Scale(domain=[0, end], nice=False),
        "axis": alt.Axis(values=values, format="d"),
    }


if __name__ == "__main__":
    folder, picture = map(Path, sys.argv[1:])
    draw(pl.read_parquet(folder / "scored" / "trajectories.parquet"), picture)
