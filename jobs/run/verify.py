"""`rsr verify`: whether a run's output is what it should be, looked at from the files alone.

Every input row once and in order, the input's columns bit for bit, the score columns' types and
meaning, and every byte as its receipt says. Nothing is changed: the run's own command repairs.
"""

import json
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from rsr.engine.trajectory import Status
from rsr.jobs.command import EXIT_FAILURES, Place, guarded, json_option
from rsr.jobs.errors import UsageError
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.run.folder import STATE_FOLDER, OutputFolder
from rsr.jobs.run.receipts import Receipt, hash_identity
from rsr.jobs.run.status import read_run
from rsr.jobs.shards import score_columns
from rsr.jobs.shards.inputs import JSON_SUFFIXES, PARQUET_SUFFIXES, find_inputs
from rsr.jobs.shards.json_input import stage_json
from rsr.jobs.shards.parquet import fingerprint, open_parquet
from rsr.jobs.shards.reader import ShardReader
from rsr.jobs.shards.writer import METADATA_KEY
from rsr.jobs.storage import is_remote

SCORED = [status.value for status in Status if status.is_scored]
UNSCORED = [status.value for status in Status if not status.is_scored]
MAX_ROWS_NAMED = 3
"""Of one file: what is wrong with one row is usually wrong with many."""


@dataclass(frozen=True, slots=True)
class Problem:
    """file: below OUTPUT. is_damage: the file must go before the run's command redoes it."""

    file: str
    what: str
    is_damage: bool = False


@dataclass(slots=True)
class Verification:
    """What was looked at and what is wrong. repair: the commands that put it right, in order."""

    output: str
    is_deep: bool
    num_shards: int = 0
    num_rows: int = 0
    problems: list[Problem] = field(default_factory=list)
    repair: list[str] = field(default_factory=list)


def verify_output(
    output: OutputFolder, *, deep: bool, stop: StopRequest, source: str | None = None
) -> Verification:
    """Look at every shard of the run in `output`; with `deep`, beside its input.

    source: where INPUT is now, if it was moved. Raises `UsageError` if there is no run, or if
    somebody is writing to it.
    """
    manifest = read_run(output)
    if (holder := output.holder()) is not None:
        raise UsageError(f"{output.root} is being written by {holder}; verify it afterwards")
    sources = manifest["sources"]
    if source is not None:
        sources = {name: file for file, name in find_inputs(source)}
    checked = Verification(output.storage.describe(), deep)
    for shard in manifest["shards"]:
        stop.check()
        checked.num_shards += 1
        checked.num_rows += shard["num_rows"]
        problems = list(_output_problems(output, manifest, shard))
        if deep and not problems:
            problems += _input_problems(output, shard, sources.get(shard["name"]))
        checked.problems += problems
    checked.problems += _strangers(output, manifest)
    checked.repair = _repair(output, manifest, checked.problems)
    return checked


def _output_problems(
    output: OutputFolder, manifest: dict[str, Any], shard: dict[str, Any]
) -> Iterator[Problem]:
    """What can be wrong with an output without looking at its input."""
    name, num_rows = shard["name"], shard["num_rows"]
    found = output.storage.find(name)
    if found is None:
        yield Problem(name, f"not written: {num_rows:,} rows are missing")
        return
    receipt = output.stored_receipt(name)
    expected = (0, num_rows, shard["fingerprint"], hash_identity(manifest))
    if receipt is None:
        yield Problem(name, "has no receipt that can be trusted")
        return
    if (receipt.start, receipt.stop, receipt.fingerprint, receipt.settings) != expected:
        yield Problem(name, "its receipt is of another input or other settings")
        return
    if found.num_bytes != receipt.content_bytes:
        what = f"is {found.num_bytes:,} bytes long; its receipt says {receipt.content_bytes:,}"
        yield Problem(name, what, is_damage=True)
    elif not output.has_content(found, receipt):
        yield Problem(name, "its bytes are not those its receipt vouches for", is_damage=True)
    else:
        # What follows is as the run wrote it: a mistake there is the run's, not the disk's.
        for what in _table_problems(output.storage.describe(name), manifest, num_rows, receipt):
            yield Problem(name, what, is_damage=True)


