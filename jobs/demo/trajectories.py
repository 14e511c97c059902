"""The demonstration's data: arithmetic word problems, each solved in six made-up styles.

Everything here is invented by this module from a seed, so that the demonstration needs no data
set. The styles stand in for teachers: the same steps and numbers, told in very different words.
Knows nothing of models or scores.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import polars as pl

DEFAULT_NUM_PROBLEMS = 15

NAMES = ("Mia", "Omar", "Ana", "Jun", "Leo", "Priya", "Tom", "Zoe")


@dataclass(frozen=True, slots=True)
class Step:
    """`left operator right = value`, and what the value counts: "13" "eggs left to sell"."""

    left: int
    operator: str
    right: int
    value: int
    counts: str

    def equation(self, *, times: str = "*", over: str = "/") -> str:
        sign = {"*": times, "/": over}.get(self.operator, self.operator)
        return f"{self.left} {sign} {self.right} = {self.value}"

    def __str__(self) -> str:
        return f"{self.value} {self.counts}"


def add(left: int, right: int, counts: str) -> Step:
    return Step(left, "+", right, left + right, counts)


def subtract(left: int, right: int, counts: str) -> Step:
    return Step(left, "-", right, left - right, counts)


def multiply(left: int, right: int, counts: str) -> Step:
    return Step(left, "*", right, left * right, counts)


def divide(left: int, right: int, counts: str) -> Step:
    assert left % right == 0, "the problems are made so that everything divides evenly"
    return Step(left, "/", right, left // right, counts)


class Problem(NamedTuple):
    """A word problem and the steps that solve it; the last step's value is the answer."""

    question: str
    steps: list[Step]

    @property
    def answer(self) -> int:
        return self.steps[-1].value


def market(rng: random.Random) -> Problem:
    name, thing = rng.choice(NAMES), rng.choice(("eggs", "peaches", "candles", "tomatoes"))
    had, kept, price = rng.randint(14, 60), rng.randint(2, 9), rng.randint(2, 7)
    left = subtract(had, kept, f"{thing} left to sell")
    return Problem(
        f"{name} takes {had} {thing} to the market, gives {kept} of them to a neighbour and sells "
        f"the rest for {price} dollars each. How many dollars does {name} earn?",
        [left, multiply(left.value, price, "dollars earned")],
    )


def bus(rng: random.Random) -> Problem:
    vehicle = rng.choice(("bus", "tram", "ferry"))
    start, off = rng.randint(20, 48), rng.randint(3, 15)
    on, more = rng.randint(4, 18), rng.randint(2, 12)
    after_off = subtract(start, off, "passengers who stay on")
    after_on = add(after_off.value, on, "passengers after the first stop")
    return Problem(
        f"A {vehicle} leaves with {start} passengers. At the first stop {off} get off and {on} get "
        f"on. At the second stop {more} more get on. How many passengers are on the {vehicle} now?",
        [after_off, after_on, add(after_on.value, more, "passengers now")],
    )


def bakery(rng: random.Random) -> Problem:
    thing = rng.choice(("rolls", "muffins", "biscuits"))
    trays, per_tray, per_bag = rng.randint(4, 9), rng.randint(12, 24), rng.randint(3, 8)
    baked = multiply(trays, per_tray, f"{thing} baked")
    kept = baked.value % per_bag + per_bag
    packed = subtract(baked.value, kept, f"{thing} to be packed")
    return Problem(
        f"A bakery bakes {trays} trays of {per_tray} {thing}. It keeps {kept} {thing} for its own "
        f"café and packs the rest into bags of {per_bag}. How many bags does it fill?",
        [baked, packed, divide(packed.value, per_bag, "bags filled")],
    )


def savings(rng: random.Random) -> Problem:
    name, thing = rng.choice(NAMES), rng.choice(("bicycle", "guitar", "tent", "lamp"))
    per_week, weeks, gift = rng.randint(5, 25), rng.randint(3, 12), rng.randint(10, 50)
    saved = multiply(per_week, weeks, "dollars saved")
    total = add(saved.value, gift, "dollars with the gift")
    price = rng.randint(10, total.value - 2)
    return Problem(
        f"{name} saves {per_week} dollars a week for {weeks} weeks, is given {gift} dollars and "
        f"then buys a {thing} for {price} dollars. How many dollars does {name} have left?",
        [saved, total, subtract(total.value, price, "dollars left")],
    )


