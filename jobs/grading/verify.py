"""What a graded file must hold: the input's rows in order, bit for bit, and sound grades."""

from collections.abc import Callable, Iterator

import pyarrow as pa

from rsr.jobs.grading.columns import GRADE_FIELDS, is_grade_column
from rsr.jobs.grading.grades import KNOWN_VERDICTS, GradeStatus
from rsr.jobs.run.manifest import Manifest
from rsr.jobs.run.verify import ChecksOfRows
from rsr.jobs.shards.writer import GRADE_METADATA_KEY


class GradingChecks(ChecksOfRows):
    """The checks of `rsr.jobs.run.verify.ShardChecks` for what `rsr grade` writes."""

    looked_at = ("grade_status", "correct")

    def metadata_key(self, _manifest: Manifest) -> bytes:
        return GRADE_METADATA_KEY

    def is_added(self, _manifest: Manifest) -> Callable[[str], bool]:
        return is_grade_column

    def wrong_in_schema(self, schema: pa.Schema) -> str | None:
        found = [schema.field(i) for i, n in enumerate(schema.names) if is_grade_column(n)]
        if pa.schema(found).equals(pa.schema(GRADE_FIELDS)):
            return None
        return f"has grade columns {[f'{f.name}: {f.type}' for f in found]}"

    def statuses(
        self, batch: pa.RecordBatch, _manifest: Manifest
    ) -> Iterator[tuple[str, str | None]]:
        rows = (batch[name].to_pylist() for name in self.looked_at)
        for status, correct in zip(*rows, strict=True):
            wrong = None
            if status not in set(GradeStatus):
                wrong = f"has a row of status {status!r}"
            elif correct != KNOWN_VERDICTS.get(GradeStatus(status)):
                wrong = f"has a row of status {status!r} with correct {correct}"
            yield status, wrong


CHECKS = GradingChecks()
