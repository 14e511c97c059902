"""The demonstration: made-up trajectories, a real student, the ordinary scoring job.

    FOLDER/trajectories.parquet         what `trajectories.py` makes up
    FOLDER/scored/trajectories.parquet  the same with score columns
    FOLDER/picture.svg                  what `picture.py` draws of them

Knows the order of the steps, and what is worth telling of the result.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl
from rich.panel import Panel

from rsr.engine.config import ScorerConfig
from rsr.jobs.demo.student import demo_student
from rsr.jobs.demo.trajectories import DEFAULT_NUM_PROBLEMS, demo_trajectories
from rsr.jobs.errors import UsageError
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.progress import Progress
from rsr.jobs.scoring.score import ScoreOptions, ScoreResult, run_score
from rsr.jobs.shards.score_columns import dataset_of, dataset_sums
from rsr.jobs.storage.atomic import atomic_path
from rsr.jobs.terminal import Console, Table, styled

METADATA_KEY = "rsr_demo"
"""Key in the trajectories file's metadata that marks it as ours, so that it may be replaced."""

NOTE = (
    "These trajectories are made up: word problems from templates, told in six styles by this "
    "program, not by real teachers. The student and its scores are real. So the table shows how "
    "this student takes these styles; it does not say which real teacher to choose, nor which "
    "style would train better."
)

EXCERPT_LINES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """Where a demonstration goes, and which problems it makes up.

    folder: where everything goes. seed, num_problems: of the made-up trajectories.
    """

    folder: Path
    seed: int = 0
    num_problems: int = DEFAULT_NUM_PROBLEMS
    verbose: bool = False

    @property
    def trajectories(self) -> Path:
        return self.folder / "trajectories.parquet"

    @property
    def scored(self) -> Path:
        return self.folder / "scored"

    @property
    def picture(self) -> Path:
        return self.folder / "picture.svg"


@dataclass(frozen=True, slots=True)
class TeacherScore:
    """One style. rsr: of its data set (Eq. 9), which is mean_rank / mean_surprisal_nats.

    mean_rank, mean_surprisal_nats: means over trajectories of their means over tokens.
    """

    teacher: str
    num_trajectories: int
    rsr: float | None
    mean_rank: float
    mean_surprisal_nats: float
    mean_num_tokens: float
    share_correct: float


@dataclass(frozen=True, slots=True)
class ScoredTrajectory:
    """One row of the result, as far as the report needs it."""

    id: str
    rsr: float
    mean_rank: float
    mean_surprisal_nats: float
    correct: bool
    response: str


@dataclass(frozen=True, slots=True)
class DemoReport:
    """What a finished demonstration shows.

    teachers: lowest data-set RSR first. best, worst: trajectories by their own RSR (Eq. 7).
    """

    picture: Path
    teachers: list[TeacherScore]
    best: ScoredTrajectory
    worst: ScoredTrajectory


def score_demo(options: DemoOptions, progress: Progress, stop: StopRequest) -> ScoreResult:
    """Make the trajectories up and score them, replacing an earlier demonstration in the folder.

    Raises `UsageError` if something of the extra `demo` is missing, or if the folder cannot be
    written or holds files of these names that are not ours; `Interrupted` when `stop` says so.
    """
    _require_replaceable(options.trajectories)
    RunFolder(options.scored).earlier_run("score")  # refuses what is not a run's
    student = demo_student()
    stop.check()
    _write_trajectories(options)
    return run_score(
        ScoreOptions(
            input=str(options.trajectories),
            output=options.scored,
            # float32 is exact, and several times faster than bfloat16 emulated by an older CPU.
            scorer=ScorerConfig(model=str(student), dtype="float32"),
            overwrite=True,
            verbose=options.verbose,
        ),
        progress,
        stop,
    )


def report_demo(options: DemoOptions) -> DemoReport:
    """What a finished `score_demo` has to tell; draws its picture, too."""
    # Altair takes a second to import: `rsr --help` should not wait for it.
    from rsr.jobs.demo.picture import draw

    rows = pl.read_parquet(options.scored / options.trajectories.name)
    scored = rows.drop_nulls("rsr").sort("rsr", "id")
    draw(scored, options.picture)
    return DemoReport(
        picture=options.picture,
        teachers=rank_teachers(scored),
        best=_trajectory(scored.row(0, named=True)),
        worst=_trajectory(scored.row(-1, named=True)),
    )


