"""Proves the GPU path on whatever card is here, in ten minutes: `make gpu`.

Tests of the kernel and of the pooler's part without vLLM, then the kernel's benchmark, a process
for each head, and the engine's where vLLM is installed. Also runs from a checkout that is not
installed, where torch, triton, numpy, pytest, click and rich are:

    python benchmarks/gpu.py

Result files are named by the card. `--dry-run` runs the same steps on a CPU, with next to no work.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("tests/kernels/test_gpu.py", "tests/engine/test_gpu.py")
# Small students first: where the epilogue is most of the time. Then the shape of the goal.
PRESETS = ("qwen2.5-0.5b", "qwen3-8b", "qwen2.5-1.5b", "smollm2-135m", "gemma-2-2b")
TOKENS = {"qwen2.5-0.5b": 16_384, "qwen2.5-1.5b": 8192, "smollm2-135m": 16_384}
MINUTES = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 where every step did what it should, 1 otherwise, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="[%(default)s]")
    parser.add_argument("--published", type=Path, help="as of `rsr bench engine`")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with next to no work")
    options = parser.parse_args(arguments)
    card = "dry run" if options.dry_run else _card()
    if card is None:
        print("no NVIDIA GPU that torch can use: nothing to prove here", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    name = "".join(c if c.isalnum() else "_" for c in card.lower())
    end = time.monotonic() + 60 * options.minutes
    for old in options.out.glob(f"kernel_{name}_*.csv"):
        old.unlink()
    steps = _steps(options.out, name, options.dry_run)
    failed = [step.name for step in steps if not _run(step, end)]
    if find_spec("vllm") and not options.dry_run and not _run_engine(options, name, end):
        failed.append("engine")
    table = options.out / f"kernel_{name}.md"
    files = sorted(options.out.glob(f"kernel_{name}_*.csv"))
    table.write_text(f"{card}\n\n" + "\n".join(markdown(files)) + "\n")
    print(table.read_text())
    print(f"{table}: a table for README.md; rows in {', '.join(path.name for path in files)}")
    for step in failed:
        print(f"failed: {step}", file=sys.stderr)
    return 1 if failed else 0


def _card() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


@dataclass(frozen=True)
class Step:
    """A command to run; what it prints goes to `output` where there is one."""

    name: str
    command: list[str]
    output: Path | None = None


def _steps(out: Path, name: str, is_dry: bool) -> Iterator[Step]:
    """What a machine with torch and Triton alone can do, in order."""
    pytest = [sys.executable, "-m", "pytest", "--quiet", "-m", "gpu", "--noconftest"]
    yield Step("tests", [*pytest, *TESTS, *(["--collect-only"] if is_dry else [])])
    for preset in ("smollm2-135m",) if is_dry else PRESETS:
        bench = [sys.executable, "-m", "rsr.benchmarks.bench_kernel", "--preset", preset]
        bench += ["--csv", str(out / f"kernel_{name}_{preset}.csv")]
        if is_dry:
            bench += ["--device", "cpu", "--tokens", "8", "--repeat", "1"]
        elif preset in TOKENS:
            bench += ["--tokens", str(TOKENS[preset])]
        yield Step(f"kernel, {preset}", bench)


def _run_engine(options: argparse.Namespace, name: str, end: float) -> bool:
    """The engine beside its peers, on the demonstration's student and rows."""
    try:
        from rsr.jobs.demo.student import demo_student
        from rsr.jobs.demo.trajectories import demo_trajectories

        student = demo_student()
    except Exception as error:  # whatever is missing, the kernel's results are worth having
        print(f"== engine: {type(error).__name__}: {error}", file=sys.stderr)
        return False
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.parquet"
        demo_trajectories(num_problems=200).write_parquet(rows)
        engine = [sys.executable, "-m", "rsr.benchmarks.bench_engine", "--model", str(student)]
        engine += ["--input", str(rows), "--rows", "1000", "--repeat", "2", "--dtype", "bfloat16"]
        if options.published is not None:
            engine += ["--published", str(options.published.resolve())]
        step = Step("engine", [*engine, "--json"], options.out / f"engine_{name}.json")
        return _run(step, end)


def _run(step: Step, end: float) -> bool:
    """Whether a step did what it should, before time was up."""
    left = end - time.monotonic()
    if left <= 0:
        print(f"== {step.name}: no time left", file=sys.stderr)
        return False
    print(f"== {step.name}", file=sys.stderr, flush=True)
    # Where nothing is installed, the links in .editor/ are the package.
    path = os.pathsep.join([str(ROOT / ".editor"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path.rstrip(os.pathsep)}
    with nullcontext(None) if step.output is None else step.output.open("w") as output:
        try:
            done = subprocess.run(
                step.command, cwd=ROOT, env=environment, stdout=output, timeout=left, check=False
            )
        except subprocess.TimeoutExpired:
            print(f"== {step.name}: time is up", file=sys.stderr)
            return False
    return done.returncode == 0


def markdown(files: Sequence[Path]) -> Iterator[str]:
    """Lines of a table: one row a head and operation, times as multiples of the bare GEMM's."""
    yield "| head | operation | ms | of the bare GEMM | TFLOP/s | GB/s | extra MiB |"
    yield "|---|---|---|---|---|---|---|"
    for path in files:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                yield f"| {' | '.join(_cells(row))} |"


def _cells(row: dict[str, str]) -> list[str]:
    sizes = (int(row[size]) for size in ("num_tokens", "hidden_size", "vocab_size"))
    head = f"{row['preset']}, {' × '.join(f'{size:,}' for size in sizes)}, {row['dtype']}"
    if row["failed_check"]:
        return [head, row["operation"], f"not timed: {row['failed_check']}", "", "", "", ""]
    return [
        head,
        row["operation"],
        f"{float(row['time_ms_p50']):,.2f}",
        f"{1 / float(row['share_of_gemm']):.2f} ×",
        f"{float(row['tflop_per_s']):,.1f}",
        f"{float(row['gb_per_s']):,.0f}",
        f"{float(row['peak_extra_mib']):,.0f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
