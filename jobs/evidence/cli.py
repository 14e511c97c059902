"""`rsr teachers`, `correlate`, `simulate` and `report`: parse, call one function, print.

What is computed, and how, is in the modules of the same names.
"""

import csv
import io
from collections.abc import Callable
from dataclasses import asdict, replace
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any, TypeVar

import click

from rsr.engine.catalogue import BY_NAME
from rsr.jobs.cluster.calls_at import calls_at
from rsr.jobs.command import (
    address_option,
    configure_logging,
    guarded,
    json_option,
)
from rsr.jobs.comparison.compare import StreamComparison, StreamOptions, compare_streams
from rsr.jobs.comparison.drift import DriftOptions
from rsr.jobs.comparison.streams import open_streams
from rsr.jobs.errors import UsageError
from rsr.jobs.evidence.correlate import (
    CorrelateOptions,
    correlate,
    read_table,
)
from rsr.jobs.evidence.drawing import MAX_ROWS
from rsr.jobs.evidence.metric_table import MetricTable, metric_table, write_metrics
from rsr.jobs.evidence.observations import (
    NO_PROBLEMS,
    ObservationColumns,
    observe,
)
from rsr.jobs.evidence.printing import (
    print_comparisons,
    print_correlations,
    print_metric_list,
    print_metric_table,
    print_simulation,
)
from rsr.jobs.evidence.simulate import (
    DEFAULT_NUM_TOKENS,
    DEFAULT_SEED,
    PUBLISHED,
    Simulation,
    simulate,
)
from rsr.jobs.evidence.teachers import (
    CompareOptions,
    Comparison,
    TeacherEvidence,
    compare_teachers,
)
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.options import metric_option, rank_clip_option
from rsr.jobs.shards.measures import measure, stored_measures
from rsr.jobs.shards.scored import USUAL_ID, USUAL_TEACHER, open_scored
from rsr.jobs.storage.atomic import write_text_atomically
from rsr.jobs.terminal import Console, print_json

PLOT_SUFFIXES = (".html", ".png", ".svg")

F = TypeVar("F", bound=Callable[..., Any])

teacher_column_option = click.option(
    "--teacher-column",
    default=USUAL_TEACHER,
    show_default=True,
    help="Column of who wrote the trajectory.",
)
problem_column_option = click.option(
    "--problem-column",
    default="problem_id",
    show_default=True,
    help=f"Column of the problem; problems are resampled, not rows. {NO_PROBLEMS!r}: every "
    "row is a problem of its own.",
)
quality_option = click.option(
    "--quality-column", metavar="COLUMN", help="Column of a reward or the like, for the metric car."
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
    help="Number of bootstrap draws.",
)
max_rows_option = click.option(
    "--max-rows",
    type=click.IntRange(min=1),
    default=MAX_ROWS,
    show_default=True,
    help="Where SCORED has more rows, compare over all rows of problems drawn at random, about so "
    "many rows; they take 240 bytes of memory each.",
)
mixed_option = click.option(
    "--allow-mixed-students",
    is_flag=True,
    help="Take the files as one student's although their metadata say otherwise.",
)


def seed_option(default: int = 0) -> Callable[[F], F]:
    return click.option(
        "--seed",
        type=click.IntRange(min=0),
        default=default,
        show_default=True,
        help="Seed of the random generator.",
    )


def _columns(teacher: str, problem: str, confounds: tuple[str, ...]) -> ObservationColumns:
    return ObservationColumns(teacher, None if problem == NO_PROBLEMS else problem, confounds)


