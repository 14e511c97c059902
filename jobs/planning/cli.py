"""`rsr plan`: parse, predict, print."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich import box

from rsr.jobs.command import guarded, json_option
from rsr.jobs.inspection.printing import print_reading
from rsr.jobs.options import (
    ENCODING_FIELDS,
    column_options,
    scorer_config,
    scorer_options,
    trajectory_columns,
)
from rsr.jobs.planning.gpus import GPUS
from rsr.jobs.planning.prediction import RunPlan, plan_run
from rsr.jobs.terminal import Console, Table, print_json, printable

BAR_WIDTH = 24
"""Characters of the longest bar; with what stands before it, it fits into 60 columns."""


@click.command()
@click.argument("input", metavar="INPUT")
@click.option("--gpu", required=True, type=click.Choice(sorted(GPUS)), help="GPU to predict for.")
@click.option(
    "--num-gpus",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Number of these GPUs.",
)
@click.option(
    "--calibration",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Output of rsr bench engine --json, on this GPU with this student: measured speed "
    "instead of assumed.",
)
@click.option(
    "--sample",
    "sample_rows",
    type=click.IntRange(min=2),
    default=1000,
    show_default=True,
    help="Rows to tokenize.",
)
@scorer_options(
    *ENCODING_FIELDS,
    "dtype",
    "metrics",
    "prompt_metrics",
    "token_scores",
    "step_pattern",
    "unconditional",
    "window",
)
@column_options
@json_option
def plan(
    input: str,
    gpu: str,
    num_gpus: int,
    calibration: Path | None,
    sample_rows: int,
    as_json: bool,
    **student_and_columns: Any,
) -> None:
    """Predict what rsr score over INPUT would take: tokens, memory, hours, GPU-hours, output.

    Reads a sample of rows, with the options of rsr score, and the student's configuration; loads no
    weights and needs no GPU. Rows of the sample that would have no score are counted by reason.
    """
    predicted = guarded(
        lambda _stop: plan_run(
            input,
            scorer_config(student_and_columns, with_weights=False),
            trajectory_columns(student_and_columns),
            GPUS[gpu],
            num_gpus=num_gpus,
            sample_rows=sample_rows,
            calibration=calibration,
        )
    )
    if as_json:
        print_json(asdict(predicted) | {"sample": predicted.sample.to_json()})
    else:
        _print(predicted, input, student_and_columns["model"])


def _print(predicted: RunPlan, source: str, model: str) -> None:
    table = Table(
        "predicted",
        "",
        "because",
        title=printable(f"{source} by {model}: a prediction, nothing was run"),
        box=box.HEAVY_HEAD,
        pad_edge=True,
    )
    for figure in predicted.figures:
        table.add_row(figure.name, figure.value, figure.because)
    lengths = Table("tokens of a row", "sampled rows", "")
    most = max(bar["num_rows"] or 0 for bar in predicted.length_histogram)
    for bar in predicted.length_histogram:
        count, edge = bar["num_rows"] or 0, bar["up_to"]
        label = f"up to {edge:,}" if edge else "more"
        lengths.add_row(label, f"{count:,}", "█" * math.ceil(BAR_WIDTH * count / max(1, most)))
    options = " ".join(
        f"--{name.replace('_', '-')} {value}" for name, value in predicted.settings.items()
    )
    console = Console()
    console.print(table, lengths)
    print_reading(predicted.sample, console)
    console.say(f"it would take: {options}")
