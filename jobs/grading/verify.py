"""What a graded file must hold: the input's rows in order, bit for bit, and sound grades."""

import json
from collections.abc import Iterator, Mapping

import pyarrow as pa

from rsr.jobs.grading.columns import GRADE_COLUMNS, GRADE_FIELDS, is_grade_column
from rsr.jobs.grading.grades import KNOWN_VERDICTS, GradeStatus
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.manifest import Identity, InputShard, Manifest, ManifestError
from rsr.jobs.run.receipts import Receipt
from rsr.jobs.run.staging import parquet_of
from rsr.jobs.run.verify import ChecksByFile, Problem
from rsr.jobs.shards.compare import first_difference
from rsr.jobs.shards.parquet import open_parquet
from rsr.jobs.shards.reader import ShardReader
from rsr.jobs.shards.writer import GRADE_METADATA_KEY


class GradingChecks(ChecksByFile):
    """The checks of `rsr.jobs.run.verify.ShardChecks` for what `rsr grade` writes."""

    def wrong_in_table(
        self, folder: RunFolder, manifest: Manifest, shard: InputShard, receipt: Receipt
    ) -> Iterator[str]:
        path = folder.storage.describe(shard.name)
        with open_parquet(path) as file:
            schema, there = file.schema_arrow, file.metadata.num_rows
        if there != shard.num_rows:
            yield f"has {there:,} rows; expected {shard.num_rows:,}"
        found = [schema.field(i) for i, n in enumerate(schema.names) if is_grade_column(n)]
        if not pa.schema(found).equals(pa.schema(GRADE_FIELDS)):
            yield f"has grade columns {[f'{f.name}: {f.type}' for f in found]}"
            return
        if _digest_of(schema) != manifest.identity.digest:
            yield "its metadata name other settings than the run's"
        counts: dict[str, int] = {}
        for batch in ShardReader(path, list(GRADE_COLUMNS)).rows(0, there):
            statuses, verdicts = batch["grade_status"].to_pylist(), batch["correct"].to_pylist()
            for status, correct in zip(statuses, verdicts, strict=True):
                if status not in set(GradeStatus):
                    yield f"has a row of status {status!r}"
                    return
                if correct != KNOWN_VERDICTS.get(GradeStatus(status)):
                    yield f"has a row of status {status!r} with correct {correct}"
                    return
                counts[status] = counts.get(status, 0) + 1
        if counts != receipt.summary.rows_by_status:
            yield f"has rows of status {counts}; its receipt says {receipt.summary.rows_by_status}"

    def wrong_beside_input(
        self, folder: RunFolder, manifest: Manifest, shard: InputShard, source: str
    ) -> Iterator[str]:
        written = folder.storage.describe(shard.name)
        with parquet_of(source, manifest.exploded, shard.num_rows) as path:
            what = first_difference(path, written, shard.num_rows, is_added=is_grade_column)
        if what is not None:
            yield what

    def wrong_in_run(
        self, folder: RunFolder, manifest: Manifest, receipts: Mapping[str, Receipt]
    ) -> Iterator[Problem]:
        yield from ()


CHECKS = GradingChecks()


def _digest_of(schema: pa.Schema) -> str | None:
    try:
        return Identity.parse(json.loads((schema.metadata or {})[GRADE_METADATA_KEY])).digest
    except (KeyError, ValueError, ManifestError):
        return None