@click.command()
@click.argument("scored", metavar="SCORED...", nargs=-1, required=True)
@teacher_column_option
@problem_column_option
@metric_option
@quality_option
@rank_clip_option
@click.option(
    "--sample",
    type=click.IntRange(min=1),
    help="Compare over this many problems that all teachers solved, drawn at random; the paper "
    "takes 200. [default: all rows]",
)
@draws_option
@seed_option()
@max_rows_option
@confound_option
@mixed_option
@click.option(
    "--csv",
    "csv_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write the table, one line for each student and teacher: with the accuracies after "
    "training added, what rsr correlate reads.",
)
@address_option("Read shards")
@json_option
def teachers(
    scored: tuple[str, ...],
    teacher_column: str,
    problem_column: str,
    metric: str,
    quality_column: str | None,
    rank_clip: str | None,
    sample: int | None,
    num_draws: int,
    seed: int,
    max_rows: int,
    confounds: tuple[str, ...],
    allow_mixed_students: bool,
    csv_path: Path | None,
    address: str | None,
    as_json: bool,
) -> None:
    """Rank teachers by the data-set RSR of their trajectories in SCORED, or by another metric.

    Lower RSR is better; length and surprisal are always shown beside it. SCORED is what `rsr
    score` wrote: a file, a folder or a glob. Several are several students, compared side by side.
    Intervals are 95 % bootstrap intervals over problems.
    """
    configure_logging(verbose=False)
    columns = _columns(teacher_column, problem_column, confounds)
    options = CompareOptions(num_draws=num_draws, sample=sample, seed=seed)

    def run(stop: StopRequest) -> list[Comparison]:
        comparisons = []
        with calls_at(address, stop) as calls:
            for path in scored:
                stop.check()
                observations = observe(
                    path,
                    columns,
                    rank_clip=rank_clip,
                    metric=metric,
                    quality_column=quality_column,
                    allow_mixed_students=allow_mixed_students,
                    max_rows=max_rows,
                    seed=seed,
                    calls=calls,
                )
                comparisons.append(compare_teachers(observations, options))
        labelled = _distinct_students(comparisons)
        if csv_path is not None:
            _write_teachers_csv(labelled, csv_path)
        return labelled

    comparisons = guarded(run)
    if as_json:
        print_json({"students": [c.to_json() for c in comparisons]})
    else:
        print_comparisons(comparisons, Console())


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


@click.command(name="metrics")
@click.argument("scored", metavar="[SCORED]", required=False)
@click.option("--by", metavar="COLUMN", help="Column of the groups, such as teacher.")
@click.option(
    "--metric",
    "names",
    type=click.Choice(list(BY_NAME)),
    metavar="NAME",
    multiple=True,
    help="Only this one; may be repeated, and the others are compared with the first. [default: "
    "every one that SCORED stores]",
)
@quality_option
@rank_clip_option
@mixed_option
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="Also write the table, one line a group, as metrics.csv, which rsr correlate reads, and "
    "the metrics of each trajectory as rows.parquet.",
)
@click.option("--list", "is_list", is_flag=True, help="Say what every metric is, and end.")
@click.option("--markdown", is_flag=True, help="With --list: as the table in docs/metrics.md.")
@json_option
def metrics_command(
    scored: str | None,
    by: str | None,
    names: tuple[str, ...],
    quality_column: str | None,
    rank_clip: str | None,
    allow_mixed_students: bool,
    output: Path | None,
    is_list: bool,
    markdown: bool,
    as_json: bool,
) -> None:
    """Show every metric of the trajectories in SCORED that one pass of the student can tell.

    SCORED is what `rsr score` wrote: a file, a folder or a glob. Nothing but its stored sums is
    read: no GPU, no student.
    """
    configure_logging(verbose=False)
    if is_list:
        print_metric_list(Console(), markdown=markdown)
        return

    def run(_: StopRequest) -> MetricTable:
        if scored is None:
            raise UsageError("give SCORED, what rsr score wrote, or --list")
        table = open_scored(
            scored,
            rank_clip=rank_clip,
            columns=[by] if by else [],
            allow_mixed_students=allow_mixed_students,
        )
        if names:
            lacking: dict[str, str] = {}
            measures = [measure(table, name, quality_column=quality_column) for name in names]
        else:
            measures, lacking = stored_measures(table, quality_column=quality_column)
        told = metric_table(table, measures, by=by, lacking=lacking)
        if output is not None:
            write_metrics(table, measures, told, output)
        return told

    told = guarded(run)
    if as_json:
        print_json(told.to_json())
    else:
        print_metric_table(told, Console())


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
    "--target",
    default="performance",
    show_default=True,
    help="Column of the performance after training.",
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
        print_json(asdict(result))
    else:
        print_correlations(result, Console())


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
        print_json({"seed": seed, "num_tokens": num_tokens, **rows})
    else:
        print_simulation(result, Console())


