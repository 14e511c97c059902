"""`rsr export`: parse, build options, export, push, print."""

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import click

from rsr.jobs.command import EXIT_FAILURES, Place, guarded, json_option, typed_command
from rsr.jobs.export.export import (
    DEFAULT_NAME,
    DEFAULT_SHARD_ROWS,
    ExportOptions,
    ExportResult,
    run_export,
)
from rsr.jobs.export.formats import FormatName
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.options import column_options, trajectory_columns
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.storage.hub_push import PushTarget
from rsr.jobs.terminal import Console, complain, fact_table, print_json

OPTION_NAMES = frozenset(option.name for option in fields(ExportOptions))


@click.command()
@click.argument("input", metavar="SELECTED")
@click.argument("output", metavar="FOLDER", type=Place())
@click.option(
    "--format",
    type=click.Choice(get_args(FormatName)),
    default="messages",
    show_default=True,
    help="Format whose fields a row gets.",
)
@column_options
@click.option(
    "--id-column",
    metavar="COLUMN",
    help="Column that identifies rows. [default: id, if its values differ; else file and row]",
)
@click.option(
    "--shuffle-seed",
    "seed",
    type=int,
    help="Shuffle the rows by this seed. [default: SELECTED's order]",
)
@click.option(
    "--shard-rows",
    type=click.IntRange(min=1),
    default=DEFAULT_SHARD_ROWS,
    show_default=True,
    help="Most rows of a Parquet file.",
)
@click.option("--name", default=DEFAULT_NAME, show_default=True, help="Name of the data set.")
@click.option(
    "--license",
    "licence",
    metavar="ID",
    help="Licence of the data set, in the hub's spelling (apache-2.0). Without it, the card "
    "says that none was stated.",
)
@click.option(
    "--source",
    "sources",
    multiple=True,
    metavar="TEXT",
    help="Source of the rows and its licence, for the card; may be repeated.",
)
@click.option("--push", metavar="hf://datasets/ORG/NAME", help="Upload the folder to the hub, too.")
@click.option(
    "--public", is_flag=True, help="Make a data set that --push creates public, not private."
)
@click.option("--overwrite", is_flag=True, help="Discard the earlier export in FOLDER.")
@json_option
def export(output: Path | str, push: str | None, public: bool, as_json: bool, **asked: Any) -> None:
    """Write the trajectories in SELECTED as a data set that trainers read, into FOLDER.

    FOLDER gets data/train-*.parquet and train.jsonl with nothing but what is trained on,
    scores.parquet with everything else that is known of a row by its id, a data-set card, and
    what LLaMA-Factory and axolotl want to be told. Null fields are left out. Stopped half way, the
    same command goes on.
    """

    def run(stop: StopRequest) -> tuple[ExportResult, str | None]:
        # A place that cannot be pushed to is refused before anything is written.
        target = None if push is None else PushTarget.of(push)
        columns = trajectory_columns(asked)
        own = {name: value for name, value in asked.items() if name in OPTION_NAMES}
        options = ExportOptions(output=output, columns=columns, command=typed_command(), **own)
        result = run_export(options, stop)
        pushed = None
        if target is not None:
            pushed = target.push(result.folder.storage, result.files, private=not public)
        return result, pushed

    result, pushed = guarded(run, log=RunFolder(output).log_path)
    if as_json:
        print_json(
            {
                "output": str(result.folder.root),
                "num_rows": result.num_rows,
                "num_files": result.num_files,
                "left_out": dict(result.left_out),
                "ids": result.ids,
                "pushed": pushed,
            }
        )
    else:
        _print(result, pushed)
    for reason, count in result.left_out.items():
        complain(f"left out, {count:,} rows: {reason}")
    sys.exit(EXIT_FAILURES if result.left_out else 0)


def _print(result: ExportResult, pushed: str | None) -> None:
    table = fact_table()
    table.add_row("rows", f"{result.num_rows:,} in {result.num_files:,} Parquet files")
    table.add_row("ids", result.ids)
    table.add_row("result", str(result.folder))
    if pushed is not None:
        table.add_row("pushed", pushed)
    Console().show(table)
