"""`rsr teachers`, `correlate`, `simulate` and `report`: parse, call one function, print.

What is computed, and how, is in the modules of the same names.
"""

import csv
import io
import json
from dataclasses import asdict, replace
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rsr.jobs.command import configure_logging, guarded, json_option
from rsr.jobs.errors import UsageError
from rsr.jobs.evidence.confounds import Confound
from rsr.jobs.evidence.correlate import (
    Coefficient,
    CorrelateOptions,
    Correlations,
    correlate,
    read_table,
)
from rsr.jobs.evidence.observations import (
    NO_PROBLEMS,
    ObservationColumns,
    observe,
)
from rsr.jobs.evidence.simulate import (
    DEFAULT_NUM_TOKENS,
    DEFAULT_SEED,
    PUBLISHED,
    Simulation,
    simulate,
)
from rsr.jobs.evidence.teachers import (
    AGREEMENT,
    CompareOptions,
    Comparison,
    TeacherEvidence,
    compare_teachers,
)
from rsr.jobs.files import write_text_atomically
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.scored import open_scored, rank_clip_option

PLOT_SUFFIXES = (".html", ".png", ".svg")
PIPE_WIDTH = 120
"""Columns of a table that goes to a file."""

teacher_column_option = click.option(
    "--teacher-column", default="teacher", show_default=True, help="Who wrote the trajectory."
)
problem_column_option = click.option(
    "--problem-column",
    default="problem_id",
    show_default=True,
    help=f"What the trajectory answers; problems are resampled, not rows. {NO_PROBLEMS!r}: every "
    "row is a problem of its own.",
)
confound_option = click.option(
    "--confound",
    "confounds",
    multiple=True,
    metavar="COLUMN",
    help="Also correlate RSR with this numeric column; may be repeated. Length, surprisal and, "
    "where it is there, `correct` are always shown.",
)
draws_option = click.option(
    "--draws",
    "num_draws",
    type=click.IntRange(min=1),
    default=1_000,
    show_default=True,
    help="Bootstrap draws.",
)
mixed_option = click.option(
    "--allow-mixed-students",
    is_flag=True,
    help="Take the files as one student's although their metadata say otherwise.",
)


def seed_option(default: int = 0) -> Any:
    return click.option(
        "--seed",
        type=click.IntRange(min=0),
        default=default,
        show_default=True,
        help="Of every random draw.",
    )


def _columns(teacher: str, problem: str, confounds: tuple[str, ...]) -> ObservationColumns:
    return ObservationColumns(teacher, None if problem == NO_PROBLEMS else problem, confounds)


@click.command()
@click.argument("scored", metavar="SCORED...", nargs=-1, required=True)
@teacher_column_option
@problem_column_option
@rank_clip_option
@click.option(
    "--sample",
    type=click.IntRange(min=1),
    help="Compare over this many problems that all teachers solved, drawn at random; the paper "
    "takes 200. [default: all rows]",
)
@draws_option
@seed_option()
@confound_option
@mixed_option
@click.option(
    "--csv",
    "csv_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write the table, one line for each student and teacher: with the accuracies after "
    "training added, what rsr correlate reads.",
)
@json_option
def teachers(
    scored: tuple[str, ...],
    teacher_column: str,
    problem_column: str,
    rank_clip: str | None,
    sample: int | None,
    num_draws: int,
    seed: int,
    confounds: tuple[str, ...],
    allow_mixed_students: bool,
    csv_path: Path | None,
    as_json: bool,
) -> None:
    """Rank teachers by the data-set RSR of their trajectories in SCORED (lower is better).

    SCORED is what `rsr score` wrote: a file, a folder or a glob. Several are several students,
    compared side by side. Intervals are 95 % bootstrap intervals over problems.
    """
    configure_logging(verbose=False)
    columns = _columns(teacher_column, problem_column, confounds)
    options = CompareOptions(num_draws=num_draws, sample=sample, seed=seed)

    def run(stop: StopRequest) -> list[Comparison]:
        comparisons = []
        for path in scored:
            stop.check()
            observations = observe(
                path, columns, rank_clip=rank_clip, allow_mixed_students=allow_mixed_students
            )
            comparisons.append(compare_teachers(observations, options))
        labelled = _distinct_students(comparisons)
        if csv_path is not None:
            _write_teachers_csv(labelled, csv_path)
        return labelled

    comparisons = guarded(run)
    if as_json:
        click.echo(json.dumps({"students": [asdict(c) for c in comparisons]}))
    else:
        print_comparisons(comparisons, wide_console())


