"""The report's charts, as Vega-Lite specifications that name their data instead of holding it.

Points drawn in two charts stand in the page once. Widths follow the page.
"""

from collections.abc import Sequence
from typing import Any

import altair as alt

from rsr.jobs.evidence.charts import (
    BLUE,
    INK,
    MUTED,
    ORANGE,
    TEACHER_COLOURS,
    TEACHER_SHAPES,
    styled,
)

ROW_PX, SCATTER_PX = 44, 360
POINTS, DISTRIBUTIONS, SHARES = "points", "distributions", "shares"
"""Names of the data sets that the page holds."""

OTHERS = "other teachers"
RSR_FORMAT = ".3f"


def distribution_chart(num_teachers: int, metric: str, direction: str) -> dict[str, Any]:
    """Each teacher's trajectories (5, 25, 50, 75 and 95 %) and its data set's value with interval.

    Data: DISTRIBUTIONS, a row per teacher with p5 … p95, rsr, low, high and num.
    """
    data = alt.Chart(alt.NamedData(name=DISTRIBUTIONS))
    y = alt.Y("teacher:N", sort=None, title=None, axis=alt.Axis(ticks=False, domain=False))
    tooltip = [
        alt.Tooltip("teacher:N"),
        alt.Tooltip("num:Q", title="trajectories", format=","),
        alt.Tooltip("rsr:Q", title=f"data-set {metric}", format=RSR_FORMAT),
        alt.Tooltip("interval:N", title="95 % interval"),
        *(alt.Tooltip(f"p{p}:Q", title=f"{p} % below", format=".2f") for p in (5, 25, 50, 75, 95)),
    ]
    x = alt.X("p5:Q", title=f"{metric} ({direction} is better)", scale=alt.Scale(zero=False))
    x = x.axis(tickCount=8)
    wide = data.mark_bar(height=4, color="#c9d3de", cornerRadius=2)
    middle = data.mark_bar(height=18, color="#a9bbcf", cornerRadius=2)
    median = data.mark_tick(size=18, thickness=2, color="white")
    whisker = data.mark_rule(strokeWidth=3, color=INK)
    point = data.mark_point(shape="diamond", size=100, filled=True, color=ORANGE, opacity=1)
    return _spec(
        alt.layer(
            wide.encode(x=x, x2="p95:Q", y=y, tooltip=tooltip),
            middle.encode(x="p25:Q", x2="p75:Q", y=y, tooltip=tooltip),
            median.encode(x="p50:Q", y=y, tooltip=tooltip),
            whisker.encode(x="low:Q", x2="high:Q", y=y, tooltip=tooltip),
            point.encode(x="rsr:Q", y=y, tooltip=tooltip),
        ),
        height=ROW_PX * num_teachers,
    )


CROWDED_POINTS = 3_000
"""Number of marks from which on they have their smallest size and opacity."""


def scatter_chart(
    x_field: str,
    x_title: str,
    *,
    logarithmic: bool,
    rsr_range: tuple[float, float],
    colour: Any,
    num_points: int,
) -> dict[str, Any]:
    """RSR of each sampled trajectory against a field of POINTS; beyond the range, at its edge."""
    low, high = rsr_range
    scale = alt.Scale(type="log", nice=False) if logarithmic else alt.Scale(zero=False, nice=False)
    x = alt.X(f"{x_field}:Q", title=x_title, scale=scale)
    if logarithmic:
        x = x.axis(tickCount=5, format="~s")
    y = alt.Y("rsr:Q", title="RSR").scale(domain=[low, high], clamp=True, nice=False)
    shades, shapes = colour
    # Few marks are large and dense enough to tell colours apart; many must not become one.
    crowding = min(1.0, num_points / CROWDED_POINTS)
    chart = alt.Chart(alt.NamedData(name=POINTS)).mark_point(
        size=90 - 68 * crowding, filled=True, opacity=0.85 - 0.4 * crowding, strokeWidth=0
    )
    return _spec(
        chart.encode(
            x=x,
            y=y,
            color=alt.Color("shown:N", title=None, scale=shades),
            shape=alt.Shape("shown:N", title=None, scale=shapes),
            tooltip=[
                alt.Tooltip("teacher:N"),
                alt.Tooltip("rsr:Q", title="RSR", format=RSR_FORMAT),
                alt.Tooltip("rank:Q", title="mean rank", format=".2f"),
                alt.Tooltip("surprisal:Q", title="mean surprisal, nats", format=RSR_FORMAT),
                alt.Tooltip("tokens:Q", title="tokens", format=","),
            ],
        ),
        height=SCATTER_PX,
    )


def teacher_scales(teachers: Sequence[str]) -> tuple[alt.Scale, alt.Scale]:
    """Colour and shape of each teacher as `shown_names` calls it, the same in all charts."""
    names = list(dict.fromkeys(shown_names(teachers).values()))
    colours = [*TEACHER_COLOURS[: len(names)]]
    shapes = [*TEACHER_SHAPES[: len(names)]]
    if names and names[-1] == OTHERS:
        colours[len(names) - 1 :], shapes[len(names) - 1 :] = [MUTED], ["circle"]
    return alt.Scale(domain=names, range=colours), alt.Scale(domain=names, range=shapes)


def shown_names(teachers: Sequence[str]) -> dict[str, str]:
    """Teacher → its name in a legend; those after the first few share one."""
    most = len(TEACHER_COLOURS)
    kept = len(teachers) if len(teachers) <= most else most - 1
    return {name: name if i < kept else OTHERS for i, name in enumerate(teachers)}


def composition_chart(num_teachers: int) -> dict[str, Any]:
    """Each teacher's share of the selection beside its share of the pool.

    Data: SHARES, a row per teacher and `set` (pool, selection) with share and num.
    """
    data = alt.Chart(alt.NamedData(name=SHARES))
    y = alt.Y("teacher:N", sort=None, title=None, axis=alt.Axis(ticks=False, domain=False))
    x = alt.X("share:Q", title="share of trajectories", axis=alt.Axis(format="%", tickCount=5))
    sets = ["pool", "selection"]
    tooltip = [
        "teacher:N",
        "set:N",
        alt.Tooltip("share:Q", format=".1%"),
        alt.Tooltip("num:Q", title="trajectories", format=","),
    ]
    marks = data.mark_point(size=130, filled=True, opacity=1)
    return _spec(
        alt.layer(
            data.mark_line(color="#c9d3de", strokeWidth=4).encode(x=x, y=y, detail="teacher:N"),
            marks.encode(
                x=x,
                y=y,
                color=alt.Color("set:N", title=None).scale(domain=sets, range=[MUTED, BLUE]),
                shape=alt.Shape("set:N", title=None).scale(
                    domain=sets, range=["circle", "diamond"]
                ),
                tooltip=tooltip,
            ),
        ),
        height=ROW_PX * num_teachers,
    )


def _spec(chart: Any, *, height: int) -> dict[str, Any]:
    sized = chart.properties(
        width="container",
        height=height,
        autosize=alt.AutoSizeParams(type="fit-x", contains="padding"),
    )
    spec: dict[str, Any] = styled(sized).to_dict()
    return spec
