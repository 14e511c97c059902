"""What the commands print at four widths of a terminal and in a pipe, held as text.

RSR_RENEW_SNAPSHOTS=1 writes the texts anew: look at what changed before committing it.
"""

import io
import os
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsr.engine.metrics import DatasetRsr
from rsr.jobs.evidence.confounds import Confound
from rsr.jobs.evidence.printing import print_comparisons
from rsr.jobs.evidence.teachers import Comparison, TeacherEvidence
from rsr.jobs.inspection.reading import Reading
from rsr.jobs.planning import cli as planning
from rsr.jobs.planning.prediction import Figure, RunPlan
from rsr.jobs.run import cli as run_cli
from rsr.jobs.run.events import UnitFinished, WorkerStarted
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.progress import Progress
from rsr.jobs.run.status import RunStatus
from rsr.jobs.scoring.cli import print_score_result
from rsr.jobs.scoring.score import ScoreResult
from rsr.jobs.selection.composition import Composition, Part
from rsr.jobs.selection.result import SelectionResult
from rsr.jobs.shards.score_columns import Reason, Summary
from rsr.jobs.terminal import Console, Table, complain

SNAPSHOTS = Path(__file__).parent / "snapshots"
WIDTHS = (60, 80, 100, 140)
TEACHERS = ("175b_finetuning", "175b_verification", "6b_finetuning", "ground_truth")
SUMMARY = Summary(
    num_rows=150,
    num_tokens=20_293,
    rows_by_status={"ok": 148, "no_response": 2},
    dataset=DatasetRsr(148, 600.0, 190.0),
    reasons={"no_response: empty response": Reason(2, "a.parquet row 7")},
)


def teachers(console):
    figures = {"low": 2.9, "high": 3.1, "probability_best": 0.25, "share_correct": 0.4}
    means = {"mean_rank": 4.2, "mean_surprisal_nats": 1.31, "mean_num_tokens": 128.4}
    found = [
        TeacherEvidence(name, 1_000, 1_000, 3.0 + n / 10, 3.0 + n / 10, **figures, **means)
        for n, name in enumerate(TEACHERS)
    ]
    confounds = [
        Confound("length", 4_000, 0.12, -0.05, {}),
        Confound("correct", 4_000, None, 0.2, {}),
    ]
    one = Comparison("student", "scored", None, found, 1_000, 1_000, None, 200, confounds)
    print_comparisons([one], console)


def select(console):
    parts = {
        name: Part(1_000 - n, 128_000, 400, 1_000, 3_000.0, DatasetRsr(1_000, 4_200.0, 1_310.0))
        for n, name in enumerate(TEACHERS)
    }
    facts = {"num_rows": 5_000, "num_kept": 1_000, "largest_rsr": 5.0856, "ties_by": "id"}
    composition = Composition("teacher", parts, parts)
    SelectionResult(RunFolder(Path("best")), facts, composition).print(console)


def score(console):
    result = ScoreResult("scored", Path("scored/.rsr/run.log"), SUMMARY, 14_205, 32.0, {"crash": 1})
    print_score_result(result)


def score_going_on(console):
    Progress(console).going_on(60, 150)
    Progress(console).loading("student", 1, 1)


def score_finished_again(console):
    Progress(console).going_on(150, 150)


def score_refused(console):
    with redirect_stderr(sys.stdout):
        complain("scored holds a run with other settings: dtype was float32 and is bfloat16")


def score_running(console):
    """One frame of the live view; in a pipe it has lines at long intervals instead."""
    progress = Progress(console)
    with redirect_stdout(sys.stderr), progress.scoring(150, Summary()):
        progress.tell(
            WorkerStarted(worker=0, node="n", pid=1, seconds=1.0, max_num_batched_tokens=8)
        )
        done = Summary(45, 6_088, {"ok": 45})
        progress.tell(
            UnitFinished(
                shard="a", start=0, stop=45, worker=0, node="n", seconds=20.0, summary=done
            )
        )
    return progress


def status(console):
    found = RunStatus(
        output="scored", writer="score", subject="student", created="2026-11-24 21:40:01 UTC",
        holder=None, num_shards=2, num_shards_done=1, num_units_kept=1, num_rows=150,
        num_rows_done=90, num_rows_written=75, num_tokens=10_000, rows_by_status={"ok": 75},
        dataset_rsr=3.2358, rows_per_s=2.4, reasons={},
    )  # fmt: skip
    console.show(run_cli._table(found))


def plan(console):
    why = "FLOPs over 64 workers at that speed, all of them busy to the end, and nobody else there"
    figures = [Figure("rows", "4,096", "the footers"), Figure("time", "3 min 00 s", why)]
    bars = [{"up_to": 128, "num_rows": 40}, {"up_to": None, "num_rows": 1}]
    plan = RunPlan(1, 1, 1, 1, bars, *[1] * 11, {"workers": 4}, Reading(512, SUMMARY), figures)
    planning._print(plan, "trajectories.parquet", "student")


SUBJECTS = (
    teachers, select, score, score_going_on, score_finished_again, score_refused, status, plan,
)  # fmt: skip


def printed(subject, width):
    """width: of a terminal without colours; None is a pipe."""
    with redirect_stdout(io.StringIO()) as stream, pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width or 80))
        patch.setenv("NO_COLOR", "1")
        patch.setenv("TERM", "xterm")
        if width is not None:
            patch.setenv("FORCE_COLOR", "1")
        subject(Console(color_system=None))
    return re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())


def captures(subject):
    for width in (*WIDTHS, None):
        where = "in a pipe" if width is None else f"at {width} columns"
        yield f"--- {where}\n{printed(subject, width)}"


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: s.__name__)
def test_commands_print_what_they_printed(subject):
    path = SNAPSHOTS / f"{subject.__name__}.txt"
    text = "".join(captures(subject))
    if "RSR_RENEW_SNAPSHOTS" in os.environ:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("width", [*WIDTHS, None])
@pytest.mark.parametrize("subject", [teachers, select])
def test_no_teacher_is_cut(subject, width):
    lines = printed(subject, width).splitlines()
    for name in TEACHERS:
        assert any(line.startswith(name) for line in map(str.strip, lines))
    table = [line for line in lines if line.strip().startswith(TEACHERS)]
    assert not any("…" in line or line.endswith(" ") for line in table)
    assert width is None or max(map(len, table)) <= width


cells = st.text("ab1 ", min_size=1, max_size=40)


@pytest.mark.seconds
@given(
    width=st.integers(30, 120),
    rows=st.lists(st.lists(cells, min_size=6, max_size=6), min_size=1, max_size=4),
)
def test_a_stacked_table_says_everything(width, rows):
    """Whatever stands in its cells, none of it is left out, and no line is too wide."""
    table = Table("name")
    for number in range(1, 6):
        table.add_column(f"c{number}", justify="right" if number % 2 else "left")
    for row in rows:
        table.add_row(*row)
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(table)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    for number in range(1, 6):
        assert f"c{number}" in text
    for row in rows:
        for cell in row[1:]:
            for letter in "ab1":
                assert text.count(letter) >= cell.count(letter)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_narrow_terminal_keeps_bar_share_and_time_left(width):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    progress = score_running(console)
    shown = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    shown.print(progress._view())
    text = shown.file.getvalue()
    assert "━" * 3 in text
    # Of the unit in hand, more from moment to moment.
    assert re.search(r"3\d% · ", text)
    assert " left · 45 of 150 rows" in text
    assert "…" not in text
