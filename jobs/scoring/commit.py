"""Putting a scored shard together: the input's rows, and the score columns of its units."""

import json
from collections.abc import Iterator, Sequence
from typing import cast

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from rsr.jobs.run.store import IncompleteShardError, RunStore, stored_receipt
from rsr.jobs.scoring.columns import AddedColumns, added_columns
from rsr.jobs.shards import score_columns
from rsr.jobs.shards.score_columns import Summary
from rsr.jobs.shards.shard import Shard, Unit
from rsr.jobs.shards.writer import write_beside
from rsr.jobs.storage.hashing import HashingFile


def commit_scored_shard(store: RunStore, shard: Shard) -> Summary:
    """Write the shard's output from its input rows and finished units, then its receipt.

    Takes any finished units that hold every row once, whatever cut them. Raises
    `IncompleteShardError` if there are none such, `ChangedInputError` if the input is another by
    now. Streams: holds a unit's score columns and a row group's rows at a time.
    """
    covering = store.covering_units(shard)
    added = added_columns(store.identity.settings)
    metadata = {added.metadata_key: json.dumps(store.identity.to_json()).encode()}
    summary = Summary()
    for _, receipt in covering:
        summary.merge(receipt.summary)

    def write(sink: HashingFile) -> Summary:
        tables = _tables(store, added, [unit for unit, _ in covering])
        write_beside(sink, shard, tables, added.replaces, metadata)
        return summary

    first_finished_s = min((r.finished_s for _, r in covering), default=None)
    store.publish(shard, write, first_finished_s=first_finished_s)
    store.remove_units(shard)
    return summary


def keep_first_rows(store: RunStore, shard: Shard) -> None:
    """Make a unit of the shard's output, if that holds only the first of its rows.

    So it is after `--limit` was raised: the output was whole, and more rows belong into it now.
    """
    receipt = stored_receipt(store.folder, shard.name)
    if receipt is None or not 0 < receipt.stop < shard.num_rows:
        return
    found = store.folder.storage.find(shard.name)
    is_ours = receipt.is_for(shard, 0, receipt.stop, store.digest)
    if found is None or not is_ours or not store.has_content(found, receipt):
        return
    names = added_columns(store.identity.settings).schema.names
    with store.folder.storage.open(shard.name) as file:
        scores = pq.read_table(file, columns=names)
    unit = Unit(shard, 0, receipt.stop)
    store.commit_unit(unit, cast(pl.DataFrame, pl.from_arrow(scores)), receipt.summary)


def _tables(store: RunStore, added: AddedColumns, units: Sequence[Unit]) -> Iterator[pa.Table]:
    """The units' added columns, one after the other; at least one table, if an empty one."""
    yield score_columns.to_arrow(added.to_frame([]))
    for unit in units:
        frame = store.read_unit(unit)
        if frame is None:
            raise IncompleteShardError(f"{store.unit_name(unit)} was damaged a moment ago")
        yield score_columns.to_arrow(frame)
