"""A subset of a scored table as a run: the chosen rows of each shard, copied type for type.

Rows are copied with pyarrow, not Polars, which normalises Arrow types; row groups without a chosen
row are not read. A choice is a function of input and settings, so a run that was stopped decides
again and copies only the shards that have no receipt. Knows nothing of scores or of how rows were
chosen.
"""

import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rich.progress import Progress

from rsr.jobs.errors import ShardsFailed, first_line
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.manifest import Identity, InputShard, JsonObject, Manifest
from rsr.jobs.run.opening import hold_output
from rsr.jobs.run.preflight import (
    canonical,
    check_form,
    check_places,
    refusing_what_cannot_be_reached,
    require_disk_space,
)
from rsr.jobs.run.store import ChangedInputError, RunStore
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

Mask = NDArray[np.bool_]


def write_subset(
    table: ScoredTable,
    output: Path | str,
    choose: Callable[[], Mask],
    stop: StopRequest,
    *,
    writer: str,
    command: tuple[str, ...],
    settings: JsonObject,
    overwrite: bool,
) -> RunFolder:
    """Write the rows of `table` that `choose` says, (num_rows,), to the folder `output`.

    writer, settings: whose run this is; an earlier run of the same is gone on with, any other
    is refused unless `overwrite`. command: what was typed. `choose` is called when OUTPUT is known
    to be fit.

    Raises `UsageError`, OUTPUT being as it was, also if `choose` does; `ShardsFailed` if some
    could not be read or written, the others being complete; `Interrupted` when `stop` says so,
    every finished shard kept.
    """
    masks: list[Mask] = []

    def decide() -> float:
        masks.append(choose())
        assert len(masks[0]) == table.num_rows
        return _expected_bytes(table, masks[0])

    with opened_subset(
        table,
        output,
        decide,
        stop,
        writer=writer,
        command=command,
        settings=settings,
        overwrite=overwrite,
    ) as store:
        _copy_shards(store, _unfinished(store, table, masks[0]), stop)
    return store.folder


@contextmanager
def opened_subset(
    table: ScoredTable,
    output: Path | str,
    decide: Callable[[], float],
    stop: StopRequest,
    *,
    writer: str,
    command: tuple[str, ...],
    settings: JsonObject,
    overwrite: bool,
) -> Iterator[RunStore]:
    """The run in `output`, begun or gone on with, held while rows are copied to it.

    decide: called when OUTPUT is known to be fit; how many bytes will be written. The rest is as
    `write_subset` has it.
    """
    wanted = Manifest(
        writer=writer,
        identity=Identity(settings),
        shards=tuple(InputShard.of(shard, canonical(shard.path)) for shard in table.shards),
        subject=f"of {table.path}",
        command=command,
        output=str(output),
    )
    with ExitStack() as opened:
        with refusing_what_cannot_be_reached():
            check_form(output, len(table.shards))
            check_places(table.path, [(s.path, s.name) for s in table.shards], output)
            held = opened.enter_context(hold_output(output, writer=writer, overwrite=overwrite))
            if not held.is_new:
                held.go_on(wanted)
        # Until all is read, hours may go by: a store that fails meanwhile is no wrong usage.
        expected_bytes = decide()
        stop.check()
        if held.is_new:
            with refusing_what_cannot_be_reached():
                require_disk_space(output, expected_bytes)
                held.begin(wanted)
        yield RunStore.of(held.folder, wanted.identity)


def read_kept_rows(folder: RunFolder, shard: InputShard) -> Mask:
    """(num_rows,) mask of the input's rows that a selection took of a shard.

    Raises `OSError` if it is not there, `ValueError` if it is damaged.
    """
    try:
        packed = zlib.decompress(folder.storage.read(folder.kept_rows_name(shard.name)))
    except zlib.error as error:
        raise ValueError(str(error)) from error
    bits = np.unpackbits(np.frombuffer(packed, np.uint8))
    if len(bits) - shard.num_rows not in range(8):
        raise ValueError(f"it is of about {len(bits)} rows, not of {shard.num_rows}")
    return bits[: shard.num_rows].astype(bool)


