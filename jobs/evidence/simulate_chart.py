"""The simulation's picture: what the student learnt, and where four texts lie under it."""

import altair as alt
import polars as pl

from rsr.jobs.evidence.charts import BLUE, INK, MUTED, ORANGE, styled
from rsr.jobs.evidence.simulate import PUBLISHED, Simulation

SIZE_PX = 380
RSR_LINES = (1.5, 2.0, 2.5, 3.0)
OURS, PAPER = "this run", "the paper's Table 3"


def draw_simulation(simulation: Simulation) -> alt.TopLevelMixin:
    """Mean rank against mean surprisal of each text, beside the student's probabilities."""
    return styled(
        alt.hconcat(_texts(simulation), _student(simulation), spacing=40).properties(
            title=alt.Title(
                "The text to learn from is the one of lowest ratio",
                subtitle="Surprising, yet made of tokens the student ranks high: its minor mode. "
                "RSR is the slope of the line from the origin.",
            )
        )
    )


def _texts(simulation: Simulation) -> alt.LayerChart:
    rows = [
        {
            "text": row.text,
            "source": source,
            "surprisal": row.mean_surprisal_nats,
            "rank": row.mean_rank,
            "RSR": row.mean_rank / row.mean_surprisal_nats,
        }
        for source, texts in ((OURS, simulation.texts), (PAPER, PUBLISHED))
        for row in texts
    ]
    points = pl.DataFrame(rows)
    right = points.select(pl.max("surprisal")).item() * 1.15
    top = points.select(pl.max("rank")).item() * 1.1
    x = alt.X("surprisal:Q", title="mean surprisal, nats", scale=alt.Scale(domain=[0, right]))
    y = alt.Y("rank:Q", title="mean rank", scale=alt.Scale(domain=[0, top]))
    ends = [(rsr, min(right, top / rsr), min(top, rsr * right)) for rsr in RSR_LINES]
    rays = pl.DataFrame(
        [(f"RSR {rsr:g}", *end) for rsr, u, v in ends for end in ((0.0, 0.0), (u, v))],
        schema=["ray", "surprisal", "rank"],
        orient="row",
    )
    lines = alt.Chart(rays).mark_line(color=MUTED, strokeDash=[4, 4], strokeWidth=1, opacity=0.6)
    ends_of_rays = rays.filter(pl.col("rank") > 0)
    ray_labels = alt.Chart(ends_of_rays).mark_text(color=MUTED, align="right", dx=-4, dy=-6)
    marks = alt.Chart(points).mark_point(size=140, strokeWidth=2)
    ours = points.filter(pl.col("source") == OURS)
    leftward = pl.col("text").is_in(["mixed", "foreign"])
    return alt.layer(
        lines.encode(x=x, y=y, detail="ray:N"),
        ray_labels.encode(x=x, y=y, text="ray:N"),
        marks.encode(
            x=x,
            y=y,
            color=alt.Color("source:N", title=None)
            .scale(domain=[OURS, PAPER], range=[BLUE, ORANGE])
            .legend(orient="bottom"),
            shape=alt.Shape("source:N", title=None)
            .scale(domain=[OURS, PAPER], range=["circle", "cross"])
            .legend(orient="bottom"),
            tooltip=["text", "source", *(alt.Tooltip(f, format=".2f") for f in _NUMBERS)],
        ),
        *(
            alt.Chart(ours.filter(chosen))
            .mark_text(align=align, dx=dx, fontSize=14, fontWeight="bold", color=INK)
            .encode(x=x, y=y, text="text:N")
            for chosen, align, dx in ((leftward, "right", -14), (~leftward, "left", 14))
        ),
    ).properties(width=SIZE_PX, height=SIZE_PX)


_NUMBERS = ("surprisal", "rank", "RSR")


def _student(simulation: Simulation) -> alt.Chart:
    tokens = pl.DataFrame({"probability": simulation.student}).with_row_index("token", offset=1)
    dots = alt.Chart(tokens).mark_circle(color=BLUE, size=60, opacity=1)
    return dots.encode(
        x=alt.X("token:O", title="token, as the major mode orders them").axis(
            values=[1, *range(10, len(tokens) + 1, 10)], labelAngle=0
        ),
        y=alt.Y("probability:Q", title="the student's probability").scale(type="log"),
        tooltip=["token", alt.Tooltip("probability:Q", format=".5f")],
    ).properties(width=SIZE_PX, height=SIZE_PX)
