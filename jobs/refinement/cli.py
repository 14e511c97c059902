"""`rsr refine`: parse, build options, call one function, print what it returns."""

import sys
from pathlib import Path
from typing import Any

import click

from rsr.jobs.command import EXIT_FAILURES, Place, guarded, json_option, typed_command
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.options import column_options, trajectory_columns
from rsr.jobs.refinement.endpoint import EndpointOptions
from rsr.jobs.refinement.outcome import RefineStatus
from rsr.jobs.refinement.prompts import MODES
from rsr.jobs.refinement.refine import (
    DEFAULT_CONCURRENCY,
    RefineOptions,
    RefineResult,
    run_refine,
)
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.terminal import Console, complain, fact_table, print_json


@click.command()
@click.argument("input", metavar="INPUT")
@click.argument("output", metavar="OUTPUT", type=Place())
@click.option(
    "--mode",
    type=click.Choice(MODES),
    required=True,
    help="What the oracle does. style-aligned: repair what is wrong, in the student's own "
    "style. minimal: as few changes as possible. from-scratch: a solution of the oracle's own, "
    "which does not see the trace.",
)
@click.option(
    "--endpoint",
    "url",
    required=True,
    metavar="URL",
    help="URL of a server with OpenAI's API, up to /v1.",
)
@click.option(
    "--api-model",
    "model",
    required=True,
    metavar="NAME",
    help="Name of the oracle at the endpoint.",
)
@click.option(
    "--api-key-variable",
    "key_variable",
    default="OPENAI_API_KEY",
    show_default=True,
    metavar="NAME",
    help="Variable of the environment that holds the key; a local server needs none. The key is "
    "never written down.",
)
@click.option(
    "--answer-column",
    metavar="COLUMN",
    help="Column of gold answers, which the oracle is told. [default: it is told none]",
)
@click.option(
    "--id-column",
    metavar="COLUMN",
    help="Column whose values become parent_id. [default: id if there is one, else file and row]",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    help="Sampling temperature of replies. [default: the server's]",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    help="Longest reply; the native trace is kept where one is longer. [default: the server's]",
)
@click.option(
    "--concurrency",
    type=click.IntRange(min=1),
    default=DEFAULT_CONCURRENCY,
    show_default=True,
    help="Most requests at a time.",
)
@click.option(
    "--max-requests",
    type=click.IntRange(min=1),
    help="Stop after this many, attempts that failed included; the same command goes on with as "
    "many again. [default: as many as it takes]",
)
@click.option(
    "--retries",
    type=click.IntRange(min=0),
    default=EndpointOptions.__dataclass_fields__["retries"].default,
    show_default=True,
    help="Retries of a row's request, with growing pauses, if the server is busy or silent.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    default=EndpointOptions.__dataclass_fields__["timeout_s"].default,
    show_default=True,
    help="Seconds of one request.",
)
@column_options
@click.option("--overwrite", is_flag=True, help="Discard the earlier run in OUTPUT.")
@click.option(
    "--same-input",
    is_flag=True,
    help="Go on though INPUT's files have other times than when the run began: they are copies.",
)
@json_option
def refine(
    input: str,
    output: Path | str,
    mode: Any,
    url: str,
    model: str,
    key_variable: str,
    answer_column: str | None,
    id_column: str | None,
    temperature: float | None,
    max_tokens: int | None,
    concurrency: int,
    max_requests: int | None,
    retries: int,
    timeout_s: float,
    overwrite: bool,
    same_input: bool,
    as_json: bool,
    **asked: Any,
) -> None:
    """Have an oracle repair each row's trace in INPUT, or write it anew, into the folder OUTPUT.

    OUTPUT gets one Parquet file for each of INPUT, under the same name: the same rows in the same
    order, the oracle's trace in the place of the native one, which is kept as original_response
    beside parent_id and refine_status. A row that the oracle refuses, cuts off or does not answer
    keeps its native trace, and refine_detail says why. Scores and grades of the native traces are
    left out: grade and score OUTPUT, and rsr compare tells what was gained. Stopped half way, the
    same command goes on, and asks nothing again that was answered.

    The oracle is a server; that of `vllm serve` is one. rsr starts none itself.
    """

    def run(stop: StopRequest) -> RefineResult:
        endpoint = EndpointOptions(
            url=url,
            model=model,
            key_variable=key_variable,
            temperature=temperature,
            max_tokens=max_tokens,
            timeout_s=timeout_s,
            retries=retries,
        )
        options = RefineOptions(
            input=input,
            output=output,
            mode=mode,
            endpoint=endpoint,
            columns=trajectory_columns(asked),
            answer_column=answer_column,
            id_column=id_column,
            concurrency=concurrency,
            max_requests=max_requests,
            overwrite=overwrite,
            same_input=same_input,
            command=typed_command(),
        )
        return run_refine(options, stop)

    result = guarded(run, log=RunFolder(output).log_path)
    if as_json:
        print_json(
            {
                "output": str(result.folder.root),
                "num_rows": result.summary.num_rows,
                "rows_by_status": result.summary.rows_by_status,
                "num_requests": result.num_requests,
            }
        )
    else:
        _print(result)
    sys.exit(_exit_code(result))


def _print(result: RefineResult) -> None:
    table = fact_table()
    by_status = ", ".join(f"{n:,} {name}" for name, n in result.summary.rows_by_status.items())
    told = f"  ({by_status})" if by_status else ""
    table.add_row("rows", f"{result.summary.num_rows:,}{told}")
    table.add_row("requests", f"{result.num_requests:,} by this start")
    table.add_row("result", f"{result.folder.root}/")
    Console().show(table)


def _exit_code(result: RefineResult) -> int:
    """1 where no row came back from the oracle with a trace, which is said; else 0."""
    counts = result.summary.rows_by_status
    answered = (RefineStatus.REFINED, RefineStatus.UNCHANGED)
    if result.summary.num_rows and not any(counts.get(status) for status in answered):
        told = ", ".join(f"{count:,} {status}" for status, count in counts.items())
        complain(
            f"no row was refined: {told}; refine_detail in {result.folder.root} tells why of each"
        )
        return EXIT_FAILURES
    return 0
