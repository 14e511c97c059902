"""What the oracle is asked about a unit's rows: the same of a server and of a model of our own."""

from collections.abc import Iterator
from dataclasses import dataclass

from rsr.jobs.grading.answers import text_of
from rsr.jobs.refinement.commit import RefinedColumns
from rsr.jobs.refinement.outcome import Outcome
from rsr.jobs.refinement.prompts import Prompt
from rsr.jobs.refinement.rows import refinable
from rsr.jobs.shards.reader import ShardReader, TrajectoryReader
from rsr.jobs.shards.shard import Unit


@dataclass(frozen=True, slots=True)
class Question:
    """The message to the oracle about one row, and the trace that the row has."""

    prompt: str
    native: str

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.prompt}]


@dataclass(frozen=True, slots=True)
class Questions:
    """How rows become questions. columns: that are read. prompt: of the mode."""

    columns: RefinedColumns
    prompt: Prompt

    def reader(self) -> TrajectoryReader:
        """What `of` reads rows with; one reader goes on where it stopped."""
        return TrajectoryReader(self.columns.trajectory)

    def of(self, unit: Unit, reader: TrajectoryReader) -> Iterator[Question | Outcome]:
        """The question about each row in order, or why there is none."""
        answers = _gold_answers(self.columns.answer, unit)
        for trajectory, answer in zip(reader.read(unit), answers, strict=True):
            found = refinable(trajectory)
            if isinstance(found, Outcome):
                yield found
            else:
                prompt = self.prompt.render(found.problem, found.trace, answer)
                yield Question(prompt, found.trace)


def _gold_answers(column: str | None, unit: Unit) -> list[str]:
    if column is None:
        return [""] * unit.num_rows
    answers: list[str] = []
    for batch in ShardReader(unit.shard.path, [column]).rows(unit.start, unit.stop):
        answers += [text_of(value) for value in batch.column(0).to_pylist()]
    return answers
