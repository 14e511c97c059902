"""Whether a run's output is what it should be, looked at from the files alone.

Every shard is there with a receipt, and every byte is as its receipt says. What a file of one
command must hold, and how it compares with its input, is that command's to say: see `ShardChecks`.
Nothing is changed.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Literal, Protocol, cast

import pyarrow as pa

from rsr.jobs.errors import UsageError
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.manifest import (
    STATE_FOLDER,
    Identity,
    InputShard,
    Manifest,
    ManifestError,
)
from rsr.jobs.run.receipts import Receipt
from rsr.jobs.run.staging import parquet_of
from rsr.jobs.run.store import RunStore, stored_receipt
from rsr.jobs.shards.compare import first_difference
from rsr.jobs.shards.inputs import PARQUET_SUFFIXES, find_inputs
from rsr.jobs.shards.parquet import file_version, fingerprint, open_parquet
from rsr.jobs.shards.reader import ShardReader
from rsr.jobs.shards.staging import is_staged_from, needs_staging
from rsr.jobs.storage import is_remote
from rsr.jobs.terminal import shell_command

CHECKS = {
    "score": "rsr.jobs.scoring.verify",
    "sample": "rsr.jobs.sampling.verify",
    "grade": "rsr.jobs.grading.verify",
    "refine": "rsr.jobs.refinement.verify",
    "compare": "rsr.jobs.comparison.verify",
    "export": "rsr.jobs.export.verify",
    "filter": "rsr.jobs.selection.verify",
    "select": "rsr.jobs.selection.verify",
}
"""The module whose `CHECKS` look into a run's files, by the run's command. Named here and
imported when needed, because what is common to all runs must not depend on any of them."""

Repair = Literal["none", "rerun", "remove", "overwrite"]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong with a file of OUTPUT.

    repair: what puts it right: nothing that this command knows; the run's own command; the same
    after the file is removed; or the run anew, since its input is another.
    """

    file: str
    what: str
    repair: Repair = "none"


@dataclass(slots=True)
class Verification:
    """What was looked at and what is wrong. repair: the commands that put it right, in order."""

    output: str
    is_deep: bool
    num_shards: int = 0
    num_rows: int = 0
    problems: list[Problem] = field(default_factory=list)
    repair: list[str] = field(default_factory=list)


class ShardChecks(Protocol):
    """What the files of one command must hold."""

    def wrong_in_table(
        self, folder: RunFolder, manifest: Manifest, shard: InputShard, receipt: Receipt
    ) -> Iterator[str]:
        """What is wrong with an output whose bytes are as its receipt says."""

    def source_of(
        self,
        manifest: Manifest,
        shard: InputShard,
        place: str | None,
        files: Mapping[str, str],
    ) -> str | None:
        """What a shard was made of, None if it is not there.

        place: where INPUT is now, if it was moved; files: of it, by the name of the output.
        """

    def is_another_input(
        self, folder: RunFolder, manifest: Manifest, shard: InputShard, source: str
    ) -> bool:
        """Whether an input is seen to be another without comparing its rows."""

    def wrong_beside_input(
        self, folder: RunFolder, manifest: Manifest, shard: InputShard, source: str
    ) -> Iterator[str]:
        """Where an output differs from what its input, the file `source`, makes of it.

        Raises `UsageError`, `OSError` or `pa.ArrowException` if `source` cannot be read.
        """

    def wrong_in_run(
        self, folder: RunFolder, manifest: Manifest, receipts: Mapping[str, Receipt]
    ) -> Iterator[Problem]:
        """What is wrong with a complete run as a whole. receipts: by the shard's name."""


class ChecksByFile:
    """The part of `ShardChecks` that is the same where each file of INPUT becomes one of OUTPUT."""

    def source_of(
        self,
        manifest: Manifest,
        shard: InputShard,
        place: str | None,
        files: Mapping[str, str],
    ) -> str | None:
        return shard.source if place is None else files.get(shard.name)

    def is_another_input(
        self, folder: RunFolder, manifest: Manifest, shard: InputShard, source: str
    ) -> bool:
        if needs_staging(source, manifest.exploded):
            return not is_staged_from(folder.storage.describe(shard.name), source)
        return fingerprint(source) != shard.fingerprint


