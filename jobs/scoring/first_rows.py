"""What becomes of a run's first rows: they are encoded before a model is loaded.

A corpus that this student cannot read as it stands shows there, before the night is spent. Knows
encoders by what they return; knows nothing of Ray.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pyarrow as pa

from rsr.jobs.errors import UsageError
from rsr.jobs.shards.columns import TrajectoryColumns
from rsr.jobs.shards.reader import read_trajectories
from rsr.jobs.shards.score_columns import Summary, told_reasons
from rsr.jobs.shards.shard import Shard, Unit

if TYPE_CHECKING:
    from rsr.engine.chat import TrajectoryEncoder

NUM_ROWS = 200
MAX_BYTES = 16 << 20
"""Of trajectory text that is encoded, whatever the number of rows: about half a second's work."""
MAX_SHARDS = 16
"""That are tried, should there be none or only damaged rows in the first of them."""
NOT_REFUSING = 1.0


@dataclass(slots=True)
class FirstRows:
    """Rows that were encoded. summary: their number and why some are refused.

    notes: what was changed before they were rendered, by the number of rows.
    """

    summary: Summary = field(default_factory=Summary)
    notes: Counter[str] = field(default_factory=Counter)

    @property
    def num_refused(self) -> int:
        return sum(reason.num_rows for reason in self.summary.reasons.values())

    def told(self) -> str:
        """One line on what was done to them, for a user; "" if there are none."""
        done = [f"{count:,} {note}" for note, count in self.notes.most_common()]
        if refused := self.num_refused:
            done.append(f"{refused:,} without a score")
        what = "; ".join(done) or "rendered as they stand"
        return f"{_rows(self.summary.num_rows)} looked at: {what}" if self.summary.num_rows else ""

    def require_scored(self, max_refused: float) -> None:
        """Raises `UsageError`, with the reasons, if a larger share is refused than may be."""
        num_rows, refused = self.summary.num_rows, self.num_refused
        if num_rows and refused / num_rows > max_refused:
            raise UsageError(
                f"{refused:,} of the first {_rows(num_rows)} would have no score, more than "
                f"--max-refused {max_refused:g} allows; with --max-refused {NOT_REFUSING:g} the "
                "others are scored all the same",
                more=told_reasons(self.summary.reasons),
            )


def first_units(shards: Sequence[Shard]) -> list[Unit]:
    """Where to look for the first rows: more than enough, for some may not be readable."""
    units = []
    for shard in [shard for shard in shards if shard.num_rows][:MAX_SHARDS]:
        fitting = MAX_BYTES * shard.num_rows // max(1, shard.num_bytes)
        units.append(Unit(shard, 0, min(shard.num_rows, NUM_ROWS, max(1, fitting))))
    return units


def look_at_rows(
    encoder: "TrajectoryEncoder", units: Sequence[Unit], columns: TrajectoryColumns
) -> FirstRows:
    """What becomes of the first `NUM_ROWS` rows of `units` that can be read."""
    looked = FirstRows()
    for unit in units:
        try:
            rows = read_trajectories(unit, columns)
        except (OSError, UsageError, pa.ArrowException):
            # The run will say so, of that shard alone.
            continue
        encoded = [encoder.encode(row) for row in rows[: NUM_ROWS - looked.summary.num_rows]]
        looked.summary.num_rows += len(encoded)
        looked.summary.count_reasons(encoded, unit.shard.name, unit.start)
        looked.notes.update(note for row in encoded for note in row.notes)
        if looked.summary.num_rows >= NUM_ROWS:
            break
    return looked


def _rows(number: int) -> str:
    return f"{number:,} row{'s' * (number != 1)}"