def book(rng: random.Random) -> Problem:
    name, days, per_day = rng.choice(NAMES), rng.randint(3, 9), rng.randint(11, 32)
    read = multiply(per_day, days, "pages read")
    pages = read.value + rng.randint(8, 140)
    return Problem(
        f"A book has {pages} pages. {name} reads {per_day} pages a day for {days} days. How many "
        "pages are left to read?",
        [read, subtract(pages, read.value, "pages left to read")],
    )


def tiles(rng: random.Random) -> Problem:
    colour, other = rng.sample(("white", "blue", "green", "black"), 2)
    rows, per_row, price = rng.randint(5, 14), rng.randint(6, 15), rng.randint(2, 6)
    total = multiply(rows, per_row, "tiles in all")
    others = rng.randint(3, total.value - 3)
    wanted = subtract(total.value, others, f"{colour} tiles")
    return Problem(
        f"A floor has {rows} rows of {per_row} tiles. {others} of the tiles are {other} and the "
        f"rest are {colour}. A {colour} tile costs {price} dollars. How many dollars do the "
        f"{colour} tiles cost?",
        [total, wanted, multiply(wanted.value, price, f"dollars for the {colour} tiles")],
    )


def journey(rng: random.Random) -> Problem:
    vehicle = rng.choice(("van", "train", "lorry"))
    slow, fast = rng.randint(30, 55), rng.randint(56, 95)
    first_hours, second_hours = rng.randint(2, 5), rng.randint(2, 5)
    first = multiply(slow, first_hours, "kilometres on the first leg")
    second = multiply(fast, second_hours, "kilometres on the second leg")
    return Problem(
        f"A {vehicle} goes {slow} kilometres an hour for {first_hours} hours and then {fast} "
        f"kilometres an hour for {second_hours} hours. How many kilometres does it go in all?",
        [first, second, add(first.value, second.value, "kilometres in all")],
    )


def orchard(rng: random.Random) -> Problem:
    name, thing, other = rng.choice(NAMES), *rng.sample(("apples", "pears", "plums", "figs"), 2)
    people, share = rng.randint(3, 8), rng.randint(5, 20)
    first = rng.randint(2, people * share - 2)
    second = people * share - first
    picked = add(first, second, "pieces of fruit picked")
    return Problem(
        f"{name} picks {first} {thing} and {second} {other} and shares all the fruit evenly among "
        f"{people} people. How many pieces of fruit does each of them get?",
        [picked, divide(picked.value, people, "pieces of fruit for each of them")],
    )


TEMPLATES = (market, bus, bakery, savings, book, tiles, journey, orchard)

Style = Callable[[list[Step], random.Random], str]


def terse(steps: list[Step], rng: random.Random) -> str:
    *before, last = (str(step) for step in steps)
    link = rng.choice((", so ", ", hence ", ", then "))
    return f"{', '.join(before)}{link}{last}.\nAnswer: {steps[-1].value}"


def spelled_out(steps: list[Step], rng: random.Random) -> str:
    lines = [
        rng.choice(
            (
                "Let's solve this problem step by step.",
                "To solve this problem, we can break it down into smaller steps.",
                "We need to work through the problem one step at a time.",
            )
        )
    ]
    for number, step in enumerate(steps, start=1):
        how = {
            "+": f"add {step.right} to {step.left}",
            "-": f"subtract {step.right} from {step.left}",
            "*": f"multiply {step.left} by {step.right}",
            "/": f"divide {step.left} by {step.right}",
        }[step.operator]
        find = rng.choice(("find", "calculate", "work out"))
        lines.append(
            f"Step {number}: To {find} the number of {step.counts}, we {how}: "
            f"{step.equation(times='×', over='÷')}. This gives us {step}."
        )
    lines.append(f"Therefore, the answer is {steps[-1].value}.")
    return "\n".join(lines)


def self_checking(steps: list[Step], rng: random.Random) -> str:
    lines = []
    for step in steps:
        inverse = {"+": "-", "-": "+", "*": "/", "/": "*"}[step.operator]
        check = f"{step.value} {inverse} {step.right} = {step.left}"
        verdict = rng.choice(
            (
                f"Let me check: {check}. Yes, that is right.",
                f"Checking backwards: {check}, which matches.",
                f"Does that hold? {check}. It does.",
            )
        )
        lines.append(f"{step.equation()}, so {step}. {verdict}")
    lines.append(f"All steps are verified, so the final answer is {steps[-1].value}.")
    return "\n".join(lines)


def equations_only(steps: list[Step], rng: random.Random) -> str:
    unknown = rng.choice(("x", "n", "y"))
    return "\n".join([*(step.equation() for step in steps), f"{unknown} = {steps[-1].value}"])


