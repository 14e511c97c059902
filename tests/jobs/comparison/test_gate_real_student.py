"""The gate on a real student's scores: a repaired line passes, another register does not."""

import json
import random
from dataclasses import replace

import polars as pl
import pytest
from typed import rsr

from rsr.jobs.demo.trajectories import foreign_register, make_problem, spelled_out

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.slow]
NUM_PROBLEMS = 6


def streams():
    """Native traces with a wrong last step; with that step repaired; told in another register."""
    rows = {"native": [], "repaired": [], "rewritten": []}
    for number in range(NUM_PROBLEMS):
        problem = make_problem(0, number)
        *before, last = problem.steps
        slipped = [*before, replace(last, value=last.value + 10)]
        traces = {
            "native": spelled_out(slipped, random.Random(number)),
            "repaired": spelled_out(problem.steps, random.Random(number)),
            "rewritten": foreign_register(problem.steps, random.Random(number)),
        }
        for stream, trace in traces.items():
            rows[stream].append(
                {
                    "id": f"n{number}",
                    "parent_id": f"n{number}",
                    "problem_id": number,
                    "prompt": problem.question,
                    "response": trace,
                    "correct": stream != "native",
                }
            )
    return {stream: pl.DataFrame(of_stream) for stream, of_stream in rows.items()}


@pytest.fixture(scope="module")
def scored(tmp_path_factory, real_student):
    root = tmp_path_factory.mktemp("gate")
    (root / "in").mkdir()
    for stream, rows in streams().items():
        rows.write_parquet(root / "in" / f"{stream}.parquet")
    options = ("--model", real_student, "--dtype", "float32", "--token-columns")
    rsr("score", root / "in", root / "scored", *options)
    return root / "scored"


@pytest.mark.parametrize(("stream", "status"), [("repaired", "refined"), ("rewritten", "drifted")])
def test_gate_keeps_a_repair_and_returns_a_rewriting_to_native(scored, tmp_path, stream, status):
    paths = (scored / "native.parquet", scored / f"{stream}.parquet")
    result = rsr("compare", *paths, "--gate", tmp_path / "out", "--json")
    drifts = pl.read_parquet(tmp_path / "out" / "*.parquet")["gate_drift"].to_list()
    assert json.loads(result.stdout)["rows_by_status"] == {status: NUM_PROBLEMS}, drifts
    kept = pl.read_parquet(tmp_path / "out" / "*.parquet")["response"].to_list()
    expected = streams()["repaired" if status == "refined" else "native"]["response"].to_list()
    assert kept == expected
