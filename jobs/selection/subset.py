"""A subset of a scored table as a run: the chosen rows of each shard, copied type for type.

    OUTPUT/<shard>.parquet              the chosen rows, in their order, with the input's schema
    OUTPUT/.rsr/manifest.json           the settings and the input shards
    OUTPUT/.rsr/receipts/<shard>.json   a finished shard
    OUTPUT/.rsr/composition.json        the result, as `--json` prints it

Rows are copied with pyarrow, not Polars, which normalises Arrow types (dictionary keys, maps,
fixed-size binary, 256-bit decimals, time32); row groups without a chosen row are not read. A
choice is a function of input and settings, so a run that was stopped decides again and copies
only the shards that have no receipt. Knows nothing of scores or of how rows were chosen.
"""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from rsr.jobs.errors import ShardsFailed
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.run.folder import OutputFolder
from rsr.jobs.run.preflight import (
    check_places,
    describe_inputs,
    kept_as_it_was,
    missing_folders,
    require_disk_space,
    require_same_run,
)
from rsr.jobs.shards.parquet import open_parquet
from rsr.jobs.shards.scored import ScoredTable
from rsr.jobs.shards.shard import Shard
from rsr.jobs.shards.writer import compression_of
from rsr.jobs.storage.atomic import atomic_path

MAX_COPIES_AT_A_TIME = 8
"""Each holds a row group of kept rows and what encodes it: 100 to 200 MiB."""
READ_BATCH_BYTES = 32 << 20
MAX_READ_BATCH_ROWS = 1 << 16
ROW_GROUP_BYTES = 64 << 20
"""Decoded size at which a row group is written, however few rows that is."""
ROW_GROUP_ROWS = 1 << 16
"""Rows at which one is written, unless the input's own are larger: a few kept rows of each of
many small row groups should not become as many smaller ones."""
DICTIONARY_SAMPLE_ROWS = 1024
PLAIN_LENGTH_BYTES = 4
"""What Parquet's PLAIN encoding puts before every string."""

Mask = NDArray[np.bool_]


def write_subset(
    table: ScoredTable,
    output: Path,
    choose: Callable[[], Mask],
    stop: StopRequest,
    *,
    command: str,
    settings: dict[str, Any],
    overwrite: bool,
) -> OutputFolder:
    """Write the rows of `table` that `choose` says, (num_rows,), to the folder `output`.

    command, settings: whose run this is; an earlier run of the same is gone on with, any other
    is refused unless `overwrite`. `choose` is called when OUTPUT is known to be fit.

    Raises `UsageError`, OUTPUT being as it was, also if `choose` does; `ShardsFailed` if some
    could not be read or written, the others being complete; `Interrupted` when `stop` says so,
    every finished shard kept.
    """
    folder = OutputFolder(output, command=command)
    shards = table.shards
    check_places(table.path, [(s.path, s.name) for s in shards], output)
    identity = {"settings": settings, "shards": describe_inputs(shards)}
    manifest = folder.read_manifest()
    with ExitStack() as held:
        missing = missing_folders(folder)
        held.enter_context(folder.lock())
        with kept_as_it_was(folder, missing):
            if manifest is not None and not overwrite:
                require_same_run(manifest, identity, output)
            keep = choose()
            assert len(keep) == table.num_rows
            stop.check()
            if manifest is None or overwrite:
                require_disk_space(output, _expected_bytes(table, keep))
                if manifest is not None:
                    result_path(folder).unlink(missing_ok=True)
                    folder.clear(manifest)
                folder.create(identity)
        _copy_shards(folder, _unfinished(folder, table, keep), stop)
    return folder


def result_path(folder: OutputFolder) -> Path:
    return folder.state / "composition.json"


def _masks(table: ScoredTable, keep: Mask) -> Iterator[tuple[Shard, Mask]]:
    first = 0
    for shard in table.shards:
        yield shard, keep[first : first + shard.num_rows]
        first += shard.num_rows


def _expected_bytes(table: ScoredTable, keep: Mask) -> float:
    return sum(
        os.path.getsize(shard.path) * np.count_nonzero(mask) / max(1, shard.num_rows)
        for shard, mask in _masks(table, keep)
    )


def _unfinished(folder: OutputFolder, table: ScoredTable, keep: Mask) -> list[tuple[Shard, Mask]]:
    """What is left to copy: long shards first, so that the last to finish is a short one."""
    tasks = [
        (shard, mask) for shard, mask in _masks(table, keep) if not _is_finished(folder, shard)
    ]
    return sorted(tasks, key=lambda task: -np.count_nonzero(task[1]))


def _is_finished(folder: OutputFolder, shard: Shard) -> bool:
    try:
        receipt = json.loads(folder.storage.read(folder.receipt_name(shard.name)))
        size = _output_path(folder, shard).stat().st_size
    except (OSError, ValueError):
        return False
    return receipt == {"fingerprint": shard.fingerprint, "output_bytes": size}


def _copy_shards(folder: OutputFolder, tasks: list[tuple[Shard, Mask]], stop: StopRequest) -> None:
    num_workers = min(len(os.sched_getaffinity(0)), MAX_COPIES_AT_A_TIME)
    console = Console(stderr=True)
    failures: list[str] = []
    with (
        ThreadPoolExecutor(num_workers) as pool,
        Progress(console=console, transient=True, disable=not console.is_terminal) as bar,
    ):
        copying = bar.add_task("copying", total=sum(shard.num_rows for shard, _ in tasks))
        shards = {pool.submit(_commit, folder, shard, mask, stop): shard for shard, mask in tasks}
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
    except (OSError, pa.ArrowException) as error:
        return [f"{shard.name}: {(str(error).strip() or repr(error)).splitlines()[0]}"]
    return []


