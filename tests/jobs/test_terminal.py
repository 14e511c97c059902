"""Names are data: whatever they hold, a terminal shows it and obeys nothing of it."""

import io
import json
import os
import re
import subprocess
import sys
import unicodedata
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rsr.engine.metrics import DatasetRsr
from rsr.jobs.cli import main
from rsr.jobs.cluster.work import Failure
from rsr.jobs.demo.demo import DemoReport, ScoredTrajectory, TeacherScore, print_demo_report
from rsr.jobs.evidence.confounds import Confound
from rsr.jobs.evidence.correlate import (
    Coefficient,
    Correlations,
    Difference,
    MetricCorrelation,
)
from rsr.jobs.evidence.printing import print_comparisons, print_correlations
from rsr.jobs.evidence.teachers import Comparison, TeacherEvidence
from rsr.jobs.inspection.reading import Reading
from rsr.jobs.planning import cli as planning
from rsr.jobs.planning.prediction import Figure, RunPlan
from rsr.jobs.run import cli as run_cli
from rsr.jobs.run.events import Cause, Next, ShardFailed, WorkerLost, WorkerStarted
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.progress import Progress
from rsr.jobs.run.status import RunStatus
from rsr.jobs.run.verify import Problem, Verification
from rsr.jobs.scoring.cli import print_score_result
from rsr.jobs.scoring.score import ScoreResult
from rsr.jobs.selection.composition import Composition, Part
from rsr.jobs.selection.result import SelectionResult
from rsr.jobs.shards.score_columns import Reason, Summary
from rsr.jobs.terminal import (
    Console,
    Table,
    complain,
    print_json,
    printable,
    shell_command,
    styled,
)

HOSTILE = "a[red]b[/x]\x1b[2J:smile:\r\b\x9b31m\u202e\u2028\udce9\n\t\x7f["
texts = st.text(
    st.one_of(
        st.characters(codec=None),
        st.sampled_from("[]/\\:\x1b\x07\x9b\u202e\u2066\udce9\n\r\t\x7f'\" "),
    ),
    min_size=1,
    max_size=20,
)


