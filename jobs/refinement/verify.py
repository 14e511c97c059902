"""What a refined file must hold: the input's rows in order, and native traces bit for bit."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyarrow as pa

from rsr.jobs.refinement.commit import RefinedColumns, is_added, said_of_trace
from rsr.jobs.refinement.outcome import ADDED_FIELDS, RefineStatus
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.manifest import InputShard, Manifest
from rsr.jobs.run.staging import parquet_of
from rsr.jobs.run.verify import ChecksOfRows
from rsr.jobs.shards.columns import TrajectoryColumns
from rsr.jobs.shards.compare import first_difference, same_bits
from rsr.jobs.shards.parquet import open_parquet
from rsr.jobs.shards.reader import ShardReader
from rsr.jobs.shards.writer import REFINE_METADATA_KEY


class RefinementChecks(ChecksOfRows):
    """The checks of `rsr.jobs.run.verify.ShardChecks` for what `rsr refine` writes."""

    looked_at = ("refine_status",)

    def metadata_key(self, _manifest: Manifest) -> bytes:
        return REFINE_METADATA_KEY

    def is_added(self, manifest: Manifest) -> Callable[[str], bool]:
        return _columns_of(manifest).is_not_kept

    def wrong_in_schema(self, schema: pa.Schema) -> str | None:
        if list(schema)[-len(ADDED_FIELDS) :] == list(ADDED_FIELDS):
            return None
        return f"ends with other columns than rsr refine adds: {', '.join(schema.names)}"

    def statuses(
        self, batch: pa.RecordBatch, _manifest: Manifest
    ) -> Iterator[tuple[str, str | None]]:
        found: list[Any] = batch["refine_status"].to_pylist()
        for status in found:
            is_known = status in set(RefineStatus)
            yield status, None if is_known else f"has a row of status {status!r}"

    def wrong_beside_input(
        self, folder: RunFolder, manifest: Manifest, shard: InputShard, source: str
    ) -> Iterator[str]:
        written = folder.storage.describe(shard.name)
        columns = _columns_of(manifest)
        with parquet_of(source, manifest.exploded, shard.num_rows) as path:
            said = said_of_trace(open_parquet(path).schema_arrow, columns)
            added = partial(is_added, columns, said)
            what = first_difference(path, written, shard.num_rows, is_added=added)
            for name in (columns.trace, *said):
                what = what or _native_difference(path, written, shard.num_rows, name)
        if what is not None:
            yield what


CHECKS = RefinementChecks()


def _columns_of(manifest: Manifest) -> RefinedColumns:
    named: dict[str, Any] = {
        kind: name for kind, name in manifest.identity.columns.items() if isinstance(name, str)
    }
    answer, id_column = (manifest.identity.settings.get(k) for k in ("answer_column", "id_column"))
    return RefinedColumns(
        TrajectoryColumns(**named),
        str(answer) if answer else None,
        str(id_column) if id_column else None,
    )


def _native_difference(source: str, written: str, num_rows: int, column: str) -> str | None:
    """Where a row that keeps its native trace has another one; None if no such row does."""
    reader, first = ShardReader(written, [column, "refine_status"]), 0
    for expected in ShardReader(source, [column]).rows(0, num_rows):
        rows = pa.Table.from_batches(reader.rows(first, first + expected.num_rows))
        statuses = rows["refine_status"].to_pylist()
        is_native = pa.array([status != RefineStatus.REFINED for status in statuses], pa.bool_())
        kept = rows.filter(is_native)[column].combine_chunks()
        before = expected.column(0).filter(is_native)
        if not same_bits(before, kept):
            last = first + expected.num_rows - 1
            return f"{column} of a native trace differs in rows {first:,} to {last:,}"
        first += expected.num_rows
    return None
