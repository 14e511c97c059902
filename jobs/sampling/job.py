"""Sampling as a job of the cluster: problems in, candidates out. Does not know Ray."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from rsr.engine.config import ScorerConfig
from rsr.engine.facts import StudentFacts
from rsr.engine.messages import BadMessagesError
from rsr.engine.sampling import PromptRequest
from rsr.jobs.cluster.student import quick_imports
from rsr.jobs.sampling.blocks import Block
from rsr.jobs.sampling.columns import ProblemSamples, seed_of, summary_of, to_frame
from rsr.jobs.sampling.commit import commit_sampled_shard
from rsr.jobs.sampling.generating import Engine, GeneratingJob
from rsr.jobs.sampling.prompts import PromptSource, prompt_hash
from rsr.jobs.shards.reader import ShardReader, decoded
from rsr.jobs.shards.score_columns import Summary
from rsr.jobs.shards.shard import Shard, Unit
from rsr.jobs.storage.hub import stay_offline_without_hub

logger = logging.getLogger(__name__)

Row = dict[str, Any]
ENGINE_ERROR = "engine_error"
"""Why a problem has no answers whose unit, of it alone, took its workers with it."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A row as the engine takes it. token_ids: of its prompt, empty if it makes none."""

    token_ids: list[int]
    samples: ProblemSamples


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingJob(GeneratingJob):
    """The `UnitJob` of `rsr sample`; its model is the student."""

    prompts: PromptSource

    def open(self, max_num_batched_tokens: int | None) -> "SamplingWork":
        return SamplingWork(self, self.engine(max_num_batched_tokens))


class SamplingWork:
    """The `OpenJob` of `rsr sample`: a loaded student."""

    def __init__(self, job: SamplingJob, engine: Engine) -> None:
        self._job, self._engine = job, engine
        self._reader: ShardReader | None = None

    @property
    def max_num_batched_tokens(self) -> int | None:
        return self._engine.max_num_batched_tokens

    @property
    def notice(self) -> str | None:
        return None

    def find(self, unit: Unit) -> Summary | None:
        return self._job.store.unit_summary(unit)

    def read(self, unit: Unit) -> list[Problem]:
        """Read and encode the unit, while the engine answers another."""
        if self._reader is None or self._reader.path != unit.shard.path:
            self._reader = problem_reader(unit.shard, self._job.prompts)
        rows = read_problems(self._reader, unit)
        return [self._encoded(row) for row in rows]

    def run(self, unit: Unit, rows: list[Problem]) -> list[ProblemSamples]:
        block = Block.parse(unit.shard.name)
        samples = [problem.samples for problem in rows]
        places = [place for place, problem in enumerate(rows) if problem.token_ids]
        requests = [
            PromptRequest(
                rows[place].token_ids,
                seed_of(self._job.seed, block.stem, unit.start + place) + block.first,
                block.num_samples,
            )
            for place in places
        ]
        for place, answers in zip(places, self._engine.sample(requests), strict=True):
            assert len(answers) == block.num_samples, "the engine lost an answer"
            samples[place] = replace(samples[place], answers=tuple(answers))
        return samples

    def keep(self, unit: Unit, results: list[ProblemSamples]) -> Summary:
        summary = summary_of(results, unit.shard, unit.start)
        self._job.store.commit_unit(unit, to_frame(results), summary)
        return summary

    def refuse(self, unit: Unit, reason: str) -> Summary:
        logger.info("%s row %d is refused: %s", unit.shard.name, unit.start, reason)
        return self.keep(unit, [ProblemSamples(reason=ENGINE_ERROR, detail=reason)])

    def commit(self, shard: Shard) -> Summary:
        return commit_sampled_shard(self._job.store, shard, self._job.seed, self._job.told_model)

    def _encoded(self, row: Row) -> Problem:
        try:
            prompt = self._job.prompts.messages(row)
            token_ids = self._engine.encode(prompt)
        except BadMessagesError as error:
            return Problem(
                [], ProblemSamples(reason=error.reason, detail=error.detail, hint=error.hint)
            )
        return Problem(token_ids, ProblemSamples(prompt, prompt_hash(prompt)))


def problem_reader(shard: Shard, prompts: PromptSource) -> ShardReader:
    """A reader of the columns that prompts are made of."""
    return ShardReader(shard.path, prompts.columns_needed() or None)


def read_problems(reader: ShardReader, unit: Unit) -> list[Row]:
    """The unit's rows, each a value by column; None for one that cannot be decoded."""
    rows: list[Row] = []
    for batch in reader.rows(unit.start, unit.stop):
        columns = {
            field.name: decoded(column, field)
            for field, column in zip(batch.schema, batch.columns, strict=True)
        }
        rows += [{name: c[place] for name, c in columns.items()} for place in range(len(batch))]
    return rows


NUM_FIRST_ROWS, MAX_FIRST_FILES = 200, 16
"""Where the first prompt is looked for: a run none of whose first problems makes one is refused."""


def first_units(files: Sequence[Shard]) -> list[Unit]:
    """The first rows of the first files that have any."""
    units = [Unit(file, 0, min(file.num_rows, NUM_FIRST_ROWS)) for file in files if file.num_rows]
    return units[:MAX_FIRST_FILES]


@dataclass(frozen=True, slots=True)
class FirstPrompts:
    """What becomes of a run's first problems. text: the first prompt, None if none makes one.

    refusals: of all of them, if so, the first one's reason; "" otherwise.
    """

    text: str | None = None
    refusal: str = ""


def look_at_student(
    config: ScorerConfig, prompts: PromptSource, units: Sequence[Unit]
) -> tuple[StudentFacts, FirstPrompts]:
    """What `config` makes of the model, and what of the first problems, those of `units`.

    Raises ValueError for a model that cannot be used.
    """
    rows = (
        row for unit in units for row in read_problems(problem_reader(unit.shard, prompts), unit)
    )
    return look_at_prompts(config, (partial(prompts.messages, row) for row in rows))


def look_at_prompts(
    config: ScorerConfig, prompts: Iterable[Callable[[], list[dict[str, str]]]]
) -> tuple[StudentFacts, FirstPrompts]:
    """What `config` makes of the model and of the first of `prompts` that it can read.

    prompts: each gives its messages, or raises `BadMessagesError`. Raises ValueError for a model
    that cannot be used.
    """
    stay_offline_without_hub(config.model)
    with quick_imports():
        from rsr.engine.prompts import PromptEncoder
        from rsr.engine.student import open_student

        student = open_student(config)
        encoder = PromptEncoder(student)
    refusal = ""
    for prompt in prompts:
        try:
            messages = prompt()
            encoder.encode(messages)
            return student.facts, FirstPrompts(encoder.render(messages))
        except BadMessagesError as error:
            refusal = refusal or error.detail + (f"; {error.hint}" if error.hint else "")
    return student.facts, FirstPrompts(None, refusal)