BIDI_CONTROLS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def assert_is_shown(printed: str, text: str) -> None:
    """Nothing to obey but line feeds, and all of the text, spelled out where need be."""
    others = set(printed) - {"\n"}
    assert not {c for c in others if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")}
    assert not {c for c in others if unicodedata.bidirectional(c) in BIDI_CONTROLS}
    # Where a cell is padded or an own label stands before it, it is still there in one piece.
    assert printable(text).strip() in printed


def show_table(text):
    table = Table(text, title=printable(text))
    table.add_row(text)
    Console().print(table)


def show_lines(text):
    console = Console()
    console.say(text)
    console.say(styled((text, "bold"), text))


def show_comparison(text):
    teachers = [TeacherEvidence(text, 1, 1, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)]
    teachers.append(TeacherEvidence(text, 1, 0))
    confounds = [Confound(text, 1, 0.5, None, {})]
    one = Comparison(text, "p", text, teachers, 1, 1, None, 1, confounds, [text], [text])
    print_comparisons([one, one], Console())


def show_correlations(text):
    coefficient = Coefficient(0.5, 0.5, 0.1, 0.4, 0.6, {text: 0.5})
    metric = MetricCorrelation(text, coefficient, coefficient, 3)
    difference = Difference(text, text, 0.1, 0.0, 0.2, 0.9, 3)
    print_correlations(Correlations(text, text, [metric], [difference], [text]), Console())


def show_selection(text):
    part = Part(1, 1, 1, 1, 1.0, DatasetRsr(1, 1.0, 1.0))
    composition = Composition(text, {text: part}, {text: part, None: Part()})
    folder = RunFolder(Path("/" + text.replace("\0", "")))
    SelectionResult(folder, {"ties_by": text, "num_kept": 1}, composition).print(Console())


def show_demo(text):
    row = ScoredTrajectory(text, 1.0, 1.0, 1.0, True, text)
    teacher = TeacherScore(text, 1, 1.0, 1.0, 1.0, 1.0, 1.0)
    print_demo_report(DemoReport(Path("p"), [teacher], row, row), Console())


def show_score(text):
    summary = Summary(1, 1, {text: 1}, DatasetRsr(1, 1.0, 1.0))
    result = ScoreResult(text, Path(text), summary, 1, 1.0, {text: 1}, [Failure(text, 0, 1, text)])
    with redirect_stderr(sys.stdout):
        print_score_result(result)


def show_status(text):
    found = RunStatus(
        output=text, writer=text, subject=text, created=text, holder=None, num_shards=1,
        num_shards_done=1, num_units_kept=0, num_rows=1, num_rows_done=1, num_rows_written=1,
        num_tokens=1, rows_by_status={text: 1}, dataset_rsr=1.0, rows_per_s=1.0,
        reasons={text: Reason(1, text, text)},
    )  # fmt: skip
    Console().show(run_cli._table(found))


def show_verification(text):
    problems = [Problem(text, text)]
    run_cli._print(Verification(text, True, 1, 1, problems, [text]))


def show_plan(text):
    figures = [Figure("rows", text, text)]
    bars = [{"up_to": 128, "num_rows": 1}]
    reading = Reading(512, Summary(1, 0, {text: 1}, reasons={text: Reason(1, text, text)}))
    reading.notes[text] += 1
    plan = RunPlan(1, 1, 1, 1, bars, *[1] * 11, {}, reading, figures)
    planning._print(plan, text, text)


def events_about(text):
    yield WorkerStarted(worker=0, node=text, pid=1, seconds=1.0, max_num_batched_tokens=512)
    yield WorkerLost(worker=1, node=text, cause=Cause.CRASH, reason=text)
    yield ShardFailed(
        shard=text, worker=0, node=text, cause=Cause.OUTPUT, reason=text, attempts=1,
        next=Next.AGAIN,
    )  # fmt: skip


def show_progress(text, **options):
    progress = Progress(Console(file=sys.stdout, **options))
    progress.loading(text, 1, 1)
    with progress.scoring(1, Summary()):
        for event in events_about(text):
            progress.tell(event)


def show_complaint(text):
    with redirect_stderr(sys.stdout):
        complain(text)


SHOWN = [value for name, value in list(globals().items()) if name.startswith("show_")]


@pytest.mark.seconds
@pytest.mark.parametrize("show", SHOWN)
@settings(max_examples=60, deadline=None)
@given(text=texts)
@example(text=HOSTILE)
@example(text="[/]")
@example(text="out [bold]")
def test_whatever_a_name_holds_is_shown_and_not_obeyed(show, text):
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as stream:
        patch.setenv("COLUMNS", "10000")
        show(text)
    assert_is_shown(stream.getvalue(), text)


def test_a_live_view_shows_names_too():
    with redirect_stdout(io.StringIO()) as stream:
        show_progress(HOSTILE, force_terminal=True, color_system=None, width=500)
    # It moves the cursor, which is rich's own doing.
    assert_is_shown(re.sub(r"\x1b\[[?0-9;]*[A-Za-z]|\r", "", stream.getvalue()), HOSTILE)


@settings(max_examples=200, deadline=None)
@given(text=texts)
def test_json_is_ascii_without_control_characters_and_says_the_same(text):
    with redirect_stdout(io.StringIO()) as stream:
        print_json({text: [text]})
    line = stream.getvalue()
    assert not re.search(r"[^ -~]", line.removesuffix("\n"))
    assert json.loads(line) == {text: [text]}


@settings(max_examples=50, deadline=None)
@given(names=st.lists(texts.map(lambda t: t.replace("\0", "")), min_size=1, max_size=3))
@example(names=["brack[train]et.parquet", "a'b\\c", "caf\udce9 \x1b[2J", "-n", ""])
def test_a_command_is_read_by_bash_as_it_was_meant(names):
    # What is no file name anywhere: other surrogates than those that stand for bytes.
    names = [re.sub("[\ud800-\udc7f\udd00-\udfff]", "", name) for name in names]
    line = shell_command(["printf", "%s\\0", *names])
    assert printable(line) == line
    done = subprocess.run(["bash", "-c", line], capture_output=True, check=True)
    assert done.stdout == b"".join(os.fsencode(name) + b"\0" for name in names)


# Through the command line.


def rsr(*arguments):
    return CliRunner().invoke(main, [*map(str, arguments)], env={"COLUMNS": "500"})


@pytest.fixture
def texts_table():
    return pa.table({"text": ["a", "b", "c"]})


def test_verify_names_the_damaged_file_and_removes_no_other(make_run, tmp_path, texts_table):
    name = "brack[train]et.parquet"
    run = make_run({name: texts_table, "bracket.parquet": texts_table}, tmp_path / "o[red]x")
    for shard in run.shards:
        run.finish(shard)
    damaged = tmp_path / "o[red]x" / name
    damaged.write_bytes(damaged.read_bytes()[:-3])
    result = rsr("verify", tmp_path / "o[red]x")
    assert result.exit_code == 1
    assert f"\n{name}  is " in result.output
    (remove,) = [line for line in result.output.splitlines() if line.strip().startswith("rm ")]
    subprocess.run(["bash", "-c", remove], check=True)
    left = sorted(path.name for path in damaged.parent.glob("*.parquet"))
    assert left == ["bracket.parquet"]
    assert str(damaged.parent) in rsr("status", damaged.parent).output


def test_names_that_look_like_markup_print(make_run, tmp_path, texts_table):
    run = make_run({"a.parquet": texts_table}, tmp_path / "out")
    run.finish(run.shards[0])
    stranger = tmp_path / "out" / "[" / "x].parquet"
    stranger.parent.mkdir()
    stranger.write_bytes(b"")
    result = rsr("verify", tmp_path / "out")
    assert result.exit_code == 1
    assert "[/x].parquet  is not of this run" in result.output


def test_a_teacher_cannot_write_to_the_terminal(write_scored, tmp_path):
    teachers = ["a\x1b[2J\x00", "b[/red]"]
    columns = {"teacher": teachers, "problem_id": [0, 0]}
    path = write_scored(tmp_path / "scored.parquet", [2.0, 3.0], columns=columns)
    for command in (["teachers", path], ["filter", path, tmp_path / "out", "--keep-rows", 2]):
        result = rsr(*command)
        assert result.exit_code == 0
        assert "a\\x1b[2J\\x00" in result.output
        assert "b[/red]" in result.output
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", result.output)


def test_words_of_the_user_are_data_too(tmp_path):
    for arguments in (["status", tmp_path / "\x1b[2J\u202e"], ["\x1b[2J"]):
        result = rsr(*arguments)
        assert result.exit_code == 2
        assert "\\x1b[2J" in result.output
        assert "\x1b" not in result.output


@pytest.mark.seconds
def test_ascii_terminals_get_all_of_it(make_run, tmp_path, texts_table):
    run = make_run({"é…×.parquet": texts_table}, tmp_path / "out")
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "200"}
    for command in (["verify", run.output.root], ["simulate", "--tokens", "10"]):
        done = subprocess.run(
            [sys.executable, "-m", "rsr.jobs.cli", *map(str, command)],
            capture_output=True,
            env=environment,
        )
        assert b"Traceback" not in done.stderr
        assert done.stdout.isascii()
        assert done.returncode == (1 if command[0] == "verify" else 0)
        if command[0] == "verify":
            assert rb"\xe9...x.parquet" in done.stdout


