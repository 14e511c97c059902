"""`rsr refine` against a real `vllm serve`: it is understood, and its faults cost nothing."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from faulty_proxy import FAULTS, SILENCE_S, FaultyProxy

from rsr.jobs.cli import main
from rsr.jobs.refinement import endpoint

CONTEXT_TOKENS = 4_096
START_S = 600


pytestmark = [pytest.mark.slow, pytest.mark.vllm]


@pytest.fixture(scope="module")
def vllm_port(tmp_path_factory, make_tokenizer, tiny_llama):
    """A server of a model of random weights, whose tokens are bytes."""
    import torch
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("oracle")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    shape = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=CONTEXT_TOKENS)
    LlamaForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(folder), "--served-model-name", "oracle"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", str(CONTEXT_TOKENS)]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    log = (folder / "log").open("w")
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
        deadline = time.monotonic() + START_S
        while True:
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                time.sleep(0.5)
        yield port
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()


def test_vllm_is_understood(vllm_port, tmp_path):
    prompts = ["1 + 1?", "2 + 2?", "3 + 3?"]
    traces = ["It is 2.", "It is 5.", "far too long " * 400]
    pq.write_table(pa.table({"prompt": prompts, "response": traces}), tmp_path / "rows.parquet")

    def refine(output, model):
        arguments = [str(tmp_path / "rows.parquet"), str(tmp_path / output), "--mode", "minimal"]
        arguments += [
            "--endpoint",
            f"http://127.0.0.1:{vllm_port}/v1",
            "--api-model",
            model,
            "--max-tokens",
            "20",
        ]
        return CliRunner().invoke(main, ["refine", *arguments, "--temperature", "0"])

    # A model of random weights never writes the tags: each native trace is kept, with the reason.
    assert "no row was refined" in refine("out", "oracle").stderr
    rows = pq.read_table(tmp_path / "out" / "rows.parquet")
    assert rows["response"].to_pylist() == traces
    assert rows["refine_status"].to_pylist() == ["cut_off", "cut_off", "refused"]
    assert rows["refine_completion_tokens"].to_pylist() == [20, 20, None]
    assert str(CONTEXT_TOKENS) in rows["refine_detail"][2].as_py()
    stranger = refine("other", "stranger")
    assert stranger.exit_code == 1
    assert "has no 'stranger'" in stranger.stderr


def test_faults_on_the_way_lose_no_answer_and_ask_for_none_twice(vllm_port, tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_S", 0.01)
    num_rows = 24
    columns = {"prompt": [f"{n} + {n}?" for n in range(num_rows)], "response": ["It is 2."]}
    columns["response"] *= num_rows
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")

    def refine(url, output, *more):
        arguments = [str(tmp_path / "rows.parquet"), str(tmp_path / output), "--mode", "minimal"]
        arguments += ["--endpoint", f"{url}/v1", "--api-model", "oracle", "--max-tokens", "20"]
        arguments += ["--temperature", "0", "--timeout", str(SILENCE_S), "--retries", "20", *more]
        result = CliRunner().invoke(main, ["refine", *arguments, "--json"])
        assert result.exit_code == 1, result.stderr
        return result

    refine(f"http://127.0.0.1:{vllm_port}", "undisturbed")
    with FaultyProxy(vllm_port).running() as proxy:
        with proxy.faults(0.4, "429", *FAULTS) as injected:
            ended = refine(proxy.url, "out", "--max-requests", "20")
            assert "the same command goes on" in ended.stderr
            told = json.loads(refine(proxy.url, "out").stdout)
        assert set(injected) == {"429", *FAULTS}
        # Every row has had one whole answer, over both starts; what failed was asked for again.
        answers = [number for body, number in proxy.answered.items() if body]
        assert answers == [1] * num_rows
        # Some faults hit the question of which models there are.
        asked = 20 + told["num_requests"]
        assert num_rows < asked <= num_rows + sum(injected.values()), injected
        rows = pq.read_table(tmp_path / "out" / "rows.parquet")
        assert rows.equals(pq.read_table(tmp_path / "undisturbed" / "rows.parquet"))
        assert json.loads(refine(proxy.url, "out").stdout)["num_requests"] == 0
