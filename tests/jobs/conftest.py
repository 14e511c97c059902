"""Scored files without a student: rows as `rsr score` would have written them."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rsr.engine.metrics import STORED_RANK_CLIPS
from rsr.jobs import score_columns
from rsr.jobs.output import METADATA_KEY

IDENTITY = {
    "settings": {"model": "student", "dtype": "float32", "rank_clip": 100},
    "columns": {"messages": "messages"},
    "model": {"config_sha256": "0123"},
    "versions": {"rsr-engine": "0.1.0"},
}


@pytest.fixture(scope="session")
def write_scored() -> Callable[..., Path]:
    """Writes a scored file: input columns, and score columns that agree with each other.

    rsr: one value a row; None is a row that could not be scored, NaN a broken score. num_tokens:
    scored tokens of each row, 10 where not given. Mean surprisal is 2 nats and r_max 100; the
    rank sum at r_max 50 is half of that at 100, at 200 twice, at 500 five times, unclipped ten.
    """

    def write(
        path: Path,
        rsr: Sequence[float | None],
        *,
        columns: Mapping[str, Any] | None = None,
        num_tokens: Sequence[int] | None = None,
        identity: Mapping[str, Any] | None = IDENTITY,
        **write_options: Any,
    ) -> Path:
        tokens = [10] * len(rsr) if num_tokens is None else list(num_tokens)
        factors = dict(zip(STORED_RANK_CLIPS, (0.5, 1.0, 2.0, 5.0, 10.0), strict=True))
        values: dict[str, list[Any]] = {
            "rsr": list(rsr),
            "rsr_num_tokens": [n if r is not None else 0 for r, n in zip(rsr, tokens, strict=True)],
            "rsr_mean_rank": [None if r is None else 2.0 * r for r in rsr],
            "rsr_mean_surprisal": [None if r is None else 2.0 for r in rsr],
            "rsr_mean_entropy": [None if r is None else 1.0 for r in rsr],
            "rsr_rank_sums": [
                None if r is None else {name: 2.0 * r * n * f for name, f in factors.items()}
                for r, n in zip(rsr, tokens, strict=True)
            ],
            "rsr_status": ["no_response" if r is None else "ok" for r in rsr],
        }
        fields = score_columns.arrow_fields(token_columns=False)
        arrays = [pa.array(values[f.name], f.type) for f in fields]
        own = pa.table(dict(columns or {}))
        schema = pa.schema([*own.schema, *fields])
        if identity is not None:
            schema = schema.with_metadata({METADATA_KEY: json.dumps(identity).encode()})
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_arrays([*own.columns, *arrays], schema=schema)
        pq.write_table(table, path, **write_options)
        return path

    return write


@pytest.fixture(scope="session")
def identity() -> dict[str, Any]:
    """What `write_scored` says of the run, for tests that change it."""
    return json.loads(json.dumps(IDENTITY))
