"""Refining as a job of the cluster: rows in, outcomes out. Does not know Ray."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from rsr.engine.config import ScorerConfig
from rsr.engine.facts import StudentFacts
from rsr.engine.messages import BadMessagesError
from rsr.engine.sampling import PromptRequest, SampledText
from rsr.jobs.refinement.commit import commit_refined_shard
from rsr.jobs.refinement.outcome import Mode, Outcome, RefineStatus, summary_of, to_frame
from rsr.jobs.refinement.questions import Question, Questions
from rsr.jobs.refinement.replies import outcome_of_reply
from rsr.jobs.sampling.columns import seed_of
from rsr.jobs.sampling.generating import Engine, GeneratingJob
from rsr.jobs.sampling.job import FirstPrompts, look_at_prompts
from rsr.jobs.shards.score_columns import Summary
from rsr.jobs.shards.shard import Shard, Unit

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EncodedQuestion:
    """A question as the engine takes it. token_ids: of its prompt, not empty."""

    native: str
    token_ids: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class RefiningJob(GeneratingJob):
    """The `UnitJob` of `rsr refine --model`; its model is the oracle."""

    questions: Questions

    @property
    def mode(self) -> Mode:
        return self.questions.prompt.mode

    def open(self, max_num_batched_tokens: int | None) -> "RefiningWork":
        return RefiningWork(self, self.engine(max_num_batched_tokens))


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
        return commit_refined_shard(
            job.store, shard, job.questions.columns, job.mode, job.told_model
        )

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
