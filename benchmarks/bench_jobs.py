"""`rsr filter` and `rsr select` beside what else one would use, on a corpus of make_scored.py.

    python benchmarks/bench_jobs.py filter FOLDER [--repeat 3] [--csv results/jobs_cpu.csv]
    python benchmarks/bench_jobs.py select FOLDER

filter: `--keep-fraction 0.2`, beside Polars copying the same files with the threshold known
beforehand. select: the lowest RSR per problem, beside DuckDB's arg_min joined back to all
columns. Every command is a process of its own, taking turns within each repetition; what is
measured is the whole command, imports included, and the peak memory of its process tree. All
must have written the same rows, or nothing is reported. Needs the extra `dev`.
"""

import argparse
import csv
import importlib.metadata
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import polars as pl
import psutil
import pyarrow.parquet as pq

from rsr.benchmarks.memory import peak_rss_mib

SAMPLE_SECONDS = 0.2
"""Between looks at a process's own high-water mark: to look takes time from who is measured."""

POLARS_COPY = """
import sys, polars as pl
source, output, threshold = sys.argv[1:]
rows = pl.scan_parquet(f"{source}/*.parquet").filter(pl.col("rsr") <= float(threshold))
rows.sink_parquet(output, compression="zstd", mkdir=True)
"""

DUCKDB_ARG_MIN = """
import sys, duckdb
source, output = sys.argv[1:]
duckdb.sql(f\"\"\"
    COPY (
        SELECT rows.* FROM read_parquet('{source}/*.parquet') AS rows
        JOIN (
            SELECT arg_min(id, rsr) AS id FROM read_parquet('{source}/*.parquet')
            WHERE rsr IS NOT NULL GROUP BY problem_id
        ) AS best ON rows.id = best.id
    ) TO '{output}' (FORMAT parquet, COMPRESSION zstd)
\"\"\")
"""


@dataclass(frozen=True)
class BenchRow:
    case: str
    implementation: str
    num_rows: int
    num_shards: int
    num_rows_kept: int
    num_repetitions: int
    time_s_p50: float
    time_s_min: float
    time_s_max: float
    peak_tree_mib: float
    num_cores: int
    cpu: str
    python: str
    polars: str
    pyarrow: str
    duckdb: str
    commit: str


def filter_commands(source: Path, output: Path) -> dict[str, list[str]]:
    # What the other is told: the largest RSR of the best fifth.
    rsr = pl.scan_parquet(source / "*.parquet").select("rsr").drop_nulls().collect()["rsr"].sort()
    threshold = rsr[int(len(rsr) * 0.2 + 0.5) - 1]
    rsr_command = [sys.executable, "-m", "rsr.jobs.cli", "filter", str(source)]
    return {
        "rsr filter": [*rsr_command, str(output), "--keep-fraction", "0.2", "--json"],
        "polars copy": [
            *(sys.executable, "-c", POLARS_COPY, str(source)),
            *(str(output / "copy.parquet"), repr(threshold)),
        ],
    }


def select_commands(source: Path, output: Path) -> dict[str, list[str]]:
    rsr_command = [sys.executable, "-m", "rsr.jobs.cli", "select", str(source)]
    return {
        "rsr select": [*rsr_command, str(output), "--group-by", "problem_id", "--json"],
        "duckdb arg_min": [
            *(sys.executable, "-c", DUCKDB_ARG_MIN),
            *(str(source), str(output / "best.parquet")),
        ],
    }


CASES = {"filter": filter_commands, "select": select_commands}


def run(command: list[str]) -> tuple[float, float]:
    """Seconds of a command, and the peak of its process tree's resident memory in MiB."""
    started = time.perf_counter()
    process = psutil.Popen(command, stdout=subprocess.DEVNULL)
    peak_mib = 0.0
    while process.poll() is None:
        peak_mib = max(peak_mib, _peak_mib(process))
        time.sleep(SAMPLE_SECONDS)
    seconds = time.perf_counter() - started
    if process.returncode != 0:
        sys.exit(f"exit code {process.returncode}: {' '.join(command)}")
    return seconds, peak_mib


def _peak_mib(process: psutil.Process) -> float:
    """Peaks so far of a process and its children, added up; 0 where one has just ended."""
    try:
        members = [process, *process.children(recursive=True)]
        return sum(peak_rss_mib(member.pid) for member in members)
    except (OSError, psutil.NoSuchProcess):
        return 0.0


def fingerprint(output: Path) -> tuple[int, int]:
    """Number of rows below `output`, and a sum of hashes over all their columns, in any order."""
    rows = pl.scan_parquet(output / "*.parquet")
    whole = pl.struct(pl.all()).hash(0)
    sums = rows.select(pl.len(), whole.sum().alias("hash")).collect(engine="streaming")
    return sums.row(0)


def bench(case: str, source: Path, num_repetitions: int) -> list[BenchRow]:
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        output = Path(folder) / "output"
        commands = CASES[case](source, output)
        times: dict[str, list[float]] = {name: [] for name in commands}
        peaks: dict[str, list[float]] = {name: [] for name in commands}
        prints: dict[str, tuple[int, int]] = {}
        for _ in range(num_repetitions):
            for name, command in commands.items():
                output.mkdir()
                seconds, peak_mib = run(command)
                times[name].append(seconds)
                peaks[name].append(peak_mib)
                if name not in prints:
                    prints[name] = fingerprint(output)
                shutil.rmtree(output)
                print(f"{name}: {seconds:.1f} s, {peak_mib:,.0f} MiB", file=sys.stderr)
    if len(set(prints.values())) != 1:
        sys.exit(f"the results differ, so nothing is reported: {prints}")
    return _rows(case, source, prints, times, peaks)


def _rows(
    case: str,
    source: Path,
    prints: Mapping[str, tuple[int, int]],
    times: Mapping[str, list[float]],
    peaks: Mapping[str, list[float]],
) -> list[BenchRow]:
    shards = list(source.glob("*.parquet"))
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    return [
        BenchRow(
            case=case,
            implementation=name,
            num_rows=sum(pq.read_metadata(shard).num_rows for shard in shards),
            num_shards=len(shards),
            num_rows_kept=prints[name][0],
            num_repetitions=len(times[name]),
            time_s_p50=round(statistics.median(times[name]), 2),
            time_s_min=round(min(times[name]), 2),
            time_s_max=round(max(times[name]), 2),
            peak_tree_mib=round(max(peaks[name])),
            num_cores=len(psutil.Process().cpu_affinity()),
            cpu=cpu_name(),
            python=platform.python_version(),
            polars=pl.__version__,
            pyarrow=importlib.metadata.version("pyarrow"),
            duckdb=importlib.metadata.version("duckdb"),
            commit=commit,
        )
        for name in times
    ]


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "?")


def append_csv(rows: list[BenchRow], path: Path) -> None:
    is_new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        if is_new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=list(CASES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--csv", type=Path, help="append the results to this file")
    arguments = parser.parse_args()
    rows = bench(arguments.case, arguments.folder, arguments.repeat)
    ours, theirs = rows
    report = {
        "rows": [asdict(row) for row in rows],
        "time_ratio_p50": ours.time_s_p50 / theirs.time_s_p50,
    }
    print(json.dumps(report))
    if arguments.csv:
        append_csv(rows, arguments.csv)


if __name__ == "__main__":
    main()
