"""`ScoreBatches` as a step of a real Ray Data pipeline, as docs/python.md has it."""

import subprocess
import sys

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typed import rsr

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.slow]

PIPELINE = """
import sys

import ray
import ray.data

from rsr.engine import ScorerConfig
from rsr.jobs import ScoreBatches

source, output, model = sys.argv[1:]
ray.init(num_cpus=2, include_dashboard=False)
ray.data.read_parquet(source).map_batches(
    ScoreBatches,
    fn_constructor_args=(ScorerConfig(model=model, dtype="float32"),),
    batch_format="pyarrow",
    batch_size=8,
    concurrency=1,
).write_parquet(output)
"""


def test_pipeline_writes_what_score_writes(tmp_path, tiny_student):
    rows = [
        {
            "id": row,
            "messages": [
                {"role": "user", "content": f"What is {row} + 1?"},
                {"role": "assistant", "content": f"It is {row + 1}. " * (1 + row % 3)},
            ],
        }
        for row in range(20)
    ]
    rows[3]["messages"] = []
    source = tmp_path / "in" / "rows.parquet"
    source.parent.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), source)
    words = [str(source), str(tmp_path / "piped"), str(tiny_student)]
    subprocess.run([sys.executable, "-c", PIPELINE, *words], check=True, timeout=500)
    rsr("score", source, tmp_path / "scored", "--model", tiny_student, "--dtype", "float32")
    piped = pl.read_parquet(tmp_path / "piped" / "*.parquet").sort("id")
    scored = pl.read_parquet(tmp_path / "scored" / "rows.parquet")
    assert piped.columns == scored.columns
    exact = ["id", "messages", "rsr_status", "rsr_detail", "rsr_num_tokens"]
    assert piped.select(exact).equals(scored.select(exact))
    ratios, expected = (frame["rsr"].drop_nulls().to_list() for frame in (piped, scored))
    assert ratios == pytest.approx(expected, rel=1e-5)
