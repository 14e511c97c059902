"""What a selection must hold: the rows it says it took, in their order, as they stand in SCORED."""

import json
from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa

from rsr.jobs.run.folder import COMPOSITION, RunFolder
from rsr.jobs.run.manifest import InputShard, Manifest
from rsr.jobs.run.receipts import Receipt
from rsr.jobs.run.verify import ChecksByFile, Problem
from rsr.jobs.selection.subset import read_kept_rows
from rsr.jobs.shards.compare import same_bits
from rsr.jobs.shards.exploded import rows_at
from rsr.jobs.shards.parquet import open_parquet
from rsr.jobs.shards.reader import ShardReader


class SelectionChecks(ChecksByFile):
    """The checks of `rsr.jobs.run.verify.ShardChecks` for `rsr filter` and `rsr select`."""

    def wrong_in_table(
        self, folder: RunFolder, manifest: Manifest, shard: InputShard, receipt: Receipt
    ) -> Iterator[str]:
        with open_parquet(folder.storage.describe(shard.name)) as file:
            there = file.metadata.num_rows
        if there != receipt.summary.num_rows:
            yield f"has {there:,} rows; its receipt says {receipt.summary.num_rows:,}"
        try:
            num_kept = int(np.count_nonzero(read_kept_rows(folder, shard)))
        except (OSError, ValueError) as error:
            yield f"which rows were taken cannot be read: {error}"
            return
        if num_kept != there:
            yield f"has {there:,} rows; {num_kept:,} were taken"

    def wrong_beside_input(
        self, folder: RunFolder, manifest: Manifest, shard: InputShard, source: str
    ) -> Iterator[str]:
        mask = read_kept_rows(folder, shard)
        written = folder.storage.describe(shard.name)
        with open_parquet(source) as before, open_parquet(written) as after:
            if not before.schema_arrow.equals(after.schema_arrow, check_metadata=True):
                yield "its columns, or their metadata, are not those of its input"
                return
            if before.metadata.num_rows != shard.num_rows:
                yield f"its input has {before.metadata.num_rows:,} rows, not {shard.num_rows:,}"
                return
        reader, first, row = ShardReader(written), 0, 0
        for batch in ShardReader(source).rows(0, shard.num_rows):
            here = np.flatnonzero(mask[row : row + batch.num_rows])
            row += batch.num_rows
            if not len(here):
                continue
            found = pa.Table.from_batches(reader.rows(first, first + len(here)))
            for name, expected, column in zip(
                batch.schema.names, batch.columns, found.columns, strict=True
            ):
                if not same_bits(rows_at(expected, pa.array(here)), column.combine_chunks()):
                    last = first + len(here) - 1
                    yield f"column {name!r} differs in rows {first:,} to {last:,}"
                    return
            first += len(here)

    def wrong_in_run(
        self, folder: RunFolder, manifest: Manifest, receipts: Mapping[str, Receipt]
    ) -> Iterator[Problem]:
        num_rows = sum(receipt.summary.num_rows for receipt in receipts.values())
        try:
            told = json.loads(folder.storage.read(COMPOSITION))["num_kept"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            yield Problem(COMPOSITION, f"the result cannot be read: {error!r}", "rerun")
            return
        if told != num_rows:
            what = f"tells of {told} rows; {num_rows:,} were written"
            yield Problem(COMPOSITION, what, "rerun")


CHECKS = SelectionChecks()
