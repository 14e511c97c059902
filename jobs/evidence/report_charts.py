"""The report's charts, as Vega-Lite specifications that name their data instead of holding it.

Points drawn in two charts stand in the page once. Widths follow the page.
"""

from typing import Any

import altair as alt

from rsr.jobs.evidence.charts import BLUE, INK, MUTED, ORANGE, styled

ROW_PX = 44
POINTS, DISTRIBUTIONS, SHARES = "points", "distributions", "shares"
"""Names of the data sets that the page holds."""

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
    return sized_spec(
        alt.layer(
            wide.encode(x=x, x2="p95:Q", y=y, tooltip=tooltip),
            middle.encode(x="p25:Q", x2="p75:Q", y=y, tooltip=tooltip),
            median.encode(x="p50:Q", y=y, tooltip=tooltip),
            whisker.encode(x="low:Q", x2="high:Q", y=y, tooltip=tooltip),
            point.encode(x="rsr:Q", y=y, tooltip=tooltip),
        ),
        height=ROW_PX * num_teachers,
        description=f"{metric} of each teacher's data set and of its trajectories",
    )


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
    return sized_spec(
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
        description="Each teacher's share of the pool and of the selection",
    )


def sized_spec(chart: Any, *, height: int, description: str) -> dict[str, Any]:
    """The chart as wide as the page lets it be. description: for who cannot see it."""
    sized = chart.properties(
        width="container",
        height=height,
        description=description,
        background="transparent",
        autosize=alt.AutoSizeParams(type="fit-x", contains="padding"),
    )
    spec: dict[str, Any] = styled(sized).to_dict()
    return spec
