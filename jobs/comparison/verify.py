"""What a gated file must hold: the refined rows that passed, bit for bit, each with its verdict."""

from collections.abc import Callable, Iterator

import pyarrow as pa

from rsr.jobs.comparison.gate import GATE_COLUMNS, GATE_FIELDS, GateStatus
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.manifest import InputShard, Manifest
from rsr.jobs.run.verify import ChecksOfRows
from rsr.jobs.shards.compare import same_bits
from rsr.jobs.shards.parquet import open_parquet
from rsr.jobs.shards.reader import ShardReader
from rsr.jobs.shards.writer import GATE_METADATA_KEY


class GateChecks(ChecksOfRows):
    """The checks of `rsr.jobs.run.verify.ShardChecks` for what `rsr compare --gate` writes."""

    looked_at = ("gate_status", "gate_drift")

    def metadata_key(self, _manifest: Manifest) -> bytes:
        return GATE_METADATA_KEY

    def is_added(self, _manifest: Manifest) -> Callable[[str], bool]:
        return GATE_COLUMNS.__contains__

    def wrong_in_schema(self, schema: pa.Schema) -> str | None:
        if list(schema)[-len(GATE_FIELDS) :] == list(GATE_FIELDS):
            return None
        return f"ends with other columns than rsr compare --gate adds: {', '.join(schema.names)}"

    def statuses(
        self, batch: pa.RecordBatch, manifest: Manifest
    ) -> Iterator[tuple[str, str | None]]:
        max_drift = manifest.identity.settings.get("max_drift")
        rows = (batch[name].to_pylist() for name in self.looked_at)
        for status, drift in zip(*rows, strict=True):
            wrong = None
            if status not in set(GateStatus):
                wrong = f"has a row of status {status!r}"
            elif status == GateStatus.REFINED and not (
                isinstance(max_drift, int | float) and drift is not None and drift <= max_drift
            ):
                wrong = f"has a refined row of drift {drift}; expected at most {max_drift}"
            yield status, wrong

    def wrong_beside_input(
        self, folder: RunFolder, manifest: Manifest, shard: InputShard, source: str
    ) -> Iterator[str]:
        """`source` is the refined file; native rows are not looked for again."""
        written = folder.storage.describe(shard.name)
        before, after = open_parquet(source).schema_arrow, open_parquet(written).schema_arrow
        if before.names != [name for name in after.names if name not in GATE_COLUMNS]:
            yield f"has other columns than its input: {', '.join(after.names)}"
            return
        reader, first = ShardReader(written), 0
        for expected in ShardReader(source).rows(0, shard.num_rows):
            last = first + expected.num_rows
            rows = pa.Table.from_batches(reader.rows(first, last))
            passed = [status == GateStatus.REFINED for status in rows["gate_status"].to_pylist()]
            mask = pa.array(passed, pa.bool_())
            kept = rows.filter(mask)
            for place, name in enumerate(before.names):
                wanted = expected.column(place).filter(mask)
                if not same_bits(wanted, kept.column(place).combine_chunks()):
                    yield f"column {name!r} differs in refined rows {first:,} to {last - 1:,}"
                    return
            first = last


CHECKS = GateChecks()
