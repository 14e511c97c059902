"""What an export must hold: each row once, in its order, as INPUT's rows make it."""

from collections.abc import Iterator, Mapping
from typing import Any

from rsr.jobs.export.export import data_name, open_source
from rsr.jobs.export.files import data_table
from rsr.jobs.export.plan import Plan, survey
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.manifest import InputShard, Manifest
from rsr.jobs.run.receipts import Receipt
from rsr.jobs.run.verify import Problem
from rsr.jobs.shards.columns import TrajectoryColumns
from rsr.jobs.shards.inputs import find_inputs
from rsr.jobs.shards.parquet import open_parquet
from rsr.jobs.shards.shard import digest_of
from rsr.jobs.shards.staging import needs_staging


class ExportChecks:
    """The checks of `rsr.jobs.run.verify.ShardChecks` for `rsr export`."""

    def wrong_in_table(
        self, folder: RunFolder, manifest: Manifest, shard: InputShard, receipt: Receipt
    ) -> Iterator[str]:
        if not shard.num_rows:
            return
        with open_parquet(folder.storage.describe(shard.name)) as file:
            there = file.metadata.num_rows
        if there != shard.num_rows:
            yield f"has {there:,} rows; expected {shard.num_rows:,}"

    def source_of(
        self,
        manifest: Manifest,
        shard: InputShard,
        place: str | None,
        files: Mapping[str, str],
    ) -> str | None:
        return shard.source if place is None else place

    def is_another_input(
        self, _folder: RunFolder, _manifest: Manifest, _shard: InputShard, _source: str
    ) -> bool:
        """Whether it is, `wrong_beside_input` finds from all the files at once."""
        return False

    def wrong_beside_input(
        self, folder: RunFolder, manifest: Manifest, shard: InputShard, source: str
    ) -> Iterator[str]:
        """A file of rows is made again and compared; those made from the same rows are hashed."""
        if not shard.num_rows:
            return
        settings = manifest.identity.settings
        files = find_inputs(source)
        if any(needs_staging(file, manifest.exploded) for file, _ in files):
            yield "was made of JSON or lists, which are not read again: export anew to compare"
            return
        named_columns: dict[str, Any] = {
            kind: name for kind, name in manifest.identity.columns.items() if isinstance(name, str)
        }
        columns = TrajectoryColumns(**named_columns)
        named = settings["id_column"]
        rows = open_source(
            files, columns, str(settings["format"]), None if named is None else str(named)
        )
        if digest_of(rows.shards) != shard.fingerprint:
            yield "its input has changed since the run began"
            return
        stop = StopRequest()
        seed = settings["seed"]
        shard_rows = settings["shard_rows"]
        assert seed is None or isinstance(seed, int)
        assert isinstance(shard_rows, int)
        plan = Plan.of(rows, survey(rows, stop), seed, shard_rows)
        number = next(
            n for n in range(plan.num_files) if data_name(n, plan.num_files) == shard.name
        )
        with open_parquet(folder.storage.describe(shard.name)) as file:
            if not file.read().equals(data_table(plan, number, stop)):
                yield "its rows are not those that its input makes"

    def wrong_in_run(
        self, folder: RunFolder, manifest: Manifest, receipts: Mapping[str, Receipt]
    ) -> Iterator[Problem]:
        yield from ()


CHECKS = ExportChecks()