def _distinct_students(comparisons: list[Comparison]) -> list[Comparison]:
    """The same, two students of one name told apart by their paths."""
    names = [c.student for c in comparisons]
    return [
        replace(c, student=f"{c.student} ({c.path})") if names.count(c.student) > 1 else c
        for c in comparisons
    ]


def _write_teachers_csv(comparisons: list[Comparison], path: Path) -> None:
    stream = io.StringIO()
    fields = [f.name for f in dataclass_fields(TeacherEvidence)]
    writer = csv.DictWriter(stream, ["student", *fields])
    writer.writeheader()
    for comparison in comparisons:
        for teacher in comparison.teachers:
            writer.writerow({"student": comparison.student, **asdict(teacher)})
    _write_text(path, stream.getvalue())


def _write_text(path: Path, text: str) -> None:
    try:
        write_text_atomically(path, text)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error


def wide_console() -> Console:
    """Tables keep their columns where nobody's terminal says how wide they may be."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PIPE_WIDTH)


def print_comparisons(comparisons: list[Comparison], console: Console) -> None:
    """Each student's table, and with several students one of their RSRs side by side."""
    for comparison in comparisons:
        _print_comparison(comparison, console)
    if len(comparisons) > 1:
        console.print("\n[bold]Side by side[/]: data-set RSR, each student's best marked *")
        console.print(_side_by_side(comparisons))


def _print_comparison(comparison: Comparison, console: Console) -> None:
    over = (
        f"{comparison.num_problems:,} problems"
        if comparison.sample is None
        else f"a sample of {comparison.sample:,} of {comparison.num_shared_problems:,} problems"
    )
    clip = f", ranks {comparison.rank_clip}" if comparison.rank_clip else ""
    console.print(
        f"\n[bold]{escape(comparison.student)}[/]: teachers by data-set RSR (Eq. 9; lower is "
        f"better) over {over}{clip}",
        soft_wrap=True,
    )
    console.print(_teacher_table(comparison.teachers))
    console.print(_samples_sentence(comparison), soft_wrap=True)
    console.print("\nSpearman of RSR with")
    console.print(_confound_table(comparison.confounds))
    for warning in comparison.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True)
    for note in comparison.notes:
        console.print(f"note: {escape(note)}", soft_wrap=True)


