"""`rsr plan`: sums that come out by hand, and refusals."""

import json
import os
import shutil
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from rsr.benchmarks.engine_runs import OURS
from rsr.engine.cost import ModelCost
from rsr.jobs.cli import main
from rsr.jobs.errors import UsageError
from rsr.jobs.planning.gpus import GPUS
from rsr.jobs.planning.prediction import ACTIVATION_BYTES, choose_layout
from rsr.jobs.planning.sample import histogram
from rsr.jobs.scoring.score import METRIC_BYTES_PER_ROW, SCORE_BYTES_PER_ROW

SEVENTY_B = ModelCost(
    num_parameters=70 * 10**9,
    num_active_parameters=68 * 10**9,
    num_layers=80,
    num_heads=64,
    num_kv_heads=8,
    head_size=128,
    hidden_size=8192,
    vocab_size=128_256,
    dtype_bytes=2,
)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(3):
        texts = ["x" * (10 + row % 7) for row in range(400)]
        pq.write_table(pa.table({"text": texts}), folder / f"{number}.parquet")
    return folder


def plan(*arguments):
    return CliRunner().invoke(main, ["plan", *map(str, arguments)])


def plan_json(*arguments):
    result = plan(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_plan_of_known_rows(source, tiny_student):
    found = plan_json(source, "--model", tiny_student, "--gpu", "h100", "--num-gpus", 8)
    # A byte is a token, and the first of a row is not scored.
    mean = sum(10 + row % 7 for row in range(400)) / 400
    assert found["num_rows"] == 1200
    assert found["num_tokens"] == pytest.approx(1200 * mean, rel=0.01)
    assert found["num_scored_tokens"] == pytest.approx(1200 * (mean - 1), rel=0.01)
    assert abs(found["num_tokens"] - 1200 * mean) <= found["num_tokens_error"]
    assert found["settings"]["tensor_parallel_size"] == 1
    assert found["num_workers"] == 8
    assert found["gpu_hours"] == pytest.approx(found["seconds"] * 8 / 3600)
    files = sum(file.stat().st_size for file in source.iterdir())
    assert found["output_bytes"] == files + (SCORE_BYTES_PER_ROW + METRIC_BYTES_PER_ROW) * 1200
    assert sum(bar["num_rows"] for bar in found["length_histogram"]) >= 1000


@pytest.mark.seconds
def test_more_gpus_take_less_time_and_a_measurement_replaces_the_assumption(
    source, tiny_student, tmp_path
):
    measured = tmp_path / "bench_engine.json"
    row = {"way": OURS, "tokens_per_s": 10.0, "num_rows": 10, "num_tokens": 130}
    measured.write_text(json.dumps({"rows": [row], "verification": None}))
    common = (source, "--model", tiny_student, "--gpu", "a100", "--calibration", measured)
    one = plan_json(*common)
    four = plan_json(*common, "--num-gpus", 4)
    # As long rows as those measured, at as many tokens a second, and three minutes to start.
    assert one["seconds"] - 180 == pytest.approx(one["num_tokens"] / 10, rel=0.02)
    # 21 units of about equal length: one of the four workers scores a sixth one, the others wait.
    assert one["num_units"] == four["num_units"] == 21
    assert four["seconds"] - 180 == pytest.approx((one["seconds"] - 180) * 6 / 21, rel=0.05)
    assert four["share_busy"] == pytest.approx(21 / 24, rel=0.05)
    assert one["share_busy"] == pytest.approx(1, rel=0.01)
    because = {f["name"]: f["because"] for f in one["figures"]}
    assert because["speed of a GPU"].startswith("measured: 10 tokens/s")
    assumed = plan_json(source, "--model", tiny_student, "--gpu", "a100")
    because = {f["name"]: f["because"] for f in assumed["figures"]}
    assert because["speed of a GPU"].startswith("ASSUMED")


def test_more_gpus_than_help_are_named(source, tiny_student):
    """A run of seconds takes its start-up on any number of them."""
    found = plan_json(source, "--model", tiny_student, "--gpu", "h100", "--num-gpus", 64)
    assert found["most_useful_gpus"] == 1
    (figure,) = (f for f in found["figures"] if f["name"] == "GPUs that help")
    assert figure["value"] == "up to 1"
    assert figure["because"].startswith("they take 3 min 00 s and 0.05 GPU-hours; twice as many")
    assert found["gpu_hours"] == pytest.approx(3.2, rel=0.01)


def test_student_needs_no_weights(source, tiny_student, tmp_path):
    folder = tmp_path / "student"
    ignored = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(tiny_student, folder, ignore=ignored)
    bare = plan_json(source, "--model", folder, "--gpu", "h100")
    assert (
        bare["num_tokens"]
        == plan_json(source, "--model", tiny_student, "--gpu", "h100")["num_tokens"]
    )
    (folder / "config.json").unlink()
    result = plan(source, "--model", folder, "--gpu", "h100")
    assert result.exit_code == 2
    assert "has no config.json" in result.stderr


@pytest.mark.slow
def test_hub_that_cannot_be_reached_is_asked_once(source, tmp_path):
    """By a process of its own: huggingface_hub reads its environment when it is imported."""
    command = [sys.executable, "-m", "rsr.jobs.cli", "plan", source, "--gpu", "h100"]
    online = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    process = subprocess.run(
        [*map(str, command), "--model", "nobody/nothing"],
        env=online | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 2
    assert process.stderr.splitlines() == [
        "rsr: no usable model 'nobody/nothing': no such folder here, and as a name on the hub: We "
        "couldn't connect to 'http://127.0.0.1:9' to load the files, and couldn't find them in the "
        "cached files."
    ]


def test_table_says_that_it_is_a_prediction(source, tiny_student):
    result = plan(source, "--model", tiny_student, "--gpu", "h100")
    assert result.exit_code == 0
    for word in ("a prediction, nothing was run", "GPU-hours", "ASSUMED", "it would take:"):
        assert word in " ".join(result.stdout.split())


def test_student_is_spread_over_as_few_gpus_as_hold_it():
    layout = choose_layout(SEVENTY_B, GPUS["h100"], num_gpus=64, max_model_len=32_768)
    assert (layout.tensor_parallel_size, layout.num_workers) == (4, 16)
    assert layout.kv_tokens == int(
        (4 * (0.9 * 80e9 - ACTIVATION_BYTES) - 140e9) // SEVENTY_B.kv_bytes_per_token
    )
    larger = choose_layout(SEVENTY_B, GPUS["b200"], num_gpus=64, max_model_len=32_768)
    assert (larger.tensor_parallel_size, larger.num_workers) == (1, 64)
    with pytest.raises(UsageError, match="do not fit 2 × l4"):
        choose_layout(SEVENTY_B, GPUS["l4"], num_gpus=2, max_model_len=32_768)


def test_lengths_fall_into_their_bins():
    bars = {bar["up_to"]: bar["num_rows"] for bar in histogram([0, 128, 129, 70_000])}
    assert (bars[128], bars[256], bars[None]) == (2, 1, 1)
    assert sum(bars.values()) == 4


def test_json_lines_are_planned_too(tmp_path, tiny_student):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": "abc"}) for _ in range(5)))
    assert plan_json(path, "--model", tiny_student, "--gpu", "l4")["num_tokens"] == 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "h1000"], "is not one of"),
        (["--gpu", "h100", "--model", "/none"], "no such model folder"),
        (["--gpu", "h100", "--calibration", "CALIBRATION"], "a row of way 'rsr'"),
    ],
)
def test_what_cannot_be_planned_is_refused(source, tiny_student, tmp_path, options, message):
    (tmp_path / "other.json").write_text("{}")
    options = [str(tmp_path / "other.json") if o == "CALIBRATION" else o for o in options]
    result = plan(source, "--model", tiny_student, *options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_rows_without_score_are_counted_by_reason_before_the_night_is_spent(tmp_path, tiny_student):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"q": "Two?", "answers": ["2", "a <|im_end|> b"]},
        {"q": "Three?", "answers": ["3" * 600]},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    columns = ["--prompt-column", "q", "--explode-responses", "answers"]
    common = (path, "--model", tiny_student, "--gpu", "l4", *columns)
    found = plan_json(*common)["sample"]
    assert found["rows_by_status"] == {"ok": 1, "bad_messages": 1, "truncated": 1}
    (reason,) = found["reasons"].values()
    assert (reason["num_rows"], reason["example"]) == (1, "rows.parquet row 1")
    assert found["truncated"]["num_rows"] == 1
    told = " ".join(plan(*common).stdout.split())
    assert "1 33.3% bad_messages: a message contains one of this student's control tokens" in told
    # Cut off no less where the template adds nothing.
    plain = plan_json(*common, "--chat-template", "none", "--max-model-len", 100)["sample"]
    assert plain["truncated"]["num_tokens"] == len("Three?") + 600 - 100


