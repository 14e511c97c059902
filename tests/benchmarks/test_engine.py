"""The benchmark on a tiny student: every way scores the same, and memory stays with the limit."""

import json

import polars as pl
import pytest
from click.testing import CliRunner

from rsr.benchmarks.child import ChildProcess
from rsr.benchmarks.cli import bench
from rsr.benchmarks.engine import join_rows
from rsr.benchmarks.engine_runs import LIMIT, OURS, Workload, open_way, run_way
from rsr.engine import ScorerConfig, Trajectory

LONG_ROW_TOKENS = 32_768
MAX_PEAK_MEMORY_RATIO = 1.2


@pytest.fixture
def rows_path(tmp_path):
    messages = [
        [{"role": "user", "content": f"{i} + {i}?"}, {"role": "assistant", "content": f"{2 * i}."}]
        for i in range(6)
    ]
    path = tmp_path / "rows.parquet"
    pl.DataFrame({"messages": messages}).write_parquet(path)
    return path


@pytest.mark.vllm
@pytest.mark.slow
def test_every_way_scores_the_same(tiny_student, rows_path):
    arguments = ["engine", "--model", tiny_student, "--input", rows_path, "--verify", 2]
    arguments += ["--rows", 4, "--repeat", 1, "--dtype", "float32", "--json"]
    result = CliRunner().invoke(bench, [str(a) for a in arguments], catch_exceptions=False)
    report = json.loads(result.stdout)
    rows = {row["way"]: row for row in report["rows"]}
    assert set(rows) == {"bare prefill", "rsr", "prompt_logprobs"}
    assert rows["prompt_logprobs"]["max_rsr_difference"] < 1e-5
    assert {row["num_rows"] for row in rows.values()} == {4}
    verification = report["verification"]
    assert verification["num_rows"] == 2
    assert verification["num_equal_ranks"] == verification["num_tokens"] > 0
    assert verification["max_surprisal_difference_nats"] < 1e-4


@pytest.mark.vllm
@pytest.mark.slow
def test_long_row_needs_no_more_memory_than_its_prefill(wide_student):
    text = "".join(f"{i} squared is {i * i}. " for i in range(LONG_ROW_TOKENS))[:LONG_ROW_TOKENS]
    config = ScorerConfig(model=str(wide_student), dtype="float32")
    workload = Workload(config, [Trajectory(text=text)])
    peak_mib = {}
    for way in (LIMIT, OURS):
        with ChildProcess() as child:
            child.call(open_way, way, workload)
            outcome = child.call(run_way, way, len(workload.trajectories))
        peak_mib[way] = outcome.peak_rss_mib
    assert outcome.sums[0][2] == LONG_ROW_TOKENS - 1
    assert peak_mib[OURS] < MAX_PEAK_MEMORY_RATIO * peak_mib[LIMIT]


@pytest.fixture
def wide_student(tmp_path, make_tokenizer, tiny_llama):
    """Tiny but for its vocabulary: logits of a 32k row would take 4 GiB."""
    from transformers import LlamaForCausalLM

    config = tiny_llama(
        vocab_size=32_000, num_hidden_layers=1, max_position_embeddings=LONG_ROW_TOKENS
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    make_tokenizer(chat_template=None).save_pretrained(tmp_path)
    return tmp_path


def test_joined_rows_are_cut_at_the_asked_length():
    rows = [Trajectory(text="x" * 40) for _ in range(7)]
    assert [len(t.text) for t in join_rows(rows, min_characters=100)] == [122, 122]


@pytest.mark.seconds
def test_published_script_needs_messages(rows_path, tiny_student, tmp_path):
    arguments = ["engine", "--model", tiny_student, "--input", rows_path, "--join", 5]
    arguments += ["--published", tmp_path]
    result = CliRunner().invoke(bench, [str(a) for a in arguments])
    assert result.exit_code == 2
    assert "no --join" in result.output


@pytest.mark.seconds
def test_published_script_that_lacks_a_package_is_refused_in_one_line(
    rows_path, tiny_student, tmp_path
):
    (tmp_path / "rsr_cal.py").write_text("import a_package_that_is_not_there")
    arguments = ["engine", "--model", tiny_student, "--input", rows_path, "--published", tmp_path]
    result = CliRunner().invoke(bench, [str(a) for a in arguments])
    assert result.exit_code == 2
    assert "rsr_cal.py cannot be imported: No module named 'a_package_that" in result.output
