"""A subset of a scored table as a run: the chosen rows of each shard, copied type for type.

Rows are copied with pyarrow, not Polars, which normalises Arrow types; row groups without a chosen
row are not read. A choice is a function of input and settings, so a run that was stopped decides
again and copies only the files that have no receipt. Which rows go into which file is `layout.py`'s
to say. Knows nothing of scores or of how rows were chosen.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import Progress

from rsr.jobs.errors import ShardsFailed, first_line
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.manifest import Identity, InputShard, JsonObject, Manifest
from rsr.jobs.run.opening import hold_output
from rsr.jobs.run.preflight import (
    canonical,
    check_columns,
    check_form,
    check_places,
    refusing_what_cannot_be_reached,
    require_disk_space,
)
from rsr.jobs.run.store import ChangedInputError, RunStore, require_unchanged
from rsr.jobs.selection.kept_rows import KeptRows
from rsr.jobs.selection.layout import (
    ROWS_PER_FILE,
    Mask,
    OutputFile,
    files_like_input,
    files_of_rows,
    require_one_run,
)
from rsr.jobs.shards.parquet import file_size_bytes, open_parquet
from rsr.jobs.shards.score_columns import Summary
from rsr.jobs.shards.scored import ScoredTable
from rsr.jobs.shards.shard import Shard
from rsr.jobs.shards.writer import ShardWriter
from rsr.jobs.storage import is_remote
from rsr.jobs.storage.concurrency import in_parallel
from rsr.jobs.storage.hashing import HashingFile
from rsr.jobs.terminal import Console

MAX_COPIES_AT_A_TIME = 8
"""Each holds a row group of kept rows and what encodes it: 100 to 200 MiB."""
READ_BATCH_BYTES = 32 << 20
MAX_READ_BATCH_ROWS = 1 << 16
PLAIN_LENGTH_BYTES = 4
"""What Parquet's PLAIN encoding puts before every string."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Which rows are kept. num_kept: of each shard. rows_of: (num_rows,) mask of a shard."""

    num_kept: Sequence[int]
    rows_of: Callable[[Shard], Mask]

    @classmethod
    def of(cls, table: ScoredTable, keep: Mask) -> Self:
        """keep: (num_rows,) mask of the table."""
        assert len(keep) == table.num_rows
        masks, first = {}, 0
        for shard in table.shards:
            masks[shard.name] = keep[first : first + shard.num_rows]
            first += shard.num_rows
        num_kept = [int(np.count_nonzero(masks[shard.name])) for shard in table.shards]
        return cls(num_kept, lambda shard: masks[shard.name])


@dataclass(frozen=True, slots=True, kw_only=True)
class SubsetPlace:
    """Where a subset goes, and whose run it is.

    writer, settings: an earlier run of the same is gone on with, any other is refused unless
    `overwrite`. command: what was typed. rows_per_file: None is a file for each of the table's, or
    one file where OUTPUT is one.
    """

    output: Path | str
    writer: str
    settings: JsonObject
    command: tuple[str, ...]
    rows_per_file: int | None
    overwrite: bool


def write_subset(
    table: ScoredTable, place: SubsetPlace, choose: Callable[[], Mask], stop: StopRequest
) -> RunFolder:
    """Write the rows of `table` that `choose` says, (num_rows,), to OUTPUT.

    `choose` is called when OUTPUT is known to be fit.

    Raises `UsageError`, OUTPUT being as it was, also if `choose` does; `ShardsFailed` if some
    could not be read or written, the others being complete; `Interrupted` when `stop` says so,
    every finished file kept.
    """
    choices: list[Choice] = []

    def decide() -> Sequence[int]:
        choices.append(Choice.of(table, choose()))
        return choices[0].num_kept

    with opened_subset(table, place, decide, stop) as (store, files):
        _copy_files(store, _unfinished(store, files), choices[0], stop)
    return store.folder


