"""Workers that exist on paper only, with a clock of their own."""

import heapq
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rsr.jobs.cluster.answers import Answer, Done, Placed, Ready, Reply
from rsr.jobs.cluster.dispatcher import PoolEndedError
from rsr.jobs.cluster.work import RefuseRow, RunUnit, Task
from rsr.jobs.shards.score_columns import Summary
from rsr.jobs.shards.shard import Unit

HANGS = object()
Misfortune = Callable[["PaperPool", int, Unit], Answer | object | None]


@dataclass
class PaperWorker:
    max_num_batched_tokens: int
    queue: list[Task] = field(default_factory=list)
    engine_free_at: float = 0.0


@dataclass
class PaperPool:
    """Takes a second a unit (`seconds_of` says otherwise) on a clock that only waiting moves.

    misfortune: what a unit is answered with, if not with being done; `HANGS` for nothing at all.
    start_answers: what a start is answered with. ends_at: when the pool itself ends.
    answers_from: when workers can first be counted and started.
    """

    num_places: int = 2
    misfortune: Misfortune | None = None
    seconds_of: Callable[[Unit], float] = lambda unit: 1.0
    vllm_default_tokens: int = 8192
    now: float = 0.0
    killed: list[int] = field(default_factory=list)
    refused: list[Unit] = field(default_factory=list)
    sent: list[tuple[int, Task]] = field(default_factory=list)
    scored: list[Unit] = field(default_factory=list)
    workers: dict[int, PaperWorker] = field(default_factory=dict)
    in_hand: Counter = field(default_factory=Counter)
    most_in_hand: Counter = field(default_factory=Counter)
    start_answers: Callable[["PaperPool", int], list[Answer]] | None = None
    ends_at: float = math.inf
    answers_from: float = 0.0
    _due: list[tuple[float, int, Reply]] = field(default_factory=list)
    _order: int = 0

    @property
    def is_answering(self) -> bool:
        return self.now >= self.answers_from

    def start(self, worker: int, max_num_batched_tokens: int | None) -> None:
        tokens = max_num_batched_tokens or self.vllm_default_tokens
        self.workers[worker] = PaperWorker(tokens)
        answers = self.start_answers and self.start_answers(self, worker)
        if answers is None:
            answers = [
                Placed(node="paper", pid=worker),
                Ready(seconds=0.0, max_num_batched_tokens=tokens),
            ]
        for answer in answers:
            self._answer_at(self.now, worker, answer)

    def send(self, worker: int, task: Task) -> None:
        self.sent.append((worker, task))
        self.in_hand[worker] += isinstance(task, RunUnit)
        self.most_in_hand[worker] = max(self.most_in_hand[worker], self.in_hand[worker])
        hand = self.workers[worker]
        if not isinstance(task, RunUnit):
            if isinstance(task, RefuseRow):
                self.refused.append(task.unit)
            self._answer_at(self.now, worker, done(task), task)
            return
        hand.engine_free_at = max(hand.engine_free_at, self.now) + self.seconds_of(task.unit)
        answer: Answer | object = done(task)
        if self.misfortune is not None:
            answer = self.misfortune(self, worker, task.unit) or answer
        self._answer_at(hand.engine_free_at, worker, answer, task)

    def kill(self, worker: int) -> None:
        self.killed.append(worker)
        del self.workers[worker]

    def wait(self, seconds: float) -> list[Reply]:
        if self.now >= self.ends_at:
            raise PoolEndedError("its house burned down")
        replies: list[Reply] = []
        while self._due and not replies and self._due[0][0] <= self.now + seconds:
            due, _, reply = heapq.heappop(self._due)
            if reply.worker in self.workers:
                self.now = max(self.now, due)
                if isinstance(reply.answer, Done) and isinstance(reply.task, RunUnit):
                    self.scored.append(reply.task.unit)
                    self.in_hand[reply.worker] -= 1
                replies.append(reply)
        if not replies:
            self.now += seconds
        return replies

    def _answer_at(self, due: float, worker: int, answer: Any, task: Task | None = None) -> None:
        self._order += 1
        if answer is not HANGS:
            heapq.heappush(self._due, (due, self._order, Reply(worker, task, answer)))


def done(task: Task) -> Done:
    num_rows = 0 if not hasattr(task, "unit") else task.unit.num_rows
    return Done(summary=Summary(num_rows=num_rows), seconds=1.0)
