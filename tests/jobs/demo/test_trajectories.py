"""The made-up trajectories: right where they say so, the same every time, truly different."""

import itertools
import operator
import re

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsr.jobs.demo.trajectories import (
    DEFAULT_NUM_PROBLEMS,
    TEACHERS,
    TEMPLATES,
    demo_trajectories,
    make_problem,
)

# The answer from the numbers of the question, in the order in which the question names them.
ANSWERS = {
    "market": lambda had, kept, price: (had - kept) * price,
    "bus": lambda start, off, on, more: start - off + on + more,
    "bakery": lambda trays, per_tray, kept, per_bag: (trays * per_tray - kept) / per_bag,
    "savings": lambda per_week, weeks, gift, price: per_week * weeks + gift - price,
    "book": lambda pages, per_day, days: pages - per_day * days,
    "tiles": lambda rows, per_row, others, price: (rows * per_row - others) * price,
    "journey": lambda slow, hours, fast, more: slow * hours + fast * more,
    "orchard": lambda first, second, people: (first + second) / people,
}
OPERATORS = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "×": operator.mul,
    "/": operator.truediv,
    "÷": operator.truediv,
}
EQUATION = re.compile(r"(\d+) ([-+*/×÷]) (\d+) = (\d+)")

seeds = st.integers(-(2**63), 2**63)
problem_ids = st.integers(0, 10_000)


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def solution(row: dict) -> str:
    return row["messages"][1]["content"]


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-zé']+", text.lower()))


@given(seed=seeds, problem_id=problem_ids)
def test_answer_follows_from_the_question(seed, problem_id):
    problem = make_problem(seed, problem_id)
    template = TEMPLATES[problem_id % len(TEMPLATES)].__name__
    assert problem.answer == ANSWERS[template](*numbers(problem.question))
    assert all(step.value > 0 for step in problem.steps), "nobody has a negative number of eggs"


@settings(max_examples=30)
@given(seed=seeds)
def test_correct_says_whether_the_solution_ends_with_the_answer(seed):
    for row in demo_trajectories(seed, len(TEMPLATES)).iter_rows(named=True):
        assert row["correct"] == (numbers(solution(row))[-1] == row["answer"])


@settings(max_examples=30)
@given(seed=seeds)
def test_every_equation_of_a_correct_solution_holds(seed):
    rows = demo_trajectories(seed, len(TEMPLATES)).filter("correct")
    equations = [
        equation
        for row in rows.iter_rows(named=True)
        for equation in EQUATION.findall(solution(row))
    ]
    assert equations
    for left, sign, right, value in equations:
        assert OPERATORS[sign](int(left), int(right)) == int(value)


def test_some_teachers_err_and_the_one_that_checks_does_not():
    correct = dict(
        demo_trajectories(seed=0, num_problems=400)
        .group_by("teacher")
        .agg(pl.col("correct").mean())
        .iter_rows()
    )
    for name, teacher in TEACHERS.items():
        assert correct[name] == pytest.approx(1 - teacher.slip_rate, abs=0.06)
    assert correct["self_checking"] == 1
    assert not demo_trajectories()["correct"].all(), "the default demonstration shows some errors"


def test_same_seed_gives_the_same_bytes(tmp_path):
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        demo_trajectories(seed).write_parquet(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_more_problems_only_add_rows():
    few, many = demo_trajectories(3, 4), demo_trajectories(3, 9)
    assert many.head(len(few)).equals(few)


def test_every_problem_is_solved_once_by_every_teacher():
    frame = demo_trajectories()
    assert len(frame) == DEFAULT_NUM_PROBLEMS * len(TEACHERS) == 90
    assert frame["id"].is_unique().all()
    assert not frame.select("problem_id", "teacher").is_duplicated().any()
    assert frame["messages"].list.eval(pl.element().struct["role"]).to_list() == (
        [["user", "assistant"]] * len(frame)
    )
    for _, siblings in frame.group_by("problem_id"):
        assert siblings["messages"].list.first().n_unique() == 1, "one question"
        assert siblings["messages"].list.last().n_unique() == len(TEACHERS), "six solutions"


def test_styles_share_few_words_of_their_own():
    own: dict[str, set[str]] = {name: set() for name in TEACHERS}
    for row in demo_trajectories().iter_rows(named=True):
        problem = make_problem(0, row["problem_id"])
        told = words(problem.question).union(*(words(step.counts) for step in problem.steps))
        own[row["teacher"]] |= words(solution(row)) - told
    for one, other in itertools.combinations(own, 2):
        shared = len(own[one] & own[other]) / len(own[one] | own[other])
        assert shared < 0.2, f"{one} and {other} share {own[one] & own[other]}"


def test_styles_differ_in_length():
    lengths = dict(
        demo_trajectories()
        .with_columns(length=pl.col("messages").list.last().struct["content"].str.len_chars())
        .group_by("teacher")
        .agg(pl.col("length").mean())
        .iter_rows()
    )
    assert lengths["equations_only"] < 60 < lengths["terse"] < 100
    assert 200 < lengths["self_checking"] < lengths["wandering"]
