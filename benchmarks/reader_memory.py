"""Peak memory of everything but the engine, over an input far larger than memory should be.

    python benchmarks/reader_memory.py --folder /somewhere/large

Writes one large Parquet shard (or JSON-lines file) of long texts in big row groups, then runs the
worker's way over it in a process of its own: plan units, read each, keep made-up scores, commit
the shard. The engine is left out: its model's memory comes on top. Appends a row to the results.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rsr.benchmarks.memory import peak_rss_mib
from rsr.engine.metrics import TrajectoryScore, score_tokens
from rsr.engine.trajectory import Status, TokenScores, Trajectory
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.manifest import Identity
from rsr.jobs.run.store import RunStore
from rsr.jobs.scoring.commit import commit_scored_shard
from rsr.jobs.shards import score_columns
from rsr.jobs.shards.columns import TrajectoryColumns
from rsr.jobs.shards.json_input import stage_json
from rsr.jobs.shards.parquet import open_parquet, row_groups
from rsr.jobs.shards.reader import TrajectoryReader
from rsr.jobs.shards.score_columns import Summary
from rsr.jobs.shards.shard import UNIT_RULES, cut_units, describe_shard

TEXT_BYTES = 48_000
"""A trajectory of about 12k tokens, the paper's."""
ROWS_PER_GROUP = 20_000
WORDS_BYTES = 4 << 20
COLUMNS = TrajectoryColumns(prompt="prompt", response="response")
RESULTS = Path(__file__).parent / "results" / "reader_memory.jsonl"


def long_texts(num_rows: int, seed: int) -> list[str]:
    """Texts that do not repeat: slices of one random text, each from a place of its own."""
    random = np.random.default_rng(seed)
    letters = random.integers(97, 123, WORDS_BYTES, dtype=np.uint8)
    letters[random.integers(0, WORDS_BYTES, WORDS_BYTES // 6)] = 32
    words = letters.tobytes().decode()
    starts = random.integers(0, WORDS_BYTES - TEXT_BYTES, num_rows)
    return [words[start : start + TEXT_BYTES] for start in starts]


def write_parquet(path: Path, num_bytes: int) -> None:
    """About `num_bytes` of text in row groups of about a gigabyte, plain-encoded."""
    fields: list[tuple[str, pa.DataType]] = [
        ("id", pa.int64()),
        ("prompt", pa.string()),
        ("response", pa.string()),
    ]
    schema = pa.schema(fields)
    num_rows = num_bytes // TEXT_BYTES
    with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False) as writer:
        for first in range(0, num_rows, ROWS_PER_GROUP):
            size = min(ROWS_PER_GROUP, num_rows - first)
            rows = [range(first, first + size), [f"Problem {first}"] * size]
            writer.write_table(
                pa.table([*rows, long_texts(size, first)], schema=schema),
                row_group_size=ROWS_PER_GROUP,
            )


def write_json_lines(path: Path, num_bytes: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for first in range(0, num_bytes // TEXT_BYTES, 1000):
            for row, text in enumerate(long_texts(1000, first), start=first):
                file.write(json.dumps({"id": row, "prompt": "p", "response": text}) + "\n")


def stand_in_score(trajectory: Trajectory) -> TrajectoryScore:
    """A score of a few made-up tokens."""
    if not trajectory.response:
        return TrajectoryScore(Status.NO_RESPONSE)
    tokens = TokenScores(
        token_ids=np.arange(4, dtype=np.int32),
        ranks=np.arange(1, 5, dtype=np.int32),
        logprobs=np.full(4, -1.0, np.float32),
        entropies=np.zeros(4, np.float32),
    )
    return score_tokens(tokens)


def run(source: Path, root: Path) -> dict[str, float]:
    """Plan, read, keep and commit, as a run does."""
    path, started = str(source), time.perf_counter()
    if source.suffix == ".jsonl":
        path = str(root / "staged.parquet")
        stage_json(source, path)
    store = RunStore.of(RunFolder(root / "out"), Identity({"token_scores": False}))
    shard = describe_shard(path, "shard.parquet", COLUMNS, None)
    units = cut_units(
        shard,
        max_rows=UNIT_RULES["gpu"].max_rows,
        max_bytes=UNIT_RULES["gpu"].max_bytes,
        groups=row_groups(open_parquet(path).metadata, COLUMNS.names),
    )
    reader = TrajectoryReader(COLUMNS)
    for unit in units:
        scores = [stand_in_score(trajectory) for trajectory in reader.read(unit)]
        frame = score_columns.to_frame(scores, token_columns=False)
        store.commit_unit(unit, frame, Summary.of(frame))
    read_s = time.perf_counter() - started
    summary = commit_scored_shard(store, shard)
    assert summary.num_rows == shard.num_rows
    return {
        "num_rows": shard.num_rows,
        "text_gib": shard.num_bytes / 2**30,
        "row_groups": open_parquet(path).metadata.num_row_groups,
        "num_units": len(units),
        "read_and_keep_s": read_s,
        "commit_s": time.perf_counter() - started - read_s,
        "peak_rss_mib": peak_rss_mib(),
    }


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), help="For the data; default: TMPDIR.")
@click.option("--gib", type=float, default=10.0, show_default=True, help="Text, uncompressed.")
@click.option("--kind", type=click.Choice(["parquet", "jsonl"]), default="parquet")
@click.option("--max-mib", type=float, default=2048.0, show_default=True, help="More fails.")
@click.option("--child", is_flag=True, hidden=True)
def main(folder: Path | None, gib: float, kind: str, max_mib: float, child: bool) -> None:
    """Measure, print and keep one row; exit code 1 if the peak is above --max-mib."""
    if child:
        assert folder is not None, "the parent says where the data are"
        click.echo(json.dumps(run(folder / f"in.{kind}", folder)))
        return
    with tempfile.TemporaryDirectory(dir=folder) as place:
        write = write_parquet if kind == "parquet" else write_json_lines
        write(Path(place) / f"in.{kind}", int(gib * 2**30))
        # The peak is to be the run's alone, not that of making its input.
        command = [sys.executable, __file__, "--folder", place, "--kind", kind, "--child"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    row = {"kind": kind, "pyarrow": pa.__version__, **json.loads(done.stdout)}
    click.echo(json.dumps(row))
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    sys.exit(row["peak_rss_mib"] > max_mib)


if __name__ == "__main__":
    main()
