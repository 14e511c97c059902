"""What a scored file must hold: the input's rows in order, bit for bit, and sound scores."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pyarrow as pa

from rsr.engine.trajectory import Status
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.manifest import InputShard, Manifest
from rsr.jobs.run.receipts import Receipt
from rsr.jobs.run.verify import ChecksOfAddedColumns
from rsr.jobs.shards import score_columns
from rsr.jobs.shards.parquet import open_parquet
from rsr.jobs.shards.reader import ShardReader
from rsr.jobs.shards.writer import METADATA_KEY

SCORED = [status.value for status in Status if status.is_scored]
UNSCORED = [status.value for status in Status if not status.is_scored]
MAX_ROWS_NAMED = 3
"""Of one file: what is wrong with one row is usually wrong with many."""


class ScoringChecks(ChecksOfAddedColumns):
    """The checks of `rsr.jobs.run.verify.ShardChecks` for what `rsr score` writes."""

    def wrong_in_table(
        self, folder: RunFolder, manifest: Manifest, shard: InputShard, receipt: Receipt
    ) -> Iterator[str]:
        path = folder.storage.describe(shard.name)
        with open_parquet(path) as file:
            schema, there = file.schema_arrow, file.metadata.num_rows
        if there != shard.num_rows:
            yield f"has {there:,} rows; expected {shard.num_rows:,}"
        kept = score_columns.kept_by(manifest.identity.settings)
        wanted = pa.schema(score_columns.arrow_fields(**kept))
        scores = [f for f in schema if score_columns.is_score_column(f.name)]
        if not pa.schema(scores).equals(wanted) or list(schema)[-len(scores) :] != scores:
            yield f"has score columns {[f'{f.name}: {f.type}' for f in scores]}; expected {wanted}"
            return
        yield from self.wrong_in_metadata(schema, manifest)
        counts: dict[str, int] = {}
        bad_rows: list[str] = []
        for batch in ShardReader(path, ["rsr", "rsr_status", "rsr_num_tokens"]).rows(0, there):
            bad_rows += islice(_score_problems(batch), MAX_ROWS_NAMED - len(bad_rows))
            statuses: Any = batch["rsr_status"]
            for entry in statuses.value_counts():
                status = entry["values"].as_py()
                counts[status] = counts.get(status, 0) + entry["counts"].as_py()
        yield from bad_rows
        if counts != receipt.summary.rows_by_status:
            yield f"has rows of status {counts}; its receipt says {receipt.summary.rows_by_status}"


CHECKS = ScoringChecks(METADATA_KEY, score_columns.is_score_column)


def _score_problems(batch: pa.RecordBatch) -> Iterator[str]:
    """A row is scored and has a score, or says why not."""
    rows = zip(
        batch["rsr"].to_pylist(),
        batch["rsr_status"].to_pylist(),
        batch["rsr_num_tokens"].to_pylist(),
        strict=True,
    )
    for rsr, status, num_tokens in rows:
        if status not in SCORED + UNSCORED:
            yield f"has a row of status {status!r}; expected one of {SCORED + UNSCORED}"
        elif (rsr is not None) != (status in SCORED) or bool(num_tokens) != (status in SCORED):
            yield f"has a row of status {status!r} with RSR {rsr} over {num_tokens} tokens"
