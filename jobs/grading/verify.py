"""What a graded file must hold: the input's rows in order, bit for bit, and sound grades."""

from collections.abc import Callable, Iterator

import pyarrow as pa

from rsr.jobs.grading.columns import GRADE_COLUMNS, GRADE_FIELDS, is_grade_column
from rsr.jobs.grading.grades import KNOWN_VERDICTS, GradeStatus
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.manifest import InputShard, Manifest
from rsr.jobs.run.receipts import Receipt
from rsr.jobs.run.verify import ChecksOfAddedColumns
from rsr.jobs.shards.parquet import open_parquet
from rsr.jobs.shards.reader import ShardReader
from rsr.jobs.shards.writer import GRADE_METADATA_KEY


class GradingChecks(ChecksOfAddedColumns):
    """The checks of `rsr.jobs.run.verify.ShardChecks` for what `rsr grade` writes."""

    def metadata_key(self, _manifest: Manifest) -> bytes:
        return GRADE_METADATA_KEY

    def is_added(self, _manifest: Manifest) -> Callable[[str], bool]:
        return is_grade_column

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
        yield from self.wrong_in_metadata(schema, manifest)
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


CHECKS = GradingChecks()