def _masks(table: ScoredTable, keep: Mask) -> Iterator[tuple[Shard, Mask]]:
    first = 0
    for shard in table.shards:
        yield shard, keep[first : first + shard.num_rows]
        first += shard.num_rows


def _expected_bytes(table: ScoredTable, keep: Mask) -> float:
    return sum(
        file_size_bytes(shard.path) * np.count_nonzero(mask) / max(1, shard.num_rows)
        for shard, mask in _masks(table, keep)
    )


def _unfinished(store: RunStore, table: ScoredTable, keep: Mask) -> list[tuple[Shard, Mask]]:
    """What is left to copy: long shards first, so that the last to finish is a short one."""
    tasks = list(_masks(table, keep))
    with in_parallel(store.read_receipt, table.shards) as receipts:
        left = [task for task, receipt in zip(tasks, receipts, strict=True) if receipt is None]
    return sorted(left, key=lambda task: -np.count_nonzero(task[1]))


def _copy_shards(store: RunStore, tasks: list[tuple[Shard, Mask]], stop: StopRequest) -> None:
    num_workers = min(len(os.sched_getaffinity(0)), MAX_COPIES_AT_A_TIME)
    if any(is_remote(str(place)) for place in (store.folder.root, *(s.path for s, _ in tasks))):
        # Most of the time goes by in waiting for a store's answers, not on a core.
        num_workers = MAX_COPIES_AT_A_TIME
    console = Console(stderr=True)
    failures: list[str] = []
    with (
        ThreadPoolExecutor(num_workers) as pool,
        Progress(console=console, transient=True, disable=not console.is_terminal) as bar,
    ):
        copying = bar.add_task("copying", total=sum(shard.num_rows for shard, _ in tasks))
        shards = {
            pool.submit(commit_rows, store, shard, mask, stop): shard for shard, mask in tasks
        }
        waiting = set(shards)
        try:
            while waiting:
                # A signal is only seen between two Python instructions of this thread.
                done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in done:
                    bar.advance(copying, shards[future].num_rows)
                    failures += _failure(shards[future], future)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if failures:
        raise ShardsFailed("\n".join(sorted(failures)))


def _failure(shard: Shard, future: Future[None]) -> list[str]:
    """A line about what files can do to a copy; anything else, such as `Interrupted`, is raised."""
    try:
        future.result()
    except (OSError, pa.ArrowException, ChangedInputError) as error:
        return [f"{shard.name}: {first_line(error)}"]
    return []


def commit_rows(store: RunStore, shard: Shard, mask: Mask, stop: StopRequest) -> None:
    """Write the shard's chosen rows, and before them which those are."""

    def write(sink: HashingFile) -> Summary:
        _copy_rows(shard, mask, sink, stop)
        return Summary(num_rows=int(np.count_nonzero(mask)))

    kept_rows = zlib.compress(np.packbits(mask).tobytes(), level=1)
    store.folder.storage.write(store.folder.kept_rows_name(shard.name), kept_rows)
    store.publish(shard, write)


def _copy_rows(shard: Shard, mask: Mask, sink: HashingFile, stop: StopRequest) -> None:
    """Write the shard's chosen rows, holding no more than one row group of them."""
    with open_parquet(shard.path) as plain:
        coded = _coded_columns(plain)
        source = open_parquet(shard.path, read_dictionary=coded) if coded else plain
        metadata, schema = source.metadata, plain.schema_arrow
        with source, ShardWriter(sink, schema, plain) as writer:
            start = 0
            for group in range(metadata.num_row_groups):
                num_rows = metadata.row_group(group).num_rows
                if mask[start : start + num_rows].any():
                    batch_rows = _batch_rows(metadata.row_group(group))
                    for batch in source.iter_batches(batch_rows, [group], use_threads=False):
                        stop.check()
                        for part in _chosen(batch, mask[start : start + batch.num_rows]):
                            writer.add(_spelled_out(part, schema, coded))
                        start += batch.num_rows
                else:
                    start += num_rows


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
