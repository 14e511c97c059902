"""INPUT through the student's tokenizer and chat template: no weights, no GPU, nothing written."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rsr.engine.config import ScorerConfig
from rsr.engine.trajectory import InspectedTrajectory
from rsr.jobs.errors import UsageError, refusing_values
from rsr.jobs.inspection.reading import Reading
from rsr.jobs.inspection.rows import InputRow, InputRows
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.run.preflight import refusing_what_cannot_be_reached
from rsr.jobs.shards.columns import TrajectoryColumns
from rsr.jobs.storage.hub import stay_offline_without_hub

if TYPE_CHECKING:
    from rsr.engine.student import Student


@dataclass(frozen=True, slots=True)
class InspectOptions:
    """What `rsr inspect` is asked to do.

    limit: rows that are counted, from INPUT's first. num_shown: of these, rows to show. row: the
    number of one row to show instead.
    """

    input: str
    scorer: ScorerConfig
    columns: TrajectoryColumns
    limit: int
    num_shown: int
    row: int | None = None


@dataclass(frozen=True, slots=True)
class InspectedRow:
    """A row of INPUT, and what the student reads of it."""

    source: InputRow
    seen: InspectedTrajectory

    def parts(self) -> Iterator[tuple[str, bool]]:
        """The text in order, cut where scoring begins and ends; whether each part is scored.

        Where nothing is rendered, the row as INPUT has it, as JSON.
        """
        last = 0
        if not self.seen.text:
            given = {name: value for name, value in asdict(self.source.trajectory).items() if value}
            yield json.dumps(given, ensure_ascii=False, default=str), False
        for start, end in self.seen.scored:
            yield self.seen.text[last:start], False
            yield self.seen.text[start:end], True
            last = end
        yield self.seen.text[last:], False

    def to_json(self) -> dict[str, Any]:
        """An object of `rows` of `rsr inspect --json`; `scored` counts characters of `text`."""
        encoded = self.seen.encoded
        return {
            "row": self.source.number,
            "status": encoded.status.value,
            "detail": encoded.detail or None,
            "text": self.seen.text,
            "scored": [list(span) for span in self.seen.scored],
            "num_tokens": encoded.num_tokens,
            "num_scored": encoded.num_scored,
        }


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `rsr inspect` found.

    rows: to show. reading: of the first rows of INPUT together.
    """

    rows: list[InspectedRow]
    reading: Reading

    def to_json(self) -> dict[str, Any]:
        """The object that `rsr inspect --json` prints."""
        return {
            "rows": [row.to_json() for row in self.rows],
            "summary": self.reading.to_json(),
        }


def inspect_input(options: InspectOptions, stop: StopRequest) -> Inspection:
    """Look at INPUT as `rsr score` would read it.

    Raises `UsageError` where that would refuse INPUT or the student, and if INPUT has no rows or no
    such row; `Interrupted` when `stop` says so.
    """
    num_rows = max(options.limit, 0 if options.row is None else options.row + 1)
    with (
        refusing_what_cannot_be_reached(),
        InputRows(options.input, options.columns, num_rows) as rows,
    ):
        student = student_to_read_with(options.scorer)
        with refusing_values():
            encoder = student.encoder()
        reading = Reading(student.max_model_len)
        wanted: list[InputRow] = []
        for piece in rows.pieces(0, options.limit):
            stop.check()
            with refusing_values():
                encoded = encoder.encode_all([row.trajectory for row in piece])
            reading.add(encoded, piece[0].shard, piece[0].row)
            wanted += piece[: max(0, options.num_shown - len(wanted))]
        if not reading.summary.num_rows:
            raise UsageError(f"{options.input} has no rows to inspect")
        if options.row is not None:
            wanted = [row for piece in rows.pieces(options.row, options.row + 1) for row in piece]
            if not wanted:
                raise UsageError(f"{options.input} has no row {options.row:,}; they count from 0")
        shown = [InspectedRow(row, encoder.inspect(row.trajectory)) for row in wanted]
    return Inspection(shown, reading)


def student_to_read_with(scorer: ScorerConfig) -> "Student":
    """The student without its weights, which may be missing; raises `UsageError` if it is no use.

    Asks a hub that does not answer once, and no more.
    """
    stay_offline_without_hub(scorer.model)
    # transformers takes seconds to import, and looks for the hub's settings when it is.
    from rsr.engine.student import open_student

    with refusing_values():
        return open_student(scorer, with_weights=False)
