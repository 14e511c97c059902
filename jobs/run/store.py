"""What a run has finished, and whether it can be trusted.

Units and shards are committed with a receipt each. A file is used again only if its receipt is
of this input, these settings and these bytes; otherwise it is the same as missing.
"""

import io
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import polars as pl

from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.manifest import Identity
from rsr.jobs.run.receipts import Receipt
from rsr.jobs.shards.parquet import fingerprint
from rsr.jobs.shards.score_columns import Summary
from rsr.jobs.shards.shard import Shard, Unit
from rsr.jobs.storage import StoredFile
from rsr.jobs.storage.hashing import HashingFile, hash_bytes, hash_file

UNIT_NAME = re.compile(r"(?P<start>\d{12})-(?P<stop>\d{12})\.scores")


class IncompleteShardError(Exception):
    """A shard was to be written before all of its rows were finished."""


class ChangedInputError(Exception):
    """An input file is not the one that the run began with."""


@dataclass(frozen=True, slots=True)
class RunStore:
    """The finished files of one run. Making one touches nothing.

    identity: of the run; files of any other are not trusted. digest: `identity.digest`.
    """

    folder: RunFolder
    identity: Identity
    digest: str

    @classmethod
    def of(cls, folder: RunFolder, identity: Identity) -> Self:
        return cls(folder, identity, identity.digest)

    def unit_name(self, unit: Unit) -> str:
        # Not .parquet: a glob over OUTPUT must never take these for output.
        folder = self.folder.units_folder(unit.shard.name)
        return f"{folder}/{unit.start:012d}-{unit.stop:012d}.scores"

    def commit_unit(self, unit: Unit, frame: pl.DataFrame, summary: Summary) -> None:
        """Keep a finished unit's table, with its receipt, until its shard is complete."""
        assert len(frame) == unit.num_rows, "a unit must come back with all its rows"
        buffer = io.BytesIO()
        frame.write_parquet(buffer)
        content = buffer.getvalue()
        now = time.time()
        receipt = Receipt(
            start=unit.start,
            stop=unit.stop,
            fingerprint=unit.shard.fingerprint,
            settings=self.digest,
            content_bytes=len(content),
            content_blake2b=hash_bytes(content),
            version="",
            first_finished_s=now,
            finished_s=now,
            summary=summary,
        )
        line = receipt.to_json().encode() + b"\n"
        self.folder.storage.write(self.unit_name(unit), line + content)

    def kept_units(self, shard: Shard) -> list[tuple[Unit, Receipt]]:
        """Finished units that can be trusted and do not overlap, in order of rows.

        It does not matter what cut them: a unit that was halved stands beside its neighbours as
        two.
        """
        kept: list[tuple[Unit, Receipt]] = []
        cursor = 0
        for unit in self._unit_files(shard):
            if unit.start >= cursor and (read := self._read_unit_file(unit)) is not None:
                kept.append((unit, read[0]))
                cursor = unit.stop
        return kept

    def covering_units(self, shard: Shard) -> list[tuple[Unit, Receipt]]:
        """Finished units that hold every row once, in order; any cut of the shard will do.

        Raises `IncompleteShardError` if there are none such.
        """
        trusted = {
            unit: read[0]
            for unit in self._unit_files(shard)
            if (read := self._read_unit_file(unit)) is not None
        }
        units = exact_cover(list(trusted), shard.num_rows)
        if units is None:
            raise IncompleteShardError(
                f"{shard.name}: not every row has a finished unit that can be trusted"
            )
        return [(unit, trusted[unit]) for unit in units]

    def read_unit(self, unit: Unit) -> pl.DataFrame | None:
        """A finished unit's table; None if there is none that can be trusted."""
        read = self._read_unit_file(unit)
        return None if read is None else pl.read_parquet(read[1])

    def unit_summary(self, unit: Unit) -> Summary | None:
        """A finished unit's summary; None if there is none that can be trusted."""
        read = self._read_unit_file(unit)
        return None if read is None else read[0].summary

    def read_receipt(self, shard: Shard) -> Receipt | None:
        """A finished shard's receipt; None unless its output is there and the one vouched for.

        An output that was not written since is not read again: what decayed on the disk without
        being written is for `rsr verify` to find.
        """
        receipt = stored_receipt(self.folder, shard.name)
        if receipt is None or not receipt.is_for(shard, 0, shard.num_rows, self.digest):
            return None
        found = self.folder.storage.find(shard.name)
        if found is None or found.num_bytes != receipt.content_bytes:
            return None
        if self.folder.lines is not None and not self.folder.lines.is_whole():
            return None
        if found.version == receipt.version or self.has_content(found, receipt):
            return receipt
        return None

    def has_content(self, file: StoredFile, receipt: Receipt) -> bool:
        """Whether a file is, byte for byte, the one that its receipt vouches for."""
        with self.folder.storage.open(file.name) as opened:
            return hash_file(opened) == receipt.content_blake2b

    def publish(
        self,
        shard: Shard,
        write: Callable[[HashingFile], Summary],
        *,
        first_finished_s: float | None = None,
    ) -> Summary:
        """Write a shard's output by `write`, which returns its summary, and then its receipt.

        Raises `ChangedInputError` if the input is another by now.
        """
        require_unchanged(shard)
        return self.publish_derived(shard, write, first_finished_s=first_finished_s)

    def publish_derived(
        self,
        shard: Shard,
        write: Callable[[HashingFile], Summary],
        *,
        first_finished_s: float | None = None,
    ) -> Summary:
        """`publish` of a file that is made of more than one input, which the caller watches."""
        storage = self.folder.storage
        with storage.writing(shard.name) as temporary, temporary.open("wb") as file:
            sink = HashingFile(file)
            summary = write(sink)
        found = storage.find(shard.name)
        if found is None:
            raise FileNotFoundError(f"{storage.describe(shard.name)} was removed as it was written")
        if self.folder.lines is not None:
            self.folder.lines.write()
        now = time.time()
        receipt = Receipt(
            start=0,
            stop=shard.num_rows,
            fingerprint=shard.fingerprint,
            settings=self.digest,
            content_bytes=sink.num_bytes,
            content_blake2b=sink.hexdigest(),
            version=found.version,
            first_finished_s=now if first_finished_s is None else first_finished_s,
            finished_s=now,
            summary=summary,
        )
        name = self.folder.receipt_name(shard.name)
        storage.write(name, receipt.to_json().encode() + b"\n")
        return summary

    def remove_units(self, shard: Shard) -> None:
        """Remove a finished shard's units."""
        self.folder.storage.remove_folder(self.folder.units_folder(shard.name))

    def _unit_files(self, shard: Shard) -> list[Unit]:
        """The units that have a file, by first row, the longest first where several begin."""
        files = self.folder.storage.list(self.folder.units_folder(shard.name))
        ranges = (range_of_unit(file.name) for file in files)
        return [
            Unit(shard, start, stop)
            for start, stop in sorted(filter(None, ranges), key=lambda r: (r[0], -r[1]))
            if start < stop <= shard.num_rows
        ]

    def _read_unit_file(self, unit: Unit) -> tuple[Receipt, bytes] | None:
        """The receipt and what it vouches for; None unless it does."""
        try:
            head, _, content = self.folder.storage.read(self.unit_name(unit)).partition(b"\n")
        except FileNotFoundError:
            return None
        receipt = Receipt.parse(head)
        if receipt is None or not receipt.is_for(unit.shard, unit.start, unit.stop, self.digest):
            return None
        return (receipt, content) if hash_bytes(content) == receipt.content_blake2b else None


