"""What a run has left to do, and doing it: the same for every run whose OUTPUT is whole shards.

Knows receipts and units; knows nothing of what becomes of a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rsr.jobs.cluster.job import UnitJob
from rsr.jobs.cluster.venue import Venue
from rsr.jobs.cluster.work import Failure, WorkQueue
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.run.progress import Progress
from rsr.jobs.run.receipts import Receipt
from rsr.jobs.run.store import RunStore
from rsr.jobs.shards.score_columns import Summary
from rsr.jobs.shards.shard import Shard, Unit, was_written_again
from rsr.jobs.storage.concurrency import in_parallel


@dataclass(frozen=True, slots=True)
class Remaining:
    """What is left of a run. unfinished: shards without output, by name; todo: units of theirs that
    are not kept; kept: summary of those that are. done: summary of the shards that have output.
    """

    unfinished: dict[str, Shard] = field(default_factory=dict)
    todo: list[Unit] = field(default_factory=list)
    kept: Summary = field(default_factory=Summary)
    done: Summary = field(default_factory=Summary)

    @property
    def num_unfinished_rows(self) -> int:
        return sum(shard.num_rows for shard in self.unfinished.values())


@dataclass(slots=True)
class PoolResult:
    """What a run did. summary: of all of OUTPUT. num_tokens_now, seconds: of this start."""

    summary: Summary
    num_tokens_now: int = 0
    seconds: float = 0.0
    failures: list[Failure] = field(default_factory=list)


def find_remaining(
    store: RunStore,
    shards: Sequence[Shard],
    cut: Callable[[Shard, list[Unit]], list[Unit]],
) -> Remaining:
    """Look at the receipts of `shards`. cut: a shard, beside its kept units, into the others."""

    def look_at(shard: Shard) -> Receipt | list[tuple[Unit, Receipt]]:
        return store.read_receipt(shard) or store.kept_units(shard)

    remaining = Remaining()
    with in_parallel(look_at, shards) as found:
        for shard, there in zip(shards, found, strict=True):
            if isinstance(there, Receipt):
                remaining.done.merge(there.summary)
                continue
            remaining.unfinished[shard.name] = shard
            for _, receipt in there:
                remaining.kept.merge(receipt.summary)
            remaining.todo.extend(cut(shard, [unit for unit, _ in there]))
    return remaining


def do_remaining(
    job: UnitJob[Summary],
    remaining: Remaining,
    venue: Venue,
    progress: Progress,
    stop: StopRequest,
) -> PoolResult:
    """Hand what is left to workers; what was given up is among the failures.

    Raises `UsageError` if no worker can be started, `Interrupted` when `stop` says so, with what
    is finished kept.
    """
    total = Summary()
    total.merge(remaining.done)
    result = PoolResult(total)
    num_rows = remaining.num_unfinished_rows
    num_done = remaining.done.num_rows
    progress.going_on(num_done + remaining.kept.num_rows, num_done + num_rows)
    if not remaining.unfinished:
        return result
    # Ray takes seconds to import, and a run that is complete does not need it.
    from rsr.jobs.cluster.run import run_on_cluster

    report = run_on_cluster(
        job,
        WorkQueue(remaining.unfinished, remaining.todo),
        venue.cluster(),
        num_rows=num_rows,
        kept=remaining.kept,
        progress=progress,
        stop=stop,
    )
    for summary in report.written:
        total.merge(summary)
    result.num_tokens_now, result.seconds = report.num_tokens, report.seconds
    result.failures = report.failures + [
        Failure(shard.name, shard.num_rows, 1, f"{shard.path} was written again meanwhile")
        for shard in remaining.unfinished.values()
        if was_written_again(shard)
    ]
    if result.failures:
        reason = "not written; its finished units are kept"
        result.failures += [Failure(name, 0, 1, reason) for name in report.unwritten]
    return result