@contextmanager
def opened_subset(
    table: ScoredTable, place: SubsetPlace, decide: Callable[[], Sequence[int]], stop: StopRequest
) -> Iterator[tuple[RunStore, list[OutputFile]]]:
    """The run in OUTPUT and its files, begun or gone on with, held while rows are copied to it.

    decide: called when OUTPUT is known to be fit; how many rows are kept of each shard. Raises
    `UsageError` as `write_subset` does.
    """
    output = place.output
    rows_per_file = _rows_per_file(table, place)
    files = files_like_input(table) if rows_per_file is None else None
    with ExitStack() as opened:
        with refusing_what_cannot_be_reached():
            check_columns(output, table.schema)
            check_places(table.path, [(s.path, s.name) for s in table.shards], output)
            held = opened.enter_context(
                hold_output(output, writer=place.writer, overwrite=place.overwrite)
            )
            if files is not None and not held.is_new:
                held.go_on(_manifest(table, place, rows_per_file, files))
        # Until all is read, hours may go by: a store that fails meanwhile is no wrong usage.
        num_kept = decide()
        stop.check()
        if rows_per_file is not None:
            files = files_of_rows(table, num_kept, rows_per_file, canonical(table.path))
        assert files is not None
        wanted = _manifest(table, place, rows_per_file, files)
        with refusing_what_cannot_be_reached():
            if held.is_new:
                require_disk_space(output, _expected_bytes(table, num_kept))
                held.begin(wanted)
            else:
                held.go_on(wanted)
        yield RunStore.of(held.folder, wanted.identity), files


def _rows_per_file(table: ScoredTable, place: SubsetPlace) -> int | None:
    """Rows of a file of OUTPUT; None where its files are those of INPUT.

    Raises `UsageError` unless OUTPUT can hold them.
    """
    is_one_file = RunFolder(place.output).is_one_file
    check_form(place.output, 1 if place.rows_per_file is None else None)
    rows_per_file = place.rows_per_file
    if is_one_file and len(table.shards) > 1:
        rows_per_file = max(1, table.num_rows)
    if rows_per_file is not None:
        require_one_run(table)
    return rows_per_file


def _manifest(
    table: ScoredTable,
    place: SubsetPlace,
    rows_per_file: int | None,
    files: Sequence[OutputFile],
) -> Manifest:
    layout = {} if rows_per_file is None else {ROWS_PER_FILE: rows_per_file}
    return Manifest(
        writer=place.writer,
        identity=Identity({**place.settings, **layout}),
        shards=tuple(InputShard.of(file.shard, canonical(file.shard.path)) for file in files),
        subject=f"of {table.path}",
        command=place.command,
        output=str(place.output),
    )


def _expected_bytes(table: ScoredTable, num_kept: Sequence[int]) -> float:
    return sum(
        file_size_bytes(shard.path) * kept / max(1, shard.num_rows)
        for shard, kept in zip(table.shards, num_kept, strict=True)
    )


def _unfinished(store: RunStore, files: Sequence[OutputFile]) -> list[OutputFile]:
    """What is left to copy: long files first, so that the last to finish is a short one."""
    with in_parallel(store.read_receipt, [file.shard for file in files]) as receipts:
        left = [file for file, receipt in zip(files, receipts, strict=True) if receipt is None]
    return sorted(left, key=lambda file: -file.shard.num_rows)


def _copy_files(
    store: RunStore, files: Sequence[OutputFile], choice: Choice, stop: StopRequest
) -> None:
    num_workers = min(len(os.sched_getaffinity(0)), MAX_COPIES_AT_A_TIME)
    read = (piece.shard.path for file in files for piece in file.slices)
    if any(is_remote(str(place)) for place in (store.folder.root, *read)):
        # Most of the time goes by in waiting for a store's answers, not on a core.
        num_workers = MAX_COPIES_AT_A_TIME
    console = Console(stderr=True)
    failures: list[str] = []
    with (
        ThreadPoolExecutor(num_workers) as pool,
        Progress(console=console, transient=True, disable=not console.is_terminal) as bar,
    ):
        copying = bar.add_task("copying", total=sum(file.shard.num_rows for file in files))
        copies = {
            pool.submit(commit_file, store, file, choice.rows_of, stop): file for file in files
        }
        waiting = set(copies)
        try:
            while waiting:
                # A signal is only seen between two Python instructions of this thread.
                done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in done:
                    bar.advance(copying, copies[future].shard.num_rows)
                    failures += _failure(copies[future], future)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if failures:
        raise ShardsFailed("\n".join(sorted(failures)))


def _failure(file: OutputFile, future: Future[None]) -> list[str]:
    """A line about what files can do to a copy; anything else, such as `Interrupted`, is raised."""
    try:
        future.result()
    except (OSError, pa.ArrowException, ChangedInputError) as error:
        return [f"{file.shard.name}: {first_line(error)}"]
    return []


