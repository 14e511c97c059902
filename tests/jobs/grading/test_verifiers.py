"""What each verifier says of hundreds of answers; no row keeps another from its grade."""

import os
from pathlib import Path

import grading_cases as cases
import psutil
import pytest

from rsr.engine.trajectory import Trajectory
from rsr.jobs.errors import UsageError
from rsr.jobs.grading.answers import GradableRow, gradable
from rsr.jobs.grading.children import GradingChild
from rsr.jobs.grading.grades import Grade

DEVNULL = -3


def children_of_this_process():
    return [c for c in psutil.Process().children(recursive=True) if "grading.child" in _line(c)]


def _line(process):
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("verifier", "table"),
    [("math", cases.MATH), ("exact", cases.EXACT), ("mcq", cases.CHOICES)],
    ids=["math", "exact", "mcq"],
)
def test_every_case_has_the_status_that_it_should(verifier, table):
    with GradingChild(verifier, 20.0, DEVNULL) as child:
        found = [(gold, answer, _status(child, gold, answer)) for gold, answer, _ in table]
    assert found == [(gold, answer, status) for gold, answer, status in table]
    assert not children_of_this_process()


def _status(child, gold, response, finish_reason=None):
    row = gradable(Trajectory(prompt="?", response=response), gold, finish_reason)
    return str((row if isinstance(row, Grade) else child.grade(row)).status)


@pytest.mark.seconds
def test_only_a_complete_answer_after_the_reasoning_counts():
    with GradingChild("math", 20.0, DEVNULL) as child:
        found = [_status(child, *case[:3]) for case in cases.RESPONSES]
    assert found == [case[3] for case in cases.RESPONSES]


def test_there_are_three_hundred_cases():
    tables = (cases.MATH, cases.EXACT, cases.CHOICES, cases.RESPONSES, cases.HANGS)
    assert sum(map(len, tables)) >= 300
    for table in tables:
        assert len({repr(case) for case in table}) == len(table), "one stands there twice"


@pytest.mark.slow
def test_answer_that_hangs_costs_itself_alone():
    with GradingChild("math", 1.5, DEVNULL) as child:
        for gold, answer in cases.HANGS:
            assert child.grade(GradableRow(answer, gold)).status == "timeout"
            assert child.grade(GradableRow(r"\boxed{2/4}", "0.5")).status == "correct"
            assert len(children_of_this_process()) == 1
    assert not children_of_this_process()


@pytest.mark.slow
def test_memory_of_a_process_stays_flat():
    with GradingChild("math", 20.0, DEVNULL) as child:

        def rss_after(rows):
            for row in rows:
                assert child.grade(GradableRow(f"\\boxed{{x^2+{row}x}}", f"x(x+{row})")).correct
            (process,) = children_of_this_process()
            return process.memory_info().rss

        first = rss_after(range(2, 200))
        assert rss_after(range(200, 400)) < first + (32 << 20)


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine.py").write_text(
        "import os, sys, time\n"
        "number = 5\n"
        "def same(answer, gold):\n"
        "    print('chatter')\n"
        "    return answer.strip() == gold\n"
        "def told(answer, gold):\n"
        "    return (None if gold == '?' else answer == gold), answer.upper()\n"
        "def bad(answer, gold):\n"
        "    return {'raise': lambda: 1 / 0, 'exit': sys.exit, 'odd': lambda: 'yes',\n"
        "            'die': lambda: os._exit(3), 'kill': lambda: os.kill(os.getpid(), 9),\n"
        "            'memory': lambda: bytearray(1 << 40)}[answer]()\n"
    )
    monkeypatch.chdir(tmp_path)


def test_function_of_the_user_grades(own_module):
    with GradingChild("mine:same", 5.0, DEVNULL) as child:
        assert child.grade(GradableRow(" a", "a")).status == "correct"
        assert child.grade(GradableRow("b", "a")).status == "wrong"
    with GradingChild("mine:told", 5.0, DEVNULL) as child:
        assert child.grade(GradableRow("a", "?")).status == "gold_unparsable"
        grade = child.grade(GradableRow("a", "a"))
        assert (grade.status, grade.extracted) == ("correct", "A")


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("answer", "detail"),
    [
        ("raise", "ZeroDivisionError"),
        ("exit", "SystemExit"),
        ("odd", "returned 'yes'; expected True, False or None"),
        ("die", "ended with 3"),
        ("kill", "killed by SIGKILL"),
        ("memory", "ran out of memory"),
    ],
)
def test_function_that_fails_is_an_error_of_its_row(own_module, answer, detail):
    with GradingChild("mine:bad", 5.0, DEVNULL) as child:
        grade = child.grade(GradableRow(answer, "x"))
        assert (grade.status, grade.correct) == ("error", None)
        assert detail in grade.detail
        assert child.grade(GradableRow("raise", "x")).status == "error"


@pytest.mark.parametrize(
    ("verifier", "reason"),
    [
        ("maths", "expected math, exact, mcq or MODULE:FUNCTION"),
        ("none:such", "No module named 'none'"),
        ("mine:none", "has no attribute 'none'"),
        ("mine:number", "is int, not a function"),
    ],
)
def test_verifier_that_cannot_be_had_is_refused_in_one_line(own_module, verifier, reason):
    with pytest.raises(UsageError, match=reason) as refused:
        GradingChild(verifier, 5.0, DEVNULL)
    assert "\n" not in str(refused.value)
    assert not children_of_this_process()


def test_module_of_the_users_folder_is_not_taken_for_pythons(own_module, tmp_path):
    (tmp_path / "json.py").write_text("raise RuntimeError")
    with GradingChild("mine:same", 5.0, DEVNULL) as child:
        assert child.grade(GradableRow("a", "a")).status == "correct"


@pytest.mark.seconds
def test_process_ends_with_its_parent(tmp_path):
    """Even one whose parent had no time for anything, and that is busy itself."""
    import subprocess
    import sys
    import time

    script = (
        "import threading\n"
        "from rsr.jobs.grading.children import GradingChild\n"
        "from rsr.jobs.grading.answers import GradableRow\n"
        "child = GradingChild('math', 300.0, -3)\n"
        "print(child._process.pid, flush=True)\n"
        r"child.grade(GradableRow('\\boxed{9^{9^{9^{9}}}}', '1'))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as parent:
        pid = int(parent.stdout.readline())
        time.sleep(0.5)
        parent.kill()
    deadline = time.monotonic() + 30
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the process outlives its parent"
        time.sleep(0.1)
    assert os.getpid() != pid
