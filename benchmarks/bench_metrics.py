"""What the sums of all metrics cost in scoring: `python benchmarks/bench_metrics.py --help`.

Three engines score the same rows in turns: with RSR's sums alone, with those of all metrics, and
with the prompts' too. RSR must come out with the same bits from the first two. Prints one JSON
object: seconds of each round, and what the median round takes beside the first engine's.
"""

import json
import platform
import statistics
import time
from pathlib import Path

import click
import polars as pl

from rsr.benchmarks.child import ChildProcess
from rsr.engine.config import ScorerConfig
from rsr.engine.scorer import Scorer
from rsr.engine.trajectory import Trajectory

DATA = Path(__file__).parents[2] / "shared" / "data" / "gsm8k_teachers.parquet"
WAYS: dict[str, dict[str, object]] = {
    "rsr": {"metrics": "rsr"},
    "all": {"metrics": "all"},
    "all and prompts": {"metrics": "all", "prompt_metrics": True},
}

_opened: dict[str, Scorer] = {}
"""In a child process: its one engine."""


def open_engine(config: ScorerConfig) -> None:
    _opened["engine"] = Scorer(config)


def score(rows: list[Trajectory]) -> tuple[float, list[float | None]]:
    """Seconds, and the RSR of each row."""
    start = time.perf_counter()
    scores = _opened["engine"].score(rows)
    return time.perf_counter() - start, [s.rsr for s in scores]


@click.command()
@click.option("--model", required=True, help="The student: a folder or a hub name.")
@click.option("--input", "path", type=Path, default=DATA, help="Parquet with a messages column.")
@click.option("--rows", "num_rows", default=64, show_default=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("--dtype", default="float32", show_default=True)
def main(model: str, path: Path, num_rows: int, rounds: int, dtype: str) -> None:
    frame = pl.read_parquet(path, columns=["messages"], n_rows=num_rows)
    rows = [Trajectory(messages=messages) for messages in frame["messages"].to_list()]
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    rsrs: dict[str, list[float | None]] = {}
    with ChildProcess() as first, ChildProcess() as second, ChildProcess() as third:
        children = dict(zip(WAYS, (first, second, third), strict=True))
        for name, child in children.items():
            settings = {"model": model, "dtype": dtype, **WAYS[name]}
            child.call(open_engine, ScorerConfig(**settings))  # type: ignore[arg-type]
            _, rsrs[name] = child.call(score, rows)
        for number in range(rounds):
            # Whoever comes later in a round meets a warmer machine, or a busier one.
            names = list(WAYS)[:: -1 if number % 2 else 1]
            for name in names:
                taken, _ = children[name].call(score, rows)
                seconds[name].append(taken)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    told = {
        "model": Path(model).name,
        "machine": platform.processor() or platform.machine(),
        "num_rows": len(rows),
        "seconds": {name: [round(s, 3) for s in taken] for name, taken in seconds.items()},
        "beside_rsr_alone": {name: round(m / medians["rsr"], 4) for name, m in medians.items()},
        "same_bits": rsrs["all"] == rsrs["rsr"],
    }
    click.echo(json.dumps(told))
    if not told["same_bits"]:
        raise SystemExit("RSR changes where all metrics are asked for")


if __name__ == "__main__":
    main()
