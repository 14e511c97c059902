"""Output: the folder a run writes, and what makes it safe to stop and start again.

    OUTPUT/<shard>.parquet              finished shards: input rows plus score columns
    OUTPUT/.rsr/manifest.json           what the run is: settings, versions, input shards
    OUTPUT/.rsr/receipts/<shard>.json   a finished shard: rows, tokens, statuses
    OUTPUT/.rsr/units/<shard>/*.scores  score columns of finished units of unfinished shards
    OUTPUT/.rsr/run.log                 what vLLM, Ray and the workers have to say
    OUTPUT/.rsr/events.jsonl            what happened when, one JSON object a line (`events.py`)
    OUTPUT/.rsr/lock                    held while a run writes

Every file appears whole under its name or not at all. Input columns are copied with pyarrow,
type for type; only the score columns are made by Polars. Knows nothing of models or Ray.
"""

import fcntl
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from rsr.jobs import score_columns
from rsr.jobs.errors import UsageError
from rsr.jobs.files import atomic_path, write_text_atomically
from rsr.jobs.score_columns import Summary
from rsr.jobs.shards import Shard, Unit, iter_rows, open_parquet

STATE_FOLDER = ".rsr"
METADATA_KEY = b"rsr"
"""Key of the run's identity, as JSON, in the metadata of every output file."""


UNIT_NAME = re.compile(r"(?P<start>\d{12})-(?P<stop>\d{12})\.scores")


class IncompleteShardError(Exception):
    """A shard was to be written before all of its rows were scored."""


