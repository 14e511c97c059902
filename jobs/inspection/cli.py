"""`rsr inspect`: parse, look, print."""

from pathlib import Path
from typing import Any

import click

from rsr.jobs.command import configure_logging, guarded, json_option
from rsr.jobs.inspection.inspection import Inspection, InspectOptions, inspect_input
from rsr.jobs.inspection.page import write_page
from rsr.jobs.inspection.printing import print_inspection
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.options import (
    ENCODING_FIELDS,
    column_options,
    scorer_config,
    scorer_options,
    trajectory_columns,
)
from rsr.jobs.terminal import Console, print_json


@click.command()
@click.argument("input", metavar="INPUT")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    help="Rows that the table counts, from the first of INPUT.",
)
@click.option(
    "--show",
    "num_shown",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="Rows to show, from the first; on the terminal, long texts are cut short in the middle.",
)
@click.option(
    "--row",
    type=click.IntRange(min=0),
    help="Show the whole of this row instead: its number in INPUT, from 0.",
)
@click.option(
    "--html",
    "page",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write what is shown to a self-contained page, texts as a whole.",
)
@scorer_options(*ENCODING_FIELDS)
@column_options
@json_option
def inspect(
    input: str,
    limit: int,
    num_shown: int,
    row: int | None,
    page: Path | None,
    as_json: bool,
    **student_and_columns: Any,
) -> None:
    """Show INPUT's first rows as the student reads them, and what of them would be scored.

    Then counts, over --limit rows: which have no score and why, how many tokens are scored and how
    many are too many, and what was changed before the chat template. Takes INPUT and options as
    rsr score does; reads the model's tokenizer and configuration alone, loads no weights, needs no
    GPU and writes nothing but --html.
    """
    configure_logging(verbose=False)

    def run(stop: StopRequest) -> Inspection:
        options = InspectOptions(
            input=input,
            scorer=scorer_config(student_and_columns, with_weights=False),
            columns=trajectory_columns(student_and_columns),
            limit=limit,
            num_shown=num_shown,
            row=row,
        )
        inspection = inspect_input(options, stop)
        if page is not None:
            write_page(inspection, options, page)
        return inspection

    inspection = guarded(run, after_stop="the same command starts over")
    if as_json:
        print_json(inspection.to_json())
    else:
        print_inspection(inspection, Console(), whole=row is not None)