# Streams that do not take what is written.

COMMAND = f"{sys.executable} -m rsr.jobs.cli"


def shell(line, **options):
    command = ["bash", "-o", "pipefail", "-c", line]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


@pytest.fixture
def damaged(make_run, tmp_path, texts_table):
    """OUTPUT of a run of which nothing was written: `rsr verify` ends with 1 and a table."""
    make_run({f"{i}.parquet": texts_table for i in range(3)}, tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.seconds
def test_full_disk_behind_stdout_is_one_line_and_code_74(damaged):
    for options in ("", "--json"):
        done = shell(f"{COMMAND} verify {damaged} {options} > /dev/full")
        assert done.returncode == 74
        assert done.stderr == "rsr: stdout cannot be written: No space left on device\n"


@pytest.mark.seconds
def test_reader_that_leaves_early_changes_no_exit_code(damaged):
    # The reader is gone before the first byte.
    for command, code in ((f"verify {damaged}", 1), (f"status {damaged}", 0), ("--help", 0)):
        done = shell(f"(sleep 0.1; {COMMAND} {command}) | true")
        assert done.returncode == code
        assert done.stderr == ""


@pytest.mark.seconds
def test_watching_ends_when_nobody_reads(damaged):
    with RunFolder(damaged).lock():
        done = shell(f"{COMMAND} status {damaged} --watch --json | head -1")
    assert done.returncode == 0
    assert json.loads(done.stdout)["num_shards"] == 3
    assert done.stderr == ""


@pytest.mark.seconds
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_closed_streams(damaged, closed):
    done = shell(f"{COMMAND} verify {damaged} {closed}")
    assert done.returncode == 1
    assert done.stderr == ""
    assert ("not written" in done.stdout) == (">&- " not in f"{closed} ".replace("2>&-", ""))
