"""What becomes of a run's first rows: they are encoded before a model is loaded.

A corpus that this student cannot read as it stands shows there, before the night is spent. Knows
students by what they encode; knows nothing of Ray.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pyarrow as pa

from rsr.jobs.errors import UsageError
from rsr.jobs.inspection.reading import Reading, told_rows
from rsr.jobs.shards.columns import TrajectoryColumns
from rsr.jobs.shards.reader import read_trajectories
from rsr.jobs.shards.score_columns import told_reasons
from rsr.jobs.shards.shard import Shard, Unit

if TYPE_CHECKING:
    from rsr.engine.student import Student

NUM_ROWS = 200
MAX_BYTES = 16 << 20
"""Bytes of trajectory text that are encoded, for any number of rows: half a second's work."""
MAX_SHARDS = 16
"""Shards that are tried if the first of them hold no rows or only damaged ones."""
NOT_REFUSING = 1.0


def first_units(shards: Sequence[Shard]) -> list[Unit]:
    """Where to look for the first rows: more than enough, for some may not be readable."""
    units = []
    for shard in [shard for shard in shards if shard.num_rows][:MAX_SHARDS]:
        fitting = MAX_BYTES * shard.num_rows // max(1, shard.num_bytes)
        units.append(Unit(shard, 0, min(shard.num_rows, NUM_ROWS, max(1, fitting))))
    return units


def look_at_rows(student: "Student", units: Sequence[Unit], columns: TrajectoryColumns) -> Reading:
    """What the student reads of the first `NUM_ROWS` rows of `units` that can be read."""
    encoder = student.encoder()
    reading = Reading(student.max_model_len)
    for unit in units:
        try:
            rows = read_trajectories(unit, columns)
        except (OSError, UsageError, pa.ArrowException):
            # The run will say so, of that shard alone.
            continue
        wanted = rows[: NUM_ROWS - reading.summary.num_rows]
        reading.add(encoder.encode_all(wanted), unit.shard.name, unit.start)
        if reading.summary.num_rows >= NUM_ROWS:
            break
    return reading


def told(reading: Reading) -> str:
    """One line on what was done to the rows, for a user; "" if there are none."""
    done = [f"{count:,} {note}" for note, count in reading.notes.most_common()]
    if refused := reading.num_refused:
        done.append(f"{refused:,} without a score")
    what = "; ".join(done) or "rendered as they stand"
    num_rows = reading.summary.num_rows
    return f"{told_rows(num_rows)} looked at: {what}" if num_rows else ""


def require_scored(reading: Reading, max_refused: float) -> None:
    """Raises `UsageError`, with the reasons, if a larger share is refused than may be."""
    num_rows, refused = reading.summary.num_rows, reading.num_refused
    if num_rows and refused / num_rows > max_refused:
        raise UsageError(
            f"{refused:,} of the first {told_rows(num_rows)} would have no score, more than "
            f"--max-refused {max_refused:g} allows; with --max-refused {NOT_REFUSING:g} the "
            "others are scored all the same",
            more=told_reasons(reading.summary.reasons),
        )
