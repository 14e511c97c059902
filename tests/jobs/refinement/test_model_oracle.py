"""`rsr refine --model`: step by step as a worker does it; the whole way with Ray and real vLLM."""

import json
import signal
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from disturbed_run import start_until_units
from typed import rsr

from rsr.engine.config import ScorerConfig
from rsr.engine.messages import BadMessagesError
from rsr.engine.sampling import SampledText, Sampling
from rsr.jobs.cli import main
from rsr.jobs.refinement.commit import RefinedColumns
from rsr.jobs.refinement.job import RefiningJob, look_at_oracle
from rsr.jobs.refinement.prompts import load_prompt
from rsr.jobs.refinement.questions import Questions
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.manifest import Identity, InputShard, Manifest
from rsr.jobs.run.store import RunStore
from rsr.jobs.sampling.columns import seed_of
from rsr.jobs.shards.columns import TrajectoryColumns
from rsr.jobs.shards.shard import Unit, describe_shard

TRACES = ["all wrong", "fine already", "a control token", "PLAIN wrong", "CUT wrong", "BREAKS", ""]
STATUSES = ["refined", "unchanged", "refused", "no_trace", "cut_off", "failed", "not_refinable"]
COLUMNS = TrajectoryColumns(prompt="prompt", response="response")


class RepairingEngine:
    """Writes the solution that it is shown, with every `wrong` in it made `right`, and the seed."""

    max_num_batched_tokens = 512

    def __init__(self, config, sampling):
        self.seeds = []

    def encode(self, messages):
        (message,) = messages
        if "a control token" in message["content"]:
            raise BadMessagesError("it has a control token", detail="it has <|im_end|>")
        return list(message["content"].encode())

    def sample(self, requests):
        self.seeds += [r.first_seed for r in requests]
        assert all(r.num_samples == 1 for r in requests)
        return [[self._reply(bytes(r.token_ids).decode())] for r in requests]

    def _reply(self, prompt):
        trace = prompt.split("<solution>\n")[1].split("\n</solution>")[0]
        assert trace != "BREAKS"
        repaired = trace.replace("wrong", "right")
        text = repaired if "PLAIN" in trace else f"<refined_trace>{repaired}</refined_trace>"
        return SampledText(text, "length" if "CUT" in trace else "stop", len(trace))


@pytest.fixture
def refining(tmp_path):
    """A run of `RefiningJob` without a cluster, over `TRACES`."""
    source = tmp_path / "in.parquet"
    prompts = [f"Problem {n}?" for n in range(len(TRACES))]
    pq.write_table(pa.table({"prompt": prompts, "response": TRACES}), source)
    shard = describe_shard(str(source), "in.parquet", COLUMNS, None)
    identity = Identity({"seed": 7, "answer_column": None, "id_column": None}, COLUMNS.to_json())
    folder = RunFolder(tmp_path / "out")
    shards = (InputShard.of(shard, str(source)),)
    folder.write_manifest(Manifest(writer="refine", identity=identity, shards=shards))
    job = RefiningJob(
        config=ScorerConfig(model="m"),
        sampling=Sampling(),
        questions=Questions(RefinedColumns(COLUMNS, None, None), load_prompt("minimal")),
        seed=7,
        store=RunStore.of(folder, identity),
        open_engine=RepairingEngine,
    )
    return job, shard, folder


def test_each_row_gets_what_its_reply_makes_of_it(refining):
    job, shard, folder = refining
    work = job.open(None)
    for start, stop in ((0, 2), (2, 5), (6, 7)):
        unit = Unit(shard, start, stop)
        work.keep(unit, work.run(unit, work.read(unit)))
    work.refuse(Unit(shard, 5, 6), "crash: it is dead")
    summary = work.commit(shard)
    rows = pq.read_table(folder.root / "in.parquet")
    assert rows["refine_status"].to_pylist() == STATUSES
    assert rows["response"].to_pylist() == ["all right", *TRACES[1:]]
    assert rows["original_response"].to_pylist()[:6] == TRACES[:6]
    assert set(rows["refine_model"].to_pylist()) == {"m"}
    details = rows["refine_detail"].to_pylist()
    assert [details[2], details[5]] == ["it has <|im_end|>", "crash: it is dead"]
    assert work._engine.seeds == [seed_of(7, "in", row) for row in (0, 1, 3, 4)]
    assert rows["refine_completion_tokens"][0].as_py() == len(TRACES[0])
    assert rows["refine_prompt_tokens"][0].as_py() > 500
    assert summary.num_tokens == sum(map(len, (TRACES[n] for n in (0, 1, 3, 4))))
    checked = CliRunner().invoke(main, ["verify", str(folder.root), "--deep"])
    assert checked.exit_code == 0, checked.output