class ChecksOfAddedColumns(ChecksByFile):
    """The part of `ShardChecks` that is the same where OUTPUT is INPUT and some columns more."""

    def metadata_key(self, manifest: Manifest) -> bytes:
        """Where a file's metadata say which run wrote it."""
        raise NotImplementedError

    def is_added(self, manifest: Manifest) -> Callable[[str], bool]:
        """Whether a column is not INPUT's."""
        raise NotImplementedError

    def wrong_in_metadata(self, schema: pa.Schema, manifest: Manifest) -> Iterator[str]:
        """Whether the file says that another run wrote it, or says nothing."""
        try:
            text = (schema.metadata or {})[self.metadata_key(manifest)]
            digest = Identity.parse(json.loads(text)).digest
        except (KeyError, ValueError, ManifestError):
            digest = None
        if digest != manifest.identity.digest:
            yield "its metadata name other settings than the run's"

    def wrong_beside_input(
        self, folder: RunFolder, manifest: Manifest, shard: InputShard, source: str
    ) -> Iterator[str]:
        written = folder.storage.describe(shard.name)
        with parquet_of(source, manifest.exploded, shard.num_rows) as path:
            what = first_difference(path, written, shard.num_rows, is_added=self.is_added(manifest))
        if what is not None:
            yield what

    def wrong_in_run(
        self, folder: RunFolder, manifest: Manifest, receipts: Mapping[str, Receipt]
    ) -> Iterator[Problem]:
        yield from ()


class ChecksOfRows(ChecksOfAddedColumns):
    """The part of `ShardChecks` that is the same where a run gives each row a status.

    looked_at: the columns that `statuses` asks for.
    """

    looked_at: tuple[str, ...]

    def wrong_in_schema(self, schema: pa.Schema) -> str | None:
        """What is wrong with the columns that the run added; None if nothing is."""
        raise NotImplementedError

    def statuses(
        self, batch: pa.RecordBatch, manifest: Manifest
    ) -> Iterator[tuple[str, str | None]]:
        """Each row's status, and what is wrong with the row, if anything is."""
        raise NotImplementedError

    def wrong_in_table(
        self, folder: RunFolder, manifest: Manifest, shard: InputShard, receipt: Receipt
    ) -> Iterator[str]:
        path = folder.storage.describe(shard.name)
        with open_parquet(path) as file:
            schema, there = file.schema_arrow, file.metadata.num_rows
        if there != shard.num_rows:
            yield f"has {there:,} rows; expected {shard.num_rows:,}"
        if (wrong := self.wrong_in_schema(schema)) is not None:
            yield wrong
            return
        yield from self.wrong_in_metadata(schema, manifest)
        counts: dict[str, int] = {}
        for batch in ShardReader(path, list(self.looked_at)).rows(0, there):
            for status, wrong in self.statuses(batch, manifest):
                if wrong is not None:
                    yield wrong
                    return
                counts[status] = counts.get(status, 0) + 1
        if counts != receipt.summary.rows_by_status:
            yield f"has rows of status {counts}; its receipt says {receipt.summary.rows_by_status}"


def verify_output(
    folder: RunFolder, *, deep: bool, stop: StopRequest, source: str | None = None
) -> Verification:
    """Look at every shard of the run in `folder`; with `deep`, beside its input.

    source: where INPUT is now, if it was moved. Raises `UsageError` if there is no run, or if
    somebody is writing to it.
    """
    manifest = folder.require_run()
    if (holder := folder.holder()) is not None:
        raise UsageError(f"{folder.root} is being written by {holder}; verify it afterwards")
    checks = _checks_of(manifest)
    moved = {} if source is None else {name: file for file, name in find_inputs(source)}
    checked = Verification(folder.storage.describe(), deep)
    receipts: dict[str, Receipt] = {}
    for shard in manifest.shards:
        stop.check()
        checked.num_shards += 1
        checked.num_rows += shard.num_rows
        receipt = stored_receipt(folder, shard.name)
        problems = list(_output_problems(folder, manifest, shard, receipt, checks))
        if deep and not problems:
            problems += _input_problems(folder, manifest, shard, source, moved, checks)
        checked.problems += problems
        if receipt is not None:
            receipts[shard.name] = receipt
    if not checked.problems:
        checked.problems += checks.wrong_in_run(folder, manifest, receipts)
    if folder.is_one_file:
        # The run knows it by the name of the input.
        checked.problems = [replace(p, file=checked.output) for p in checked.problems]
    else:
        checked.problems += _strangers(folder, manifest)
    checked.repair = _repair(folder, manifest, checked.problems)
    return checked


