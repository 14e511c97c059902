"""Word problems of one step, with their answers: for the demonstration's student to solve itself.

The demonstration's own problems take two or three steps, of which a model of 135 million parameters
hardly ever gets all right.
"""

import random
from pathlib import Path

import polars as pl

from rsr.jobs.storage.atomic import atomic_path

NAMES = ("Priya", "Tom", "Aisha", "Mateo", "Lin", "Sofia")
THINGS = ("apples", "books", "pencils", "stones", "tickets", "cards")


def demo_problems(seed: int = 0, num_problems: int = 24) -> pl.DataFrame:
    """Columns problem_id, problem and answer, which is known by construction.

    The same seed gives the same rows, and a larger `num_problems` only adds rows.
    """
    rows = []
    for problem_id in range(num_problems):
        rng = random.Random(f"{seed}/{problem_id}")
        name, things = rng.choice(NAMES), rng.choice(THINGS)
        first, second = rng.randint(2, 9), rng.randint(1, 9)
        question = (
            f"{name} has {first} {things} and gets {second} more. "
            f"How many {things} does {name} have now?"
        )
        rows.append((problem_id, question, first + second))
    return pl.DataFrame(rows, schema=["problem_id", "problem", "answer"], orient="row")


def write_problems(path: str, seed: int = 0, num_problems: int = 24) -> None:
    """Write `demo_problems` as Parquet."""
    with atomic_path(Path(path)) as temporary:
        demo_problems(seed, num_problems).write_parquet(temporary)