def wandering(steps: list[Step], rng: random.Random) -> str:
    lines = [
        rng.choice(
            (
                "Okay, so, hmm. Where do I even start with this one.",
                "Right, let me think out loud here for a bit.",
                "Hm, I feel like I have seen something like this before, maybe on a rainy day.",
            )
        )
    ]
    asides = rng.sample(
        (
            "I could draw a picture, though my drawings are never any good, so let me not.",
            "Also, who counts these things, and do they get bored?",
            "It is a bit like counting stairs in the dark, but never mind that.",
            "I keep losing track of what was asked, so let me read it again. Fine.",
            "A table would be overkill, probably.",
        ),
        len(steps),
    )
    for step, aside in zip(steps, asides, strict=True):
        tempting = {"+": multiply, "-": add, "*": add, "/": subtract}[step.operator]
        detour = tempting(step.left, step.right, step.counts)
        lines.append(
            f"{aside} Maybe {detour.equation()}? No wait, that is not what we want. "
            f"It should be {step.equation()}, I think, so {step}."
        )
    lines.append(f"Anyway, after all that, I would say {steps[-1].value}.")
    return "\n".join(lines)


def foreign_register(steps: list[Step], rng: random.Random) -> str:
    lines = [
        rng.choice(
            (
                "Know all men by these presents, that the reckoning prayed for standeth thus:",
                "Hear ye, gentle reader, the computation hereunder set forth in good faith.",
                "Whereas a certain number is demanded, be it recited as followeth, to wit:",
            )
        )
    ]
    for step in steps:
        verb = {
            "+": "augmented by",
            "-": "abated by",
            "*": "multiplied unto",
            "/": "apportioned amongst",
        }[step.operator]
        opening = rng.choice(("Item:", "Imprimis:", "Furthermore:"))
        lines.append(
            f"{opening} the said {step.left}, being {verb} {step.right}, yieldeth {step.value}, "
            f"videlicet {step}."
        )
    lines.append(f"Ergo, per the premises aforesaid, let judgment be entered: {steps[-1].value}.")
    return "\n".join(lines)


class Teacher(NamedTuple):
    """A style, and how often it gets the last step wrong."""

    style: Style
    slip_rate: float


TEACHERS: dict[str, Teacher] = {
    "terse": Teacher(terse, slip_rate=0.2),
    "spelled_out": Teacher(spelled_out, slip_rate=0.05),
    "self_checking": Teacher(self_checking, slip_rate=0.0),
    "equations_only": Teacher(equations_only, slip_rate=0.1),
    "wandering": Teacher(wandering, slip_rate=0.25),
    "foreign_register": Teacher(foreign_register, slip_rate=0.1),
}

SCHEMA: dict[str, Any] = {
    "id": pl.String,
    "problem_id": pl.Int32,
    "teacher": pl.String,
    "correct": pl.Boolean,
    "answer": pl.Int32,
    "messages": pl.List(pl.Struct({"role": pl.String, "content": pl.String})),
}


def demo_trajectories(seed: int = 0, num_problems: int = DEFAULT_NUM_PROBLEMS) -> pl.DataFrame:
    """Made-up trajectories, one row for each of `num_problems` problems and six teachers.

    id: `<problem_id>-<teacher>`. answer: the problem's right answer, known by construction.
    correct: whether the solution ends with it. messages: the question and the solution.
    The same seed gives the same rows, and a larger `num_problems` only adds rows.
    """
    rows = []
    for problem_id in range(num_problems):
        problem = make_problem(seed, problem_id)
        for name, teacher in TEACHERS.items():
            # One generator for each row: editing one style leaves the others' texts alone.
            rng = random.Random(f"{seed}/{problem_id}/{name}")
            steps = _maybe_slip(problem.steps, teacher.slip_rate, rng)
            messages = [
                {"role": "user", "content": problem.question},
                {"role": "assistant", "content": teacher.style(steps, rng)},
            ]
            correct = steps[-1].value == problem.answer
            row = (f"{problem_id}-{name}", problem_id, name, correct, problem.answer, messages)
            rows.append(row)
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def make_problem(seed: int, problem_id: int) -> Problem:
    """Problem number `problem_id` of a seed; the templates take turns."""
    template = TEMPLATES[problem_id % len(TEMPLATES)]
    return template(random.Random(f"{seed}/{problem_id}"))


def _maybe_slip(steps: list[Step], slip_rate: float, rng: random.Random) -> list[Step]:
    """The steps, whose last value is made wrong with a probability of `slip_rate`."""
    if rng.random() >= slip_rate:
        return steps
    last = steps[-1]
    return [*steps[:-1], replace(last, value=last.value + rng.choice((1, 2, 10, 20)))]
