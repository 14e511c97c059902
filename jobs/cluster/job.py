"""What a run does to its units: the one thing that `cluster/` does not know.

The cluster knows units, workers, deadlines, halving and resuming. A job says the rest: how a
worker gets ready, what becomes of a unit's rows, what to do with a row that breaks every worker,
and how a shard's output is put together. A new job (sampling with vLLM, grading in child
processes, asking an HTTP endpoint) is another implementation of the two protocols below.
"""

from pathlib import Path
from typing import Any, Protocol, TypeVar

from rsr.jobs.run.events import Cause, Tally
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.shards.shard import Shard, Unit

Rows = TypeVar("Rows")
Results = TypeVar("Results")
S_co = TypeVar("S_co", bound=Tally, covariant=True)


class UnitJob(Protocol[S_co]):
    """A job as it is sent to every worker once: small, and picklable."""

    @property
    def name(self) -> str:
        """What does the work, for people: a model, say."""

    @property
    def folder(self) -> RunFolder:
        """OUTPUT, where logs and events go besides what the job itself writes."""

    @property
    def must_see(self) -> tuple[Path, ...]:
        """Local paths that every machine must have."""

    @property
    def max_num_batched_tokens(self) -> int | None:
        """What `open` is given at first; after a worker ran out of memory, half of it."""

    def open(self, max_num_batched_tokens: int | None) -> "OpenJob[Any, Any, S_co]":
        """Get a worker's process ready, once. May take minutes; any exception refuses the start.

        Called by the thread that also calls `OpenJob.run`.
        """

    def cause_of(self, error: Exception) -> Cause:
        """What an error of `open` or `OpenJob.run` means.

        After `ENGINE` and `MEMORY` the worker is replaced, and the unit's rows are suspected.
        After any other cause, the unit is tried again later by whichever worker is free.
        """


class OpenJob(Protocol[Rows, Results, S_co]):
    """A job in a worker's process.

    `read`, `run` and the methods that write have a thread each, so that one unit is read or written
    while another is run; each takes units in the order in which they came. A unit's results must
    depend on its rows and the job alone, since a unit may be run again by another worker.
    """

    @property
    def max_num_batched_tokens(self) -> int | None:
        """What a worker that runs out of memory should take half of; None if there is no such."""

    @property
    def notice(self) -> str | None:
        """What the user should know about how this worker works, or None."""

    def find(self, unit: Unit) -> S_co | None:
        """The summary of a unit that is kept already, by a worker that died before it said so."""

    def read(self, unit: Unit) -> Rows:
        """The unit's rows, made as ready for `run` as can be done without it.

        An exception costs the unit an attempt.
        """

    def run(self, unit: Unit, rows: Rows) -> Results:
        """The work itself. An exception is what `UnitJob.cause_of` says."""

    def keep(self, unit: Unit, results: Results) -> S_co:
        """Keep the results, whole or not at all. On `OSError` it is called again for a while."""

    def refuse(self, unit: Unit, reason: str) -> S_co:
        """Keep a unit of one row, which breaks every worker alone, as refused for `reason`."""

    def commit(self, shard: Shard) -> S_co:
        """Write the output of a shard whose rows are all kept. On `OSError` as `keep`."""
