"""`rsr status` and `rsr verify`, for a run of any command, on any machine that sees OUTPUT."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import click
from rich.live import Live

from rsr.jobs.command import EXIT_FAILURES, Place, guarded, json_option
from rsr.jobs.errors import Interrupted
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.preflight import refusing_what_cannot_be_reached
from rsr.jobs.run.status import RunStatus, read_status
from rsr.jobs.run.verify import Verification, verify_output
from rsr.jobs.shards.score_columns import told_reasons
from rsr.jobs.terminal import (
    Console,
    Table,
    fact_table,
    format_seconds,
    is_stdout_read,
    print_json,
    quantity,
)

WATCH_EVERY_S = 2.0


class Words(NamedTuple):
    """What a table calls the tokens that a run counts, and rows that it refused."""

    tokens: str
    lacking: str


SCORE_WORDS = Words("scored tokens", "without a score")
WORDS = {
    "sample": Words("sampled tokens", "without an answer"),
    "refine": Words("tokens of the oracle", "with the native trace"),
}
"""Words for the runs of each command that does not use `SCORE_WORDS`."""


@click.command()
@click.argument("output", metavar="OUTPUT", type=Place())
@click.option("--watch", is_flag=True, help="Print again every two seconds, until nobody writes.")
@json_option
def status(output: Path | str, watch: bool, as_json: bool) -> None:
    """Say how far the run in OUTPUT is: rows, shards, speed, and who is writing.

    Works while the run goes and after it. With --watch and --json, one object a line.
    """
    folder = RunFolder(output)
    if watch:
        guarded(lambda stop: _watch(folder, stop, as_json))
        return
    found = guarded(lambda _stop: _read(folder))
    if as_json:
        print_json(found.to_json())
    else:
        Console().show(_table(found))


def _read(folder: RunFolder) -> RunStatus:
    with refusing_what_cannot_be_reached():
        return read_status(folder)


def _watch(folder: RunFolder, stop: StopRequest, as_json: bool) -> None:
    found = _read(folder)
    with Live(Table(), console=Console(quiet=as_json), auto_refresh=False) as live:
        while True:
            if as_json:
                print_json(found.to_json())
            live.update(_table(found), refresh=True)
            if found.holder is None or not is_stdout_read():
                return
            try:
                stop.wait(WATCH_EVERY_S)
            except Interrupted:
                return
            found = _read(folder)


def _table(found: RunStatus) -> Table:
    table, words = fact_table(), WORDS.get(found.writer, SCORE_WORDS)
    share = found.num_rows_done / found.num_rows if found.num_rows else 1.0
    what = f"{found.output}, rsr {found.writer} {found.subject}, begun {found.created}"
    table.add_row("run", what)
    table.add_row("rows", f"{found.num_rows_done:,} of {found.num_rows:,} ({share:.1%})")
    units = quantity(found.num_units_kept, "unit")
    kept = f", and {units} of those to come" if found.num_units_kept else ""
    table.add_row("shards", f"{found.num_shards_done:,} of {found.num_shards:,} written{kept}")
    if found.num_shards_done:
        by_status = ", ".join(f"{n:,} {name}" for name, n in found.rows_by_status.items())
        told = [f"{found.num_rows_written:,} rows" + (f" ({by_status})" if by_status else "")]
        if found.num_tokens:
            told.append(f"{found.num_tokens:,} {words.tokens}")
        table.add_row("in them", ", ".join(told))
    for number, line in enumerate(told_reasons(found.reasons)):
        table.add_row("" if number else words.lacking, line)
    if found.dataset_rsr is not None:
        table.add_row("data-set RSR", f"{found.dataset_rsr:.4f}")
    if found.rows_per_s is not None:
        left = found.seconds_left
        later = "" if left is None else f", {format_seconds(left)} left"
        table.add_row("speed", f"{found.rows_per_s:,.1f} rows/s{later}")
    table.add_row("now", _now(found))
    return table


def _now(found: RunStatus) -> str:
    if found.holder is not None:
        return f"written by {found.holder}"
    if found.is_finished:
        return "finished"
    return f"stopped; the same rsr {found.writer} command goes on"


@click.command()
@click.argument("output", metavar="OUTPUT", type=Place())
@click.option(
    "--deep",
    is_flag=True,
    help="Also compare every input column with INPUT, bit for bit, in order.",
)
@click.option("--input", "source", help="Place of INPUT now, if it was moved since the run.")
@json_option
def verify(output: Path | str, deep: bool, source: str | None, as_json: bool) -> None:
    """Check that OUTPUT is whole: every row once, in order, every byte as it was written.

    Reads everything and changes nothing. Exit code 1 and a table if something is wrong, with the
    commands that put it right.
    """

    def run(stop: StopRequest) -> Verification:
        with refusing_what_cannot_be_reached():
            return verify_output(RunFolder(output), deep=deep, stop=stop, source=source)

    checked = guarded(run)
    if as_json:
        print_json(asdict(checked))
    else:
        _print(checked)
    sys.exit(EXIT_FAILURES if checked.problems else 0)


def _print(checked: Verification) -> None:
    console = Console()
    shards = quantity(checked.num_shards, "shard")
    looked = f"{quantity(checked.num_rows, 'row')} in {shards} of {checked.output}"
    if not checked.problems:
        how = "whole, in order, and as in INPUT" if checked.is_deep else "whole"
        console.say(f"{looked}: {how}")
        return
    table = Table("file", "what is wrong")
    for problem in checked.problems:
        table.add_row(problem.file, problem.what)
    console.say(f"{looked}: {quantity(len(checked.problems), 'problem')}")
    console.show(table)
    if checked.repair:
        console.say("To repair:")
    for command in checked.repair:
        console.say(f"  {command}")
