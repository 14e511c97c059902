"""Putting a sampled shard together: each problem's row once for every sample of it."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from rsr.jobs.run.store import IncompleteShardError, RunStore
from rsr.jobs.sampling.blocks import Block
from rsr.jobs.sampling.columns import CANDIDATE_SCHEMA, candidates, is_candidate_column
from rsr.jobs.shards.parquet import open_parquet
from rsr.jobs.shards.reader import ShardReader
from rsr.jobs.shards.score_columns import Summary
from rsr.jobs.shards.shard import Shard
from rsr.jobs.shards.writer import ShardWriter
from rsr.jobs.storage.hashing import HashingFile

SAMPLE_METADATA_KEY = b"rsr_sample"
"""Key of the run's identity, as JSON, in the metadata of every sampled file."""
MAX_REPEATED_ROWS = 1024
"""Rows of output that are made at a time."""


def commit_sampled_shard(store: RunStore, shard: Shard, seed: int, model: str) -> Summary:
    """Write the shard's output from its input rows and finished units, then its receipt."""
    covering = store.covering_units(shard)
    summary = Summary()
    for _, receipt in covering:
        summary.merge(receipt.summary)
    block = Block.parse(shard.name)

    def parts() -> Iterator[tuple[int, int, pa.Table]]:
        for unit, _ in covering:
            frame = store.read_unit(unit)
            if frame is None:
                raise IncompleteShardError(f"{store.unit_name(unit)} was damaged a moment ago")
            yield unit.start, unit.stop, candidates(frame, block, unit.start, seed, model)

    def write(sink: HashingFile) -> Summary:
        _write(sink, shard, block, parts(), json.dumps(store.identity.to_json()).encode())
        return summary

    first_finished_s = min((r.finished_s for _, r in covering), default=None)
    store.publish(shard, write, first_finished_s=first_finished_s)
    store.remove_units(shard)
    return summary


def _write(
    sink: HashingFile,
    shard: Shard,
    block: Block,
    parts: Iterator[tuple[int, int, pa.Table]],
    identity: bytes,
) -> None:
    with open_parquet(shard.path) as source:
        schema = source.schema_arrow
        # The messages of a problem become the whole conversation.
        kept = [i for i, name in enumerate(schema.names) if not is_candidate_column(name)]
        metadata: dict[bytes | str, bytes | str] = dict((schema.metadata or {}).items())
        metadata[SAMPLE_METADATA_KEY] = identity
        fields = [schema.field(index) for index in kept]
        full = pa.schema([*fields, *CANDIDATE_SCHEMA], metadata=metadata)
        reader = ShardReader(shard.path)
        with ShardWriter(sink, full, source) as writer:
            for start, stop, added in parts:
                first = 0
                for batch in _small(reader.rows(start, stop), block.num_samples):
                    places = np.repeat(np.arange(batch.num_rows), block.num_samples)
                    beside = added.slice(first, len(places)).combine_chunks()
                    first += len(places)
                    columns: list[Any] = [batch.column(index).take(places) for index in kept]
                    columns += [column.chunk(0) for column in beside.columns]
                    writer.add(pa.RecordBatch.from_arrays(columns, schema=full))


def _small(batches: Iterator[pa.RecordBatch], num_samples: int) -> Iterator[pa.RecordBatch]:
    """The same rows in pieces that stay small when each row is repeated `num_samples` times."""
    for batch in batches:
        num_rows = max(1, MAX_REPEATED_ROWS // num_samples)
        for first in range(0, batch.num_rows, num_rows):
            yield batch.slice(first, num_rows)
