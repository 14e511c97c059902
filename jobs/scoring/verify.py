"""What a scored file must hold: the input's rows in order, bit for bit, and sound scores."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rsr.engine.trajectory import Status
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.manifest import InputShard, Manifest
from rsr.jobs.run.receipts import Receipt
from rsr.jobs.run.verify import ChecksOfAddedColumns
from rsr.jobs.scoring.columns import AddedColumns, added_columns
from rsr.jobs.shards.parquet import open_parquet
from rsr.jobs.shards.reader import ShardReader

SCORED = [status.value for status in Status if status.is_scored]
UNSCORED = [status.value for status in Status if not status.is_scored]
MAX_ROWS_NAMED = 3
"""Rows of one file that are named: what is wrong with one is usually wrong with many."""


class ScoringChecks(ChecksOfAddedColumns):
    """The checks of `rsr.jobs.run.verify.ShardChecks` for what `rsr score` writes."""

    def metadata_key(self, manifest: Manifest) -> bytes:
        return added_columns(manifest.identity.settings).metadata_key

    def is_added(self, manifest: Manifest) -> Callable[[str], bool]:
        return added_columns(manifest.identity.settings).replaces

    def wrong_in_table(
        self, folder: RunFolder, manifest: Manifest, shard: InputShard, receipt: Receipt
    ) -> Iterator[str]:
        path = folder.storage.describe(shard.name)
        with open_parquet(path) as file:
            schema, there = file.schema_arrow, file.metadata.num_rows
        if there != shard.num_rows:
            yield f"has {there:,} rows; expected {shard.num_rows:,}"
        added = added_columns(manifest.identity.settings)
        wanted = added.schema
        scores = [f for f in schema if added.replaces(f.name)]
        if not pa.schema(scores).equals(wanted) or list(schema)[-len(scores) :] != scores:
            yield f"has score columns {[f'{f.name}: {f.type}' for f in scores]}; expected {wanted}"
            return
        yield from self.wrong_in_metadata(schema, manifest)
        counts: dict[str, int] = {}
        bad_rows: list[str] = []
        looked_at = ["rsr", "rsr_status", "rsr_num_tokens"]
        if added.is_second_pass:
            looked_at = wanted.names
        for batch in ShardReader(path, looked_at).rows(0, there):
            scores_of_rows, statuses, nums_tokens = _parts(batch, added)
            problems = _score_problems(scores_of_rows, statuses, nums_tokens)
            bad_rows += islice(problems, MAX_ROWS_NAMED - len(bad_rows))
            for entry in statuses.value_counts():
                status = entry["values"].as_py()
                counts[status] = counts.get(status, 0) + entry["counts"].as_py()
        yield from bad_rows
        if counts != receipt.summary.rows_by_status:
            yield f"has rows of status {counts}; its receipt says {receipt.summary.rows_by_status}"


CHECKS = ScoringChecks()


def _parts(batch: pa.RecordBatch, added: AddedColumns) -> tuple[Any, Any, Any]:
    """The score, which is null where there is none, the status and the number of tokens."""
    if not added.is_second_pass:
        return batch["rsr"], batch["rsr_status"], batch["rsr_num_tokens"]
    sums: Any = batch[added.columns[0].name]
    return tuple(pc.struct_field(sums, name) for name in ("surprisal_sum", "status", "num_tokens"))


def _score_problems(scores: Any, statuses: Any, nums_tokens: Any) -> Iterator[str]:
    """A row is scored and has a score, or says why not."""
    parts = (column.to_pylist() for column in (scores, statuses, nums_tokens))
    for score, status, num_tokens in zip(*parts, strict=True):
        if status not in SCORED + UNSCORED:
            yield f"has a row of status {status!r}; expected one of {SCORED + UNSCORED}"
        elif (score is not None) != (status in SCORED) or bool(num_tokens) != (status in SCORED):
            yield f"has a row of status {status!r} with score {score} over {num_tokens} tokens"
