"""`rsr filter` and `rsr select` on a cluster of one machine, beside the one-machine commands.

    python benchmarks/bench_cluster.py [--rows 10000000] [--shards 16] [--text-bytes 200]
        [--corpus FOLDER] [--repeat 1] [--jsonl results/cluster_cpu.jsonl]

Makes a corpus of make_scored.py in FOLDER, or takes what is there, starts a Ray of as many CPUs as
there are cores, and runs each command both ways, taking turns. What is measured is the whole
command, imports included; the memory is that of the driver, and of the largest of Ray's workers,
with and without what it has looked at of the shared object store. Both must have written the same
files, byte for byte, or nothing is reported. Needs the extra `dev`.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pyarrow.parquet as pq
from ray.cluster_utils import Cluster

from rsr.benchmarks.bench_jobs import cpu_name, run
from rsr.benchmarks.make_scored import TEXT_BYTES, make_scored
from rsr.benchmarks.memory import peak_rss_mib
from rsr.jobs.storage.hashing import hash_bytes

CASES = {
    "filter --keep-fraction 0.2": ["filter", "--keep-fraction", "0.2"],
    "filter --within teacher": ["filter", "--keep-fraction", "0.2", "--within", "teacher"],
    "select --group-by problem_id": ["select", "--group-by", "problem_id"],
    "select --keep 2 --max-share-per": [
        *("select", "--group-by", "problem_id", "--keep", "2"),
        *("--max-share-per", "teacher=0.126"),
    ],
}
SECONDS_BETWEEN_LOOKS = 1.0
STORE_SHARE = 0.3
"""Of the memory, for Ray's object store: what `ray start` takes."""


class WorkerPeaks:
    """The largest resident memory of any of Ray's workers, in MiB, while it is open.

    private_mib: of it what is the worker's own, as seen once a second.
    """

    def __init__(self) -> None:
        self.mib = self.private_mib = 0.0
        self._is_over = threading.Event()

    @contextmanager
    def watched(self) -> Iterator[None]:
        watcher = threading.Thread(target=self._watch)
        watcher.start()
        try:
            yield
        finally:
            self._is_over.set()
            watcher.join()

    def _watch(self) -> None:
        while not self._is_over.wait(SECONDS_BETWEEN_LOOKS):
            for process in psutil.process_iter(["cmdline"]):
                if (process.info["cmdline"] or [""])[0].startswith("ray::_apply"):
                    try:
                        self.mib = max(self.mib, peak_rss_mib(process.pid))
                        memory = process.memory_info()
                    except (OSError, psutil.Error):
                        continue
                    own = (memory.rss - memory.shared) / (1 << 20)
                    self.private_mib = max(self.private_mib, own)


def hashes(output: Path) -> dict[str, str]:
    return {path.name: hash_bytes(path.read_bytes()) for path in sorted(output.glob("*.parquet"))}


def require_size(source: Path, *, num_rows: int, num_shards: int, text_bytes: int) -> None:
    """End the program if the corpus is not the one that results will be said to be of."""
    files = sorted(source.glob("*.parquet"))
    found = sum(pq.read_metadata(path).num_rows for path in files), len(files)
    schema = pq.read_schema(files[0])
    if found != (num_rows, num_shards) or ("text" in schema.names) != bool(text_bytes):
        sys.exit(f"{source} has {found[0]:,} rows in {found[1]} shards, columns {schema.names}")


def bench(
    source: Path, folder: Path, address: str, num_repetitions: int
) -> Iterator[dict[str, object]]:
    output = folder / "output"
    for case, (command, *options) in CASES.items():
        ways = {"one machine": [], "cluster": ["--address", address]}
        times: dict[str, list[float]] = {way: [] for way in ways}
        peaks: dict[str, float] = dict.fromkeys(ways, 0.0)
        written: dict[str, dict[str, str]] = {}
        workers = WorkerPeaks()
        with workers.watched():
            for _ in range(num_repetitions):
                for way, more in ways.items():
                    typed = [sys.executable, "-m", "rsr.jobs.cli", command, str(source)]
                    seconds, peak_mib = run([*typed, str(output), *options, *more, "--json"])
                    times[way].append(seconds)
                    peaks[way] = max(peaks[way], peak_mib)
                    written.setdefault(way, hashes(output))
                    shutil.rmtree(output)
                    print(f"{case}, {way}: {seconds:.1f} s, {peak_mib:,.0f} MiB", file=sys.stderr)
        if written["cluster"] != written["one machine"]:
            sys.exit(f"{case}: the files differ, so nothing is reported")
        median = {way: statistics.median(seconds) for way, seconds in times.items()}
        yield {
            "case": case,
            "one_machine_s": round(median["one machine"], 2),
            "cluster_s": round(median["cluster"], 2),
            "time_ratio": round(median["cluster"] / median["one machine"], 3),
            "one_machine_mib": round(peaks["one machine"]),
            "driver_mib": round(peaks["cluster"]),
            "largest_worker_mib": round(workers.mib),
            "largest_worker_private_mib": round(workers.private_mib),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--text-bytes", type=int, default=TEXT_BYTES)
    parser.add_argument("--corpus", type=Path, help="where the corpus is, or stays")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--jsonl", type=Path, help="append the results to this file")
    arguments = parser.parse_args()
    num_cores = len(psutil.Process().cpu_affinity())
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    machine = {"num_cores": num_cores, "cpu": cpu_name(), "commit": commit}
    with tempfile.TemporaryDirectory() as folder:
        source = arguments.corpus or Path(folder) / "corpus"
        size = {
            "num_rows": arguments.rows,
            "num_shards": arguments.shards,
            "text_bytes": arguments.text_bytes,
        }
        if not source.exists():
            make_scored(source, num_groups=max(1, arguments.rows // 10), **size)
        require_size(source, **size)
        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": num_cores,
                "include_dashboard": False,
                "object_store_memory": int(STORE_SHARE * psutil.virtual_memory().total),
                # Ray makes its workers nice; then what else the machine does would count double.
                "_system_config": {"worker_niceness": 0},
            },
        )
        try:
            for row in bench(source, Path(folder), cluster.address, arguments.repeat):
                line = json.dumps(row | size | {"num_repetitions": arguments.repeat} | machine)
                print(line)
                if arguments.jsonl:
                    with arguments.jsonl.open("a") as file:
                        file.write(line + "\n")
        finally:
            cluster.shutdown()


if __name__ == "__main__":
    main()
