"""What a run looks like while it goes: a bar and a line per worker on a terminal, else plain lines.

Everything goes to stderr, so that stdout carries results alone. Knows counts and clocks only.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, SpinnerColumn, TextColumn
from rich.progress import Progress as RichProgress

from rsr.jobs.run.events import (
    BatchShrunk,
    Event,
    Next,
    NoWorkerReady,
    ShardFailed,
    Tally,
    UnitFailed,
    UnitFinished,
    WorkerLost,
    WorkerStarted,
)
from rsr.jobs.run.forecast import Forecast
from rsr.jobs.shards.score_columns import Summary
from rsr.jobs.terminal import Column, Console, format_seconds, quantity, styled

PLAIN_LINE_SECONDS = 30.0
BAR_WIDTH = 16
MAX_WORKERS_SHOWN = 16
MAX_TROUBLES_SHOWN = 50
"""More than this is for events.jsonl, not for a terminal."""
RATE_MEMORY = 0.8
"""Weight of a worker's rate so far against that of its latest unit."""


@dataclass(slots=True)
class _WorkerRate:
    node: str
    tokens_per_s: float | None = None
    num_units: int = 0
    last_s: float = 0.0

    def observe(self, event: UnitFinished, now: float) -> None:
        self.num_units += 1
        self.last_s = now
        if event.seconds > 0:
            rate = event.summary.num_tokens / event.seconds
            before = rate if self.tokens_per_s is None else self.tokens_per_s
            self.tokens_per_s = RATE_MEMORY * before + (1 - RATE_MEMORY) * rate