def rank_teachers(scored: pl.DataFrame) -> list[TeacherScore]:
    """Teachers by data-set RSR, lowest first; `scored` holds only rows that have a score."""
    groups = scored.group_by("teacher").agg(
        *dataset_sums(),
        mean_num_tokens=pl.col("rsr_num_tokens").mean(),
        share_correct=pl.col("correct").mean(),
    )
    teachers = [
        TeacherScore(
            teacher=row["teacher"],
            num_trajectories=row["num_trajectories"],
            rsr=dataset_of(row).rsr,
            mean_rank=row["mean_rank_sum"] / row["num_trajectories"],
            mean_surprisal_nats=row["mean_surprisal_sum_nats"] / row["num_trajectories"],
            mean_num_tokens=row["mean_num_tokens"],
            share_correct=row["share_correct"],
        )
        for row in groups.iter_rows(named=True)
    ]
    return sorted(teachers, key=lambda t: (t.rsr, t.teacher))


def demo_report_json(options: DemoOptions, report: DemoReport) -> dict[str, Any]:
    """What `rsr demo --json` adds to the object of `rsr score --json`."""
    return {
        "note": NOTE,
        "trajectories": str(options.trajectories),
        "picture": str(report.picture),
        "teachers": [asdict(teacher) for teacher in report.teachers],
        "best": asdict(report.best),
        "worst": asdict(report.worst),
    }


def print_demo_report(report: DemoReport, console: Console) -> None:
    """Teachers, the best and the worst trajectory, and how to read them."""
    console.print()
    console.say(styled(("Teachers by data-set RSR", "bold"), " (Eq. 9; lower is better)"))
    console.print(_teacher_table(report.teachers))
    console.print(_excerpt("lowest RSR", report.best, "blue"))
    console.print(_excerpt("highest RSR", report.worst, "dark_orange"))
    console.say(f"picture: {report.picture}")
    console.print(styled((NOTE, "yellow")))


def _write_trajectories(options: DemoOptions) -> None:
    frame = demo_trajectories(options.seed, options.num_problems)
    origin = json.dumps({"seed": options.seed, "num_problems": options.num_problems})
    try:
        with atomic_path(options.trajectories) as temporary:
            frame.write_parquet(temporary, metadata={METADATA_KEY: origin})
    except OSError as error:
        raise UsageError(f"{options.trajectories} cannot be written: {error}") from error


def _require_replaceable(path: Path) -> None:
    if not path.exists():
        return
    try:
        ours = METADATA_KEY in pl.read_parquet_metadata(path)
    except (pl.exceptions.PolarsError, OSError):
        ours = False
    if not ours:
        raise UsageError(f"{path} exists and was not written by rsr demo; choose another --output")


def _trajectory(row: dict[str, Any]) -> ScoredTrajectory:
    return ScoredTrajectory(
        id=row["id"],
        rsr=row["rsr"],
        mean_rank=row["rsr_mean_rank"],
        mean_surprisal_nats=row["rsr_mean_surprisal"],
        correct=row["correct"],
        response=row["messages"][-1]["content"],
    )


def _teacher_table(teachers: list[TeacherScore]) -> Table:
    table = Table()
    table.add_column("teacher", style="bold")
    for name in ("RSR", "mean rank", "mean surprisal (nats)", "tokens each", "correct"):
        table.add_column(name, justify="right")
    for teacher in teachers:
        table.add_row(
            teacher.teacher,
            f"{teacher.rsr:.2f}",
            f"{teacher.mean_rank:.2f}",
            f"{teacher.mean_surprisal_nats:.2f}",
            f"{teacher.mean_num_tokens:.0f}",
            f"{teacher.share_correct:.0%}",
        )
    return table


def _excerpt(label: str, trajectory: ScoredTrajectory, colour: str) -> Panel:
    lines = trajectory.response.split("\n")
    if len(lines) > EXCERPT_LINES:
        lines = [*lines[: EXCERPT_LINES - 1], "…", lines[-1]]
    text = styled("\n".join(lines), multiline=True)
    text.no_wrap, text.overflow = True, "ellipsis"
    numbers = (
        f"RSR {trajectory.rsr:.2f} = rank {trajectory.mean_rank:.2f} "
        f"/ surprisal {trajectory.mean_surprisal_nats:.2f} nats"
    )
    title = styled(f"{label}: {trajectory.id}")
    return Panel(text, title=title, subtitle=numbers, border_style=colour)
