"""A scored corpus for nights of selection: made up, large enough for copies to last a while."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

TEXT_BYTES = 500
CODEC = "brotli"
"""Copies keep their input's codec, and this one takes its time: a copy is to last some seconds."""
ROWS_PER_GROUP = 4_000
TEACHERS, TEACHER_SHARES = ["A", "B", "C"], [0.5, 0.3, 0.2]


def write_corpus(
    folder: Path, write_scored: Callable[..., Path], num_shards: int, rows_per_shard: int
) -> Path:
    """Scored rows, four of each problem, by three teachers; many share their score with others."""
    random = np.random.default_rng(0)
    for shard in range(num_shards):
        ids = np.arange(shard * rows_per_shard, (shard + 1) * rows_per_shard)
        rsr = (random.integers(1000, 9000, len(ids)) / 1000).tolist()
        columns = {
            "id": ids,
            "problem": ids // 4,
            "teacher": pa.array(random.choice(TEACHERS, len(ids), p=TEACHER_SHARES)),
            "text": _random_digits(random, len(ids)),
        }
        write_scored(
            folder / f"shard-{shard:02d}.parquet",
            # Every eleventh row could not be scored.
            [None if row % 11 == 0 else value for row, value in enumerate(rsr)],
            columns=columns,
            num_tokens=random.integers(1, 99, len(ids)).tolist(),
            compression=CODEC,
            compression_level=1,
            row_group_size=ROWS_PER_GROUP,
        )
    return folder


def _random_digits(random: np.random.Generator, num_rows: int) -> pa.Array:
    digits = random.integers(ord("0"), ord("9") + 1, num_rows * TEXT_BYTES, dtype=np.uint8)
    offsets = np.arange(num_rows + 1, dtype=np.int32) * TEXT_BYTES
    return pa.Array.from_buffers(
        pa.string(), num_rows, [None, pa.py_buffer(offsets), pa.py_buffer(digits)]
    )
