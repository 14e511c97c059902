"""`rsr refine`: parse, build options, call one function, print what it returns."""

import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from rsr.engine.sampling import Sampling
from rsr.jobs.cluster.options import ClusterOptions
from rsr.jobs.command import (
    EXIT_FAILURES,
    Place,
    configure_logging,
    guarded,
    json_option,
    typed_command,
)
from rsr.jobs.errors import UsageError
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.options import column_options, scorer_config, scorer_options, trajectory_columns
from rsr.jobs.refinement.endpoint import EndpointOptions
from rsr.jobs.refinement.options import ModelOptions, RefineOptions, RefineResult
from rsr.jobs.refinement.outcome import RefineStatus
from rsr.jobs.refinement.prompts import MODES
from rsr.jobs.refinement.refine import run_refine
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.progress import Progress
from rsr.jobs.sampling.cli import POOL_OPTIONS, STUDENT_OPTIONS, pool_options, told_speed
from rsr.jobs.terminal import Console, complain, fact_table, print_json

ENGINE_OPTIONS = tuple(name for name in STUDENT_OPTIONS if name != "model")
OF_MODEL = {*ENGINE_OPTIONS, *POOL_OPTIONS, "top_p", "seed", "verbose"}
"""Options that go with --model."""
OF_ENDPOINT = {
    "api_model",
    "key_variable",
    "concurrency",
    "max_requests",
    "retries",
    "timeout_s",
}
"""Options that go with --endpoint."""
SERVER, SAMPLING = EndpointOptions.__dataclass_fields__, Sampling()


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
    "--model",
    help="The oracle, run by workers here: a folder, or a Hugging Face hub name. Or give "
    "--endpoint.",
)
@click.option(
    "--endpoint",
    "url",
    metavar="URL",
    help="URL of the oracle's server with OpenAI's API, up to /v1. Or give --model.",
)
@click.option("--api-model", metavar="NAME", help="Name of the oracle at --endpoint.")
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
    help=f"Sampling temperature of replies. [default: the server's; {SAMPLING.temperature} with "
    "--model]",
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=SAMPLING.top_p,
    show_default=True,
    help="Share of the probability that tokens are sampled from, with --model.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    help="Longest reply; the native trace is kept where one is longer. [default: the server's; "
    f"{SAMPLING.max_tokens} with --model]",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Seed of the run with --model; a reply's own follows from it, the file and the row.",
)
@click.option(
    "--concurrency",
    type=click.IntRange(min=1),
    default=SERVER["concurrency"].default,
    show_default=True,
    help="Most requests to --endpoint at a time.",
)
@click.option(
    "--max-requests",
    type=click.IntRange(min=1),
    help="Stop after this many to --endpoint, attempts that failed included; the same command goes "
    "on with as many again. [default: as many as it takes]",
)
@click.option(
    "--retries",
    type=click.IntRange(min=0),
    default=SERVER["retries"].default,
    show_default=True,
    help="Retries of a row's request, with growing pauses, if the server is busy or silent.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    default=SERVER["timeout_s"].default,
    show_default=True,
    help="Seconds of one request.",
)
@scorer_options(*ENGINE_OPTIONS)
@pool_options
@column_options
@click.option("--overwrite", is_flag=True, help="Discard the earlier run in OUTPUT.")
@click.option(
    "--same-input",
    is_flag=True,
    help="Go on though INPUT's files have other times than when the run began: they are copies.",
)
@json_option
@click.option("-v", "--verbose", is_flag=True, help="Show what vLLM and Ray say.")
@click.pass_context
def refine(
    context: click.Context,
    /,
    input: str,
    output: Path | str,
    mode: Any,
    answer_column: str | None,
    id_column: str | None,
    overwrite: bool,
    same_input: bool,
    as_json: bool,
    verbose: bool,
    **asked: Any,
) -> None:
    """Have an oracle repair each row's trace in INPUT, or write it anew, into the folder OUTPUT.

    OUTPUT gets one Parquet file for each of INPUT, under the same name: the same rows in the same
    order, the oracle's trace in the place of the native one, which is kept as original_response
    beside parent_id and refine_status. A row that the oracle refuses, cuts off or does not answer
    keeps its native trace, and refine_detail says why. Scores and grades of the native traces are
    left out: grade and score OUTPUT, and rsr compare tells what was gained. Where INPUT is one
    file, OUTPUT may be one too: call it x.parquet or x.jsonl. Stopped half way, the same command
    goes on, and asks nothing again that was answered.

    The oracle is a --model, on workers as rsr sample has them, or a server, --endpoint; that of
    `vllm serve` is one.
    """
    configure_logging(verbose)

    def run(stop: StopRequest) -> RefineResult:
        _require_one_oracle(context)
        options = RefineOptions(
            input=input,
            output=output,
            mode=mode,
            oracle=_model(asked, verbose) if asked["model"] else _endpoint(asked),
            columns=trajectory_columns(asked),
            answer_column=answer_column,
            id_column=id_column,
            overwrite=overwrite,
            same_input=same_input,
            command=typed_command(),
        )
        return run_refine(options, Progress(), stop)

    result = guarded(run, log=RunFolder(output).log_path)
    if as_json:
        print_json(_to_json(result))
    else:
        _print(result)
    for failure in result.failures:
        complain(f"failed: {failure}")
    sys.exit(EXIT_FAILURES if result.failures else _exit_code(result))


