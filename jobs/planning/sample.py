"""What is known of INPUT before it is scored: sizes from footers, lengths from a sample of rows.

Rows are tokenized as the student would read them. Knows nothing of GPUs.
"""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rsr.jobs.errors import refusing_values
from rsr.jobs.inspection.reading import Reading
from rsr.jobs.planning.schedule import CuttableShard
from rsr.jobs.shards.columns import TrajectoryColumns, choose_columns
from rsr.jobs.shards.parquet import file_size_bytes, open_parquet, row_groups
from rsr.jobs.shards.reader import read_trajectories
from rsr.jobs.shards.shard import Shard, Unit, describe_shard
from rsr.jobs.shards.staging import needs_staging, stage

if TYPE_CHECKING:
    from rsr.engine.student import Student

SAMPLE_SHARDS = 16
HISTOGRAM_EDGES = (128, 256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)


@dataclass(frozen=True, slots=True)
class Sample:
    """Rows that were tokenized; token counts are whole sequences', context included.

    scored_tokens: of each row. reading: of all of them, and why some would get no score.
    """

    num_tokens: list[int]
    scored_tokens: list[int]
    reading: Reading

    @property
    def num_rows(self) -> int:
        return len(self.num_tokens)


@dataclass(frozen=True, slots=True)
class Corpus:
    """INPUT as a whole. num_bytes: of its files. text_bytes: uncompressed trajectory columns."""

    files: list[CuttableShard]
    num_rows: int
    num_bytes: int
    text_bytes: int


def sample_corpus(
    inputs: Sequence[tuple[str, str]],
    columns: TrajectoryColumns,
    student: "Student",
    max_rows: int,
) -> tuple[Corpus, Sample]:
    """inputs: path and name of each file; what needs it is staged in a folder that does not stay.

    columns: those that are named, as for `choose_columns`.
    """
    with tempfile.TemporaryDirectory(prefix="rsr-plan-") as folder:
        files, columns = _describe(inputs, columns, Path(folder))
        shards = [file.shard for file in files]
        sample = take_sample(shards, columns, student, max_rows)
        corpus = Corpus(
            files=files,
            num_rows=sum(shard.num_rows for shard in shards),
            num_bytes=sum(file_size_bytes(file) for file, _ in inputs),
            text_bytes=sum(shard.num_bytes for shard in shards),
        )
    return corpus, sample


def _describe(
    inputs: Sequence[tuple[str, str]], columns: TrajectoryColumns, folder: Path
) -> tuple[list[CuttableShard], TrajectoryColumns]:
    files = []
    for number, (file, name) in enumerate(inputs):
        path = file
        if needs_staging(file, columns.exploded):
            path = str(folder / f"{number}.parquet")
            stage(file, path, columns.exploded)
        opened = open_parquet(path)
        columns = choose_columns(opened.schema_arrow, columns, file)
        groups = row_groups(opened.metadata, columns.names)
        files.append(CuttableShard(describe_shard(path, name, columns, None), groups))
    return files, columns


def take_sample(
    shards: Sequence[Shard], columns: TrajectoryColumns, student: "Student", max_rows: int
) -> Sample:
    """Tokenize runs of rows from the middle of shards spread evenly over the input."""
    with refusing_values():
        encoder = student.encoder()
    filled = [shard for shard in shards if shard.num_rows]
    step = max(1, math.ceil(len(filled) / SAMPLE_SHARDS))
    chosen = filled[::step]
    num_tokens: list[int] = []
    scored_tokens: list[int] = []
    reading = Reading(student.max_model_len)
    for number, shard in enumerate(chosen):
        wanted = math.ceil((max_rows - len(num_tokens)) / (len(chosen) - number))
        size = min(wanted, shard.num_rows)
        start = (shard.num_rows - size) // 2
        trajectories = read_trajectories(Unit(shard, start, start + size), columns)
        with refusing_values():
            rows = encoder.encode_all(trajectories)
        num_tokens += [row.num_tokens for row in rows]
        scored_tokens += [row.num_head_rows for row in rows]
        reading.add(rows, shard.name, start)
    return Sample(num_tokens, scored_tokens, reading)


def histogram(num_tokens: Sequence[int]) -> list[dict[str, int | None]]:
    """Rows by length: from the edge before (not included) up to `up_to` tokens; None is beyond."""
    counts = dict.fromkeys((*HISTOGRAM_EDGES, None), 0)
    for length in num_tokens:
        counts[next((edge for edge in HISTOGRAM_EDGES if length <= edge), None)] += 1
    return [{"up_to": edge, "num_rows": count} for edge, count in counts.items()]