@dataclass(frozen=True, slots=True)
class OutputFolder:
    """A run's output. Making one touches nothing; `create` does."""

    root: Path

    @property
    def state(self) -> Path:
        return self.root / STATE_FOLDER

    @property
    def manifest_path(self) -> Path:
        return self.state / "manifest.json"

    @property
    def log_path(self) -> Path:
        return self.state / "run.log"

    @property
    def events_path(self) -> Path:
        return self.state / "events.jsonl"

    def shard_path(self, shard: Shard) -> Path:
        return self.root / shard.name

    def receipt_path(self, shard: Shard) -> Path:
        return self.state / "receipts" / f"{shard.name}.json"

    def units_folder(self, shard: Shard) -> Path:
        return self.state / "units" / shard.name

    def unit_path(self, unit: Unit) -> Path:
        # Not .parquet: a glob over OUTPUT must never take these for output.
        return self.units_folder(unit.shard) / f"{unit.start:012d}-{unit.stop:012d}.scores"

    def staged_path(self, name: str) -> Path:
        """Where JSON input named `name` stands as Parquet."""
        return self.state / "staged" / name

    def read_manifest(self) -> dict[str, Any] | None:
        """The earlier run's manifest, or None; `UsageError` if the folder is not a run's."""
        try:
            return json.loads(self.manifest_path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            pass
        except ValueError as error:
            raise UsageError(
                f"{self.manifest_path} is damaged ({error}); use --overwrite"
            ) from error
        if self.root.is_dir() and any(e.name != STATE_FOLDER for e in self.root.iterdir()):
            raise UsageError(f"{self.root} is not empty and was not written by rsr score")
        return None

    def create(self, manifest: dict[str, Any]) -> None:
        write_text_atomically(self.manifest_path, json.dumps(manifest, indent=2) + "\n")

    def clear(self, manifest: dict[str, Any]) -> None:
        """Remove what the run of `manifest` wrote, and nothing else."""
        for shard in manifest["shards"]:
            (self.root / shard["name"]).unlink(missing_ok=True)
        for part in ("receipts", "units", "staged"):
            shutil.rmtree(self.state / part, ignore_errors=True)
        self.manifest_path.unlink(missing_ok=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process; the kernel lets go of it however the process ends."""
        with self._open_lock() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                raise UsageError(f"{self.root} is being written by {file.read()}") from error
            file.truncate(0)
            started = time.strftime("%Y-%m-%d %H:%M:%S %Z")
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {started}")
            file.flush()
            yield

    def _open_lock(self) -> TextIO:
        try:
            self.state.mkdir(parents=True, exist_ok=True)
            return (self.state / "lock").open("a+")
        except OSError as error:
            raise UsageError(f"OUTPUT {self.root} cannot be written: {error.strerror}") from error

    def commit_unit(self, unit: Unit, frame: pl.DataFrame) -> Summary:
        """Keep a scored unit until its shard is complete."""
        assert len(frame) == unit.num_rows, "a unit must come back with all its rows"
        with atomic_path(self.unit_path(unit)) as temporary:
            frame.write_parquet(temporary)
        return Summary.of(frame)

    def kept_units(self, shard: Shard) -> list[tuple[Unit, Summary]]:
        """Finished units that can be trusted and do not overlap, in order of rows.

        Whatever cut them: a unit that was halved stands beside its neighbours as two.
        """
        kept: list[tuple[Unit, Summary]] = []
        cursor = 0
        for unit in self._unit_files(shard):
            if unit.start >= cursor and (frame := self.read_unit(unit)) is not None:
                kept.append((unit, Summary.of(frame)))
                cursor = unit.stop
        return kept

    def _unit_files(self, shard: Shard) -> list[Unit]:
        """The units that have a file, by first row, the longest first where several begin."""
        names = (
            UNIT_NAME.fullmatch(path.name) for path in self.units_folder(shard).glob("*.scores")
        )
        ranges = ((int(name["start"]), int(name["stop"])) for name in names if name)
        return [
            Unit(shard, start, stop)
            for start, stop in sorted(ranges, key=lambda r: (r[0], -r[1]))
            if start < stop <= shard.num_rows
        ]

    def read_unit(self, unit: Unit) -> pl.DataFrame | None:
        """A finished unit's score columns; None if there are none that can be trusted."""
        path = self.unit_path(unit)
        if not path.exists():
            return None
        try:
            frame = pl.read_parquet(path.read_bytes())
        except (pl.exceptions.PolarsError, OSError):
            return None
        return frame if len(frame) == unit.num_rows else None

    def read_receipt(self, shard: Shard) -> Summary | None:
        """A finished shard's summary; None unless its output is there with all its rows."""
        try:
            receipt = json.loads(self.receipt_path(shard).read_text(encoding="utf-8"))
            num_rows = pq.read_metadata(self.shard_path(shard)).num_rows
            size = self.shard_path(shard).stat().st_size
        except (OSError, ValueError, pa.ArrowException):
            return None
        if receipt["fingerprint"] != shard.fingerprint or receipt["output_bytes"] != size:
            return None
        return _summary_from_json(receipt["summary"]) if num_rows == shard.num_rows else None

    def commit_shard(self, shard: Shard, identity: dict[str, Any]) -> Summary:
        """Write the shard's output from its input rows and finished units, then its receipt.

        Takes any finished units that hold every row once, however they were cut. Raises
        `IncompleteShardError` if there are none such. Streams: holds the score columns, and one
        batch of the input at a time.
        """
        units = exact_cover(self._unit_files(shard), shard.num_rows)
        frames = [frame for unit in units or () if (frame := self.read_unit(unit)) is not None]
        if units is None or len(frames) < len(units):
            raise IncompleteShardError(f"{shard.name}: not every row has a finished unit")
        token_columns = identity["settings"]["token_scores"]
        scores = (
            pl.concat(frames) if frames else score_columns.to_frame([], token_columns=token_columns)
        )
        assert len(scores) == shard.num_rows, "every row has exactly one score"
        with atomic_path(self.shard_path(shard)) as temporary:
            _write_shard(temporary, shard, score_columns.to_arrow(scores), identity)
        summary = Summary.of(scores)
        receipt = {
            "fingerprint": shard.fingerprint,
            "output_bytes": self.shard_path(shard).stat().st_size,
            "summary": asdict(summary),
        }
        write_text_atomically(self.receipt_path(shard), json.dumps(receipt, indent=2) + "\n")
        shutil.rmtree(self.units_folder(shard), ignore_errors=True)
        return summary


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
    while (unit := following[cover[-1].stop if cover else 0]) is not None:
        cover.append(unit)
    return cover


def _write_shard(path: Path, shard: Shard, scores: pa.Table, identity: dict[str, Any]) -> None:
    with open_parquet(shard.path) as source:
        schema = source.schema_arrow
        compression = _compression(source)
    kept = [i for i, name in enumerate(schema.names) if not score_columns.is_score_column(name)]
    metadata = {**(schema.metadata or {}), METADATA_KEY: json.dumps(identity).encode()}
    fields = [schema.field(i) for i in kept] + list(scores.schema)
    full = pa.schema(fields, metadata=metadata)
    with pq.ParquetWriter(path, full, compression=compression) as writer:
        start = 0
        for batch in iter_rows(shard.path, 0, shard.num_rows):
            part = scores.slice(start, batch.num_rows).combine_chunks()
            arrays = [batch.column(i) for i in kept] + [
                column.chunk(0) if column.num_chunks else pa.array([], column.type)
                for column in part.columns
            ]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=full))
            start += batch.num_rows


def _compression(source: pq.ParquetFile) -> str:
    """The input's own codec, so that the output is no larger than expected."""
    if not source.metadata.num_row_groups or not source.metadata.num_columns:
        return "zstd"
    codec = source.metadata.row_group(0).column(0).compression.lower()
    return "none" if codec == "uncompressed" else codec


def _summary_from_json(values: dict[str, Any]) -> Summary:
    dataset = score_columns.DatasetRsr(**values.pop("dataset"))
    return Summary(**values, dataset=dataset)
