"""`rsr status`: how far a run is, from the files it leaves; while it writes, and after.

Reads the manifest, receipts and the names of finished units, never a score. Knows nothing of
Ray: it can run on any machine that sees OUTPUT.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.live import Live
from rich.table import Table

from rsr.jobs.command import Place, guarded, json_option
from rsr.jobs.errors import Interrupted, UsageError
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.run.folder import OutputFolder, range_of_unit
from rsr.jobs.run.progress import format_seconds
from rsr.jobs.shards.score_columns import Summary
from rsr.jobs.storage.locks import Holder

WATCH_EVERY_S = 2.0
RATE_WINDOW_S = 600.0
"""Speed is that of the last ten minutes: long enough for many units, short enough to show a
change."""


@dataclass(frozen=True, slots=True)
class Span:
    """Rows that finished between two Unix times."""

    first_s: float
    last_s: float
    num_rows: int


@dataclass(frozen=True, slots=True)
class RunStatus:
    """A run, seen from outside.

    num_rows_done: in finished shards and in finished units of the others. num_units_kept: those
    units. num_tokens, rows_by_status, dataset_rsr: of finished shards. holder: who writes now.
    rows_per_s: over the last ten minutes in which anything finished; None before two units have.
    """

    output: str
    model: str
    created: str
    holder: Holder | None
    num_shards: int
    num_shards_done: int
    num_units_kept: int
    num_rows: int
    num_rows_done: int
    num_tokens: int
    rows_by_status: dict[str, int]
    dataset_rsr: float | None
    rows_per_s: float | None

    @property
    def is_finished(self) -> bool:
        return self.num_shards_done == self.num_shards

    @property
    def seconds_left(self) -> float | None:
        """At the present speed; None where nobody is at work or none is known."""
        if self.holder is None or not self.rows_per_s:
            return None
        return (self.num_rows - self.num_rows_done) / self.rows_per_s

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"is_finished": self.is_finished, "seconds_left": self.seconds_left}


def read_status(output: OutputFolder) -> RunStatus:
    """Raises `UsageError` if no run has written to `output`."""
    manifest = read_run(output)
    done = Summary()
    spans: list[Span] = []
    num_shards_done = num_units_kept = num_rows_kept = 0
    for shard in manifest["shards"]:
        receipt = output.stored_receipt(shard["name"])
        if receipt is not None and receipt.stop == shard["num_rows"]:
            num_shards_done += 1
            done.merge(receipt.summary)
            spans.append(Span(receipt.first_finished_s, receipt.finished_s, receipt.stop))
            continue
        units = _finished_units(output, shard["name"])
        spans += units
        num_units_kept += len(units)
        num_rows_kept += sum(unit.num_rows for unit in units)
    holder = output.holder()
    return RunStatus(
        output=output.storage.describe(),
        model=manifest["settings"]["model"],
        created=manifest["created"],
        holder=holder,
        num_shards=len(manifest["shards"]),
        num_shards_done=num_shards_done,
        num_units_kept=num_units_kept,
        num_rows=sum(shard["num_rows"] for shard in manifest["shards"]),
        num_rows_done=done.num_rows + num_rows_kept,
        num_tokens=done.num_tokens,
        rows_by_status=done.rows_by_status,
        dataset_rsr=done.dataset.rsr,
        rows_per_s=rate(spans, now_s=time.time() if holder else None),
    )


def read_run(output: OutputFolder) -> dict[str, Any]:
    """The manifest of the run in `output`; raises `UsageError` if there is none."""
    try:
        manifest = output.read_manifest()
    except OSError as error:
        raise UsageError(str(error)) from error
    if manifest is None:
        raise UsageError(f"{output.root} holds no run: expected the OUTPUT of rsr score")
    return manifest


def _finished_units(output: OutputFolder, shard_name: str) -> list[Span]:
    """A unit that was halved and then scored whole counts once."""
    files = output.storage.list(output.units_folder(shard_name))
    ranged = [(rows, f.modified_s) for f in files if (rows := range_of_unit(f.name)) is not None]
    spans: list[Span] = []
    counted = 0
    for (start, stop), time_s in sorted(ranged):
        if stop > counted:
            spans.append(Span(time_s, time_s, stop - max(start, counted)))
            counted = stop
    return spans


def rate(spans: Sequence[Span], *, now_s: float | None = None) -> float | None:
    """Rows per second up to `now_s`, or up to the last that finished; None if that says nothing.

    A finished shard's rows count as if they had come evenly over its time.
    """
    if not spans:
        return None
    last_s = now_s or max(span.last_s for span in spans)
    first_s = max(min(span.first_s for span in spans), last_s - RATE_WINDOW_S)
    if last_s - first_s < 1.0:
        return None
    num_rows = 0.0
    for span in spans:
        inside_s = min(span.last_s, last_s) - max(span.first_s, first_s)
        length_s = span.last_s - span.first_s
        if length_s > 0:
            num_rows += span.num_rows * max(0.0, inside_s) / length_s
        elif span.last_s > first_s:
            num_rows += span.num_rows
    return num_rows / (last_s - first_s)


@click.command()
@click.argument("output", metavar="OUTPUT", type=Place())
@click.option("--watch", is_flag=True, help="Again every two seconds, until nobody writes.")
@json_option
def status(output: Path | str, watch: bool, as_json: bool) -> None:
    """Say how far the run in OUTPUT is: rows, shards, speed, and who is writing.

    Works while the run goes and after it. With --watch and --json, one object a line.
    """
    folder = OutputFolder(output)
    if watch:
        guarded(lambda stop: _watch(folder, stop, as_json))
        return
    found = guarded(lambda _stop: read_status(folder))
    if as_json:
        click.echo(json.dumps(found.to_json()))
    else:
        Console().print(_table(found), highlight=False, soft_wrap=True)


def _watch(output: OutputFolder, stop: StopRequest, as_json: bool) -> None:
    found = read_status(output)
    with Live(Table(), console=Console(quiet=as_json), auto_refresh=False) as live:
        while True:
            if as_json:
                click.echo(json.dumps(found.to_json()))
            live.update(_table(found), refresh=True)
            if found.holder is None:
                return
            try:
                stop.wait(WATCH_EVERY_S)
            except Interrupted:
                return
            found = read_status(output)


def _table(found: RunStatus) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    share = found.num_rows_done / found.num_rows if found.num_rows else 1.0
    table.add_row("run", f"{found.output}, {found.model}, begun {found.created}")
    table.add_row("rows", f"{found.num_rows_done:,} of {found.num_rows:,} ({share:.1%})")
    kept = f", and {found.num_units_kept:,} units of others" if found.num_units_kept else ""
    table.add_row("shards", f"{found.num_shards_done:,} of {found.num_shards:,} written{kept}")
    if found.num_shards_done:
        by_status = ", ".join(f"{n:,} {name}" for name, n in found.rows_by_status.items())
        table.add_row("in them", f"{found.num_tokens:,} scored tokens; rows: {by_status or 'none'}")
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
    return "finished" if found.is_finished else "stopped; the same rsr score command goes on"
