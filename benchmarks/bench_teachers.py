"""The bootstrap behind `rsr teachers`: `python benchmarks/bench_teachers.py --help`.

Times 1,000 draws over made-up scores in memory, after checking a few of them against a plain loop
over problems. Prints one JSON line; `--append` keeps it.
"""

import json
import platform
import time
from pathlib import Path

import click
import numpy as np

from rsr.jobs.evidence.bootstrap import resampled_ratios, share_lowest


def make_sums(num_problems: int, num_teachers: int) -> tuple[np.ndarray, np.ndarray]:
    """(P, G) mean ranks and mean surprisals in nats: one trajectory each, as real ones spread."""
    rng = np.random.default_rng(0)
    surprisals = rng.gamma(9.0, 0.15, (num_problems, num_teachers))
    ratios = rng.gamma(25.0, 0.13, (num_problems, num_teachers))
    return surprisals * ratios * np.linspace(1.0, 1.1, num_teachers), surprisals


def check(num_teachers: int) -> None:
    """Raises `AssertionError` unless draws are what drawing problem by problem gives."""
    ranks, surprisals = make_sums(500, num_teachers)
    draws = resampled_ratios(ranks, surprisals, num_draws=20, seed=3)
    rng = np.random.default_rng(3)
    for draw in draws:
        problems = rng.integers(0, 500, 500)
        expected = ranks[problems].sum(axis=0) / surprisals[problems].sum(axis=0)
        np.testing.assert_allclose(draw, expected, rtol=1e-12)


@click.command()
@click.option("--problems", "num_problems", default=100_000, show_default=True)
@click.option("--teachers", "num_teachers", default=5, show_default=True)
@click.option("--draws", "num_draws", default=1_000, show_default=True)
@click.option("--repeat", default=5, show_default=True, help="Timed calls.")
@click.option("--append", type=click.Path(path_type=Path), help="Add the line to this file.")
def main(
    num_problems: int, num_teachers: int, num_draws: int, repeat: int, append: Path | None
) -> None:
    """Time the bootstrap of `rsr teachers`."""
    check(num_teachers)
    sums = make_sums(num_problems, num_teachers)
    seconds = []
    for seed in range(repeat):
        start = time.perf_counter()
        share_lowest(resampled_ratios(*sums, num_draws=num_draws, seed=seed))
        seconds.append(time.perf_counter() - start)
    row = {
        "num_teachers": num_teachers,
        "num_rows_per_teacher": num_problems,
        "num_draws": num_draws,
        "repeat": repeat,
        "time_s_p50": round(float(np.median(seconds)), 3),
        "time_s_max": round(max(seconds), 3),
        "machine": platform.machine(),
        "numpy": np.__version__,
    }
    line = json.dumps(row)
    click.echo(line)
    if append is not None:
        with append.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
