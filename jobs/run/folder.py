"""Output: the folder a run writes, and what makes it safe to stop and start again.

    OUTPUT/<shard>.parquet              finished shards: input rows plus score columns
    OUTPUT/.rsr/manifest.json           what the run is: settings, versions, input shards
    OUTPUT/.rsr/receipts/<shard>.json   a finished shard: what vouches for its output
    OUTPUT/.rsr/units/<shard>/*.scores  finished units of unfinished shards: a receipt, one line of
                                        JSON, then the score columns as Parquet
    OUTPUT/.rsr/staged/                 JSON input as Parquet
    OUTPUT/.rsr/run.log                 what vLLM, Ray and the workers have to say
    OUTPUT/.rsr/events.jsonl            what happened when, one JSON object a line (`events.py`)
    OUTPUT/.rsr/lock                    held while a run writes

OUTPUT is a local folder or a prefix of an object store; either way every file appears whole
under its name or not at all. Knows nothing of models or
Ray.
"""

import io
import json
import logging
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import polars as pl
import pyarrow as pa

from rsr.jobs.errors import UsageError
from rsr.jobs.run.receipts import Receipt
from rsr.jobs.shards import score_columns
from rsr.jobs.shards.parquet import fingerprint
from rsr.jobs.shards.score_columns import Summary
from rsr.jobs.shards.shard import Shard, Unit
from rsr.jobs.shards.writer import write_shard
from rsr.jobs.storage import Storage, StoredFile, is_remote, open_storage
from rsr.jobs.storage.hashing import HashingFile, hash_bytes, hash_file
from rsr.jobs.storage.locks import HeldError, Holder

logger = logging.getLogger(__name__)

STATE_FOLDER = ".rsr"
MANIFEST = f"{STATE_FOLDER}/manifest.json"
LOCK = f"{STATE_FOLDER}/lock"
UNIT_NAME = re.compile(r"(?P<start>\d{12})-(?P<stop>\d{12})\.scores")


class IncompleteShardError(Exception):
    """A shard was to be written before all of its rows were scored."""


class ChangedInputError(Exception):
    """An input file is not the one that was scored."""