def commit_file(
    store: RunStore, file: OutputFile, rows_of: Callable[[Shard], Mask], stop: StopRequest
) -> None:
    """Write a file's rows, and beside them which those are.

    rows_of: (num_rows,) mask of the kept rows of a shard. Raises `ChangedInputError` if a shard is
    another by now.
    """
    storage, name = store.folder.storage, file.shard.name

    def write(sink: HashingFile) -> Summary:
        with (
            storage.writing(store.folder.kept_rows_name(name)) as temporary,
            temporary.open("w") as taken,
        ):

            def masks() -> Iterator[tuple[Shard, Mask]]:
                for piece in file.slices:
                    require_unchanged(piece.shard)
                    mask = piece.within(rows_of(piece.shard))
                    taken.write(KeptRows(piece.shard.name, mask).to_json() + "\n")
                    yield piece.shard, mask

            num_rows = _copy_rows(masks(), sink, stop)
        return Summary(num_rows=num_rows)

    store.publish_derived(file.shard, write)


def _copy_rows(masks: Iterator[tuple[Shard, Mask]], sink: HashingFile, stop: StopRequest) -> int:
    """Write the chosen rows of shards of one schema, holding no more than one row group of them.

    masks: (num_rows,) of each shard. Returns how many rows were written.
    """
    with ExitStack() as opened:
        writer, num_rows = None, 0
        for shard, mask in masks:
            with open_parquet(shard.path) as plain:
                if writer is None:
                    writer = opened.enter_context(ShardWriter(sink, plain.schema_arrow, plain))
                for rows in _chosen_rows(shard, plain, mask, stop):
                    writer.add(rows)
            num_rows += int(np.count_nonzero(mask))
        return num_rows


def _chosen_rows(
    shard: Shard, plain: pq.ParquetFile, mask: Mask, stop: StopRequest
) -> Iterator[pa.RecordBatch]:
    coded = _coded_columns(plain)
    source = open_parquet(shard.path, read_dictionary=coded) if coded else plain
    metadata, schema = source.metadata, plain.schema_arrow
    with source:
        start = 0
        for group in range(metadata.num_row_groups):
            num_rows = metadata.row_group(group).num_rows
            if not mask[start : start + num_rows].any():
                start += num_rows
                continue
            batch_rows = _batch_rows(metadata.row_group(group))
            for batch in source.iter_batches(batch_rows, [group], use_threads=False):
                stop.check()
                for part in _chosen(batch, mask[start : start + batch.num_rows]):
                    yield _spelled_out(part, schema, coded)
                start += batch.num_rows


def _spelled_out(rows: pa.RecordBatch, schema: pa.Schema, coded: list[str]) -> pa.RecordBatch:
    """Rows with every column as the schema has it. coded: columns that are dictionaries."""
    columns: list[Any] = list(rows.columns)
    for index, field in enumerate(schema):
        if field.name in coded:
            columns[index] = columns[index].dictionary_decode()
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _coded_columns(source: pq.ParquetFile) -> list[str]:
    """Columns of strings that are stored as a dictionary and numbers.

    A teacher's name, say: spelled out for every row only to drop most of them, they take three
    times as long to read.
    """
    metadata, names = source.metadata, source.schema_arrow.names
    if not metadata.num_row_groups:
        return []
    group = metadata.row_group(0)
    leaves = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    return [
        field.name
        for field in source.schema_arrow
        # By a dotted name pyarrow would take a child of another column for it.
        if "." not in field.name
        and (pa.types.is_string(field.type) or pa.types.is_binary(field.type))
        and names.count(field.name) == 1
        and (leaf := leaves.get(field.name)) is not None
        # Plainly stored, the length alone of a value takes as much.
        and leaf.total_uncompressed_size < PLAIN_LENGTH_BYTES * leaf.num_values
    ]


def _batch_rows(group: pq.RowGroupMetaData) -> int:
    bytes_per_row = max(1, group.total_byte_size // group.num_rows)
    return max(1, min(MAX_READ_BATCH_ROWS, READ_BATCH_BYTES // bytes_per_row))


def _chosen(batch: pa.RecordBatch, mask: Mask) -> list[pa.RecordBatch]:
    if not mask.any():
        return []
    if mask.all():
        return [batch]
    try:
        return [batch.filter(pa.array(mask))]
    except pa.ArrowNotImplementedError:
        # Views cannot be filtered yet; slices of runs can be had of any type.
        edges = np.flatnonzero(np.diff(mask, prepend=False, append=False)).reshape(-1, 2)
        return [batch.slice(start, stop - start) for start, stop in edges.tolist()]