def _teacher_table(teachers: list[TeacherEvidence]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("teacher")
    for heading in (
        "RSR",
        "95 % interval",
        "P(best)",
        "mean rank",
        "surprisal (nats)",
        "tokens each",
        "correct",
        "scored",
    ):
        table.add_column(heading, justify="right")
    for t in teachers:
        scored = f"{t.num_trajectories:,} of {t.num_rows:,}"
        if t.rsr is None:
            table.add_row(escape(t.teacher), "nothing scored", *[""] * 6, scored)
            continue
        bounds = "" if t.low is None else f"{t.low:.3f} – {t.high:.3f}"
        table.add_row(
            escape(t.teacher),
            f"{t.rsr:.3f}",
            bounds,
            f"{t.probability_best:.3f}",
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


def _confound_table(confounds: list[Confound]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for heading in ("overall", "within problem", "rows"):
        table.add_column(heading, justify="right")
    for c in confounds:
        cells = ("–" if rho is None else f"{rho:+.3f}" for rho in (c.overall, c.within_problem))
        table.add_row(escape(c.name), *cells, f"{c.num_rows:,}")
    return table


def _side_by_side(comparisons: list[Comparison]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("teacher")
    for comparison in comparisons:
        table.add_column(escape(comparison.student), justify="right")
    by_student = [{t.teacher: t for t in c.teachers} for c in comparisons]
    for name in sorted({name for teachers in by_student for name in teachers}):
        cells = []
        for comparison, by_name in zip(comparisons, by_student, strict=True):
            teacher = by_name.get(name)
            rsr = teacher.rsr if teacher else None
            best = "*" if teacher == comparison.best else " "
            cells.append("–  " if rsr is None else f"{rsr:.3f} {best}")
        table.add_row(escape(name), *cells)
    return table


@click.command(name="correlate")
@click.argument("table", type=click.Path(path_type=Path))
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    default=("rsr",),
    show_default=True,
    help="Column that should predict the target; may be repeated, and is then ranked.",
)
@click.option(
    "--target", default="performance", show_default=True, help="Column of what came of training."
)
@click.option(
    "--by",
    default=None,
    help="Column of the students: one coefficient for each, averaged before the absolute value "
    "is taken. [default: all rows are one student's]",
)
@click.option(
    "--permutations",
    "num_permutations",
    type=click.IntRange(min=1),
    default=10_000,
    show_default=True,
    help="Random orders of the target behind the p-value.",
)
@draws_option
@seed_option()
@json_option
def correlate_command(table: Path, as_json: bool, **options: Any) -> None:
    """Correlate metrics with what came of training, over the teachers of each student in TABLE.

    TABLE is a CSV, Parquet or JSON-lines file with one row for each student and teacher.
    """
    configure_logging(verbose=False)
    result = guarded(lambda _: correlate(read_table(table), CorrelateOptions(**options)))
    if as_json:
        click.echo(json.dumps(asdict(result)))
    else:
        print_correlations(result, wide_console())


def print_correlations(result: Correlations, console: Console) -> None:
    """Metrics by |Spearman|, highest first, and what was left out."""
    students = max(len(m.spearman.by_group) for m in result.metrics)
    over = f", averaged over {students} students" if result.by and students > 1 else ""
    console.print(f"[bold]Correlation with {escape(result.target)}[/]{over}", soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    table.add_column("metric")
    for kind in ("Spearman", "Pearson"):
        table.add_column(f"|{kind}|", justify="right")
        table.add_column("signed, 95 % interval", justify="right")
        table.add_column("p", justify="right")
    table.add_column("rows", justify="right")
    for m in result.metrics:
        cells = [cell for c in (m.spearman, m.pearson) for cell in _coefficient_cells(c)]
        table.add_row(escape(m.metric), *cells, f"{m.num_rows:,}")
    console.print(table)
    for note in result.notes:
        console.print(f"note: {escape(note)}", soft_wrap=True)


def _coefficient_cells(c: Coefficient) -> tuple[str, str, str]:
    bounds = "" if c.low is None else f" [{c.low:+.2f}, {c.high:+.2f}]"
    return f"{c.absolute:.3f}", f"{c.mean:+.3f}{escape(bounds)}", f"{c.p_value:.4f}"


@click.command(name="simulate")
@seed_option(DEFAULT_SEED)
@click.option(
    "--tokens",
    "num_tokens",
    type=click.IntRange(min=1),
    default=DEFAULT_NUM_TOKENS,
    show_default=True,
    help="Tokens sampled for each text.",
)
@click.option(
    "--plot",
    "plot_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help=f"Also draw to a file ending in {', '.join(PLOT_SUFFIXES)}.",
)
@json_option
def simulate_command(seed: int, num_tokens: int, plot_path: Path | None, as_json: bool) -> None:
    """Repeat the paper's simulation (Table 3): why surprisal or rank alone does not do.

    A student learns a major and a minor mode of text over 50 tokens. Of texts from either mode,
    from a foreign one and from the mixture, the minor mode's has the lowest ratio.
    """
    configure_logging(verbose=False)

    def run(_: StopRequest) -> Simulation:
        if plot_path is not None and plot_path.suffix not in PLOT_SUFFIXES:
            raise UsageError(
                f"--plot must end in one of {', '.join(PLOT_SUFFIXES)}, got {plot_path}"
            )
        result = simulate(seed, num_tokens)
        if plot_path is not None:
            _plot_simulation(result, plot_path)
        return result

    result = guarded(run)
    if as_json:
        texts = {"texts": result.texts, "published": PUBLISHED}
        rows = {name: [asdict(row) for row in stats] for name, stats in texts.items()}
        click.echo(json.dumps({"seed": seed, "num_tokens": num_tokens, **rows}))
    else:
        print_simulation(result, wide_console())


def _plot_simulation(simulation: Simulation, path: Path) -> None:
    # Altair takes a second to import: `rsr --help` should not wait for it.
    from rsr.jobs.evidence.charts import save
    from rsr.jobs.evidence.simulate_chart import draw_simulation

    try:
        save(draw_simulation(simulation), path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error


def print_simulation(simulation: Simulation, console: Console) -> None:
    """Our values, each beside the published one in parentheses."""
    console.print("[bold]Four texts under one student[/], each beside (the paper's Table 3)")
    table = Table(box=None, pad_edge=False)
    table.add_column("text sampled from")
    for heading in ("mean surprisal (nats)", "mean rank", "mean token ratio", "RSR"):
        table.add_column(heading, justify="right")
    for ours, paper in zip(simulation.texts, PUBLISHED, strict=True):
        table.add_row(
            f"the {ours.text} mode" if ours.text != "mixed" else "the mixture",
            f"{ours.mean_surprisal_nats:.2f}  ({paper.mean_surprisal_nats:.2f})",
            f"{ours.mean_rank:.2f}  ({paper.mean_rank:.2f})",
            f"{ours.mean_token_ratio:.2f}  ({paper.mean_token_ratio:.2f})",
            f"{ours.rsr:.2f}",
        )
    console.print(table)


@click.command()
@click.argument("scored", metavar="SCORED")
@click.argument("page", metavar="OUT.html", type=click.Path(path_type=Path, dir_okay=False))
@teacher_column_option
@problem_column_option
@rank_clip_option
@click.option(
    "--selection",
    metavar="SELECTED",
    help="What rsr select or rsr filter chose from SCORED: its composition is shown beside all.",
)
@click.option(
    "--points",
    "num_points",
    type=click.IntRange(min=1),
    default=3_000,
    show_default=True,
    help="Trajectories drawn in the scatter plots, at random where there are more; the page says "
    "how many.",
)
@click.option(
    "--examples",
    "num_examples",
    type=click.IntRange(min=1, max=50),
    default=3,
    show_default=True,
    help="Trajectories of lowest RSR to show, and of highest.",
)
@click.option(
    "--tokenizer",
    help="The student's, to show tokens as text: a folder, or a hub name. [default: the run's "
    "model, where that is a folder that is there]",
)
@draws_option
@seed_option()
@confound_option
@mixed_option
@json_option
def report(
    scored: str,
    page: Path,
    teacher_column: str,
    problem_column: str,
    rank_clip: str | None,
    selection: str | None,
    num_points: int,
    num_examples: int,
    tokenizer: str | None,
    num_draws: int,
    seed: int,
    confounds: tuple[str, ...],
    allow_mixed_students: bool,
    as_json: bool,
) -> None:
    """Show what `rsr score` wrote to SCORED on one self-contained page, OUT.html.

    Teachers, what RSR goes with, a selection beside the pool, the best and the worst trajectories
    and, where SCORED has token columns, each of their tokens. It needs no network to be read. It
    contains text of the examples: think before publishing it.
    """
    configure_logging(verbose=False)
    columns = _columns(teacher_column, problem_column, confounds)

    def run(stop: StopRequest) -> Comparison:
        # Altair takes a second to import: `rsr --help` should not wait for it.
        from rsr.jobs.evidence.report import ReportOptions, write_report

        if page.suffix != ".html":
            raise UsageError(f"OUT.html must end in .html, got {page}")
        options = ReportOptions(
            CompareOptions(num_draws=num_draws, seed=seed), num_points, num_examples, tokenizer
        )
        pool = observe(
            scored, columns, rank_clip=rank_clip, allow_mixed_students=allow_mixed_students
        )
        chosen = selection and open_scored(
            selection, rank_clip=rank_clip, allow_mixed_students=allow_mixed_students
        )
        stop.check()
        return write_report(pool, page, options, chosen or None)

    comparison = guarded(run)
    if as_json:
        click.echo(json.dumps({"report": str(page)} | asdict(comparison)))
    else:
        print_comparisons([comparison], wide_console())
        click.echo(f"\nreport: {page}")
