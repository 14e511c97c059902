"""OUTPUT: where a run keeps everything, and who may write there.

    OUTPUT/<shard>.parquet              finished shards
    OUTPUT/.rsr/manifest.json           what the run is: command, settings, versions, input shards
    OUTPUT/.rsr/receipts/<shard>.json   a finished shard: what vouches for its output
    OUTPUT/.rsr/units/<shard>/*.scores  finished units of unfinished shards: a receipt, one line of
                                        JSON, then the unit's table as Parquet
    OUTPUT/.rsr/kept/<shard>.rows       which rows of the input a selection took
    OUTPUT/.rsr/composition.json        the result of a selection
    OUTPUT/.rsr/staged/                 JSON input, and lists of responses as rows, as Parquet
    OUTPUT/.rsr/run.log                 what vLLM, Ray and the workers have to say
    OUTPUT/.rsr/answers.jsonl           answers to `rsr refine` that no finished unit holds yet
    OUTPUT/.rsr/events.jsonl            what happened when, one JSON object a line (`events.py`)
    OUTPUT/.rsr/lock                    held while a run writes

OUTPUT is a local folder or a prefix of an object store; either way every file appears whole under
its name or not at all. Where it is called `x.parquet` it is one file, the only shard's output, and
`.x.parquet.rsr/` beside it stands for `.rsr/`. Where it is called `x.jsonl` that file has the rows
of the only shard's output, `.x.jsonl.rsr/rows.parquet`, as JSON lines (`lines_file.py`). What of
all this is trusted is `store.py`'s to say.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rsr.jobs.errors import UsageError
from rsr.jobs.run.manifest import STATE_FOLDER, Manifest, ManifestError, require_inside
from rsr.jobs.run.receipts import Receipt
from rsr.jobs.shards.inputs import is_parquet
from rsr.jobs.shards.lines_file import LinesFile, is_lines
from rsr.jobs.storage import Storage, is_remote, locate, open_storage
from rsr.jobs.storage.atomic import TEMPORARY_NAME
from rsr.jobs.storage.hashing import hash_bytes
from rsr.jobs.storage.locks import HeldError, Holder
from rsr.jobs.storage.one_file import OneFileStorage, folder_beside

logger = logging.getLogger(__name__)

MANIFEST = f"{STATE_FOLDER}/manifest.json"
LOCK = f"{STATE_FOLDER}/lock"
RECEIPTS = f"{STATE_FOLDER}/receipts"
STAGED = f"{STATE_FOLDER}/staged"
PARTS_OF_A_RUN = ("receipts", "units", "kept")
"""Folders below `STATE_FOLDER` that belong to one run and go with it."""
COMPOSITION = f"{STATE_FOLDER}/composition.json"


@dataclass(frozen=True, slots=True)
class EarlierRun:
    """A run that an earlier command left in OUTPUT.

    manifest: None where it is damaged, with the `damage` in words. outputs: names of the files
    that the run wrote outside of `STATE_FOLDER`.
    """

    manifest: Manifest | None
    outputs: tuple[str, ...]
    damage: str = ""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder, or the one file, that a run writes. Making one touches nothing.

    root: a local path, or an object store's URL.
    """

    root: Path | str

    def __str__(self) -> str:
        return str(self.root) if self.is_one_file else f"{self.root}/"

    @property
    def is_one_file(self) -> bool:
        """Whether OUTPUT is a file: its name says so, and no folder of that name is there."""
        place = str(self.root)
        is_folder = not is_remote(place) and Path(place).is_dir()
        return (is_parquet(place) or is_lines(place)) and not is_folder

    @property
    def lines(self) -> LinesFile | None:
        """OUTPUT itself where it is one file of JSON lines; `storage` has its rows as Parquet."""
        return LinesFile(str(self.root)) if self.is_one_file and is_lines(str(self.root)) else None

    @property
    def storage(self) -> Storage:
        if not self.is_one_file:
            return open_storage(self.root)
        around, name = locate(self.root if self.lines is None else self.lines.rows_path)
        beside = open_storage(self._beside)
        return OneFileStorage(str(self.root), around, name, STATE_FOLDER, beside)

    @property
    def _beside(self) -> str:
        """What stands for `STATE_FOLDER` where OUTPUT is one file."""
        return folder_beside(str(self.root))

    @property
    def state(self) -> Path:
        """Where this machine puts what grows while a run goes: logs and events.

        Part of a local OUTPUT; beside an object store, which cannot append, a folder of the
        machine's own.
        """
        if not is_remote(str(self.root)):
            return Path(self._beside) if self.is_one_file else Path(self.root) / STATE_FOLDER
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
        return f"{RECEIPTS}/{shard_name}.json"

    @staticmethod
    def units_folder(shard_name: str) -> str:
        return f"{STATE_FOLDER}/units/{shard_name}"

    @staticmethod
    def kept_rows_name(shard_name: str) -> str:
        return f"{STATE_FOLDER}/kept/{shard_name}.rows"

    @staticmethod
    def staged_name(name: str, source_version: str) -> str:
        """Where JSON input of this version, to be written as `name`, stands as Parquet."""
        label = hash_bytes(source_version.encode())[:8]
        return f"{STAGED}/{name.removesuffix('.parquet')}.{label}.parquet"

    def read_manifest(self) -> Manifest | None:
        """The manifest, or None if there is none. Raises `ManifestError` if it is damaged."""
        try:
            return Manifest.parse(self.storage.read(MANIFEST))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write_manifest(self, manifest: Manifest) -> None:
        self.storage.write(MANIFEST, manifest.to_json().encode() + b"\n")

    def require_run(self) -> Manifest:
        """The manifest of the run that is here; `UsageError` if there is none to be read."""
        try:
            manifest = self.read_manifest()
        except ManifestError as error:
            raise UsageError(
                f"{self.storage.describe(MANIFEST)} cannot be used: {error}. The run's own "
                "command with --overwrite starts it anew"
            ) from error
        except OSError as error:
            raise UsageError(str(error)) from error
        if manifest is None:
            raise UsageError(f"{self.root} holds no run: expected the OUTPUT of an rsr command")
        return manifest

    def earlier_run(self, writer: str) -> EarlierRun | None:
        """The run that is here, or None where a new one may begin.

        Raises `UsageError` if the folder is not a run's, or of another command than `writer`.
        """
        try:
            manifest = self.read_manifest()
            damage = "its manifest is gone"
        except ManifestError as error:
            manifest, damage = None, f"its manifest cannot be used: {error}"
        if manifest is not None:
            if manifest.writer != writer:
                # Not even with --overwrite: a night of scoring is not lost to a mistyped path.
                raise UsageError(
                    f"{self.root} holds what rsr {manifest.writer} wrote; choose another OUTPUT"
                )
            return EarlierRun(manifest, tuple(shard.name for shard in manifest.shards))
        return self._damaged_run(damage)

    def _damaged_run(self, damage: str) -> EarlierRun | None:
        """What receipts vouch for is a run's, whatever became of its manifest."""
        files = [file.name for file in self.storage.list()]
        if self.is_one_file:
            outputs = tuple(self._names_with_receipts(files))
            # By whatever name a receipt has it.
            files = [f for f in files if f.startswith(f"{STATE_FOLDER}/") or not outputs]
            if self.lines is not None and not outputs and self.lines.exists():
                files.append(str(self.root))
        else:
            outputs = tuple(name for name in files if self._has_receipt(name))
        strangers = [
            name
            for name in files
            if not name.startswith(f"{STATE_FOLDER}/")
            and name not in outputs
            and not TEMPORARY_NAME.fullmatch(PurePosixPath(name).name)
        ]
        if strangers:
            if self.is_one_file:
                raise UsageError(f"{self.root} is a file that no run of rsr wrote")
            raise UsageError(
                f"{self.root} is not empty, and no run's receipt names {strangers[0]!r}"
                + (f" and {len(strangers) - 1:,} more files" if len(strangers) > 1 else "")
                + ": choose another OUTPUT, or move what is there"
            )
        is_run = outputs or MANIFEST in files or any(name.startswith(RECEIPTS) for name in files)
        return EarlierRun(None, outputs, damage) if is_run else None

    def _names_with_receipts(self, files: Sequence[str]) -> list[str]:
        """Shards of the receipts among `files`."""
        prefix, suffix = f"{RECEIPTS}/", ".json"
        names = (f[len(prefix) : -len(suffix)] for f in files if f.startswith(prefix))
        return [name for name in names if self._has_receipt(name)]

    def _has_receipt(self, name: str) -> bool:
        try:
            require_inside(name)
            return Receipt.parse(self.storage.read(self.receipt_name(name))) is not None
        except (ManifestError, OSError):
            return False

    def clear(self, run: EarlierRun, *, keep_staged: Collection[str] = ()) -> None:
        """Remove what an earlier run wrote, and nothing else.

        keep_staged: names of staged files that the next run reads.
        """
        if self.lines is not None:
            self.lines.remove()
        for name in run.outputs:
            self.storage.remove(name)
        for part in PARTS_OF_A_RUN:
            self.storage.remove_folder(f"{STATE_FOLDER}/{part}")
        for file in self.storage.list(STAGED):
            if file.name not in keep_staged:
                self.storage.remove(file.name)
        for name in (COMPOSITION, MANIFEST):
            self.storage.remove(name)

    def remove_leftovers(self) -> None:
        """Remove what writers that died have left half-written."""
        self.storage.remove_leftovers()
        if self.lines is not None:
            self.lines.remove_leftovers()

    def remove_empty_folders(self, name: str) -> None:
        """Remove the folders at and below `name` that hold nothing; a local OUTPUT has such."""
        if is_remote(str(self.root)):
            return
        for parent, _, _ in os.walk(self.storage.describe(name), topdown=False):
            with suppress(OSError):
                os.rmdir(parent)

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

    def holder(self) -> Holder | None:
        """Who writes here now."""
        return self.storage.holder(LOCK)

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
