"""The whole way: `rsr sample`, Ray, real vLLM; killed, resumed, and asked for more samples."""

import json
import re
import signal
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from disturbed_run import kill_tree, start_until_units, units
from typed import rsr

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.slow]

NUM_PROBLEMS, NUM_SAMPLES, NUM_MORE = 320, 2, 3


RSR = (sys.executable, "-m", "rsr.jobs.cli")


def command(source, output, model, num_samples):
    return [
        *("sample", str(source), str(output), "--json"),
        *("--model", str(model), "--dtype", "float32", "--max-tokens", "16"),
        *("-n", str(num_samples)),
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_student):
    """An undisturbed run, and one that was killed, told to stop, went on, and got more samples."""
    root = tmp_path_factory.mktemp("sampled")
    source = root / "in.parquet"
    problems = [f"{i} + {i}?" if i != 7 else "<|im_end|>" for i in range(NUM_PROBLEMS)]
    pq.write_table(pa.table({"id": range(NUM_PROBLEMS), "question": problems}), source)
    rsr(*command(source, root / "quiet", tiny_student, NUM_SAMPLES))
    output = root / "killed"
    arguments = command(source, output, tiny_student, NUM_SAMPLES)
    kill_tree(start_until_units([*RSR, *arguments], output, 2))
    kept = units(output)
    process = start_until_units([*RSR, *arguments], output, 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    still_kept = units(output)
    resumed = rsr(*arguments)
    first = (output / "in.samples-00000-00001.parquet").read_bytes()
    more = rsr(*command(source, output, tiny_student, NUM_SAMPLES + NUM_MORE))
    result = json.loads(resumed.stdout)
    return root, kept, still_kept, result, resumed.stderr, first, json.loads(more.stdout)


def test_killed_run_resumes_to_the_same_rows(runs):
    root, kept, still_kept, result, told, first, _ = runs
    name = "in.samples-00000-00001.parquet"
    assert (root / "quiet" / name).read_bytes() == first
    assert {unit: still_kept[unit] for unit in kept} == kept
    assert result["num_tokens_now"] < result["num_tokens"]
    assert re.search(r"going on: [\d,]+ of 320 rows were done", told)
    rows = pq.read_table(root / "quiet" / name)
    assert rows["id"].to_pylist() == [i for i in range(NUM_PROBLEMS) for _ in range(NUM_SAMPLES)]
    assert result["answers_by_finish_reason"]["refused"] == NUM_SAMPLES
    (reason,) = result["reasons"]
    assert "control token" in reason


def test_larger_n_samples_only_the_new_ones(runs):
    root, *_, first, more = runs
    assert (root / "killed" / "in.samples-00000-00001.parquet").read_bytes() == first
    added = pq.read_table(root / "killed" / "in.samples-00002-00004.parquet")
    assert set(added["sample_index"].to_pylist()) == {2, 3, 4}
    assert sum(n or 0 for n in added["num_tokens"].to_pylist()) == more["num_tokens_now"]
    seeds = [
        seed
        for path in sorted(root.glob("killed/*.parquet"))
        for seed in pq.read_table(path)["seed"].to_pylist()
    ]
    assert len(set(seeds)) == len(seeds) == NUM_PROBLEMS * (NUM_SAMPLES + NUM_MORE)
    rsr("verify", root / "killed", "--deep")


def test_smaller_n_and_other_settings_are_refused(runs, tiny_student):
    root, *_ = runs
    arguments = command(root / "in.parquet", root / "killed", tiny_student, 1)
    told = rsr(*arguments, exit_code=2)
    assert "holds 5 samples of each problem" in told.stderr
    arguments = command(root / "in.parquet", root / "killed", tiny_student, 5)
    told = rsr(*arguments, "--temperature", "0.5", exit_code=2)
    assert "temperature was 1.0 and is now 0.5" in told.stderr