def _commit(folder: OutputFolder, shard: Shard, mask: Mask, stop: StopRequest) -> None:
    target = _output_path(folder, shard)
    with atomic_path(target) as temporary:
        _copy_rows(shard, mask, temporary, stop)
    receipt = {"fingerprint": shard.fingerprint, "output_bytes": target.stat().st_size}
    folder.storage.write(folder.receipt_name(shard.name), json.dumps(receipt).encode() + b"\n")


def _output_path(folder: OutputFolder, shard: Shard) -> Path:
    return Path(folder.root) / shard.name


def _copy_rows(shard: Shard, mask: Mask, target: Path, stop: StopRequest) -> None:
    """Write the shard's chosen rows, holding no more than one row group of them."""
    with open_parquet(shard.path) as plain:
        coded = _coded_columns(plain)
        source = open_parquet(shard.path, read_dictionary=coded) if coded else plain
        metadata = source.metadata
        with source, _Pending(target, plain, coded) as pending:
            start = 0
            for group in range(metadata.num_row_groups):
                num_rows = metadata.row_group(group).num_rows
                if mask[start : start + num_rows].any():
                    batch_rows = _batch_rows(metadata.row_group(group))
                    for batch in source.iter_batches(batch_rows, [group], use_threads=False):
                        stop.check()
                        pending.add(batch, mask[start : start + batch.num_rows])
                        start += batch.num_rows
                else:
                    start += num_rows


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


def _max_group_rows(metadata: pq.FileMetaData) -> int:
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    return max([ROW_GROUP_ROWS, *(group.num_rows for group in groups)])


def _batch_rows(group: pq.RowGroupMetaData) -> int:
    bytes_per_row = max(1, group.total_byte_size // group.num_rows)
    return max(1, min(MAX_READ_BATCH_ROWS, READ_BATCH_BYTES // bytes_per_row))


class _Pending:
    """Chosen rows that wait until they make a row group; leaving it writes the file.

    coded: columns of strings that arrive as dictionaries.
    """

    def __init__(self, target: Path, source: pq.ParquetFile, coded: list[str]) -> None:
        self._target, self._schema, self._coded = target, source.schema_arrow, coded
        self._compression = compression_of(source)
        self._leaf_paths = [source.schema.column(i).path for i in range(len(source.schema))]
        self._max_rows = _max_group_rows(source.metadata)
        self._writer: pq.ParquetWriter | None = None
        self._batches: list[pa.RecordBatch] = []
        self._num_rows = self._num_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        if kind is None:
            self.flush()
            self._open([])
        if self._writer is not None:
            self._writer.close()

    def add(self, batch: pa.RecordBatch, mask: Mask) -> None:
        for part in _chosen(batch, mask):
            part = self._spelled_out(part)
            if self._num_rows + part.num_rows > self._max_rows:
                self.flush()
            self._batches.append(part)
            self._num_rows += part.num_rows
            self._num_bytes += part.nbytes
        if self._num_bytes >= ROW_GROUP_BYTES:
            self.flush()

    def _spelled_out(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        """With every column as the schema has it."""
        columns = [
            column.dictionary_decode() if field.name in self._coded else column
            for field, column in zip(self._schema, rows.columns, strict=True)
        ]
        return pa.RecordBatch.from_arrays(columns, schema=self._schema)

    def flush(self) -> None:
        if self._batches:
            self._open(self._batches[:1]).write_table(
                pa.Table.from_batches(self._batches, self._schema)
            )
        self._batches, self._num_rows, self._num_bytes = [], 0, 0

    def _open(self, first_rows: list[pa.RecordBatch]) -> pq.ParquetWriter:
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._target,
                self._schema,
                compression=self._compression,
                use_dictionary=_repeating_leaves(first_rows, self._leaf_paths),
            )
        return self._writer


def _repeating_leaves(first_rows: list[pa.RecordBatch], paths: list[str]) -> list[str]:
    """Leaf columns whose values repeat among the first rows: only those gain by a dictionary.

    Trying one on distinct values costs a third of the time to write, and leaves larger files.
    """
    sample = [rows.slice(0, DICTIONARY_SAMPLE_ROWS) for rows in first_rows]
    leaves = [leaf for rows in sample for column in rows.columns for leaf in _leaves(column)]
    if len(leaves) != len(paths):
        return paths
    return [
        path
        for path, leaf in zip(paths, leaves, strict=True)
        if 2 * len(leaf.unique()) <= len(leaf)
    ]


def _leaves(array: pa.Array) -> Iterator[pa.Array]:
    """The leaf columns of an array, in the order in which Parquet stores them."""
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        yield from _leaves(array.storage)
    elif pa.types.is_struct(kind):
        for child in array.flatten():
            yield from _leaves(child)
    elif pa.types.is_map(kind):
        yield from _leaves(array.keys)
        yield from _leaves(array.items)
    elif hasattr(array, "flatten") and pa.types.is_nested(kind):
        yield from _leaves(array.flatten())
    else:
        yield array


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
