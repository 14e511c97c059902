"""How long a unit may be in the engine before its worker counts as hanging. Plain arithmetic."""

from rsr.jobs.shards.shard import Shard, Unit

FIRST_UNIT_SECONDS = 3600.0
"""Before any unit is finished nothing is known of this model on this machine."""
PATIENCE = 20.0
"""Times the mean seconds per byte of text: rows differ, and so do machines."""
MIN_SECONDS = 120.0
SHARD_BYTES_PER_SECOND = 1 << 20
"""Slower than any disk or object store on which writing a shard is still worth waiting for."""


class Deadlines:
    """Learns from finished units; `fixed_seconds` overrides what it learned."""

    def __init__(self, fixed_seconds: float | None = None) -> None:
        self._fixed_seconds = fixed_seconds
        self._bytes = self._seconds = 0.0

    def observe(self, unit: Unit, seconds: float) -> None:
        self._bytes += unit_bytes(unit)
        self._seconds += seconds

    def seconds(self, unit: Unit) -> float:
        """Seconds that the engine may spend on a unit."""
        if self._fixed_seconds is not None:
            return self._fixed_seconds
        if not self._bytes:
            return FIRST_UNIT_SECONDS
        return max(MIN_SECONDS, PATIENCE * unit_bytes(unit) * self._seconds / self._bytes)

    def write_seconds(self, shard: Shard) -> float:
        """The time to write a shard's output, or a part of it."""
        floor = self._fixed_seconds or MIN_SECONDS
        return max(floor, MIN_SECONDS + shard.num_bytes / SHARD_BYTES_PER_SECOND)


def unit_bytes(unit: Unit) -> float:
    """Its share of the shard's text; at least 1, since empty rows take time too."""
    return max(1.0, unit.num_rows * unit.shard.num_bytes / max(1, unit.shard.num_rows))