def _table_problems(
    path: str, manifest: dict[str, Any], num_rows: int, receipt: Receipt
) -> Iterator[str]:
    with open_parquet(path) as file:
        schema, there = file.schema_arrow, file.metadata.num_rows
    if there != num_rows:
        yield f"has {there:,} rows; expected {num_rows:,}"
    token_columns = manifest["settings"]["token_scores"]
    wanted = pa.schema(score_columns.arrow_fields(token_columns=token_columns))
    scores = [f for f in schema if score_columns.is_score_column(f.name)]
    if not pa.schema(scores).equals(wanted) or list(schema)[-len(scores) :] != scores:
        yield f"has score columns {[f'{f.name}: {f.type}' for f in scores]}; expected {wanted}"
        return
    identity = json.loads((schema.metadata or {}).get(METADATA_KEY, b"null"))
    if identity is None or hash_identity(identity) != hash_identity(manifest):
        yield "its metadata name other settings than the run's"
    counts: dict[str, int] = {}
    bad_rows: list[str] = []
    for batch in ShardReader(path, ["rsr", "rsr_status", "rsr_num_tokens"]).rows(0, there):
        bad_rows += islice(_score_problems(batch), MAX_ROWS_NAMED - len(bad_rows))
        for entry in batch["rsr_status"].value_counts():
            status = entry["values"].as_py()
            counts[status] = counts.get(status, 0) + entry["counts"].as_py()
    yield from bad_rows
    if counts != receipt.summary.rows_by_status:
        yield f"has rows of status {counts}; its receipt says {receipt.summary.rows_by_status}"


def _score_problems(batch: pa.RecordBatch) -> Iterator[str]:
    """A row is scored and has a score, or says why not."""
    rows = zip(
        batch["rsr"].to_pylist(),
        batch["rsr_status"].to_pylist(),
        batch["rsr_num_tokens"].to_pylist(),
        strict=True,
    )
    for rsr, status, num_tokens in rows:
        if status not in SCORED + UNSCORED:
            yield f"has a row of status {status!r}; expected one of {SCORED + UNSCORED}"
        elif (rsr is not None) != (status in SCORED) or bool(num_tokens) != (status in SCORED):
            yield f"has a row of status {status!r} with RSR {rsr} over {num_tokens} tokens"


def _input_problems(
    output: OutputFolder, shard: dict[str, Any], source: str | None
) -> Iterator[Problem]:
    name = shard["name"]
    if source is None:
        yield Problem(name, "nothing is known of its input: say where it is with --input")
        return
    with tempfile.TemporaryDirectory(prefix="rsr-verify-") as folder:
        try:
            if source.endswith(JSON_SUFFIXES):
                staged = str(Path(folder) / "staged.parquet")
                stage_json(source, staged)
                source = staged
            elif fingerprint(source) != shard["fingerprint"]:
                yield Problem(name, f"its input {source} has changed since it was scored")
                return
            what = _first_difference(source, output.storage.describe(name), shard["num_rows"])
        except (UsageError, OSError, pa.ArrowException) as error:
            yield Problem(name, f"its input cannot be compared: {error}")
            return
    if what is not None:
        yield Problem(name, what, is_damage=True)


def _first_difference(source: str, written: str, num_rows: int) -> str | None:
    """Where the input's columns differ from the output's in type, metadata, or a bit; or None."""
    before, after = open_parquet(source).schema_arrow, open_parquet(written).schema_arrow
    kept = [i for i, name in enumerate(before.names) if not score_columns.is_score_column(name)]
    for place, index in enumerate(kept):
        if not before.field(index).equals(after.field(place), check_metadata=True):
            old, new = before.field(index), after.field(place)
            return (
                f"column {old.name!r} of the input is {old.type} {old.metadata or ''}; the output "
                f"has {new.name!r}, {new.type} {new.metadata or ''}"
            )
    reader, first = ShardReader(written), 0
    for expected in ShardReader(source).rows(0, num_rows):
        rows = pa.Table.from_batches(reader.rows(first, first + expected.num_rows))
        for place, index in enumerate(kept):
            found = rows.column(place).combine_chunks()
            if not same_bits(expected.column(index), found):
                last = first + expected.num_rows - 1
                return f"column {before.names[index]!r} differs in rows {first:,} to {last:,}"
        first += expected.num_rows
    return None


