"""What charts share: type, colours that colour-blind readers can tell apart, how they are saved.

Importing it imports Altair, which takes a second; `rsr --help` should not wait for that.
"""

from pathlib import Path

import altair as alt

from rsr.jobs.storage.atomic import atomic_path

FONT = "DejaVu Sans, Verdana, sans-serif"
INK, MUTED, RULE = "#1b1f24", "#5f6770", "#d5dae0"
BLUE, ORANGE = "#0072B2", "#C24E00"

TEACHER_COLOURS = (
    "#0072B2",
    "#C24E00",
    "#007A5A",
    "#B0558A",
    "#B87800",
    "#3E9BD0",
    "#5F6B00",
)
"""Okabe and Ito's hues, darkened to stand on white."""

TEACHER_SHAPES = {
    "circle": "●",
    "square": "■",
    "triangle-up": "▲",
    "diamond": "◆",
    "cross": "✚",
    "triangle-down": "▼",
    "triangle-right": "▶",
}
"""Who cannot tell two of the colours apart can tell these; each as a character, too."""


def styled(chart: alt.TopLevelMixin) -> alt.TopLevelMixin:
    """The same type and quiet axes everywhere."""
    return (
        chart.configure(background="white", font=FONT)
        .configure_axis(
            gridColor="#eef0f3",
            domainColor=RULE,
            tickColor=RULE,
            labelColor=INK,
            titleColor=MUTED,
            labelFontSize=12,
            titleFontSize=12,
            titleFontWeight="normal",
            labelLimit=150,
        )
        # Two columns of names still fit a phone.
        .configure_legend(
            orient="top",
            columns=2,
            labelFontSize=12,
            labelLimit=150,
            symbolOpacity=1,
            symbolSize=90,
        )
        .configure_title(
            fontSize=15, subtitleFontSize=12, subtitleColor=MUTED, anchor="start", offset=12
        )
        .configure_view(stroke=None)
    )


def save(chart: alt.TopLevelMixin, target: Path) -> None:
    """Write a chart as the suffix says: .html (works without a network), .png or .svg."""
    kind = target.suffix.lstrip(".")
    with atomic_path(target) as temporary:
        # `inline` puts the JavaScript into the page instead of a link to it.
        options = {"inline": True} if kind == "html" else {"scale_factor": 2}
        chart.save(str(temporary), format=kind, **options)
