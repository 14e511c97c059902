"""How far a run is, from the files it leaves; while it writes, and after.

Reads the manifest, receipts and the names of finished units, never a score. Knows nothing of
Ray: it can run on any machine that sees OUTPUT.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.manifest import InputShard
from rsr.jobs.run.receipts import Receipt
from rsr.jobs.run.store import range_of_unit, stored_receipt
from rsr.jobs.shards.score_columns import Reason, Summary, second_pass_of
from rsr.jobs.storage.concurrency import in_parallel
from rsr.jobs.storage.locks import Holder

RATE_WINDOW_S = 600.0
"""Speed is that of the last ten minutes: long enough for many units, short enough to show a
change."""


@dataclass(frozen=True, slots=True)
class Span:
    """Rows that finished between two Unix times."""

    first_s: float
    last_s: float
    num_rows: int


@dataclass(frozen=True, slots=True)
class RunStatus:
    """A run, seen from outside.

    writer: the `rsr` command whose run it is. subject: what it is about. num_rows: of the input.
    num_rows_done: of these, in finished shards and in finished units of the others.
    num_units_kept: those units. num_rows_written, num_tokens, rows_by_status, dataset_rsr,
    reasons: of finished shards. holder: who writes now. rows_per_s: over the last ten minutes in
    which anything finished; None before two units have.
    """

    output: str
    writer: str
    subject: str
    created: str
    holder: Holder | None
    num_shards: int
    num_shards_done: int
    num_units_kept: int
    num_rows: int
    num_rows_done: int
    num_rows_written: int
    num_tokens: int
    rows_by_status: dict[str, int]
    dataset_rsr: float | None
    reasons: dict[str, Reason]
    rows_per_s: float | None

    @property
    def is_finished(self) -> bool:
        return self.num_shards_done == self.num_shards

    @property
    def seconds_left(self) -> float | None:
        """At the present speed; None where nobody is at work or none is known."""
        if self.holder is None or not self.rows_per_s:
            return None
        return (self.num_rows - self.num_rows_done) / self.rows_per_s

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"is_finished": self.is_finished, "seconds_left": self.seconds_left}


def read_status(folder: RunFolder) -> RunStatus:
    """Raises `UsageError` if no run has written to `folder`."""
    manifest = folder.require_run()
    done = Summary()
    spans: list[Span] = []
    num_shards_done = num_units_kept = num_rows_done = 0
    with in_parallel(lambda shard: _progress_of(folder, shard), manifest.shards) as found:
        for shard, progress in zip(manifest.shards, found, strict=True):
            if isinstance(progress, Receipt):
                num_shards_done += 1
                num_rows_done += shard.num_rows
                done.merge(progress.summary)
                spans.append(Span(progress.first_finished_s, progress.finished_s, shard.num_rows))
                continue
            spans += progress
            num_units_kept += len(progress)
            num_rows_done += sum(unit.num_rows for unit in progress)
    holder = folder.holder()
    return RunStatus(
        output=folder.storage.describe(),
        writer=manifest.writer,
        subject=manifest.subject,
        created=manifest.created,
        holder=holder,
        num_shards=len(manifest.shards),
        num_shards_done=num_shards_done,
        num_units_kept=num_units_kept,
        num_rows=manifest.num_rows,
        num_rows_done=num_rows_done,
        num_rows_written=done.num_rows,
        num_tokens=done.num_tokens,
        rows_by_status=done.rows_by_status,
        dataset_rsr=None if second_pass_of(manifest.identity.settings) else done.dataset.rsr,
        reasons=done.reasons,
        rows_per_s=rate(spans, now_s=time.time() if holder else None),
    )


def _progress_of(folder: RunFolder, shard: InputShard) -> Receipt | list[Span]:
    """A finished shard's receipt, or what there is of its units."""
    receipt = stored_receipt(folder, shard.name)
    if receipt is not None and receipt.stop == shard.num_rows:
        return receipt
    return _finished_units(folder, shard.name)


def _finished_units(folder: RunFolder, shard_name: str) -> list[Span]:
    """A unit that was halved and then scored whole counts once."""
    files = folder.storage.list(folder.units_folder(shard_name))
    ranged = [(rows, f.modified_s) for f in files if (rows := range_of_unit(f.name)) is not None]
    spans: list[Span] = []
    counted = 0
    for (start, stop), time_s in sorted(ranged):
        if stop > counted:
            spans.append(Span(time_s, time_s, stop - max(start, counted)))
            counted = stop
    return spans


def rate(spans: Sequence[Span], *, now_s: float | None = None) -> float | None:
    """Rows per second up to `now_s`, or up to the last that finished; None if that says nothing.

    A finished shard's rows count as if they had come evenly over its time.
    """
    if not spans:
        return None
    last_s = now_s or max(span.last_s for span in spans)
    first_s = max(min(span.first_s for span in spans), last_s - RATE_WINDOW_S)
    if last_s - first_s < 1.0:
        return None
    num_rows = 0.0
    for span in spans:
        inside_s = min(span.last_s, last_s) - max(span.first_s, first_s)
        length_s = span.last_s - span.first_s
        if length_s > 0:
            num_rows += span.num_rows * max(0.0, inside_s) / length_s
        elif span.last_s > first_s:
            num_rows += span.num_rows
    return num_rows / (last_s - first_s)