def same_bits(first: pa.Array, second: pa.Array) -> bool:
    """Whether two arrays of one type hold the same values, NaN and −0.0 told by their bits."""
    return bool(_as_bits(first).equals(_as_bits(second)))


def _as_bits(array: pa.Array | pa.ChunkedArray) -> pa.Array:
    if isinstance(array, pa.ChunkedArray):
        array = pa.array([], array.type) if not array.num_chunks else array.chunk(0)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    return array.view(_bits_type(array.type))


def _bits_type(kind: pa.DataType) -> pa.DataType:
    """`kind` with unsigned integers in the place of floats, however deep."""
    if pa.types.is_floating(kind):
        return {16: pa.uint16(), 32: pa.uint32(), 64: pa.uint64()}[kind.bit_width]
    if pa.types.is_struct(kind):
        return pa.struct([f.with_type(_bits_type(f.type)) for f in kind])
    if pa.types.is_map(kind):
        key, item = kind.key_field, kind.item_field
        return pa.map_(key.with_type(_bits_type(key.type)), item.with_type(_bits_type(item.type)))
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_bits_type(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_bits_type(kind.value_type)))
    if pa.types.is_fixed_size_list(kind):
        inner = kind.value_field.with_type(_bits_type(kind.value_type))
        return pa.list_(inner, kind.list_size)
    return kind


def _strangers(output: OutputFolder, manifest: dict[str, Any]) -> Iterator[Problem]:
    """Parquet files that the run did not write: a glob over OUTPUT would read their rows too."""
    known = {shard["name"] for shard in manifest["shards"]}
    for file in output.storage.list():
        is_ours = file.name in known or file.name.startswith(f"{STATE_FOLDER}/")
        if not is_ours and file.name.endswith(PARQUET_SUFFIXES):
            yield Problem(file.name, "is not of this run; move it out of OUTPUT")


def _repair(output: OutputFolder, manifest: dict[str, Any], problems: list[Problem]) -> list[str]:
    damaged = list(dict.fromkeys(problem.file for problem in problems if problem.is_damage))
    commands = [_remove_command(output.storage.describe(name)) for name in damaged]
    known = {shard["name"] for shard in manifest["shards"]}
    if any(problem.file in known for problem in problems):
        commands.append(manifest["command"])
    return commands


def _remove_command(place: str) -> str:
    tools = {"s3": "aws s3 rm", "gs": "gcloud storage rm", "az": "azcopy remove"}
    tool = tools[place.partition("://")[0]] if is_remote(place) else "rm"
    return f"{tool} {shlex.quote(place)}"


@click.command()
@click.argument("output", metavar="OUTPUT", type=Place())
@click.option(
    "--deep",
    is_flag=True,
    help="Also compare every input column with INPUT, bit for bit, in order.",
)
@click.option("--input", "source", help="Where INPUT is now, if not where the run found it.")
@json_option
def verify(output: Path | str, deep: bool, source: str | None, as_json: bool) -> None:
    """Check that OUTPUT is whole: every row once, in order, every byte as it was written.

    Reads everything and changes nothing. Exit code 1 and a table if something is wrong, with the
    commands that put it right.
    """
    checked = guarded(
        lambda stop: verify_output(OutputFolder(output), deep=deep, stop=stop, source=source)
    )
    if as_json:
        click.echo(json.dumps(asdict(checked)))
    else:
        _print(checked)
    sys.exit(EXIT_FAILURES if checked.problems else 0)


def _print(checked: Verification) -> None:
    console = Console()
    looked = f"{checked.num_rows:,} rows in {checked.num_shards:,} shards of {checked.output}"
    if not checked.problems:
        how = "whole, in order, and as in INPUT" if checked.is_deep else "whole"
        console.print(f"{looked}: {how}", highlight=False, soft_wrap=True)
        return
    table = Table("file", "what is wrong", box=None, pad_edge=False)
    for problem in checked.problems:
        table.add_row(problem.file, problem.what)
    console.print(f"{looked}: {len(checked.problems):,} problems", highlight=False, soft_wrap=True)
    console.print(table, highlight=False, soft_wrap=True)
    if checked.repair:
        console.print("To repair:", *checked.repair, sep="\n  ", highlight=False, soft_wrap=True)
