"""The demonstration's word problems alone, with their answers: for a student to solve itself."""

from pathlib import Path

import polars as pl

from rsr.jobs.demo.trajectories import make_problem
from rsr.jobs.storage.atomic import atomic_path


def demo_problems(seed: int = 0, num_problems: int = 24) -> pl.DataFrame:
    """Columns problem_id, problem and answer, which is known by construction."""
    problems = [make_problem(seed, number) for number in range(num_problems)]
    return pl.DataFrame(
        {
            "problem_id": range(num_problems),
            "problem": [problem.question for problem in problems],
            "answer": [problem.answer for problem in problems],
        }
    )


def write_problems(path: str, seed: int = 0, num_problems: int = 24) -> None:
    """Write `demo_problems` as Parquet."""
    with atomic_path(Path(path)) as temporary:
        demo_problems(seed, num_problems).write_parquet(temporary)