@pytest.mark.parametrize(
    ("command", "more"),
    [
        ("filter", ["--keep-fraction", "1/4"]),
        ("select", ["--group-by", "id", "--kept-share", "0.25"]),
    ],
)
def test_a_selection_reads_what_the_footers_say(tmp_path, write_scored, command, more):
    folder = tmp_path / "scored"
    for number in range(4):
        columns = {"id": list(range(50)), "text": [f"{n} " * 200 for n in range(50)]}
        write_scored(folder / f"{number}.parquet", [2.0] * 50, columns=columns)
    arguments = ["plan", command, str(folder), *more, "--machines", "2", "--json"]
    result = CliRunner().invoke(main, [*arguments, "--bandwidth", "0.5", "--sample-files", "2"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    num_bytes = sum(file.stat().st_size for file in folder.iterdir())
    assert told["footers"]["num_sampled"] == 2
    assert told["footers"]["num_rows"] == 200
    assert told["footers"]["num_bytes"] == pytest.approx(num_bytes, rel=0.01)
    assert told["num_bytes_written"] == pytest.approx(num_bytes / 4, rel=0.01)
    assert told["num_bytes_read"] > num_bytes
    assert told["num_bytes_exchanged"] == (200 * 24 if command == "select" else 200 / 8)
    moved = sum(told[f"num_bytes_{way}"] for way in ("read", "exchanged", "written"))
    assert told["seconds"] == pytest.approx(moved / 1e9)


def test_a_selection_of_columns_that_are_not_there_is_refused(tmp_path, write_scored):
    source = write_scored(tmp_path / "scored.parquet", [2.0])
    result = CliRunner().invoke(main, ["plan", "select", str(source), "--group-by", "problem"])
    assert result.exit_code == 2
    assert "problem" in result.stderr