def _plot_simulation(simulation: Simulation, path: Path) -> None:
    # Altair takes a second to import: `rsr --help` should not wait for it.
    from rsr.jobs.evidence.charts import save
    from rsr.jobs.evidence.simulate_chart import draw_simulation

    try:
        save(draw_simulation(simulation), path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error


@click.command()
@click.argument("scored", metavar="SCORED")
@click.argument("page", metavar="OUT.html", type=click.Path(path_type=Path, dir_okay=False))
@teacher_column_option
@problem_column_option
@metric_option
@quality_option
@rank_clip_option
@click.option(
    "--selection",
    metavar="SELECTED",
    help="Output of rsr select or rsr filter from SCORED: its composition is shown beside all.",
)
@click.option(
    "--compare",
    "refined",
    multiple=True,
    metavar="REFINED",
    help="A scored stream of refined traces of the same problems, shown beside SCORED, the native "
    "one, as rsr compare has them; may be repeated.",
)
@click.option(
    "--id-column",
    default=USUAL_ID,
    show_default=True,
    metavar="COLUMN",
    help="Column of SCORED whose values parent_id in --compare REFINED names.",
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
    help="Tokenizer of the student, to show tokens as text: a folder, or a hub name. [default: "
    "the run's model, where that is a folder that is there]",
)
@draws_option
@seed_option()
@max_rows_option
@confound_option
@mixed_option
@address_option("Read and sum shards")
@json_option
def report(
    scored: str,
    page: Path,
    teacher_column: str,
    problem_column: str,
    metric: str,
    quality_column: str | None,
    rank_clip: str | None,
    selection: str | None,
    refined: tuple[str, ...],
    id_column: str,
    num_points: int,
    num_examples: int,
    tokenizer: str | None,
    num_draws: int,
    seed: int,
    max_rows: int,
    confounds: tuple[str, ...],
    allow_mixed_students: bool,
    address: str | None,
    as_json: bool,
) -> None:
    """Show what `rsr score` wrote to SCORED on one self-contained page, OUT.html.

    Teachers, what RSR goes with, a selection beside the pool, refined streams beside SCORED, the
    best and the worst trajectories and, where SCORED has token columns, each of their tokens. It
    needs no network to be read. It contains text of the examples: think before publishing it.
    """
    configure_logging(verbose=False)
    columns = _columns(teacher_column, problem_column, confounds)

    def run(stop: StopRequest) -> tuple[Comparison, StreamComparison | None]:
        # Altair takes a second to import: `rsr --help` should not wait for it.
        from rsr.jobs.comparison.page import comparison_section
        from rsr.jobs.evidence.report import ReportOptions, write_report

        if page.suffix != ".html":
            raise UsageError(f"OUT.html must end in .html, got {page}")
        options = ReportOptions(
            CompareOptions(num_draws=num_draws, seed=seed),
            num_points,
            num_examples,
            tokenizer,
            quality_column,
        )
        with calls_at(address, stop) as calls:
            pool = observe(
                scored,
                columns,
                rank_clip=rank_clip,
                metric=metric,
                quality_column=quality_column,
                allow_mixed_students=allow_mixed_students,
                max_rows=max_rows,
                seed=seed,
                calls=calls,
            )
            chosen = selection and open_scored(
                selection, rank_clip=rank_clip, allow_mixed_students=allow_mixed_students
            )
            beside = None
            if refined:
                streams = open_streams(
                    (scored, *refined),
                    on=_problem_of_streams(problem_column),
                    id_column=id_column,
                    quality_columns=[quality_column] if quality_column else [],
                    rank_clip=rank_clip,
                    allow_mixed_students=allow_mixed_students,
                )
                drift = DriftOptions(num_draws=num_draws, seed=seed, tokenizer=tokenizer)
                beside = compare_streams(streams, StreamOptions(num_draws, seed, drift))
            stop.check()
            sections = [] if beside is None else [comparison_section(beside)]
            return write_report(pool, page, options, chosen or None, sections, calls), beside

    comparison, beside = guarded(run)
    if as_json:
        streams = {} if beside is None else {"streams": beside.to_json()}
        print_json({"report": str(page)} | comparison.to_json() | streams)
    else:
        print_comparisons([comparison], Console())
        console = Console()
        console.print()
        console.say(f"report: {page}")


def _problem_of_streams(problem_column: str) -> str:
    if problem_column == NO_PROBLEMS:
        raise UsageError(
            "--compare puts streams side by side on the problems that all of them have: name their "
            "column with --problem-column"
        )
    return problem_column
