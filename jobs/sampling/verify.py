"""What a sampled file must hold: each problem's row once for every sample, and sound answers."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import pyarrow as pa

from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.manifest import InputShard, Manifest
from rsr.jobs.run.receipts import Receipt
from rsr.jobs.run.staging import parquet_of
from rsr.jobs.run.verify import ChecksOfAddedColumns
from rsr.jobs.sampling.blocks import Block
from rsr.jobs.sampling.columns import CANDIDATE_SCHEMA, REFUSED, is_candidate_column, seed_of
from rsr.jobs.sampling.commit import SAMPLE_METADATA_KEY
from rsr.jobs.shards.compare import first_difference
from rsr.jobs.shards.parquet import open_parquet
from rsr.jobs.shards.reader import ShardReader


class SamplingChecks(ChecksOfAddedColumns):
    """The checks of `rsr.jobs.run.verify.ShardChecks` for what `rsr sample` writes."""

    def metadata_key(self, manifest: Manifest) -> bytes:
        return SAMPLE_METADATA_KEY

    def is_added(self, manifest: Manifest) -> Callable[[str], bool]:
        return is_candidate_column

    def wrong_in_table(
        self, folder: RunFolder, manifest: Manifest, shard: InputShard, receipt: Receipt
    ) -> Iterator[str]:
        path, block = folder.storage.describe(shard.name), Block.parse(shard.name)
        with open_parquet(path) as file:
            schema, there = file.schema_arrow, file.metadata.num_rows
        if there != shard.num_rows * block.num_samples:
            yield (
                f"has {there:,} rows; expected {shard.num_rows:,} problems, each "
                f"{block.num_samples:,} times"
            )
            return
        found = pa.schema(list(schema)[-len(CANDIDATE_SCHEMA) :])
        if not found.equals(CANDIDATE_SCHEMA):
            yield f"has columns {[f'{f.name}: {f.type}' for f in found]} at its end"
            return
        yield from self.wrong_in_metadata(schema, manifest)
        seed = int(str(manifest.identity.settings["seed"]))
        names = ["sample_index", "seed", "finish_reason", "response"]
        counts: Counter[str] = Counter()
        number = 0
        for batch in ShardReader(path, names).rows(0, there):
            for index, own_seed, reason, response in zip(
                *(batch[name].to_pylist() for name in names), strict=True
            ):
                row, sample = divmod(number, block.num_samples)
                sample += block.first
                number += 1
                counts[reason] += 1
                if (index, own_seed) != (sample, seed_of(seed, block.stem, row) + sample):
                    yield f"has sample {index} of seed {own_seed} where sample {sample} belongs"
                    return
                if (response is None) != (reason == REFUSED):
                    yield f"has an answer {response!r:.40} of finish_reason {reason!r}"
                    return
        if counts != receipt.summary.rows_by_status:
            yield (
                f"has answers of finish_reason {dict(counts)}; its receipt says "
                f"{receipt.summary.rows_by_status}"
            )

    def source_of(
        self,
        manifest: Manifest,
        shard: InputShard,
        place: str | None,
        files: Mapping[str, str],
    ) -> str | None:
        if place is None:
            return shard.source
        return files.get(f"{Block.parse(shard.name).stem}.parquet")

    def wrong_beside_input(
        self, folder: RunFolder, manifest: Manifest, shard: InputShard, source: str
    ) -> Iterator[str]:
        written, repeats = folder.storage.describe(shard.name), Block.parse(shard.name).num_samples
        with parquet_of(source) as path:
            what = first_difference(
                path, written, shard.num_rows, is_added=is_candidate_column, repeats=repeats
            )
        if what is not None:
            yield what


CHECKS = SamplingChecks()
