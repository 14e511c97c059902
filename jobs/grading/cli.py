"""`rsr grade`: parse, build options, call one function, print what it returns."""

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from rsr.jobs.command import EXIT_FAILURES, Place, guarded, json_option, typed_command
from rsr.jobs.grading.grade import DEFAULT_CPU_SECONDS, GradeOptions, GradeResult, run_grade
from rsr.jobs.grading.grades import KNOWN_VERDICTS, GradeStatus
from rsr.jobs.grading.rates import PassRates, choose_problem_column, pass_rates
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.options import column_options, trajectory_columns
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.terminal import Console, complain, fact_table, print_json

OPTION_NAMES = frozenset(option.name for option in fields(GradeOptions))


@click.command()
@click.argument("input", metavar="INPUT")
@click.argument("output", metavar="OUTPUT", type=Place())
@click.option("--answer-column", required=True, metavar="COLUMN", help="Column of gold answers.")
@click.option(
    "--verifier",
    default="math",
    show_default=True,
    metavar="math|exact|mcq|MODULE:FUNCTION",
    help="How answers are compared: mathematically, by the text, by a letter from A to J, or a "
    "function of yours that takes answer and gold and returns whether they agree.",
)
@column_options
@click.option(
    "--finish-reason-column",
    metavar="COLUMN",
    help="Column that says length where a response was cut off. [default: finish_reason, if there "
    "is one]",
)
@click.option(
    "--cpu-seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=DEFAULT_CPU_SECONDS,
    show_default=True,
    help="Most CPU seconds of one row; then its process is killed, and the row is a timeout.",
)
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    help="Processes that grade at a time. [default: one for each core]",
)
@click.option(
    "--problem-column",
    metavar="COLUMN",
    help="Column of the problem, for the pass rates. [default: problem_id or "
    "prompt_hash, if there is one]",
)
@click.option("--overwrite", is_flag=True, help="Discard the earlier run in OUTPUT.")
@click.option(
    "--same-input",
    is_flag=True,
    help="Go on though INPUT's files have other times than when the run began: they are copies.",
)
@click.option("--overwrite-columns", is_flag=True, help="Replace grades that INPUT already has.")
@json_option
def grade(output: Path | str, problem_column: str | None, as_json: bool, **asked: Any) -> None:
    """Say of each row in INPUT whether its answer is the gold one, writing to the folder OUTPUT.

    OUTPUT gets one Parquet file for each of INPUT, under the same name: the same rows in the same
    order, every column as it was, and grade_status, grade_extracted, grade_detail and correct.
    Where INPUT is one file, OUTPUT may be one too: call it x.parquet or x.jsonl. Only what stands
    after the reasoning counts; a response that was cut off is truncated, whatever stands in it.
    Stopped half way, the same command goes on.
    """

    def run(stop: StopRequest) -> tuple[GradeResult, PassRates | None]:
        columns = trajectory_columns(asked)
        own = {name: value for name, value in asked.items() if name in OPTION_NAMES}
        options = GradeOptions(output=output, columns=columns, command=typed_command(), **own)
        result = run_grade(options, stop)
        return result, _rates(result, problem_column)

    result, rates = guarded(run, log=RunFolder(output).log_path)
    told = _as_json(result, rates)
    if as_json:
        print_json(told)
    else:
        _print(result, rates, told)
    sys.exit(_exit_code(result))


def _rates(result: GradeResult, named: str | None) -> PassRates | None:
    folder = result.folder
    shards = folder.require_run().shards
    paths = [folder.storage.describe(s.name) for s in shards if s.num_rows]
    if not paths:
        return None
    column = choose_problem_column(paths[0], named)
    return None if column is None else pass_rates(paths, column)


def _as_json(result: GradeResult, rates: PassRates | None) -> dict[str, Any]:
    counts = result.summary.rows_by_status
    num_known = sum(counts.get(status, 0) for status in KNOWN_VERDICTS)
    num_rows = result.summary.num_rows
    return {
        "output": str(result.folder.root),
        "num_rows": num_rows,
        "rows_by_status": counts,
        "num_known": num_known,
        "solve_rate": counts.get(GradeStatus.CORRECT, 0) / num_known if num_known else None,
        "truncation_rate": counts.get(GradeStatus.TRUNCATED, 0) / num_rows if num_rows else None,
        **(rates.to_json() if rates else {}),
    }


def _print(result: GradeResult, rates: PassRates | None, told: dict[str, Any]) -> None:
    table = fact_table()
    by_status = ", ".join(f"{n:,} {name}" for name, n in result.summary.rows_by_status.items())
    table.add_row(
        "rows", f"{result.summary.num_rows:,}" + (f"  ({by_status})" if by_status else "")
    )
    if told["solve_rate"] is not None:
        table.add_row("solve rate", f"{told['solve_rate']:.1%} of {told['num_known']:,} known")
        table.add_row("truncated", f"{told['truncation_rate']:.1%}")
    if rates is not None:
        solved = f"{rates.num_solved:,} of {rates.num_problems:,} by {rates.column}"
        table.add_row("problems solved", solved)
        for number, (name, count) in enumerate(rates.histogram.items()):
            table.add_row("" if number else "pass rates", f"{count:,} {name}")
    table.add_row("result", str(result.folder))
    Console().show(table)


def _exit_code(result: GradeResult) -> int:
    """1 where no grade at all is known, which is said; else 0."""
    counts = result.summary.rows_by_status
    if result.summary.num_rows and not any(counts.get(status) for status in KNOWN_VERDICTS):
        told = ", ".join(f"{count:,} {status}" for status, count in counts.items())
        complain(
            f"no row has a grade: {told}; grade_status and grade_detail in {result.folder.root} "
            "tell it of each row"
        )
        return EXIT_FAILURES
    return 0
