"""What a run looks like while it goes: a bar on a terminal, else a plain line now and then.

Everything goes to stderr, so that stdout carries results alone. Knows counts and clocks only.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn
from rich.progress import Progress as RichProgress

from rsr.jobs.score_columns import Summary

PLAIN_LINE_SECONDS = 30.0


class Progress:
    """Counts rows and tokens as units finish; the tokens still to come are estimated from those.

    console: where to show it; a bar if it is a terminal.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(file=sys.stderr)
        self._bar: RichProgress | None = None
        self._num_rows = 0
        self._finished = Summary()
        self._num_rows_before = self._num_tokens_before = 0
        self._started = self._last_line = 0.0

    def loading(self, model: str, num_workers: int) -> None:
        workers = "worker" if num_workers == 1 else "workers"
        self._print(f"loading {model} on {num_workers} {workers} …")

    @contextmanager
    def scoring(self, num_rows: int, kept: Summary) -> Iterator[None]:
        """While rows are scored. kept: what an earlier start already finished of them."""
        self._num_rows = num_rows
        self._finished = Summary()
        self._finished.merge(kept)
        self._num_rows_before, self._num_tokens_before = kept.num_rows, kept.num_tokens
        self._started = self._last_line = time.monotonic()
        if not self._console.is_terminal:
            yield
            return
        with RichProgress(
            SpinnerColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
            console=self._console,
        ) as self._bar:
            self._bar.add_task(self._describe(), total=self._num_tokens_estimate())
            yield

    def advance(self, summary: Summary) -> None:
        """Count one more finished unit."""
        self._finished.merge(summary)
        self.tick()

    def tick(self) -> None:
        """Show what is known by now."""
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0],
                completed=self._finished.num_tokens,
                total=self._num_tokens_estimate(),
                description=self._describe(),
            )
        elif now - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = now
            self._print(self._describe())

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)

    def _num_tokens_estimate(self) -> float | None:
        """Tokens of all rows, at the rate of those finished; None before the first."""
        if not self._finished.num_rows:
            return None
        return self._finished.num_tokens * self._num_rows / self._finished.num_rows

    def _describe(self) -> str:
        done = self._finished
        seconds = max(1e-9, time.monotonic() - self._started)
        tokens_per_s = (done.num_tokens - self._num_tokens_before) / seconds
        rows_per_s = (done.num_rows - self._num_rows_before) / seconds
        estimate = self._num_tokens_estimate()
        if estimate is None or not rows_per_s:
            return f"{done.num_rows:,} of {self._num_rows:,} rows"
        left_s = (self._num_rows - done.num_rows) / rows_per_s
        return (
            f"{done.num_rows:,} of {self._num_rows:,} rows · {done.num_tokens:,} of "
            f"~{estimate:,.0f} tokens · {rows_per_s:,.1f} rows/s · {tokens_per_s:,.0f} tokens/s · "
            f"{format_seconds(left_s)} left"
        )


def format_seconds(seconds: float) -> str:
    """`1 h 02 min`, `3 min 20 s` or `42 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
