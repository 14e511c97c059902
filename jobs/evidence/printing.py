"""What `rsr teachers`, `correlate` and `simulate` print on a terminal.

Results in, tables out; knows neither options nor how a number was made.
"""

from rsr.engine.catalogue import METRICS, RSR
from rsr.jobs.evidence.confounds import Confound
from rsr.jobs.evidence.correlate import Coefficient, Correlations
from rsr.jobs.evidence.metric_table import MetricRow, MetricTable, told_agreement
from rsr.jobs.evidence.simulate import PUBLISHED, Simulation
from rsr.jobs.evidence.teachers import AGREEMENT, Comparison
from rsr.jobs.terminal import Console, Table, styled


def print_comparisons(comparisons: list[Comparison], console: Console) -> None:
    """Each student's table, and with several students one of their RSRs side by side."""
    for comparison in comparisons:
        _print_comparison(comparison, console)
    if len(comparisons) > 1:
        console.print()
        console.say(
            styled(
                ("Side by side", "bold"),
                f": {_metric_label(comparisons[0])}, each student's best marked *",
            )
        )
        console.print(_side_by_side(comparisons))


def _print_comparison(comparison: Comparison, console: Console) -> None:
    over = (
        f"{comparison.num_problems:,} problems"
        if comparison.sample is None
        else f"a sample of {comparison.sample:,} of {comparison.num_shared_problems:,} problems"
    )
    clip = f", ranks {comparison.rank_clip}" if comparison.rank_clip else ""
    better = f"{'Eq. 9; ' if comparison.metric == RSR else ''}{comparison.direction} is better"
    heading = f": teachers by {_metric_label(comparison)} ({better}) over {over}{clip}"
    console.print()
    console.say(styled((comparison.student, "bold"), heading))
    console.print(_teacher_table(comparison))
    if len(comparison.teachers) > 1:
        console.say(_samples_sentence(comparison))
        console.say(comparison.metrics_agree)
    console.say(_correctness_sentence(comparison))
    console.print()
    console.say(f"Spearman of {'RSR' if comparison.metric == RSR else comparison.metric} with")
    console.print(_confound_table(comparison.confounds))
    for warning in comparison.warnings:
        console.say(styled(("warning:", "yellow"), f" {warning}"))
    for note in comparison.notes:
        console.say(f"note: {note}")


def _metric_label(comparison: Comparison) -> str:
    """What teachers are ranked by, as a heading says it."""
    return "data-set RSR" if comparison.metric == RSR else comparison.metric


def _teacher_table(comparison: Comparison) -> Table:
    table = Table()
    table.add_column("teacher")
    other = () if comparison.metric == RSR else ("RSR",)
    for heading in (
        "RSR" if comparison.metric == RSR else comparison.metric,
        "95 % interval",
        "P(best)",
        *other,
        "mean rank",
        "surprisal (nats)",
        "tokens each",
        "correct",
        "scored",
    ):
        table.add_column(heading, justify="right")
    for t in comparison.teachers:
        scored = f"{t.num_trajectories:,} of {t.num_rows:,}"
        if t.value is None:
            table.add_row(t.teacher, "nothing scored", *[""] * (6 + len(other)), scored)
            continue
        bounds = "" if t.low is None else f"{t.low:.3f} – {t.high:.3f}"
        table.add_row(
            t.teacher,
            f"{t.value:.3f}",
            bounds,
            f"{t.probability_best:.3f}",
            *(f"{t.rsr:.3f}" for _ in other),
            f"{t.mean_rank:.2f}",
            f"{t.mean_surprisal_nats:.3f}",
            f"{t.mean_num_tokens:,.0f}",
            "" if t.share_correct is None else f"{t.share_correct:.0%}",
            scored,
        )
    return table


def _samples_sentence(comparison: Comparison) -> str:
    shared = f"{comparison.num_shared_problems:,} problems that all teachers solved"
    if comparison.samples_needed is None:
        return f"samples needed: more than the {shared} can tell"
    return (
        f"samples needed: {comparison.samples_needed:,} of the {shared}; from there on "
        f"{AGREEMENT:.0%} of random samples name the same best teacher"
    )


def _correctness_sentence(comparison: Comparison) -> str:
    """What no reader of the table may overlook."""
    metric = "RSR" if comparison.metric == RSR else comparison.metric
    return (
        f"{metric} does not see correctness: keep correct answers first (rsr select --require "
        "correct; rsr grade adds the verdicts), then compare"
    )


def _confound_table(confounds: list[Confound]) -> Table:
    table = Table()
    table.add_column("")
    for heading in ("overall", "within problem", "rows"):
        table.add_column(heading, justify="right")
    for c in confounds:
        cells = ("–" if rho is None else f"{rho:+.3f}" for rho in (c.overall, c.within_problem))
        table.add_row(c.name, *cells, f"{c.num_rows:,}")
    return table


def _side_by_side(comparisons: list[Comparison]) -> Table:
    table = Table()
    table.add_column("teacher")
    for comparison in comparisons:
        table.add_column(comparison.student, justify="right")
    by_student = [{t.teacher: t for t in c.teachers} for c in comparisons]
    for name in sorted({name for teachers in by_student for name in teachers}):
        cells = []
        for comparison, by_name in zip(comparisons, by_student, strict=True):
            teacher = by_name.get(name)
            value = teacher.value if teacher else None
            best = "*" if teacher == comparison.best else " "
            cells.append("–  " if value is None else f"{value:.3f} {best}")
        table.add_row(name, *cells)
    return table