def require_unchanged(shard: Shard) -> None:
    """Raises `ChangedInputError` if the shard's file is not the one that the run began with."""
    if fingerprint(shard.path) != shard.fingerprint:
        raise ChangedInputError(
            f"{shard.path} has changed since the run began; what is finished is of other rows"
        )


def stored_receipt(folder: RunFolder, shard_name: str) -> Receipt | None:
    """What vouches for a shard's output, whether or not it is right; None if nothing does."""
    try:
        return Receipt.parse(folder.storage.read(folder.receipt_name(shard_name)))
    except FileNotFoundError:
        return None


def range_of_unit(file_name: str) -> tuple[int, int] | None:
    """First row and row after the last of a unit, from its file's name."""
    match = UNIT_NAME.fullmatch(file_name.rpartition("/")[2])
    return (int(match["start"]), int(match["stop"])) if match else None


def exact_cover(units: Sequence[Unit], num_rows: int) -> list[Unit] | None:
    """Units that hold rows [0, num_rows) once each, in order; None if no choice of `units` does."""
    # From the last row back: what is reachable from a row on is known when that row is asked for.
    following: dict[int, Unit | None] = {num_rows: None}
    for unit in sorted(units, key=lambda u: u.start, reverse=True):
        if unit.stop in following:
            following[unit.start] = unit
    if 0 not in following:
        return None
    cover: list[Unit] = []
    while (link := following[cover[-1].stop if cover else 0]) is not None:
        cover.append(link)
    return cover
