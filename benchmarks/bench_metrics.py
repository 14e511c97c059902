"""What the sums of all metrics cost in scoring: `python benchmarks/bench_metrics.py --help`.

Three engines score the same rows in turns: with RSR's sums alone, with those of all metrics, and
with the prompts' too. RSR must come out with the same bits from the first two. Prints one JSON
object: seconds of each round, and what the median round takes beside the first engine's.

Two processes with the same work differ by more than the sums cost, by where their memory lies. So
the two steps that the sums lengthen, encoding rows and reducing scored tokens, are also timed by
themselves, with and without; `share_of_pass` is what is added, beside the first engine's median.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

import click
import polars as pl
import torch

from rsr.benchmarks.child import ChildProcess
from rsr.engine.config import Metrics, ScorerConfig
from rsr.engine.scored_rows import ROW_COLUMNS, reduce_rows
from rsr.engine.scorer import Scorer
from rsr.engine.student import open_student
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


def added_seconds(config: ScorerConfig, rows: list[Trajectory]) -> dict[str, float]:
    """What the sums of all metrics add to each step that they lengthen, for these rows."""
    encoders = [
        open_student(replace(config, metrics=way)).encoder() for way in get_args(Metrics)[::-1]
    ]
    lengths = [encoded.num_scored for encoded in encoders[0].encode_all(rows)]
    tokens = [torch.rand(length, len(ROW_COLUMNS)) for length in lengths]
    for number, table in enumerate(tokens):
        table[:, 0] = torch.arange(1, lengths[number] + 1)

    def reduce(has_metrics: bool) -> object:
        requests = [[table] for table in tokens]
        return reduce_rows(requests, config.rank_clip, has_entropy=True, has_metrics=has_metrics)

    return {
        "encode": _added(*(partial(encoder.encode_all, rows) for encoder in encoders)),
        "reduce": _added(partial(reduce, False), partial(reduce, True)),
    }


def _added(without: Callable[[], object], with_sums: Callable[[], object]) -> float:
    """Seconds that the median call of the second takes longer; the two take turns."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(21):
        for taken, call in zip(seconds, (without, with_sums), strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return statistics.median(seconds[1]) - statistics.median(seconds[0])


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
    added = added_seconds(ScorerConfig(model=model, dtype=dtype), rows)  # type: ignore[arg-type]
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    told = {
        "model": Path(model).name,
        "machine": platform.processor() or platform.machine(),
        "num_rows": len(rows),
        "seconds": {name: [round(s, 3) for s in taken] for name, taken in seconds.items()},
        "beside_rsr_alone": {name: round(m / medians["rsr"], 4) for name, m in medians.items()},
        "added_ms": {name: round(1e3 * taken, 2) for name, taken in added.items()},
        "share_of_pass": round(sum(added.values()) / medians["rsr"], 6),
        "same_bits": rsrs["all"] == rsrs["rsr"],
    }
    click.echo(json.dumps(told))
    if not told["same_bits"]:
        raise SystemExit("RSR changes where all metrics are asked for")


if __name__ == "__main__":
    main()
