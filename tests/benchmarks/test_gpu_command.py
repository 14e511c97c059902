"""`make gpu` without a GPU: one line, or the same steps on a CPU with next to no work."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, str(ROOT / "benchmarks" / "gpu.py")]

# What a machine with torch, triton, numpy, pytest, click and rich need not have.
BARE = """
import sys
ABSENT = {"ray", "polars", "obstore", "altair", "duckdb", "vllm", "pyarrow", "transformers"}
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Finder())
import rsr.benchmarks.bench_kernel, rsr.benchmarks.kernel, rsr.benchmarks.tune
import rsr.engine.scored_rows
"""


def run(command: list[str], **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@pytest.mark.seconds
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    done = run([*COMMAND, "--out", str(tmp_path)])
    assert done.returncode == 2
    assert done.stderr == "no NVIDIA GPU that torch can use: nothing to prove here\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.seconds
def test_what_a_bare_machine_runs_imports_nothing_else():
    path = str(ROOT / ".editor")
    done = run([sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {path!r})\n{BARE}"])
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_dry_run_goes_through_the_steps_and_makes_a_table(tmp_path):
    done = run([*COMMAND, "--dry-run", "--out", str(tmp_path)])
    assert done.returncode == 0, done.stderr
    assert "tests/engine/test_gpu.py" in done.stdout
    assert (tmp_path / "kernel_dry_run_smollm2-135m.csv").exists()
    table = (tmp_path / "kernel_dry_run.md").read_text()
    assert "| smollm2-135m, 8 × 576 × 49,152, bfloat16 | gemm |" in table
    assert table in done.stdout