def _checks_of(manifest: Manifest) -> ShardChecks:
    module = CHECKS.get(manifest.writer)
    if module is None:
        raise UsageError(f"this version of rsr cannot verify what rsr {manifest.writer} wrote")
    return cast(ShardChecks, import_module(module).CHECKS)


def _output_problems(
    folder: RunFolder,
    manifest: Manifest,
    shard: InputShard,
    receipt: Receipt | None,
    checks: ShardChecks,
) -> Iterator[Problem]:
    """What can be wrong with an output without looking at its input."""
    name = shard.name
    found = folder.storage.find(name)
    if found is None:
        yield Problem(name, f"not written: {shard.num_rows:,} rows are missing", "rerun")
        return
    expected = (0, shard.num_rows, shard.fingerprint, manifest.identity.digest)
    if receipt is None:
        yield Problem(name, "has no receipt that can be trusted", "rerun")
        return
    if (receipt.start, receipt.stop, receipt.fingerprint, receipt.settings) != expected:
        yield Problem(name, "its receipt is of another input or other settings", "rerun")
        return
    if found.num_bytes != receipt.content_bytes:
        what = f"is {found.num_bytes:,} bytes long; its receipt says {receipt.content_bytes:,}"
        yield Problem(name, what, "remove")
    elif not RunStore.of(folder, manifest.identity).has_content(found, receipt):
        yield Problem(name, "its bytes are not those its receipt vouches for", "remove")
    elif folder.lines is not None and not folder.lines.is_whole(by_content=True):
        yield Problem(name, "its lines are not those that were written", "rerun")
    else:
        # What follows is as the run wrote it: a mistake there is the run's, not the disk's.
        for what in checks.wrong_in_table(folder, manifest, shard, receipt):
            yield Problem(name, what, "remove")


def _input_problems(
    folder: RunFolder,
    manifest: Manifest,
    shard: InputShard,
    place: str | None,
    files: Mapping[str, str],
    checks: ShardChecks,
) -> Iterator[Problem]:
    """Where an output differs from its input. place, files: as `ShardChecks.source_of` has them."""
    name = shard.name
    source = checks.source_of(manifest, shard, place, files)
    if source is None:
        yield Problem(name, "--input holds no file for it")
        return
    try:
        # A copy elsewhere may differ in time: there, what is in it decides.
        if place is None and checks.is_another_input(folder, manifest, shard, source):
            what = f"its input {source} has changed since the run began"
            yield Problem(name, what, "overwrite")
            return
        differences = list(checks.wrong_beside_input(folder, manifest, shard, source))
    except (UsageError, OSError, pa.ArrowException) as error:
        yield Problem(name, f"its input cannot be compared: {error}")
        return
    for what in differences:
        # The run's own command would look for the input where it was.
        yield Problem(name, what, _repair_of_difference(shard) if place is None else "none")


def _repair_of_difference(shard: InputShard) -> Repair:
    """An input that was written again is not gone on with; one that was not makes it right."""
    is_as_it_was = shard.version in ("", file_version(shard.source))
    return "remove" if is_as_it_was else "overwrite"


def _strangers(folder: RunFolder, manifest: Manifest) -> Iterator[Problem]:
    """Parquet files that the run did not write: a glob over OUTPUT would read their rows too."""
    known = {shard.name for shard in manifest.shards}
    for file in folder.storage.list():
        is_ours = file.name in known or file.name.startswith(f"{STATE_FOLDER}/")
        if not is_ours and file.name.endswith(PARQUET_SUFFIXES):
            yield Problem(file.name, "is not of this run; move it out of OUTPUT")


def _repair(folder: RunFolder, manifest: Manifest, problems: list[Problem]) -> list[str]:
    """Shell commands that put right what can be put right, in order."""
    repairs = {problem.repair for problem in problems} - {"none"}
    if not repairs or not manifest.command:
        return []
    output = folder.storage.describe()
    if "overwrite" in repairs:
        return [manifest.shell_command(output, "--overwrite")]
    damaged = dict.fromkeys(p.file for p in problems if p.repair == "remove")
    removals = [_remove_command(folder.storage.describe(name)) for name in damaged]
    return [*removals, manifest.shell_command(output)]


def _remove_command(place: str) -> str:
    tools = {"s3": "aws s3 rm", "gs": "gcloud storage rm", "az": "azcopy remove"}
    tool = tools[place.partition("://")[0]] if is_remote(place) else "rm"
    return shell_command([*tool.split(), place])
