"""What a selection must hold: the rows it says it took, in their order, as they stand in SCORED."""

import json
from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa

from rsr.jobs.run.folder import COMPOSITION, RunFolder
from rsr.jobs.run.manifest import InputShard, Manifest
from rsr.jobs.run.receipts import Receipt
from rsr.jobs.run.verify import ChecksByFile, Problem
from rsr.jobs.selection.kept_rows import read_kept_rows
from rsr.jobs.selection.layout import ROWS_PER_FILE, Mask
from rsr.jobs.shards.compare import same_bits
from rsr.jobs.shards.exploded import rows_at
from rsr.jobs.shards.lines_file import scored_rows_of
from rsr.jobs.shards.parquet import fingerprint, open_parquet
from rsr.jobs.shards.reader import ShardReader
from rsr.jobs.shards.scored import scored_files
from rsr.jobs.shards.shard import Shard, digest_of


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
            taken = read_kept_rows(folder, shard.name)
            num_kept = sum(int(np.count_nonzero(rows.mask)) for rows in taken)
        except (OSError, ValueError) as error:
            yield f"which rows were taken cannot be read: {error}"
            return
        if num_kept != there:
            yield f"has {there:,} rows; {num_kept:,} were taken"

    def source_of(
        self,
        manifest: Manifest,
        shard: InputShard,
        place: str | None,
        files: Mapping[str, str],
    ) -> str | None:
        if _is_joined(manifest):
            return shard.source if place is None else place
        source = super().source_of(manifest, shard, place, files)
        return None if source is None else scored_rows_of(source)

    def is_another_input(
        self, folder: RunFolder, manifest: Manifest, shard: InputShard, source: str
    ) -> bool:
        """Whether it is, `wrong_beside_input` finds where files are joined, from all at once."""
        return not _is_joined(manifest) and super().is_another_input(
            folder, manifest, shard, source
        )

    def wrong_beside_input(
        self, folder: RunFolder, manifest: Manifest, shard: InputShard, source: str
    ) -> Iterator[str]:
        files = {shard.name: source}
        if _is_joined(manifest):
            inputs = [Shard(f, n, 0, 0, fingerprint(f)) for f, n in scored_files(source)]
            if digest_of(inputs) != shard.fingerprint:
                yield "its input has changed since the run began"
                return
            files = {one.name: one.path for one in inputs}
        written = ShardReader(folder.storage.describe(shard.name))
        first = 0
        for rows in read_kept_rows(folder, shard.name):
            if rows.shard_name not in files:
                yield f"was made of {rows.shard_name}, which its input does not have"
                return
            what = _first_difference(files[rows.shard_name], rows.mask, written, first)
            if what is not None:
                yield what
                return
            first += int(np.count_nonzero(rows.mask))

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


def _is_joined(manifest: Manifest) -> bool:
    """Whether a file of OUTPUT has rows of several files of INPUT."""
    return ROWS_PER_FILE in manifest.identity.settings


def _first_difference(source: str, mask: Mask, written: ShardReader, first: int) -> str | None:
    """Where the rows of `source` that were taken are not those of `written` from `first` on."""
    with open_parquet(source) as before, open_parquet(written.path) as after:
        num_rows = before.metadata.num_rows
        # A file that was joined has the metadata of the first.
        is_same = before.schema_arrow.equals(after.schema_arrow, check_metadata=not first)
    if not is_same:
        return "its columns, or their metadata, are not those of its input"
    if num_rows != len(mask):
        return f"its input has {num_rows:,} rows, not {len(mask):,}"
    row = 0
    for batch in ShardReader(source).rows(0, num_rows):
        here = np.flatnonzero(mask[row : row + batch.num_rows])
        row += batch.num_rows
        if not len(here):
            continue
        found = pa.Table.from_batches(written.rows(first, first + len(here)))
        for name, expected, column in zip(
            batch.schema.names, batch.columns, found.columns, strict=True
        ):
            if not same_bits(rows_at(expected, pa.array(here)), column.combine_chunks()):
                last = first + len(here) - 1
                return f"column {name!r} differs in rows {first:,} to {last:,}"
        first += len(here)
    return None


CHECKS = SelectionChecks()
