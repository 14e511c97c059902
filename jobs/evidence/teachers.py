"""Which teacher suits this student best, how sure that is, and how many samples would have told.

Data-set RSR (Eq. 9, arXiv 2601.14249v5), or another metric, of each teacher over the scored rows of
one student, with bootstrap intervals over problems. What a metric is, is `engine/catalogue.py`'s;
how to resample, `bootstrap.py`'s. Knows nothing of terminals: printing is `cli.py`'s.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import polars as pl

from rsr.engine.catalogue import BY_NAME, LENGTH, RSR, SURPRISAL, Metric
from rsr.engine.metrics import MIN_SURPRISAL_SUM_NATS
from rsr.jobs.errors import UsageError
from rsr.jobs.evidence.bootstrap import (
    agreement_by_sample_size,
    interval,
    ratios,
    resampled_ratios,
    share_lowest,
)
from rsr.jobs.evidence.confounds import Confound, measure_confounds, warn_of_confounds
from rsr.jobs.evidence.metric_table import MetricRow, told_agreement, with_agreement
from rsr.jobs.evidence.observations import Observations, datasets_by_teacher

AGREEMENT = 0.95
"""A sample size is enough if it finds the best teacher in at least this share of draws."""

MAX_SAMPLE_PROBLEMS = 2_000
"""Sample sizes beyond this are not tried: whoever needs more may as well score everything."""


@dataclass(frozen=True, slots=True)
class CompareOptions:
    """How teachers are compared.

    sample: compare over this many shared problems drawn at random; None takes all rows.
    """

    num_draws: int = 1_000
    sample: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class TeacherEvidence:
    """One teacher. Everything is None where it has no usable row.

    rsr: of its data set (Eq. 9). value: the same by the comparison's metric. low, high: 95 %
    percentile interval of that. probability_best: share of draws in which it is the best.
    mean_rank, mean_surprisal_nats: means over trajectories of their means over tokens.
    share_correct: None also where no row says.
    """

    teacher: str
    num_rows: int
    num_trajectories: int
    rsr: float | None = None
    value: float | None = None
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
    metric: what the teachers are ranked by, and direction which values of it are the better ones.
    metrics: the same teachers by it, RSR, length and surprisal.
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
    metric: str = RSR
    direction: str = "lower"
    metrics: list[MetricRow] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints of it."""
        without = replace(self, metrics=[])
        return asdict(without) | {
            "metrics": [row.to_json() for row in self.metrics],
            "metrics_agree": self.metrics_agree,
        }

    def to_polars(self) -> pl.DataFrame:
        """A row for each teacher, best first: `student`, and the fields of `TeacherEvidence`."""
        rows = [{"student": self.student} | asdict(teacher) for teacher in self.teachers]
        return pl.DataFrame(rows, infer_schema_length=None)

    @property
    def metrics_agree(self) -> str:
        """Whether all of `metrics` have one best teacher, in a sentence."""
        return told_agreement(self.metrics)

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
        metric=observations.metric.name,
        direction=observations.metric.direction,
        metrics=_by_metrics(observations),
    )


def _by_metrics(observations: Observations) -> list[MetricRow]:
    """The teachers by the chosen metric, then by those that always stand beside it."""
    rows = []
    counts = dict(observations.rows.group_by("teacher").len().iter_rows())
    for name in dict.fromkeys([observations.metric.name, RSR, LENGTH, SURPRISAL]):
        above, below = (part.sum(axis=0) for part in observations.problem_sums(name))
        values: dict[str, float | None] = dict.fromkeys(observations.teachers)
        for index, teacher in enumerate(observations.teachers):
            if teacher in counts:
                values[teacher] = _value(BY_NAME[name], above[index], below[index])
        num_rows = {teacher: counts.get(teacher, 0) for teacher in observations.teachers}
        rows.append(MetricRow(BY_NAME[name], values, num_rows))
    return with_agreement(rows)


def _value(metric: Metric, signed: float, denominator: float) -> float:
    """The value of a data set from its sums, whose sign was turned for lower to be better."""
    ratio = metric.sign * signed / max(denominator, MIN_SURPRISAL_SUM_NATS)
    return float(metric.finish(ratio))


def _rank(observations: Observations, options: CompareOptions) -> list[TeacherEvidence]:
    metric = observations.metric
    above, below = observations.problem_sums(metric.name)
    draws = resampled_ratios(above, below, num_draws=options.num_draws, seed=options.seed)
    best = share_lowest(draws)
    rsrs = datasets_by_teacher(observations.rows)
    means = _means(observations)
    teachers = []
    for index, name in enumerate(observations.teachers):
        num_rows = observations.num_rows_by_teacher[name]
        if name not in means:
            teachers.append(TeacherEvidence(name, num_rows, num_trajectories=0))
            continue
        value = _value(metric, above[:, index].sum(), below[:, index].sum())
        bounds = [metric.finish(metric.sign * end) for end in interval(draws[:, index]) or ()]
        low, high = sorted(bounds) if bounds else (None, None)
        count = means[name].pop("count")
        evidence = TeacherEvidence(
            teacher=name,
            num_rows=num_rows,
            num_trajectories=count,
            rsr=value if metric.name == RSR else rsrs[name].rsr,
            value=value,
            low=low,
            high=high,
            probability_best=float(best[index]),
            **means[name],
        )
        teachers.append(evidence)
    return sorted(
        teachers, key=lambda t: (t.value is None, t.value and metric.sign * t.value, t.teacher)
    )


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
        more = "; --max-rows looks at more rows" if observations.is_drawn else ""
        raise UsageError(
            f"--sample {size}: only {len(shared)} problems have a scored row of every teacher{more}"
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
    above, below = observations.problem_sums(observations.metric.name)
    present = ~np.isnan(ratios(above, below)).all(axis=0)
    if not max_problems or present.sum() < 2:
        return None
    of_all = ratios(above.sum(axis=0), below.sum(axis=0))[present]
    of_shared = np.isin(np.unique(observations.rows["problem"].to_numpy()), shared)
    agreement = agreement_by_sample_size(
        above[of_shared][:, present],
        below[of_shared][:, present],
        best=int(np.argmin(of_all)),
        num_draws=options.num_draws,
        max_problems=max_problems,
        seed=options.seed,
    )
    too_few = np.flatnonzero(agreement < AGREEMENT)
    if not len(too_few):
        return 1
    return int(too_few[-1]) + 2 if too_few[-1] + 1 < max_problems else None