@dataclass(frozen=True, slots=True)
class OutputFolder:
    """A run's output. Making one touches nothing; `create` does.

    root: a local path, or an object store's URL. settings: `hash_identity` of the run that writes;
    files of any other are not trusted. command: the `rsr` command whose run this is; a folder of
    another's is refused.
    """

    root: Path | str
    settings: str = ""
    command: str = "score"

    @property
    def storage(self) -> Storage:
        return open_storage(self.root)

    @property
    def state(self) -> Path:
        """Where this machine puts what grows while a run goes: logs and events.

        Part of a local OUTPUT; beside an object store, which cannot append, a folder of the
        machine's own.
        """
        if not is_remote(str(self.root)):
            return Path(self.root) / STATE_FOLDER
        label = hash_bytes(str(self.root).encode())
        return Path(tempfile.gettempdir()) / f"rsr-{label}"

    @property
    def log_path(self) -> Path:
        return self.state / "run.log"

    @property
    def events_path(self) -> Path:
        return self.state / "events.jsonl"

    @staticmethod
    def receipt_name(shard_name: str) -> str:
        return f"{STATE_FOLDER}/receipts/{shard_name}.json"

    @staticmethod
    def units_folder(shard_name: str) -> str:
        return f"{STATE_FOLDER}/units/{shard_name}"

    def unit_name(self, unit: Unit) -> str:
        # Not .parquet: a glob over OUTPUT must never take these for output.
        return f"{self.units_folder(unit.shard.name)}/{unit.start:012d}-{unit.stop:012d}.scores"

    @staticmethod
    def staged_name(name: str, source_fingerprint: str) -> str:
        """Where JSON input of this content, to be written as `name`, stands as Parquet."""
        label = hash_bytes(source_fingerprint.encode())[:8]
        return f"{STATE_FOLDER}/staged/{name.removesuffix('.parquet')}.{label}.parquet"

    def read_manifest(self) -> dict[str, Any] | None:
        """The earlier run's manifest, or None; `UsageError` if the folder is not a run's."""
        try:
            manifest = cast(dict[str, Any], json.loads(self.storage.read(MANIFEST)))
        except (FileNotFoundError, NotADirectoryError):
            if any(not file.name.startswith(f"{STATE_FOLDER}/") for file in self.storage.list()):
                raise UsageError(
                    f"{self.root} is not empty and was not written by rsr {self.command}"
                ) from None
            return None
        except ValueError as error:
            raise UsageError(
                f"{self.storage.describe(MANIFEST)} is damaged ({error}); use --overwrite"
            ) from error
        writer = manifest.get("writer", "score")
        if writer != self.command:
            # Not even with --overwrite: a night of scoring is not lost to a mistyped path.
            raise UsageError(f"{self.root} holds what rsr {writer} wrote; choose another OUTPUT")
        return manifest

    def create(self, manifest: dict[str, Any]) -> None:
        text = json.dumps({"writer": self.command} | manifest, indent=2)
        self.storage.write(MANIFEST, text.encode() + b"\n")

    def clear(self, manifest: dict[str, Any]) -> None:
        """Remove what the run of `manifest` wrote, and nothing else."""
        for shard in manifest["shards"]:
            self.storage.remove(shard["name"])
        for part in ("receipts", "units", "staged"):
            self.storage.remove_folder(f"{STATE_FOLDER}/{part}")
        self.storage.remove(MANIFEST)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process, until it ends or is known to be dead."""
        with ExitStack() as held:
            try:
                held.enter_context(self.storage.hold(LOCK))
            except HeldError as error:
                raise UsageError(f"{self.root} is being written by {error}") from error
            except OSError as error:
                reason = error.strerror or error
                raise UsageError(f"OUTPUT {self.root} cannot be written: {reason}") from error
            yield

    def publish_logs(self) -> None:
        """Put a copy of what grew on this machine into OUTPUT, where it is on an object store."""
        if not is_remote(str(self.root)) or not self.state.is_dir():
            return
        for file in self.state.iterdir():
            try:
                with self.storage.writing(f"{STATE_FOLDER}/{file.name}") as temporary:
                    shutil.copyfile(file, temporary)
            except OSError as error:
                logger.warning("%s stays on this machine alone: %s", file, error)

    def holder(self) -> Holder | None:
        """Who writes here now."""
        return self.storage.holder(LOCK)

    def commit_unit(self, unit: Unit, frame: pl.DataFrame) -> Summary:
        """Keep a scored unit, with its receipt, until its shard is complete."""
        assert len(frame) == unit.num_rows, "a unit must come back with all its rows"
        buffer = io.BytesIO()
        frame.write_parquet(buffer)
        content = buffer.getvalue()
        now = time.time()
        receipt = Receipt(
            start=unit.start,
            stop=unit.stop,
            fingerprint=unit.shard.fingerprint,
            settings=self.settings,
            content_bytes=len(content),
            content_blake2b=hash_bytes(content),
            version="",
            first_finished_s=now,
            finished_s=now,
            summary=Summary.of(frame),
        )
        self.storage.write(self.unit_name(unit), receipt.to_json().encode() + b"\n" + content)
        return receipt.summary

    def kept_units(self, shard: Shard) -> list[tuple[Unit, Receipt]]:
        """Finished units that can be trusted and do not overlap, in order of rows.

        Whatever cut them: a unit that was halved stands beside its neighbours as two.
        """
        kept: list[tuple[Unit, Receipt]] = []
        cursor = 0
        for unit in self._unit_files(shard):
            if unit.start >= cursor and (read := self._read_unit_file(unit)) is not None:
                kept.append((unit, read[0]))
                cursor = unit.stop
        return kept

    def _unit_files(self, shard: Shard) -> list[Unit]:
        """The units that have a file, by first row, the longest first where several begin."""
        files = self.storage.list(self.units_folder(shard.name))
        ranges = (range_of_unit(file.name) for file in files)
        return [
            Unit(shard, start, stop)
            for start, stop in sorted(filter(None, ranges), key=lambda r: (r[0], -r[1]))
            if start < stop <= shard.num_rows
        ]

    def read_unit(self, unit: Unit) -> pl.DataFrame | None:
        """A finished unit's score columns; None if there are none that can be trusted."""
        read = self._read_unit_file(unit)
        return None if read is None else pl.read_parquet(read[1])

    def _read_unit_file(self, unit: Unit) -> tuple[Receipt, bytes] | None:
        """The receipt and what it vouches for; None unless it does."""
        try:
            head, _, content = self.storage.read(self.unit_name(unit)).partition(b"\n")
        except FileNotFoundError:
            return None
        receipt = Receipt.parse(head)
        if receipt is None or not receipt.is_for(unit.shard, unit.start, unit.stop, self.settings):
            return None
        return (receipt, content) if hash_bytes(content) == receipt.content_blake2b else None

    def stored_receipt(self, shard_name: str) -> Receipt | None:
        """A shard's receipt as it stands, whatever has become of the output."""
        try:
            return Receipt.parse(self.storage.read(self.receipt_name(shard_name)))
        except FileNotFoundError:
            return None

    def read_receipt(self, shard: Shard) -> Receipt | None:
        """A finished shard's receipt; None unless its output is there and the one vouched for.

        An output that was not written since is not read again: what decayed on the disk without
        being written is for `rsr verify` to find.
        """
        receipt = self.stored_receipt(shard.name)
        if receipt is None or not receipt.is_for(shard, 0, shard.num_rows, self.settings):
            return None
        found = self.storage.find(shard.name)
        if found is None or found.num_bytes != receipt.content_bytes:
            return None
        if found.version == receipt.version or self.has_content(found, receipt):
            return receipt
        return None

    def has_content(self, file: StoredFile, receipt: Receipt) -> bool:
        """Whether a file is, byte for byte, the one that its receipt vouches for."""
        with self.storage.open(file.name) as opened:
            return hash_file(opened) == receipt.content_blake2b

    def commit_shard(self, shard: Shard, identity: dict[str, Any]) -> Summary:
        """Write the shard's output from its input rows and finished units, then its receipt.

        Takes any finished units that hold every row once, however they were cut. Raises
        `IncompleteShardError` if there are none such, `ChangedInputError` if the input is another
        by now. Streams: holds a unit's score columns and a row group's rows at a time.
        """
        if fingerprint(shard.path) != shard.fingerprint:
            raise ChangedInputError(
                f"{shard.path} has changed since the run began; its scores are of other rows"
            )
        trusted = {unit: r for unit in self._unit_files(shard) if (r := self._receipt_of(unit))}
        units = exact_cover(list(trusted), shard.num_rows)
        if units is None:
            raise IncompleteShardError(
                f"{shard.name}: not every row has a finished unit that can be trusted"
            )
        receipts = [trusted[unit] for unit in units]
        summary = Summary()
        for receipt in receipts:
            summary.merge(receipt.summary)
        with self.storage.writing(shard.name) as temporary, temporary.open("wb") as file:
            sink = HashingFile(file)
            write_shard(sink, shard, self._score_tables(units, identity), identity)
        found = self.storage.find(shard.name)
        assert found is not None, "a file that was written is there"
        finished_s = [time.time()] + [receipt.finished_s for receipt in receipts]
        written = Receipt(
            start=0,
            stop=shard.num_rows,
            fingerprint=shard.fingerprint,
            settings=self.settings,
            content_bytes=sink.num_bytes,
            content_blake2b=sink.hexdigest(),
            version=found.version,
            first_finished_s=min(finished_s),
            finished_s=max(finished_s),
            summary=summary,
        )
        self.storage.write(self.receipt_name(shard.name), written.to_json().encode() + b"\n")
        self.storage.remove_folder(self.units_folder(shard.name))
        return summary

    def _receipt_of(self, unit: Unit) -> Receipt | None:
        read = self._read_unit_file(unit)
        return None if read is None else read[0]

    def _score_tables(self, units: Sequence[Unit], identity: dict[str, Any]) -> Iterator[pa.Table]:
        """The units' score columns, one after the other, at least one table, if an empty one."""
        with_tokens = identity["settings"]["token_scores"]
        yield score_columns.to_arrow(score_columns.to_frame([], token_columns=with_tokens))
        for unit in units:
            frame = self.read_unit(unit)
            if frame is None:
                raise IncompleteShardError(f"{self.unit_name(unit)} was damaged a moment ago")
            yield score_columns.to_arrow(frame)


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
