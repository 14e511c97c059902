"""What the commands do, as functions: `rsr.jobs.score`, `filter`, `select`, `teachers`.

They take what the options of the same names take, return what the commands print, and print
nothing. What a user can get wrong raises `UsageError`, in the words of the command line; Ctrl-C
raises `KeyboardInterrupt` after what is finished has been kept. Knows options and results alone.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

import polars as pl

from rsr.engine.catalogue import RSR
from rsr.engine.config import ScorerConfig
from rsr.engine.metrics import TrajectoryScore
from rsr.engine.model_folder import require_model_folder
from rsr.jobs.cluster.calls_at import calls_at
from rsr.jobs.errors import Interrupted, UsageError, refusing_values
from rsr.jobs.evidence.drawing import MAX_ROWS
from rsr.jobs.evidence.observations import ObservationColumns, observe
from rsr.jobs.evidence.teachers import CompareOptions, Comparison, compare_teachers
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.run.progress import Progress
from rsr.jobs.scoring.score import ScoreOptions, ScoreResult, run_score
from rsr.jobs.selection.anywhere import filter_anywhere, select_anywhere
from rsr.jobs.selection.candidates import Conditions
from rsr.jobs.selection.filter import FilterOptions
from rsr.jobs.selection.result import SelectionResult
from rsr.jobs.selection.select import Objective, Pick, SelectOptions
from rsr.jobs.shards import score_columns
from rsr.jobs.shards.columns import TrajectoryColumns
from rsr.jobs.shards.scored import RANK_CLIP_NAMES, USUAL_TEACHER
from rsr.jobs.storage import is_remote

Place = str | Path
"""A local path, or the URL of an object store."""

T = TypeVar("T")


def score(
    input: Place,
    output: Place,
    config: ScorerConfig | str,
    *,
    columns: TrajectoryColumns | None = None,
    limit: int | None = None,
    workers: int | None = None,
    address: str | None = None,
    unit_timeout_s: float | None = None,
    start_timeout_s: float | None = None,
    max_refused: float = 0.5,
    overwrite: bool = False,
    same_input: bool = False,
    overwrite_columns: bool = False,
    progress: bool = False,
    verbose: bool = False,
) -> ScoreResult:
    """Add score columns to the trajectories in `input`, writing them to the folder `output`.

    config: how to score, or the student's name or folder alone. The other arguments are those of
    `ScoreOptions`. progress: tell on stderr, or in a notebook's cell, how far the run is. verbose:
    show what vLLM and Ray say, too. The same call goes on where an earlier one stopped; what could
    not be scored is in the result's `failures`. Raises `UsageError` before a model is loaded.
    """
    chosen = ScorerConfig(model=config) if isinstance(config, str) else config
    with refusing_values():
        require_model_folder(chosen.model, with_weights=True)
    options = ScoreOptions(
        input=str(input),
        output=_place(output),
        scorer=chosen,
        columns=columns or TrajectoryColumns(),
        limit=limit,
        workers=workers,
        address=address,
        unit_timeout_s=unit_timeout_s,
        start_timeout_s=start_timeout_s,
        max_refused=max_refused,
        overwrite=overwrite,
        same_input=same_input,
        overwrite_columns=overwrite_columns,
        verbose=verbose,
    )
    shown = Progress() if progress else Progress.silent()
    return _until_interrupted(lambda stop: run_score(options, shown, stop))


def filter(
    input: Place,
    output: Place,
    *,
    max_rsr: float | None = None,
    keep_fraction: float | Fraction | None = None,
    keep_rows: int | None = None,
    token_budget: int | None = None,
    within: str | None = None,
    where: str | None = None,
    min_tokens: int | None = None,
    max_tokens: int | None = None,
    metric: str = RSR,
    quality_column: str | None = None,
    rank_clip: int | str | None = None,
    id_column: str | None = None,
    teacher_column: str | None = None,
    correct_column: str | None = None,
    allow_mixed_students: bool = False,
    rows_per_file: int | None = None,
    address: str | None = None,
    overwrite: bool = False,
) -> SelectionResult:
    """Write the rows of scored `input` with the lowest RSR to the folder `output`.

    The arguments are those of `FilterOptions` and `Conditions`. keep_fraction: a float is taken as
    the decimal fraction that it is printed as. rank_clip: 50, 100, 200, 500 or "none"; None is the
    run's own. address: of a Ray cluster that looks at shards and copies them, `local` for a Ray of
    its own; None is RAY_ADDRESS, or this process. Raises `UsageError`, also if nothing would be
    kept, and `ShardsFailed`.
    """
    options = FilterOptions(
        input=str(input),
        output=_place(output),
        conditions=Conditions(where=where, min_tokens=min_tokens, max_tokens=max_tokens),
        max_rsr=max_rsr,
        keep_fraction=None if keep_fraction is None else _share("keep_fraction", keep_fraction),
        keep_rows=keep_rows,
        token_budget=token_budget,
        within=within,
        metric=metric,
        quality_column=quality_column,
        rank_clip=_rank_clip(rank_clip),
        id_column=id_column,
        teacher_column=teacher_column,
        correct_column=correct_column,
        allow_mixed_students=allow_mixed_students,
        rows_per_file=rows_per_file,
        overwrite=overwrite,
    )

    def run(stop: StopRequest) -> SelectionResult:
        with calls_at(address, stop) as calls:
            return filter_anywhere(options, calls, stop)

    return _until_interrupted(run)


def select(
    input: Place,
    output: Place,
    *,
    group_by: str,
    keep: int | None = None,
    require: Sequence[str] = (),
    max_share_per: Mapping[str, float | Fraction] | None = None,
    objective: Objective | None = None,
    quality_weight: float | None = None,
    pick: Pick = "best",
    seed: int | None = None,
    where: str | None = None,
    min_tokens: int | None = None,
    max_tokens: int | None = None,
    metric: str = RSR,
    quality_column: str | None = None,
    rank_clip: int | str | None = None,
    id_column: str | None = None,
    teacher_column: str | None = None,
    correct_column: str | None = None,
    allow_mixed_students: bool = False,
    rows_per_file: int | None = None,
    address: str | None = None,
    overwrite: bool = False,
) -> SelectionResult:
    """Write the best trajectories of each problem of scored `input` to the folder `output`.

    The arguments are those of `SelectOptions` and `Conditions`. max_share_per: by column, the
    largest share of the selected rows that one of its values may have. rank_clip, address: as
    `filter` takes them. Raises `UsageError`, also if nothing would be selected, and `ShardsFailed`.
    """
    conditions = Conditions(
        where=where, min_tokens=min_tokens, max_tokens=max_tokens, required=tuple(require)
    )
    shares = (max_share_per or {}).items()
    options = SelectOptions(
        input=str(input),
        output=_place(output),
        conditions=conditions,
        group_by=group_by,
        keep=keep,
        max_shares=tuple((name, _share("max_share_per", share)) for name, share in shares),
        objective=objective,
        quality_weight=quality_weight,
        pick=pick,
        seed=seed,
        metric=metric,
        quality_column=quality_column,
        rank_clip=_rank_clip(rank_clip),
        id_column=id_column,
        teacher_column=teacher_column,
        correct_column=correct_column,
        allow_mixed_students=allow_mixed_students,
        rows_per_file=rows_per_file,
        overwrite=overwrite,
    )

    def run(stop: StopRequest) -> SelectionResult:
        with calls_at(address, stop) as calls:
            return select_anywhere(options, calls, stop)

    return _until_interrupted(run)


def teachers(
    scored: Place,
    *,
    teacher_column: str = USUAL_TEACHER,
    problem_column: str | None = "problem_id",
    metric: str = RSR,
    quality_column: str | None = None,
    rank_clip: int | str | None = None,
    sample: int | None = None,
    draws: int = 1_000,
    seed: int = 0,
    max_rows: int = MAX_ROWS,
    confounds: Sequence[str] = (),
    allow_mixed_students: bool = False,
    address: str | None = None,
) -> Comparison:
    """The teachers of `scored`, best first, with 95 % intervals and what RSR goes with.

    problem_column: None makes every row a problem of its own. sample: compare over this many shared
    problems. draws: of the bootstrap. max_rows: where there are more, compare over all rows of
    problems drawn at random, about so many. rank_clip, address: as `filter` takes them. Raises
    `UsageError`.
    """

    def run(stop: StopRequest) -> Comparison:
        with calls_at(address, stop) as calls:
            observations = observe(
                str(scored),
                ObservationColumns(teacher_column, problem_column, tuple(confounds)),
                rank_clip=_rank_clip(rank_clip),
                metric=metric,
                quality_column=quality_column,
                allow_mixed_students=allow_mixed_students,
                max_rows=max_rows,
                seed=seed,
                calls=calls,
            )
        return compare_teachers(observations, CompareOptions(draws, sample, seed))

    return _until_interrupted(run)


def to_polars(scores: Sequence[TrajectoryScore]) -> pl.DataFrame:
    """A row for each score of a `Scorer`, in order: the columns that `score` writes."""
    return score_columns.to_frame(
        scores,
        token_columns=any(s.tokens is not None for s in scores),
        metrics=any(s.metric_sums is not None for s in scores),
    )


def _until_interrupted(run: Callable[[StopRequest], T]) -> T:
    stop = StopRequest()
    try:
        with _listening(stop):
            return run(stop)
    except Interrupted:
        raise KeyboardInterrupt("what is finished is kept; the same call goes on") from None


@contextmanager
def _listening(stop: StopRequest) -> Iterator[None]:
    """Listen to signals where Python allows for it: in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with stop.listening():
        yield


def _place(place: Place) -> Place:
    return place if isinstance(place, Path) or is_remote(place) else Path(place)


def _share(name: str, share: float | Fraction) -> Fraction:
    """An exact fraction: 0.3 is three tenths, not the float next to it."""
    exact = Fraction(str(share)) if isinstance(share, float) else Fraction(share)
    if not 0 < exact <= 1:
        raise UsageError(f"{name}={share}: expected a fraction above 0 and up to 1")
    return exact


def _rank_clip(rank_clip: int | str | None) -> str | None:
    """The name of `STORED_RANK_CLIPS` that is meant; None is the run's own."""
    if rank_clip is None:
        return None
    if str(rank_clip) not in RANK_CLIP_NAMES:
        expected = ", ".join(RANK_CLIP_NAMES)
        raise UsageError(f"rank_clip={rank_clip!r}: expected one of {expected}")
    return RANK_CLIP_NAMES[str(rank_clip)]