class Progress:
    """Counts rows and tokens as units finish; what is still to come is estimated from those.

    Counts are of finished units. Bar, percentage and time left go on within a unit, at the rate
    of those before it.

    console: where to show it; a live view if it is a terminal. lacking: what a refused row is.
    """

    def __init__(self, console: Console | None = None, *, lacking: str = "without a score") -> None:
        self._console = console or Console(stderr=True)
        self._lacking = lacking
        self._bar: RichProgress | None = None
        self._live: Live | None = None
        self._num_rows = self._num_units = 0
        self._finished = Summary()
        self._num_tokens_before = 0
        self._tokens_per_s = self._last_line = 0.0
        self._forecast = Forecast(0, 0.0)
        self._workers: dict[int, _WorkerRate] = {}
        self._num_troubles = 0
        self._reasons_told: set[str] = set()

    @classmethod
    def silent(cls) -> Self:
        """One that shows nothing."""
        return cls(Console(stderr=True, quiet=True, force_terminal=False))

    def looked_at(self, told: str) -> None:
        """Tell what was seen before the model is loaded; nothing if `told` is empty."""
        if told:
            self._console.say(styled(told, multiline=True))

    def going_on(self, num_done: int, num_rows: int) -> None:
        """Tell what an earlier start has finished, if it has finished anything."""
        if num_done == num_rows:
            self._print(f"complete: all {num_rows:,} rows were done, nothing to do")
        elif num_done:
            self._print(f"going on: {num_done:,} of {num_rows:,} rows were done")

    def loading(self, model: str, num_workers: int, num_places: int) -> None:
        """num_workers: that are asked for. num_places: for how many there is room now."""
        room = f", for {num_places} of which there is room now" * (num_places < num_workers)
        self._print(f"loading {model} on {quantity(num_workers, 'worker')}{room} …")

    def stopping(self, seconds: float) -> None:
        self._print(
            f"stopping: up to {seconds:.0f} s for the units in hand; once more stops at once"
        )

    @contextmanager
    def scoring(self, num_rows: int, kept: Tally) -> Iterator[None]:
        """While rows are scored. kept: what an earlier start already finished of them."""
        self._num_rows = num_rows
        self._finished = Summary()
        self._count(kept)
        self._num_tokens_before = kept.num_tokens
        self._last_line = time.monotonic()
        self._forecast = Forecast(num_rows, self._last_line, kept.num_rows)
        if not self._console.is_terminal:
            yield
            return
        self._bar = RichProgress(
            SpinnerColumn(table_column=Column(no_wrap=True)),
            BarColumn(bar_width=BAR_WIDTH, table_column=Column(no_wrap=True)),
            # On a narrow terminal the text goes on in a line of its own, and the bar stays.
            TextColumn("{task.description}", markup=False, table_column=Column()),
        )
        self._bar.add_task(self._describe(), total=None)
        with Live(self._view(), console=self._console, refresh_per_second=4) as self._live:
            yield
            self._live.update(self._view())

    def tell(self, event: Event) -> None:
        """Note what happened; what a user should know of gets a line of its own."""
        match event:
            case WorkerStarted():
                self._workers[event.worker] = _WorkerRate(event.node)
                self._observe()
            case WorkerLost():
                self._workers.pop(event.worker, None)
                self._observe()
                self._print_trouble(
                    f"worker {event.worker} on {event.node} lost ({event.cause}): {event.reason}"
                )
            case NoWorkerReady():
                self._print(
                    f"no worker is ready ({event.reason}); starts are tried again for "
                    f"{format_seconds(event.seconds_left)}, then the run ends"
                )
            case UnitFinished():
                self._count(event.summary)
                self._num_units += 1
                self._observe()
                if event.worker in self._workers:
                    self._workers[event.worker].observe(event, time.monotonic())
            case UnitFailed() if event.next is not Next.AGAIN:
                rows = f"{event.shard} rows {event.start} to {event.stop - 1}"
                self._print_trouble(f"{rows}: {event.reason} → {_words(event.next)}")
            case ShardFailed():
                self._print_trouble(f"{event.shard}: {event.reason} → {_words(event.next)}")
            case BatchShrunk():
                self._print_trouble(
                    f"out of memory: prefill steps of {event.tokens_now:,} tokens from now on, "
                    f"not {event.tokens_before:,}"
                )
        self.tick()

    def tick(self) -> None:
        """Show what is known by now."""
        now = time.monotonic()
        if self._bar is not None and self._live is not None:
            self._bar.update(
                self._bar.task_ids[0],
                completed=self._forecast.rows_at(now),
                # Before the first unit is finished nothing is known, and the bar says so.
                total=self._num_rows if self._finished.num_rows else None,
                description=self._describe(),
            )
            self._live.update(self._view())
        elif self._num_rows and now - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = now
            self._print(f"{self._describe()} · {self._describe_workers()}")

    def _view(self) -> Group:
        assert self._bar is not None, "the view is for terminals"
        now = time.monotonic()
        shown = list(self._workers.items())[:MAX_WORKERS_SHOWN]
        lines = [styled((_worker_line(number, rate, now), "dim")) for number, rate in shown]
        if len(self._workers) > len(shown):
            lines.append(styled((f"  and {self._describe_workers()} in all", "dim")))
        return Group(self._bar, *lines)

    def _count(self, done: Tally) -> None:
        """Add to what is finished; a reason for which rows have no score is told once."""
        self._finished.num_rows += done.num_rows
        self._finished.num_tokens += done.num_tokens
        for status, count in done.rows_by_status.items():
            before = self._finished.rows_by_status.get(status, 0)
            self._finished.rows_by_status[status] = before + count
        for name, reason in done.reasons.items() if isinstance(done, Summary) else ():
            if name not in self._reasons_told:
                self._reasons_told.add(name)
                self._print_trouble(f"{self._lacking}: {reason.told(name, with_count=False)}")

    def _observe(self) -> None:
        """Let the forecast know what is done, and what the workers have in hand, by now."""
        now, done = time.monotonic(), self._finished
        num_now = done.num_rows - self._forecast.num_rows_before
        rows_in_hand = num_now / max(1, self._num_units) * len(self._workers)
        self._forecast.observe(done.num_rows, rows_in_hand, now)
        if num_now:
            tokens_per_row = (done.num_tokens - self._num_tokens_before) / num_now
            self._tokens_per_s = tokens_per_row * self._forecast.rows_per_s

    def _print(self, line: str) -> None:
        self._console.say(line)

    def _print_trouble(self, line: str) -> None:
        self._num_troubles += 1
        if self._num_troubles <= MAX_TROUBLES_SHOWN:
            self._print(line)
        if self._num_troubles == MAX_TROUBLES_SHOWN:
            self._print("further troubles are in events.jsonl")

    def _num_tokens_estimate(self) -> float | None:
        """Tokens of all rows, at the rate of those finished; None before the first."""
        if not self._finished.num_rows:
            return None
        return self._finished.num_tokens * self._num_rows / self._finished.num_rows

    def _describe(self) -> str:
        now, done = time.monotonic(), self._finished
        estimate, left_s = self._num_tokens_estimate(), self._forecast.seconds_left(now)
        rows = f"{done.num_rows:,} of {self._num_rows:,} rows{self._describe_refused()}"
        if estimate is None or left_s is None:
            return rows
        share = f"{self._forecast.rows_at(now) / self._num_rows:.0%}"
        rows_and_tokens = f"{rows} · {done.num_tokens:,} of ~{estimate:,.0f} tokens"
        if not self._workers:
            # Whatever time is left, none of it passes now.
            return f"{share} · {rows_and_tokens}"
        return (
            f"{share} · {format_seconds(left_s)} left · {rows_and_tokens} · "
            f"{self._forecast.rows_per_s:,.1f} rows/s · {self._tokens_per_s:,.0f} tokens/s"
        )

    def _describe_refused(self) -> str:
        """` (3 without a score: 2 bad_messages, 1 too_long)`, or ""."""
        counts = self._finished.rows_without_score
        by_status = ", ".join(f"{count:,} {status}" for status, count in counts.items())
        return f" ({sum(counts.values()):,} without a score: {by_status})" if counts else ""

    def _describe_workers(self) -> str:
        """`3 workers: 410 to 512 tokens/s`."""
        rates = sorted(w.tokens_per_s for w in self._workers.values() if w.tokens_per_s)
        workers = quantity(len(self._workers), "worker")
        if not rates:
            return workers
        between = f"{rates[0]:,.0f}" + (f" to {rates[-1]:,.0f}" if len(rates) > 1 else "")
        return f"{workers}: {between} tokens/s"


def _worker_line(number: int, rate: _WorkerRate, now: float) -> str:
    if rate.tokens_per_s is None:
        return f"  worker {number} on {rate.node}: in its first unit"
    return (
        f"  worker {number} on {rate.node}: {rate.tokens_per_s:,.0f} tokens/s, "
        f"{quantity(rate.num_units, 'unit')}, the last {format_seconds(now - rate.last_s)} ago"
    )


def _words(step: Next) -> str:
    return step.value.replace("_", " ")