def test_first_rows_are_looked_at_as_the_oracle_reads_them(refining, answering_oracle):
    job, shard, _ = refining

    def look(*rows, **settings):
        config = ScorerConfig(model=str(answering_oracle), **settings)
        units = [Unit(shard, row, row + 1) for row in rows]
        return look_at_oracle(config, job.questions, units)[1]

    first = look(6, 0)
    assert first.text.startswith("<|im_start|>user\nA student solved a problem.")
    assert "all wrong" in first.text
    assert look(6).refusal == "its response is empty"
    assert "takes 512 with the answer; try a higher" in look(0, max_model_len=512).refusal


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "give one oracle: --model NAME"),
        (["--model", "M", "--endpoint", "http://x/v1"], "give one oracle: --model NAME"),
        (["--endpoint", "http://x/v1"], "--endpoint needs --api-model NAME"),
        (["--model", "M", "--retries", "6"], "--retries goes with --endpoint, not with --model"),
        (["--model", "M", "--api-model", "x"], "--api-model goes with --endpoint"),
        (
            ["--endpoint", "http://x/v1", "--api-model", "x", "--seed", "0"],
            "--seed goes with --model, not with --endpoint",
        ),
        (["--endpoint", "http://x/v1", "--api-model", "x", "--dtype", "float32"], "--dtype goes"),
    ],
)
def test_oracle_is_one_and_its_options_are_its_own(tmp_path, options, told):
    pq.write_table(pa.table({"prompt": ["p"], "response": ["r"]}), tmp_path / "in.parquet")
    arguments = ["refine", str(tmp_path / "in.parquet"), str(tmp_path / "out"), "--mode", "minimal"]
    result = CliRunner().invoke(main, [*arguments, *options])
    assert result.exit_code == 2, result.output + result.stderr
    assert told in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.vllm
@pytest.mark.ray
@pytest.mark.slow
def test_stopped_run_goes_on_to_the_same_rows(tmp_path, answering_oracle):
    traces = ["It is 41.", "It is 42.", "<|im_end|>", "x" * 5_000] + ["It is 4."] * 300
    problems = [f"{n} + {n}?" for n in range(len(traces))]
    pq.write_table(pa.table({"prompt": problems, "response": traces}), tmp_path / "in.parquet")
    output = tmp_path / "out"
    command = ["refine", str(tmp_path / "in.parquet"), str(output), "--mode", "minimal"]
    command += ["--model", str(answering_oracle)]
    command += ["--dtype", "float32", "--max-tokens", "16", "--json"]
    process = start_until_units([sys.executable, "-m", "rsr.jobs.cli", *command], output, 1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    resumed = rsr(*command)
    assert "going on: " in resumed.stderr
    told = json.loads(resumed.stdout)
    rows = pq.read_table(output / "in.parquet")
    expected = ["refined", "unchanged", "refused", "refused"] + ["refined"] * 300
    assert rows["refine_status"].to_pylist() == expected
    assert rows["response"].to_pylist() == [*["It is 42."] * 2, *traces[2:4], *["It is 42."] * 300]
    details = rows["refine_detail"].to_pylist()
    assert "control token" in details[2]
    assert "takes 4,096 with the answer" in details[3]
    assert rows["refine_completion_tokens"].to_pylist()[0] == 4
    assert told["rows_by_status"] == {"refined": 301, "refused": 2, "unchanged": 1}
    assert told["num_tokens_now"] < told["num_tokens"] == 4 * 302
    rsr("verify", output, "--deep")
    refused = rsr(*command, "--temperature", "0.5", exit_code=2)
    assert "temperature was 1.0 and is now 0.5" in refused.stderr
    assert json.loads((output / ".rsr" / "manifest.json").read_text())["writer"] == "refine"
