"""`rsr plan`: parse, predict, print."""

import math
from collections.abc import Callable, Sequence
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
from rsr.jobs.planning.prediction import Figure, RunPlan, plan_run
from rsr.jobs.planning.selection import ClusterSize, plan_selection
from rsr.jobs.selection.cli import filter_, filter_options, select, select_options
from rsr.jobs.selection.filter import FilterOptions
from rsr.jobs.selection.select import SelectOptions
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


CLUSTER_OPTIONS = [
    click.Option(
        ["--machines", "num_machines"],
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="Machines of the cluster.",
    ),
    click.Option(
        ["--bandwidth", "bandwidth_gbytes"],
        type=click.FloatRange(min=0, min_open=True),
        default=1.0,
        show_default=True,
        help="GB (10⁹ bytes) that each machine reads and writes in a second.",
    ),
    click.Option(
        ["--kept-share"],
        type=click.FloatRange(0, 1),
        help="Share of all rows that will be kept. [default: --keep-fraction, else 1]",
    ),
    click.Option(
        ["--sample-files", "num_sampled"],
        type=click.IntRange(min=1),
        default=16,
        show_default=True,
        help="Files whose footers are read.",
    ),
]
OPTIONS_OF_A_RUN = {"output", "address", "overwrite"}


def _plan_of_selection(
    command: click.Command, make_options: Callable[..., FilterOptions | SelectOptions]
) -> click.Command:
    """`rsr plan filter` or `rsr plan select`: with the options of `command`, but nothing is run."""

    def run(
        num_machines: int,
        bandwidth_gbytes: float,
        kept_share: float | None,
        num_sampled: int,
        as_json: bool,
        **fields: Any,
    ) -> None:
        options = make_options(output=Path(), **fields)
        share = kept_share if kept_share is not None else fields.get("keep_fraction") or 1
        size = ClusterSize(num_machines, bandwidth_gbytes)
        predicted = guarded(lambda _stop: plan_selection(options, float(share), size, num_sampled))
        if as_json:
            print_json(predicted.to_json())
        else:
            Console().print(_figures(predicted.figures, f"rsr {command.name} {options.input}"))

    kept = [p for p in command.params if p.name not in OPTIONS_OF_A_RUN]
    told = f"Predict what rsr {command.name} SCORED on a cluster would read, exchange and write."
    return click.Command(
        f"plan {command.name}", params=[*kept, *CLUSTER_OPTIONS], callback=run, help=told
    )


plan_filter = _plan_of_selection(filter_, filter_options)
plan_select = _plan_of_selection(select, select_options)


def _figures(figures: Sequence[Figure], subject: str) -> Table:
    table = Table(
        "predicted",
        "",
        "because",
        title=printable(f"{subject}: a prediction, nothing was run"),
        box=box.HEAVY_HEAD,
        pad_edge=True,
    )
    for figure in figures:
        table.add_row(figure.name, figure.value, figure.because)
    return table


def _print(predicted: RunPlan, source: str, model: str) -> None:
    table = _figures(predicted.figures, f"{source} by {model}")
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
