"""`rsr sample`: parse, build options, call one function, print what it returns."""

import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import click

from rsr.engine.sampling import Sampling
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
from rsr.jobs.options import scorer_config, scorer_options
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.progress import Progress
from rsr.jobs.sampling.sample import SampleOptions, SampleResult, run_sample
from rsr.jobs.shards.score_columns import told_reasons
from rsr.jobs.terminal import Console, complain, fact_table, format_seconds, print_json

STUDENT_OPTIONS = (
    "model",
    "revision",
    "dtype",
    "max_model_len",
    "chat_template",
    "chat_template_kwargs",
    "tensor_parallel_size",
    "gpu_memory_utilization",
    "max_num_batched_tokens",
    "compile",
    "trust_remote_code",
)
OPTION_NAMES = frozenset(option.name for option in fields(SampleOptions))
POOL_OPTIONS = ("workers", "address", "unit_timeout_s")


def pool_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options on which workers a run has, as the keywords `POOL_OPTIONS`."""
    for option in (
        click.option(
            "--unit-timeout",
            "unit_timeout_s",
            type=click.FloatRange(min=0, min_open=True),
            help="Seconds in the engine after which a unit's worker is killed.",
        ),
        click.option(
            "--address", help="Ray cluster to join: auto, host:port of its head, or local."
        ),
        click.option("--workers", type=click.IntRange(min=1), help="Engines at a time."),
    ):
        command = option(command)
    return command


def told_speed(num_tokens: int, seconds: float) -> str:
    """How fast engines were that made so many tokens in this start; "" if they made none."""
    if not seconds or not num_tokens:
        return ""
    rate = num_tokens / seconds
    return f"  ({num_tokens:,} now, in {format_seconds(seconds)}: {rate:,.0f} tokens/s)"


@click.command()
@click.argument("input", metavar="PROBLEMS")
@click.argument("output", metavar="OUTPUT", type=Place())
@scorer_options(*STUDENT_OPTIONS)
@click.option(
    "-n",
    "--num-samples",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Answers to each problem; raised later, only the new ones are sampled.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=1.0,
    show_default=True,
    help="Temperature of the samples; 0 always takes the likeliest token.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=1.0,
    show_default=True,
    help="Probability mass of the likeliest tokens that samples are drawn from.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=4096,
    show_default=True,
    help="Longest answer; a longer one is cut off, with finish_reason length.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Seed of the run; each sample's own follows from it, the file, the row and its number.",
)
@click.option(
    "--prompt-column",
    help="Column of problems, texts or messages. [default: messages, prompt, problem, question]",
)
@click.option(
    "--prompt-file",
    type=click.Path(),
    help="YAML file with user, and system if needed: Jinja templates over the row's columns.",
)
@pool_options
@click.option("--overwrite", is_flag=True, help="Discard the earlier run in OUTPUT.")
@click.option(
    "--same-input",
    is_flag=True,
    help="Go on although PROBLEMS' files have other times: they are copies.",
)
@json_option
@click.option("-v", "--verbose", is_flag=True, help="Show what vLLM and Ray say.")
def sample(
    output: Path | str,
    temperature: float,
    top_p: float,
    max_tokens: int,
    as_json: bool,
    verbose: bool,
    **asked: Any,
) -> None:
    """Let the student answer the PROBLEMS, writing its answers to the folder OUTPUT.

    OUTPUT gets one row for each answer: the problem's columns untouched, and messages, response,
    sample_index, seed, finish_reason, num_tokens, sample_detail, sample_model and prompt_hash.
    Stopped half way, the same command goes on.
    """
    configure_logging(verbose)

    def run(stop: StopRequest) -> SampleResult:
        if asked["prompt_column"] and asked["prompt_file"]:
            raise UsageError("give --prompt-column or --prompt-file")
        student = {name: asked[name] for name in STUDENT_OPTIONS}
        own = {n: v for n, v in asked.items() if n in OPTION_NAMES and n not in STUDENT_OPTIONS}
        options = SampleOptions(
            output=output,
            student=scorer_config(student),
            sampling=Sampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens),
            verbose=verbose,
            command=typed_command(),
            **own,
        )
        return run_sample(options, Progress(lacking="without an answer"), stop)

    result = guarded(run, log=RunFolder(output).log_path)
    done, summary = result.done, result.done.summary
    if as_json:
        print_json(
            {
                "output": str(result.output),
                "log": str(result.log),
                "answers_by_finish_reason": summary.rows_by_status,
                "reasons": {name: asdict(reason) for name, reason in summary.reasons.items()},
                "num_tokens": summary.num_tokens,
                "num_tokens_now": done.num_tokens_now,
                "seconds": done.seconds,
                "failures": [str(failure) for failure in done.failures],
            }
        )
    else:
        table = fact_table()
        told = ", ".join(f"{count:,} {name}" for name, count in summary.rows_by_status.items())
        table.add_row("answers", f"{sum(summary.rows_by_status.values()):,}  ({told})")
        speed = told_speed(done.num_tokens_now, done.seconds)
        table.add_row("tokens", f"{summary.num_tokens:,}{speed}")
        for number, line in enumerate(told_reasons(summary.reasons)):
            table.add_row("" if number else "without an answer", line)
        table.add_row("result", f"{result.output}/")
        table.add_row("log", str(result.log))
        Console().show(table)
    for failure in done.failures:
        complain(f"failed: {failure}")
    sys.exit(EXIT_FAILURES if done.failures else 0)