def print_metric_table(told: MetricTable, console: Console) -> None:
    """A line for each metric, a column for each group, the best one marked."""
    by = f" by {told.by}" if told.by else ""
    marks = f"* suits the student best, τ with {told.rows[0].metric.name}"
    console.say(styled(("Metrics", "bold"), f"{by}; {marks}"))
    table = Table()
    table.add_column("metric")
    table.add_column("better")
    for group in told.groups:
        table.add_column(group, justify="right")
    table.add_column("τ", justify="right")
    for row in told.rows:
        agreement = "–" if row.agreement is None else f"{row.agreement:+.2f}"
        table.add_row(row.metric.name, row.metric.direction, *_metric_cells(row), agreement)
    console.print(table)
    if len(told.groups) > 1:
        console.say(told_agreement(told.rows))
    for why in dict.fromkeys(told.lacking.values()):
        names = ", ".join(name for name, reason in told.lacking.items() if reason == why)
        console.say(f"note: without {names}: {why}")
    for row in told.rows:
        missing = sum(told.rows[0].num_rows.values()) - sum(row.num_rows.values())
        if missing:
            console.say(f"note: {missing:,} rows have no {row.metric.name}")


def _metric_cells(row: MetricRow) -> list[str]:
    is_told = len(row.values) > 1
    return [
        "–" if value is None else f"{value:.4g}{' *' if is_told and group == row.best else '  '}"
        for group, value in row.values.items()
    ]


def print_metric_list(console: Console, *, markdown: bool) -> None:
    """Every metric of the catalogue: what it is, of a data set, its unit and its source."""
    headings = ("metric", "of a trajectory", "of a data set", "better", "unit", "source")
    rows = [(m.name, m.formula, m.data_set, m.direction, m.unit or "1", m.source) for m in METRICS]
    if markdown:
        for cells in (headings, ["---"] * len(headings), *rows):
            console.say(f"| {' | '.join(cells)} |")
        return
    table = Table(*headings)
    for cells in rows:
        table.add_row(*cells)
    console.print(table)


def print_correlations(result: Correlations, console: Console) -> None:
    """Metrics by |Spearman|, highest first, and what was left out."""
    students = max(len(m.spearman.by_group) for m in result.metrics)
    over = f", averaged over {students} students" if result.by and students > 1 else ""
    console.say(styled((f"Correlation with {result.target}", "bold"), over))
    table = Table()
    table.add_column("metric")
    for kind in ("Spearman", "Pearson"):
        table.add_column(f"|{kind}|", justify="right")
        table.add_column("signed, 95 % interval", justify="right")
        table.add_column("p", justify="right")
    table.add_column("rows", justify="right")
    for m in result.metrics:
        cells = [cell for c in (m.spearman, m.pearson) for cell in _coefficient_cells(c)]
        table.add_row(m.metric, *cells, f"{m.num_rows:,}")
    console.print(table)
    if result.differences:
        _print_differences(result, console)
    for note in result.notes:
        console.say(f"note: {note}")


def _print_differences(result: Correlations, console: Console) -> None:
    """How much better the first metric is than each other, over the same draws."""
    first = result.differences[0].metric
    console.print()
    console.say(f"|Spearman| of {first} less that of another metric, over the same draws of rows")
    table = Table()
    table.add_column("other metric")
    for heading in ("difference", "95 % interval", f"P({first} better)", "rows"):
        table.add_column(heading, justify="right")
    for d in result.differences:
        bounds = "" if d.low is None else f"[{d.low:+.2f}, {d.high:+.2f}]"
        share = "" if d.share_better is None else f"{d.share_better:.3f}"
        table.add_row(d.other, f"{d.difference:+.3f}", bounds, share, f"{d.num_rows:,}")
    console.print(table)


def _coefficient_cells(c: Coefficient) -> tuple[str, str, str]:
    bounds = "" if c.low is None else f" [{c.low:+.2f}, {c.high:+.2f}]"
    return f"{c.absolute:.3f}", f"{c.mean:+.3f}{bounds}", f"{c.p_value:.4f}"


def print_simulation(simulation: Simulation, console: Console) -> None:
    """Our values, each beside the published one in parentheses."""
    title = styled(("Four texts under one student", "bold"), ", each beside (the paper's Table 3)")
    console.say(title)
    table = Table()
    table.add_column("text sampled from")
    for name in ("mean surprisal (nats)", "mean rank", "mean token ratio", "RSR"):
        table.add_column(name, justify="right")
    for ours, paper in zip(simulation.texts, PUBLISHED, strict=True):
        table.add_row(
            f"the {ours.text} mode" if ours.text != "mixed" else "the mixture",
            f"{ours.mean_surprisal_nats:.2f}  ({paper.mean_surprisal_nats:.2f})",
            f"{ours.mean_rank:.2f}  ({paper.mean_rank:.2f})",
            f"{ours.mean_token_ratio:.2f}  ({paper.mean_token_ratio:.2f})",
            f"{ours.rsr:.2f}",
        )
    console.print(table)
