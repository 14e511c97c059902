"""Which teacher suits this student best, how sure that is, and how many samples would have told.

Data-set RSR (Eq. 9, arXiv 2601.14249v5) of each teacher over the scored rows of one student, with
bootstrap intervals over problems. What a ratio is, is `engine/metrics.py`'s; how to resample,
`bootstrap.py`'s. Knows nothing of terminals: printing is `cli.py`'s.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import polars as pl

from rsr.engine.metrics import DatasetRsr
from rsr.jobs.errors import UsageError
from rsr.jobs.evidence.bootstrap import (
    agreement_by_sample_size,
    interval,
    ratios,
    resampled_ratios,
    share_lowest,
)
from rsr.jobs.evidence.confounds import Confound, measure_confounds, warn_of_confounds
from rsr.jobs.evidence.observations import Observations

AGREEMENT = 0.95
"""A sample size is enough if it finds the best teacher in at least this share of draws."""

MAX_SAMPLE_PROBLEMS = 2_000
"""Sample sizes beyond this are not tried: whoever needs more may as well score everything."""


@dataclass(frozen=True, slots=True)
class CompareOptions:
    """sample: compare over this many shared problems drawn at random; None takes all rows."""

    num_draws: int = 1_000
    sample: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class TeacherEvidence:
    """One teacher; lower RSR is better. Everything is None where it has no usable row.

    rsr: of its data set (Eq. 9). low, high: 95 % percentile interval. probability_best: share of
    draws in which its RSR is the lowest. mean_rank, mean_surprisal_nats: means over trajectories
    of their means over tokens. share_correct: None also where no row says.
    """

    teacher: str
    num_rows: int
    num_trajectories: int
    rsr: float | None = None
    low: float | None = None
    high: float | None = None
    probability_best: float | None = None
    mean_rank: float | None = None
    mean_surprisal_nats: float | None = None
    mean_num_tokens: float | None = None
    share_correct: float | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """The teachers of one student, best first.

    num_shared_problems: problems of which every teacher with a usable row has one. samples_needed:
    the fewest shared problems from which on a sample finds the same best teacher in AGREEMENT of
    draws; None where the data cannot tell. rank_clip: as it was asked for; None for the run's own.
    """

    student: str
    path: str
    rank_clip: str | None
    teachers: list[TeacherEvidence]
    num_problems: int
    num_shared_problems: int
    sample: int | None
    samples_needed: int | None
    confounds: list[Confound]
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def best(self) -> TeacherEvidence:
        return self.teachers[0]


def compare_teachers(observations: Observations, options: CompareOptions) -> Comparison:
    """Rank the teachers of one student.

    Raises `UsageError` where `options.sample` asks for more shared problems than there are.
    """
    shared = _shared_problems(observations)
    needed = _samples_needed(observations, shared, options)
    if options.sample is not None:
        observations = _sampled(observations, shared, options.sample, options.seed)
    teachers = _rank(observations, options)
    confounds = measure_confounds(observations)
    return Comparison(
        student=observations.student,
        path=observations.table.path,
        rank_clip=observations.table.rank_clip,
        teachers=teachers,
        num_problems=observations.num_problems,
        num_shared_problems=len(shared),
        sample=options.sample,
        samples_needed=needed,
        confounds=confounds,
        warnings=warn_of_confounds(observations, confounds),
        notes=observations.notes,
    )


def _rank(observations: Observations, options: CompareOptions) -> list[TeacherEvidence]:
    ranks, surprisals = observations.problem_sums()
    draws = resampled_ratios(ranks, surprisals, num_draws=options.num_draws, seed=options.seed)
    best = share_lowest(draws)
    means = _means(observations)
    teachers = []
    for index, name in enumerate(observations.teachers):
        num_rows = observations.num_rows_by_teacher[name]
        if name not in means:
            teachers.append(TeacherEvidence(name, num_rows, num_trajectories=0))
            continue
        bounds = interval(draws[:, index])
        count = means[name].pop("count")
        evidence = TeacherEvidence(
            teacher=name,
            num_rows=num_rows,
            num_trajectories=count,
            rsr=DatasetRsr(count, ranks[:, index].sum(), surprisals[:, index].sum()).rsr,
            low=bounds[0] if bounds else None,
            high=bounds[1] if bounds else None,
            probability_best=float(best[index]),
            **means[name],
        )
        teachers.append(evidence)
    return sorted(teachers, key=lambda t: (t.rsr is None, t.rsr, t.teacher))


def _means(observations: Observations) -> dict[str, dict[str, Any]]:
    """Plain means of each teacher that has a usable row."""
    has_correct = "correct" in observations.rows.columns
    correct = pl.col("correct") if has_correct else pl.lit(None, pl.Float64)
    groups = observations.rows.group_by("teacher").agg(
        count=pl.len(),
        mean_rank=pl.col("mean_rank").mean(),
        mean_surprisal_nats=pl.col("mean_surprisal_nats").mean(),
        mean_num_tokens=pl.col("num_tokens").mean(),
        share_correct=correct.fill_nan(None).mean(),
    )
    return {row.pop("teacher"): row for row in groups.iter_rows(named=True)}


def _shared_problems(observations: Observations) -> np.ndarray:
    """Problems of which every teacher with a usable row has one, in order."""
    teachers = observations.rows["teacher"].n_unique()
    by_problem = observations.rows.group_by("problem").agg(pl.col("teacher").n_unique())
    shared = by_problem.filter(pl.col("teacher") == teachers)["problem"]
    return shared.sort().to_numpy()


def _sampled(observations: Observations, shared: np.ndarray, size: int, seed: int) -> Observations:
    if size > len(shared):
        raise UsageError(
            f"--sample {size}: only {len(shared)} problems have a scored row of every teacher"
        )
    drawn = np.random.default_rng(seed).choice(shared, size, replace=False)
    rows = observations.rows.filter(pl.col("problem").is_in(pl.Series(drawn).implode()))
    return replace(observations, rows=rows)


def _samples_needed(
    observations: Observations, shared: np.ndarray, options: CompareOptions
) -> int | None:
    """Fewest shared problems from which on samples agree with all rows on the best teacher.

    A sample of most of the problems agrees because it is most of the problems: the answer is None
    beyond half of them, and where no size up to MAX_SAMPLE_PROBLEMS is enough.
    """
    max_problems = min(len(shared) // 2, MAX_SAMPLE_PROBLEMS)
    ranks, surprisals = observations.problem_sums()
    present = ranks.any(axis=0)
    if not max_problems or present.sum() < 2:
        return None
    of_all = ratios(ranks.sum(axis=0), surprisals.sum(axis=0))[present]
    of_shared = np.isin(np.unique(observations.rows["problem"].to_numpy()), shared)
    agreement = agreement_by_sample_size(
        ranks[of_shared][:, present],
        surprisals[of_shared][:, present],
        best=int(np.argmin(of_all)),
        num_draws=options.num_draws,
        max_problems=max_problems,
        seed=options.seed,
    )
    too_few = np.flatnonzero(agreement < AGREEMENT)
    if not len(too_few):
        return 1
    return int(too_few[-1]) + 2 if too_few[-1] + 1 < max_problems else None
