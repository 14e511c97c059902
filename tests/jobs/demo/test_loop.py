"""Once around on the student's own answers, with the real student and real vLLM."""

import json
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest

from rsr.jobs.demo.problems import demo_problems, write_problems

NUM_PROBLEMS = 4
SCRIPT = Path(__file__).parents[3] / "jobs" / "demo" / "loop.sh"


def test_problems_come_with_their_answers_and_more_of_them_begin_with_the_same(tmp_path):
    few, more = demo_problems(0, 3), demo_problems(0, 9)
    assert more.head(3).equals(few)
    assert not demo_problems(1, 3).equals(few)
    write_problems(str(tmp_path / "problems.parquet"), num_problems=3)
    assert pl.read_parquet(tmp_path / "problems.parquet").equals(few)


@pytest.mark.vllm
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1_800)
def test_loop_ends_with_a_data_set_that_trainers_read(tmp_path, real_student, monkeypatch):
    datasets = pytest.importorskip("datasets")
    data_utils = pytest.importorskip("trl.data_utils")
    from transformers import AutoTokenizer

    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    folder = tmp_path / "loop"
    command = ["sh", str(SCRIPT), str(folder), str(NUM_PROBLEMS)]
    subprocess.run(command, env={**os.environ, "PATH": path}, check=True)
    sampled = pl.read_parquet(folder / "sampled" / "*.parquet")
    assert sampled.group_by("problem_id").len()["len"].to_list() == [8] * NUM_PROBLEMS
    selected = pl.read_parquet(folder / "selected" / "*.parquet")
    assert selected["correct"].all()
    assert selected["problem_id"].is_unique().all()
    rows = [json.loads(line) for line in (folder / "dataset" / "train.jsonl").open()]
    assert len(rows) == len(selected) > 0
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    loaded = datasets.load_dataset(str(folder / "dataset"), split="train", cache_dir=str(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(real_student)
    for row in loaded:
        assert data_utils.is_conversational(row)
        text = data_utils.apply_chat_template(row, tokenizer)["text"]
        assert row["messages"][-1]["content"] in text
    assert pq.read_table(folder / "dataset" / "scores.parquet").num_rows == len(rows)
    refined = pl.read_parquet(folder / "refined-scored" / "*.parquet")
    assert len(refined) == len(sampled)
    assert refined["parent_id"].n_unique() == len(sampled)
    page = (folder / "report.html").read_text()
    assert "Streams side by side" in page
    assert "Drift of refined-scored from scored" in page
