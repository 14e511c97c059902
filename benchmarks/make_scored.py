"""Make a scored corpus of any size, the same for the same arguments: what bench_jobs.py reads.

    python benchmarks/make_scored.py FOLDER [--rows 50000000] [--groups 5000000] [--shards 64]
        [--text-bytes 200]

Rows have an id, a problem (its rows lie anywhere in the corpus), a teacher, a verdict, text made of
made-up words, and the score columns as `rsr score` writes them; one row in 128 could not be scored.
Streams: holds one row group. The numbers are made up.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rsr.engine.metrics import STORED_RANK_CLIPS
from rsr.jobs.storage.atomic import atomic_path

TEXT_BYTES = 200
TEXT_POOL_BYTES = 32 << 20
"""Long enough that rows of one compressed page rarely share text."""
ROW_GROUP_ROWS = 1 << 16
TEACHERS = [f"teacher-{letter}" for letter in "abcdefgh"]
UNSCORED_EVERY = 128


def text_pool(seed: int) -> np.ndarray:
    """(TEXT_POOL_BYTES,) ASCII bytes of made-up words, the frequent ones far more frequent."""
    rng = np.random.default_rng(seed)
    letters = rng.integers(ord("a"), ord("z") + 1, (20_000, 9), np.uint8)
    words = [bytes(row[: 2 + i % 8]) + b" " for i, row in enumerate(letters)]
    ranks = rng.zipf(1.3, TEXT_POOL_BYTES // 4) % len(words)
    text = b"".join([words[rank] for rank in ranks])
    return np.frombuffer(text, np.uint8)[:TEXT_POOL_BYTES]


def fixed_text(
    pool: np.ndarray, rng: np.random.Generator, num_rows: int, text_bytes: int
) -> "pa.Array[Any]":
    """`num_rows` strings of `text_bytes` from anywhere in the pool."""
    windows = np.lib.stride_tricks.sliding_window_view(pool, text_bytes)
    chosen = windows[rng.integers(0, len(windows), num_rows)]
    offsets = np.arange(0, (num_rows + 1) * text_bytes, text_bytes, dtype=np.int32)
    buffers = [None, pa.py_buffer(offsets.data), pa.py_buffer(np.ascontiguousarray(chosen).data)]
    return pa.Array.from_buffers(pa.string(), num_rows, buffers)


def ids(first: int, num_rows: int) -> "pa.Array[Any]":
    numbers = pa.array(np.arange(first, first + num_rows)).cast(pa.string())
    joined: pa.Array[Any] = pc.binary_join_element_wise("row", pc.utf8_lpad(numbers, 11, "0"), "-")
    return joined


def input_columns(
    first: int,
    num_rows: int,
    num_groups: int,
    pool: np.ndarray,
    rng: np.random.Generator,
    text_bytes: int,
) -> dict[str, "pa.Array[Any]"]:
    teachers = pa.array(rng.integers(0, len(TEACHERS), num_rows, np.int8))
    columns = {
        "id": ids(first, num_rows),
        "problem_id": pa.array(rng.integers(0, num_groups, num_rows)),
        "teacher": pa.DictionaryArray.from_arrays(teachers, TEACHERS).dictionary_decode(),
        "correct": pa.array(rng.random(num_rows) < 0.6),
    }
    if text_bytes:
        columns["text"] = fixed_text(pool, rng, num_rows, text_bytes)
    return columns


def scores(num_rows: int, rng: np.random.Generator) -> dict[str, "pa.Array[Any]"]:
    """Score columns that agree with each other, at r_max 100."""
    is_null = rng.integers(0, UNSCORED_EVERY, num_rows) == 0
    num_tokens = rng.integers(20, 500, num_rows).astype(np.int32)
    mean_surprisal = rng.gamma(9.0, 0.1, num_rows)
    rsr = 1.0 + rng.gamma(6.0, 0.3, num_rows)
    rank_sum = rsr * mean_surprisal * num_tokens
    num_tokens[is_null] = 0
    sums = [rank_sum * factor for factor in (0.8, 1.0, 1.2, 1.5, 4.0)]
    names = list(STORED_RANK_CLIPS)
    values = {
        "rsr": pa.array(rsr, mask=is_null),
        "rsr_num_tokens": pa.array(num_tokens),
        "rsr_mean_rank": pa.array(rsr * mean_surprisal, mask=is_null),
        "rsr_mean_surprisal": pa.array(mean_surprisal, mask=is_null),
        "rsr_mean_entropy": pa.array(0.8 * mean_surprisal, mask=is_null),
        "rsr_rank_sums": pa.StructArray.from_arrays(
            [pa.array(s) for s in sums], names, mask=pa.array(is_null)
        ),
        "rsr_status": pa.array(np.where(is_null, "no_response", "ok")),
    }
    return values


def make_scored(
    folder: Path,
    *,
    num_rows: int,
    num_groups: int,
    num_shards: int,
    text_bytes: int = TEXT_BYTES,
    seed: int = 0,
) -> None:
    """Write `folder`/shard-<n>.parquet. text_bytes: of each row; 0 leaves the column out."""
    pool = text_pool(seed)
    first = 0
    for shard in range(num_shards):
        stop = num_rows * (shard + 1) // num_shards
        rng = np.random.default_rng([seed, shard])
        with atomic_path(folder / f"shard-{shard:04d}.parquet") as path:
            writer = None
            for start in range(first, stop, ROW_GROUP_ROWS):
                size = min(ROW_GROUP_ROWS, stop - start)
                columns = input_columns(start, size, num_groups, pool, rng, text_bytes)
                table = pa.table(columns | scores(size, rng))
                writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
                writer.write_table(table)
            assert writer is not None, "more shards than rows"
            writer.close()
        first = stop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=50_000_000)
    parser.add_argument("--groups", type=int, default=5_000_000)
    parser.add_argument("--shards", type=int, default=64)
    parser.add_argument("--text-bytes", type=int, default=TEXT_BYTES)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make_scored(
        arguments.folder,
        num_rows=arguments.rows,
        num_groups=arguments.groups,
        num_shards=arguments.shards,
        text_bytes=arguments.text_bytes,
        seed=arguments.seed,
    )


if __name__ == "__main__":
    main()
