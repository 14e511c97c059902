"""The rest of a run whose oracle is a server: so many requests at a time, no answer lost.

Runs on this machine alone: the server does the work.
"""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyarrow as pa
from rich.progress import Progress

from rsr.jobs.errors import ShardsFailed, first_line
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.refinement.commit import commit_refined_shard
from rsr.jobs.refinement.endpoint import (
    Budget,
    BudgetSpentError,
    Endpoint,
    EndpointError,
    EndpointOptions,
)
from rsr.jobs.refinement.journal import Journal
from rsr.jobs.refinement.options import Plan
from rsr.jobs.refinement.outcome import Outcome, RefineStatus, summary_of, to_frame
from rsr.jobs.refinement.questions import Question
from rsr.jobs.run.store import ChangedInputError
from rsr.jobs.shards.score_columns import Summary
from rsr.jobs.shards.shard import Shard, Unit
from rsr.jobs.terminal import Console

FAILURES_PER_REQUEST = 2
"""So many rows in a row for each request at a time may fail before the server is given up; of a
small INPUT all rows, so that a server that is down costs no row its refinement for good."""
POLL_S = 0.2
"""A signal is only seen between two waits."""


@dataclass(frozen=True, slots=True)
class _Row:
    """A row that the server is to be asked about, or whose outcome is known already."""

    unit: Unit
    row: int
    asked: Question | Outcome


class ServedRun:
    """What is left of a run on its way through so many requests at a time.

    summary: of the shards written so far. Units are committed when their last row is answered,
    shards when their last unit is.
    """

    def __init__(self, plan: Plan, oracle: EndpointOptions, journal: Journal) -> None:
        self.summary = Summary()
        self.budget = Budget(oracle.max_requests)
        self._oracle, self._journal = oracle, journal
        self._questions, self._store, self._remaining = plan.questions, plan.store, plan.remaining
        self._outcomes: dict[Unit, dict[int, Outcome]] = {}
        self._units_left = {name: 0 for name in self._remaining.unfinished}
        for unit in self._remaining.todo:
            self._units_left[unit.shard.name] += 1
        self._failures_in_a_row = 0
        most = min(FAILURES_PER_REQUEST * oracle.concurrency, self._remaining.num_unfinished_rows)
        self._max_failures = max(2, most)
        self._ending: str | None = None

    async def run(self, stop: StopRequest) -> None:
        """Ask about every row that is left.

        Raises `ShardsFailed` if the budget is spent, the server given up, or a file not to be read
        or written; `Interrupted` when `stop` says so. Every answer so far is kept.
        """
        console = Console(stderr=True)
        num_rows = sum(unit.num_rows for unit in self._remaining.todo)
        try:
            for name, shard in self._remaining.unfinished.items():
                if not self._units_left[name]:
                    self._commit(shard)
            bar = Progress(console=console, transient=True, disable=not console.is_terminal)
            with bar:
                task = bar.add_task("refining", total=num_rows)
                async with Endpoint(self._oracle, self.budget) as endpoint:
                    await self._ask_all(endpoint, stop, lambda: bar.advance(task))
        except (OSError, pa.ArrowException, ChangedInputError) as error:
            raise ShardsFailed(first_line(error)) from error
        if self._ending is not None:
            raise ShardsFailed(f"{self._ending}; the same command goes on")

    async def _ask_all(
        self, endpoint: Endpoint, stop: StopRequest, advance: Callable[[], None]
    ) -> None:
        rows = self._rows(stop)
        waiting: dict[asyncio.Task[Outcome], _Row] = {}
        try:
            while True:
                while self._ending is None and len(waiting) < self._oracle.concurrency:
                    row = next(rows, None)
                    if row is None:
                        break
                    if isinstance(row.asked, Outcome):
                        self._note(row, row.asked)
                        advance()
                        continue
                    waiting[asyncio.create_task(endpoint.ask(row.asked))] = row
                if not waiting:
                    return
                done, _ = await asyncio.wait(
                    waiting, timeout=POLL_S, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    row = waiting.pop(task)
                    if (outcome := self._outcome(task)) is not None:
                        if outcome.status is not RefineStatus.FAILED:
                            self._journal.add(row.unit.shard, row.row, outcome)
                        self._note(row, outcome)
                        advance()
                # After what has come was written down.
                stop.check()
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    def _outcome(self, task: "asyncio.Task[Outcome]") -> Outcome | None:
        """What became of a row; None if it has to wait for another start."""
        try:
            outcome = task.result()
        except BudgetSpentError:
            self._ending = self._ending or f"--max-requests {self.budget.limit} is spent"
            return None
        except EndpointError as error:
            self._ending = str(error)
            return None
        if outcome.status is not RefineStatus.FAILED:
            self._failures_in_a_row = 0
            return outcome
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= self._max_failures:
            self._ending = self._ending or (
                f"--endpoint {self._oracle.url} answered none of "
                f"{self._failures_in_a_row} rows in a row: {outcome.detail}"
            )
        return outcome if self._ending is None else None

    def _rows(self, stop: StopRequest) -> Iterator[_Row]:
        """Every row of the units that are left, in order."""
        known = self._journal.read()
        reader = self._questions.reader()
        for unit in self._remaining.todo:
            for row, asked in enumerate(self._questions.of(unit, reader), unit.start):
                stop.check()
                answered = known.get((unit.shard.name, unit.shard.fingerprint, row))
                yield _Row(unit, row, answered or asked)

    def _note(self, row: _Row, outcome: Outcome) -> None:
        """Keep a row's outcome; with the last one of its unit, the unit; of its shard, that."""
        unit = row.unit
        outcomes = self._outcomes.setdefault(unit, {})
        outcomes[row.row] = outcome
        if len(outcomes) < unit.num_rows:
            return
        frame = to_frame([outcomes[number] for number in range(unit.start, unit.stop)])
        self._store.commit_unit(unit, frame, summary_of(frame))
        del self._outcomes[unit]
        self._units_left[unit.shard.name] -= 1
        if not self._units_left[unit.shard.name]:
            self._commit(unit.shard)

    def _commit(self, shard: Shard) -> None:
        columns, mode = self._questions.columns, self._questions.prompt.mode
        model = self._oracle.model
        self.summary.merge(commit_refined_shard(self._store, shard, columns, mode, model))