def _require_one_oracle(context: click.Context) -> None:
    """Raises `UsageError` unless there is one oracle, and no option of the other kind."""
    asked = context.params
    if bool(asked["model"]) == bool(asked["url"]):
        raise UsageError(
            "give one oracle: --model NAME, which workers load, or --endpoint URL --api-model NAME"
        )
    if asked["url"] and not asked["api_model"]:
        raise UsageError("--endpoint needs --api-model NAME, as the server calls the oracle")
    others, kind = (OF_ENDPOINT, "--endpoint") if asked["model"] else (OF_MODEL, "--model")
    for option in context.command.params:
        is_typed = context.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE
        if option.name in others and is_typed:
            found = "--model" if asked["model"] else "--endpoint"
            raise UsageError(f"{option.opts[-1]} goes with {kind}, not with {found}")


def _endpoint(asked: dict[str, Any]) -> EndpointOptions:
    names = ("url", "key_variable", "temperature", "max_tokens", "timeout_s", "retries")
    given = {name: asked[name] for name in (*names, "concurrency", "max_requests")}
    return EndpointOptions(model=asked["api_model"], **given)


def _model(asked: dict[str, Any], verbose: bool) -> ModelOptions:
    drawn = {"top_p": asked["top_p"]}
    drawn |= {n: asked[n] for n in ("temperature", "max_tokens") if asked[n] is not None}
    return ModelOptions(
        config=scorer_config({name: asked[name] for name in STUDENT_OPTIONS}),
        sampling=Sampling(**drawn),
        seed=asked["seed"],
        cluster=ClusterOptions(
            address=asked["address"],
            num_workers=asked["workers"],
            unit_timeout_s=asked["unit_timeout_s"],
        ),
        verbose=verbose,
    )


def _to_json(result: RefineResult) -> dict[str, Any]:
    told: dict[str, Any] = {
        "output": str(result.folder.root),
        "num_rows": result.summary.num_rows,
        "rows_by_status": result.summary.rows_by_status,
        "num_tokens": result.summary.num_tokens,
    }
    if result.num_requests is not None:
        return told | {"num_requests": result.num_requests}
    return told | {
        "num_tokens_now": result.num_tokens_now,
        "seconds": result.seconds,
        "failures": [str(failure) for failure in result.failures],
    }


def _print(result: RefineResult) -> None:
    table = fact_table()
    by_status = ", ".join(f"{n:,} {name}" for name, n in result.summary.rows_by_status.items())
    told = f"  ({by_status})" if by_status else ""
    table.add_row("rows", f"{result.summary.num_rows:,}{told}")
    speed = told_speed(result.num_tokens_now, result.seconds)
    table.add_row("tokens", f"{result.summary.num_tokens:,} of the oracle's{speed}")
    if result.num_requests is not None:
        table.add_row("requests", f"{result.num_requests:,} by this start")
    table.add_row("result", str(result.folder))
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
