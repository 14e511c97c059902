"""Putting a graded shard together: the input's rows, and the grades of its units."""

import json
from collections.abc import Iterator, Sequence

import pyarrow as pa

from rsr.jobs.grading import columns
from rsr.jobs.run.store import IncompleteShardError, RunStore
from rsr.jobs.shards.score_columns import Summary
from rsr.jobs.shards.shard import Shard, Unit
from rsr.jobs.shards.writer import GRADE_METADATA_KEY, write_beside
from rsr.jobs.storage.hashing import HashingFile


def commit_graded_shard(store: RunStore, shard: Shard) -> Summary:
    """Write the shard's output from its input rows and finished units, then its receipt.

    Raises `IncompleteShardError` if not every row has a unit, `ChangedInputError` if the input is
    another by now.
    """
    covering = store.covering_units(shard)
    summary = Summary()
    for _, receipt in covering:
        summary.merge(receipt.summary)
    metadata = {GRADE_METADATA_KEY: json.dumps(store.identity.to_json()).encode()}

    def write(sink: HashingFile) -> Summary:
        tables = _grade_tables(store, [unit for unit, _ in covering])
        write_beside(sink, shard, tables, columns.is_grade_column, metadata)
        return summary

    first_finished_s = min((r.finished_s for _, r in covering), default=None)
    store.publish(shard, write, first_finished_s=first_finished_s)
    store.remove_units(shard)
    return summary


def _grade_tables(store: RunStore, units: Sequence[Unit]) -> Iterator[pa.Table]:
    """The units' grades, one after the other; at least one table, if an empty one."""
    yield columns.to_arrow(columns.to_frame([]))
    for unit in units:
        frame = store.read_unit(unit)
        if frame is None:
            raise IncompleteShardError(f"{store.unit_name(unit)} was damaged a moment ago")
        yield columns.to_arrow(frame)
