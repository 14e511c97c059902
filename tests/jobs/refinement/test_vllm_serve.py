"""`rsr refine` against a real `vllm serve`: what vLLM's server says is understood."""

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

from rsr.jobs.cli import main

CONTEXT_TOKENS = 4_096
START_S = 240


@pytest.fixture(scope="module")
def vllm_url(tmp_path_factory, make_tokenizer, tiny_llama):
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
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)
        log.close()


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_is_understood(vllm_url, tmp_path):
    prompts = ["1 + 1?", "2 + 2?", "3 + 3?"]
    traces = ["It is 2.", "It is 5.", "far too long " * 400]
    pq.write_table(pa.table({"prompt": prompts, "response": traces}), tmp_path / "rows.parquet")

    def refine(output, model):
        arguments = [str(tmp_path / "rows.parquet"), str(tmp_path / output), "--mode", "minimal"]
        arguments += ["--endpoint", vllm_url, "--api-model", model, "--max-tokens", "20"]
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
