"""Refining as a job of the cluster: rows in, outcomes out. Does not know Ray."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rsr.engine.config import ScorerConfig
from rsr.engine.facts import StudentFacts
from rsr.engine.messages import BadMessagesError
from rsr.engine.sampling import PromptRequest, SampledText, Sampling
from rsr.jobs.cluster.student import cause_of_engine_error
from rsr.jobs.refinement.commit import commit_refined_shard
from rsr.jobs.refinement.outcome import Mode, Outcome, RefineStatus, summary_of, to_frame
from rsr.jobs.refinement.questions import Question, Questions
from rsr.jobs.refinement.replies import outcome_of_reply
from rsr.jobs.run.events import Cause
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.store import RunStore
from rsr.jobs.sampling.columns import seed_of
from rsr.jobs.sampling.job import Engine, FirstPrompts, look_at_prompts, open_generator
from rsr.jobs.shards.score_columns import Summary
from rsr.jobs.shards.shard import Shard, Unit

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EncodedQuestion:
    """A question as the engine takes it. token_ids: of its prompt, not empty."""

    native: str
    token_ids: list[int]


@dataclass(frozen=True, slots=True)
class RefiningJob:
    """The `UnitJob` of `rsr refine --model`.

    seed: of the run. store: what is kept, and for which settings. must_see: local paths that every
    machine must have. open_engine: loads the oracle.
    """

    oracle: ScorerConfig
    sampling: Sampling
    questions: Questions
    seed: int
    store: RunStore
    must_see: tuple[Path, ...] = ()
    open_engine: Callable[[ScorerConfig, Sampling], Engine] = open_generator

    @property
    def name(self) -> str:
        return self.oracle.model

    @property
    def mode(self) -> Mode:
        return self.questions.prompt.mode

    @property
    def folder(self) -> RunFolder:
        return self.store.folder

    @property
    def max_num_batched_tokens(self) -> int | None:
        return self.oracle.max_num_batched_tokens

    def open(self, max_num_batched_tokens: int | None) -> "RefiningWork":
        config = replace(self.oracle, max_num_batched_tokens=max_num_batched_tokens)
        return RefiningWork(self, self.open_engine(config, self.sampling))

    def cause_of(self, error: Exception) -> Cause:
        return cause_of_engine_error(error)


class RefiningWork:
    """The `OpenJob` of `rsr refine --model`: a loaded oracle."""

    def __init__(self, job: RefiningJob, engine: Engine) -> None:
        self._job, self._engine = job, engine
        self._reader = job.questions.reader()

    @property
    def max_num_batched_tokens(self) -> int | None:
        return self._engine.max_num_batched_tokens

    @property
    def notice(self) -> str | None:
        return None

    def find(self, unit: Unit) -> Summary | None:
        return self._job.store.unit_summary(unit)

    def read(self, unit: Unit) -> list[EncodedQuestion | Outcome]:
        """Read and encode the unit, while the engine answers another."""
        return [self._encoded(asked) for asked in self._job.questions.of(unit, self._reader)]

    def run(self, unit: Unit, rows: list[EncodedQuestion | Outcome]) -> list[Outcome]:
        stem = unit.shard.name.removesuffix(".parquet")
        requests = [
            PromptRequest(asked.token_ids, seed_of(self._job.seed, stem, row), num_samples=1)
            for row, asked in enumerate(rows, unit.start)
            if isinstance(asked, EncodedQuestion)
        ]
        replies = iter(self._engine.sample(requests))
        return [a if isinstance(a, Outcome) else _outcome(a, next(replies)) for a in rows]

    def keep(self, unit: Unit, results: list[Outcome]) -> Summary:
        frame = to_frame(results)
        summary = summary_of(frame)
        self._job.store.commit_unit(unit, frame, summary)
        return summary

    def refuse(self, unit: Unit, reason: str) -> Summary:
        logger.info("%s row %d is refused: %s", unit.shard.name, unit.start, reason)
        return self.keep(unit, [Outcome(RefineStatus.FAILED, detail=reason)])

    def commit(self, shard: Shard) -> Summary:
        job = self._job
        return commit_refined_shard(job.store, shard, job.questions.columns, job.mode, job.name)

    def _encoded(self, asked: Question | Outcome) -> EncodedQuestion | Outcome:
        if isinstance(asked, Outcome):
            return asked
        try:
            return EncodedQuestion(asked.native, self._engine.encode(asked.messages))
        except BadMessagesError as error:
            return Outcome(RefineStatus.REFUSED, detail=error.detail)


def _outcome(asked: EncodedQuestion, replies: list[SampledText]) -> Outcome:
    (reply,) = replies
    return outcome_of_reply(
        reply.text,
        asked.native,
        is_cut_off=reply.finish_reason == "length",
        prompt_tokens=len(asked.token_ids),
        completion_tokens=reply.num_tokens,
    )


def look_at_oracle(
    config: ScorerConfig, questions: Questions, units: Sequence[Unit]
) -> tuple[StudentFacts, FirstPrompts]:
    """What `config` makes of the model, and what of the first rows, those of `units`.

    Raises ValueError for a model that cannot be used.
    """
    return look_at_prompts(config, _prompts(questions, units))


def _prompts(
    questions: Questions, units: Sequence[Unit]
) -> Iterator[Callable[[], list[dict[str, str]]]]:
    reader = questions.reader()
    for unit in units:
        for asked in questions.of(unit, reader):
            yield partial(_messages, asked)


def _messages(asked: Question | Outcome) -> list[dict[str, str]]:
    if isinstance(asked, Outcome):
        raise BadMessagesError(asked.detail or asked.status.value)
    return asked.messages
