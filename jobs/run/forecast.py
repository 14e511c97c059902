"""How far a run is between two finished units, and how long it will take: what a bar moves by."""

from dataclasses import dataclass, field

MOST_AHEAD = 0.9
"""Of the rows in hand: never say that a unit is done which may still take long."""


@dataclass(slots=True)
class Forecast:
    """A run's rows by now, if units go on at the rate so far.

    num_rows: of the whole run. started_s, and every `now_s`: of one clock. num_rows_before: that
    were done when it started.
    """

    num_rows: int
    started_s: float
    num_rows_before: int = 0

    rows_per_s: float = field(default=0.0, init=False)
    _num_rows_done: int = field(init=False)
    _num_rows_in_hand: float = field(default=0.0, init=False)
    _observed_s: float = field(init=False)
    _shown: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._num_rows_done = self.num_rows_before
        self._observed_s = self.started_s

    def observe(self, num_rows_done: int, num_rows_in_hand: float, now_s: float) -> None:
        """Note how many rows are done, and about how many the workers have in their engines."""
        self._num_rows_in_hand = num_rows_in_hand
        self._observed_s = now_s
        if num_rows_done > self._num_rows_done:
            self._num_rows_done = num_rows_done
            seconds = max(1e-9, now_s - self.started_s)
            self.rows_per_s = (num_rows_done - self.num_rows_before) / seconds

    def rows_at(self, now_s: float) -> float:
        """Rows done by now, those of units in hand among them; never fewer than was said before."""
        since = max(0.0, now_s - self._observed_s) * self.rows_per_s
        ahead = min(since, MOST_AHEAD * self._num_rows_in_hand)
        self._shown = max(self._shown, min(self._num_rows_done + ahead, self.num_rows))
        return self._shown

    def seconds_left(self, now_s: float) -> float | None:
        """Until the last row; None before the first. Climbs only when a unit took longer."""
        if not self.rows_per_s:
            return None
        return (self.num_rows - self.rows_at(now_s)) / self.rows_per_s
