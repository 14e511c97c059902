"""One page that shows a scored corpus: which teacher, how sure, on what it rests, with examples.

Self-contained: charts, their JavaScript, styles and data stand in the page, whose content security
policy forbids it every request. Text out of trajectories reaches the page only through Jinja's
autoescaping or as JSON, so that a trajectory that contains `<script>` is a trajectory. Numbers are
made elsewhere: by `teachers.py`, `confounds.py`, `examples.py` and `selection/composition.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import altair as alt
import jinja2
import polars as pl
import vl_convert
from markupsafe import Markup

from rsr.engine.metrics import DEFAULT_RANK_CLIP, STORED_RANK_CLIPS
from rsr.jobs.errors import UsageError
from rsr.jobs.evidence import report_charts
from rsr.jobs.evidence.confounds import SHORT_TOKENS
from rsr.jobs.evidence.examples import Examples, find_examples, rows_by_status
from rsr.jobs.evidence.metric_table import MetricTable, metric_table, told_agreement
from rsr.jobs.evidence.observations import DATASET_COLUMNS, Observations
from rsr.jobs.evidence.report_scatter import EDGE_SHARE, draw_scatter
from rsr.jobs.evidence.teachers import (
    AGREEMENT,
    CompareOptions,
    Comparison,
    compare_teachers,
)
from rsr.jobs.run.calls import Calls
from rsr.jobs.selection.composition import (
    Composition,
    DescribingColumns,
    Part,
    parts_by_calls,
    parts_of,
)
from rsr.jobs.shards.measures import stored_measures
from rsr.jobs.shards.score_columns import dataset_of, dataset_sums
from rsr.jobs.shards.scored import USUAL_CORRECT, ScoredTable
from rsr.jobs.storage.atomic import write_text_atomically

ASSETS = Path(__file__).parent / "assets"
PERCENTILES = (5, 25, 50, 75, 95)

CANVAS_FROM = 5_000
"""Number of points from which on charts are pictures: an element for each would be slow."""


@dataclass(frozen=True, slots=True)
class ReportOptions:
    """What a report shows, and how much of it.

    num_points: at most so many trajectories are drawn as points. num_examples: best, and worst.

    tokenizer: see `find_examples`. quality_column: for the metric that takes one.
    """

    compare: CompareOptions
    num_points: int = 3_000
    num_examples: int = 3
    tokenizer: str | None = None
    quality_column: str | None = None


def write_report(
    observations: Observations,
    target: Path,
    options: ReportOptions,
    selection: ScoredTable | None,
    sections: Sequence[Markup] = (),
    calls: Calls | None = None,
) -> Comparison:
    """Write the page to `target`, whole or not at all; returns the comparison it shows.

    selection: the chosen trajectories, to be shown beside all. sections: of the page, made
    elsewhere, that come before the examples; safe HTML in the classes of `report.css`. calls: what
    is summed over every row is summed shard by shard where these are made. Raises `UsageError` if
    the page cannot be written, if nothing of the selection is scored, and where `compare_teachers`
    and `find_examples` do.
    """
    comparison = compare_teachers(observations, options.compare)
    examples = find_examples(
        observations, num_each=options.num_examples, tokenizer=options.tokenizer
    )
    table = observations.table if calls is None else observations.table.seen_from_anywhere()
    composition = _compose(observations, table, selection, calls)
    measures, lacking = stored_measures(observations.table, quality_column=options.quality_column)
    metrics = metric_table(
        table, measures, by=observations.columns.teacher, lacking=lacking, calls=calls
    )
    statuses = rows_by_status(table, calls)
    page = _render(
        observations, comparison, metrics, examples, composition, statuses, options, sections
    )
    try:
        write_text_atomically(target, page)
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error.strerror}") from error
    return comparison


def _render(
    observations: Observations,
    comparison: Comparison,
    metrics: MetricTable,
    examples: Examples,
    composition: Composition | None,
    statuses: dict[str, int],
    options: ReportOptions,
    sections: Sequence[Markup],
) -> str:
    scored_teachers = [t.teacher for t in comparison.teachers if t.value is not None]
    scatter = draw_scatter(
        observations, scored_teachers, max_points=options.num_points, seed=options.compare.seed
    )
    charts = {
        "distributions": report_charts.distribution_chart(
            len(scored_teachers), observations.metric_label, observations.metric.direction
        ),
    } | scatter.charts()
    data = {
        **scatter.data(),
        report_charts.DISTRIBUTIONS: _distributions(observations, comparison),
    }
    if composition is not None:
        charts["composition"] = report_charts.composition_chart(len(composition.teachers))
        data[report_charts.SHARES] = _shares(composition)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("report.html").render(
        comparison=comparison,
        student=_student(observations),
        metrics=metrics,
        metric_label=observations.metric_label,
        agreement_of_metrics=told_agreement(metrics.rows),
        examples=examples,
        composition=composition,
        sections=sections,
        pool=_pool(observations),
        rows_by_status=statuses,
        identities=observations.table.identities,
        is_drawn=observations.is_drawn,
        num_rows=observations.table.num_rows,
        num_files=len(observations.table.shards),
        scatter=scatter,
        edge_share=EDGE_SHARE,
        rank_clip=_rank_clip(observations),
        short_tokens=SHORT_TOKENS,
        agreement=AGREEMENT,
        page={
            "charts": charts,
            "data": data,
            "renderer": "canvas" if len(scatter.points) >= CANVAS_FROM else "svg",
        },
        style=(ASSETS / "report.css").read_text(encoding="utf-8"),
        script=(ASSETS / "report.js").read_text(encoding="utf-8"),
        vega=_vega_bundle(),
    )


def _pool(observations: Observations) -> Part:
    """All usable rows together."""
    rows = observations.rows
    return Part(
        num_rows=len(rows),
        num_tokens=int(rows["num_tokens"].cast(pl.Int64).sum()),
        dataset=dataset_of(rows.select(dataset_sums(*DATASET_COLUMNS)).row(0, named=True)),
    )


def _distributions(observations: Observations, comparison: Comparison) -> list[dict[str, Any]]:
    """Percentiles over all rows, not over the points drawn, in the order of the comparison."""
    value = pl.col(observations.value_column)
    percentiles = observations.rows.group_by("teacher").agg(
        value.quantile(p / 100, "linear").alias(f"p{p}") for p in PERCENTILES
    )
    by_teacher = {row["teacher"]: row for row in percentiles.iter_rows(named=True)}
    return [
        by_teacher[t.teacher]
        | {
            "rsr": t.value,
            "low": t.low,
            "high": t.high,
            "interval": f"{t.low:.3f} – {t.high:.3f}" if t.low is not None else "–",
            "num": t.num_trajectories,
        }
        for t in comparison.teachers
        if t.teacher in by_teacher
    ]


def _compose(
    observations: Observations,
    table: ScoredTable,
    selection: ScoredTable | None,
    calls: Calls | None,
) -> Composition | None:
    """The selection against all of the table; `UsageError` if nothing of it is scored."""
    if selection is None:
        return None
    by = DescribingColumns(
        teacher=observations.columns.teacher,
        correct=USUAL_CORRECT if "correct" in observations.rows.columns else None,
    )
    selection.require([name for name in (by.teacher, by.correct) if name])
    if calls is None:
        chosen, pool = parts_of(selection, by), parts_of(table, by)
    else:
        chosen = parts_by_calls(selection.seen_from_anywhere(), by, calls)
        pool = parts_by_calls(table, by, calls)
    composition = Composition(by.teacher, chosen, pool)
    if not composition.selected_total.num_rows:
        raise UsageError(f"{selection.path} has no scored row: there is no selection to show")
    return composition


def _shares(composition: Composition) -> list[dict[str, Any]]:
    sets = {
        "pool": (composition.pool, composition.pool_total),
        "selection": (composition.selected, composition.selected_total),
    }
    return [
        {
            "teacher": "(none)" if teacher is None else str(teacher),
            "set": name,
            "num": (num := parts.get(teacher, Part()).num_rows),
            "share": num / total.num_rows,
        }
        for teacher in composition.teachers
        for name, (parts, total) in sets.items()
    ]


def _student(observations: Observations) -> str:
    """What the page calls the student, also where the files no longer name it."""
    is_named = bool(observations.table.identities)
    return observations.student if is_named else f"the student of {observations.student}"


def _rank_clip(observations: Observations) -> str:
    """The r_max of the page, as a reader knows it."""
    table = observations.table
    if table.rank_clip is not None:
        return str(STORED_RANK_CLIPS[table.rank_clip] or "none")
    if not table.identities:
        return "not said"
    return str(table.identities[0]["settings"].get("rank_clip", DEFAULT_RANK_CLIP) or "none")


@cache
def _vega_bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that defines `vegaEmbed`, for all charts.

    Made by a JavaScript engine, which takes seconds.
    """
    version = ".".join(alt.SCHEMA_VERSION.lstrip("v").split(".")[:2])
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=version)
    # Inside <script> only this ends the element, and in JavaScript the two mean the same.
    return bundle.replace("</script", "<\\/script")
