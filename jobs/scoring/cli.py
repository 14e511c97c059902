"""`rsr score`: parse, build a config, call one function, print what it returns."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from rsr.jobs.cluster.work import Failure
from rsr.jobs.command import (
    EXIT_FAILURES,
    Place,
    configure_logging,
    guarded,
    json_option,
    typed_command,
)
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.options import (
    column_options,
    scorer_config,
    scorer_options,
    trajectory_columns,
)
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.progress import Progress
from rsr.jobs.scoring.score import ScoreOptions, ScoreResult, run_score
from rsr.jobs.shards.score_columns import SECOND_PASS_COLUMNS, Summary, told_reasons
from rsr.jobs.terminal import Console, Table, complain, fact_table, format_seconds, print_json


@click.command()
@click.argument("input", metavar="INPUT")
@click.argument("output", metavar="OUTPUT", type=Place())
@scorer_options()
@column_options
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help="Take only the first rows of INPUT: for a trial. A higher limit, or none, goes on in the "
    "same OUTPUT.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Engines at a time; default: one per GPU or tensor-parallel group, one without a GPU.",
)
@click.option(
    "--address",
    help="Ray cluster to join: auto, or host:port of its head; local is this machine alone. "
    "[default: RAY_ADDRESS, as ray job submit sets it, else local]",
)
@click.option(
    "--unit-timeout",
    "unit_timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    help="Seconds in the engine after which a unit's worker is killed and the unit given to "
    "another. [default: 20 times what finished units of that length took, at least 120]",
)
@click.option(
    "--start-timeout",
    "start_timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    help="Seconds without a ready or loading worker after which the run ends; a busy cluster or a "
    "disk that comes back may need them. [default: 1800]",
)
@click.option(
    "--max-refused",
    type=click.FloatRange(min=0, max=1),
    default=0.5,
    show_default=True,
    help="Share of the first 200 rows that may be without a score; the run ends before the model "
    "is loaded if there are more, saying why. 1 never ends it.",
)
@click.option("--overwrite", is_flag=True, help="Discard the earlier run in OUTPUT.")
@click.option(
    "--same-input",
    is_flag=True,
    help="Go on though INPUT's files have other times than when the run began: they are copies.",
)
@click.option("--overwrite-columns", is_flag=True, help="Replace rsr columns that INPUT has.")
@json_option
@click.option("-q", "--quiet", is_flag=True, help="Show no progress; troubles are in the log.")
@click.option("-v", "--verbose", is_flag=True, help="Show what vLLM and Ray say.")
def score(
    input: str,
    output: Path | str,
    limit: int | None,
    workers: int | None,
    address: str | None,
    unit_timeout_s: float | None,
    start_timeout_s: float | None,
    max_refused: float,
    overwrite: bool,
    same_input: bool,
    overwrite_columns: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **student_and_columns: Any,
) -> None:
    """Add RSR columns to the trajectories in INPUT, writing them to the folder OUTPUT.

    INPUT is a Parquet, JSON or JSON-lines file, a folder of them, or a glob; JSON may be
    compressed (.gz, .bz2, .zst). OUTPUT gets one Parquet file for each, under the same name: the
    same rows in the same order, the input's columns untouched, and the score columns. Where INPUT
    is one file, OUTPUT may be one too: call it x.parquet or x.jsonl. Stopped half way, the same
    command goes on. Both may be on an object store: s3://bucket/…, gs://bucket/…,
    az://container/…; INPUT also on the Hugging Face hub:
    `hf://datasets/ORG/NAME[@REVISION][/GLOB]`.
    """
    configure_logging(verbose)

    def run(stop: StopRequest) -> ScoreResult:
        options = ScoreOptions(
            input=input,
            output=output,
            scorer=scorer_config(student_and_columns),
            columns=trajectory_columns(student_and_columns),
            limit=limit,
            workers=workers,
            address=address,
            unit_timeout_s=unit_timeout_s,
            start_timeout_s=start_timeout_s,
            max_refused=max_refused,
            overwrite=overwrite,
            same_input=same_input,
            overwrite_columns=overwrite_columns,
            verbose=verbose,
            command=typed_command(),
        )
        return run_score(options, Progress.silent() if quiet else Progress(), stop)

    result = guarded(run, log=RunFolder(output).log_path)
    if as_json:
        print_json(score_result_json(result))
    else:
        print_score_result(result)
    sys.exit(exit_code(result))


def exit_code(result: ScoreResult) -> int:
    """1 where rows or shards failed, or where no row at all has a score, which is said; else 0."""
    summary = result.summary
    if summary.num_rows and not summary.dataset.num_trajectories:
        complain(
            f"no row has a score: {_by_status(summary)}; rsr_status and rsr_detail in "
            f"{result.output} tell it of each row"
        )
        return EXIT_FAILURES
    return EXIT_FAILURES if result.failures else 0


def score_result_json(result: ScoreResult) -> dict[str, Any]:
    """The object that `rsr score --json` prints."""
    return {
        "output": str(result.output),
        "log": str(result.log),
        "num_rows": result.summary.num_rows,
        "rows_by_status": result.summary.rows_by_status,
        "reasons": {name: asdict(reason) for name, reason in result.summary.reasons.items()},
        "num_tokens": result.summary.num_tokens,
        "num_tokens_now": result.num_tokens_now,
        "seconds": result.seconds,
        "tokens_per_s": result.num_tokens_now / result.seconds if result.seconds else None,
        "dataset_rsr": None if result.second_pass else result.summary.dataset.rsr,
        "setbacks": result.setbacks,
        "failures": [str(failure) for failure in result.failures],
    }


def print_score_result(result: ScoreResult) -> None:
    """The closing table, on stdout."""
    summary = result.summary
    table = fact_table()
    by_status = _by_status(summary)
    table.add_row("rows", f"{summary.num_rows:,}" + (f"  ({by_status})" if by_status else ""))
    speed = ""
    if result.seconds and result.num_tokens_now:
        speed = (
            f"  ({result.num_tokens_now:,} now, in {format_seconds(result.seconds)}: "
            f"{result.num_tokens_now / result.seconds:,.0f} tokens/s)"
        )
    table.add_row("scored tokens", f"{summary.num_tokens:,}{speed}")
    rsr = summary.dataset.rsr
    if rsr is None:
        table.add_row("data-set RSR", "nothing was scored")
    elif result.second_pass is None:
        table.add_row("data-set RSR", f"{rsr:.4f}")
    else:
        table.add_row("column", SECOND_PASS_COLUMNS[result.second_pass].name)
    for number, line in enumerate(told_reasons(summary.reasons)):
        table.add_row("" if number else "without a score", line)
    if result.setbacks:
        told = ", ".join(f"{count:,} {cause}" for cause, count in sorted(result.setbacks.items()))
        table.add_row("setbacks", told)
    table.add_row("result", str(RunFolder(result.output)))
    table.add_row("log", str(result.log))
    Console().show(table)
    if result.failures:
        _print_failures(result.failures)


def _print_failures(failures: list[Failure]) -> None:
    """A table of what the run ended without, on stderr."""
    table = Table(title="failed", title_justify="left")
    for heading in ("what", "attempts", "why"):
        table.add_column(heading, overflow="fold")
    for failure in failures:
        table.add_row(failure.where, str(failure.attempts), failure.reason)
    Console(stderr=True).print(table)


def _by_status(summary: Summary) -> str:
    return ", ".join(f"{count:,} {status}" for status, count in summary.rows_by_status.items())
