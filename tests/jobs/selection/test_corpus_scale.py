"""`rsr filter` on many rows: exact, in bounded memory, and through a SIGTERM.

The whole measurement, fifty million rows, is `python benchmarks/bench_jobs.py`.
"""

import importlib.util
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
NUM_ROWS = 5_000_000


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by name.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_terminated_filter_goes_on_and_ends_the_same(tmp_path):
    num_shards = 150
    corpus, whole, out = tmp_path / "corpus", tmp_path / "whole", tmp_path / "out"
    load("make_scored").make_scored(
        corpus, num_rows=600_000, num_groups=1000, num_shards=num_shards
    )

    def command(output: Path) -> list[str]:
        arguments = ["filter", str(corpus), str(output), "--keep-fraction", "0.5", "--json"]
        return [sys.executable, "-m", "rsr.jobs.cli", *arguments]

    def content(output: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in output.glob("*.parquet")}

    process = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not content(out):
        assert process.poll() is None, "it ended before it could be stopped"
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    written_ns = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    assert 0 < len(written_ns) < num_shards
    assert not list(out.rglob("*.rsr-tmp"))
    for output in (out, whole):
        subprocess.run(command(output), check=True, capture_output=True, timeout=120)
    assert content(out) == content(whole)
    assert len(content(out)) == num_shards
    assert {path: path.stat().st_mtime_ns for path in written_ns} == written_ns


@pytest.mark.slow
def test_five_million_rows_are_filtered_exactly_and_in_bounded_memory(tmp_path):
    pytest.importorskip("duckdb", reason="bench_jobs.py needs the extra dev")
    corpus = tmp_path / "corpus"
    load("make_scored").make_scored(corpus, num_rows=NUM_ROWS, num_groups=500_000, num_shards=8)
    ours, theirs = load("bench_jobs").bench("filter", corpus, 1)
    # bench() has refused to report unless both wrote the same rows, all columns compared.
    assert ours.num_rows == NUM_ROWS
    assert ours.num_rows_kept == theirs.num_rows_kept
    assert 0.19 * NUM_ROWS < ours.num_rows_kept < 0.2 * NUM_ROWS
    # A tenth of the 4 GiB for fifty million, and 600 MiB for Python, Polars and open row groups.
    assert ours.peak_tree_mib <= 1010
