"""The opening of a run: from the first look at OUTPUT until the run is begun or refused.

A run that is refused or interrupted before it begins takes back what it put into OUTPUT, file by
file, and folders only where they are empty: what others have put there meanwhile is theirs.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from rsr.jobs.errors import UsageError
from rsr.jobs.run.folder import LOCK, STAGED, EarlierRun, RunFolder
from rsr.jobs.run.manifest import Manifest
from rsr.jobs.run.preflight import check_columns, check_form, check_places
from rsr.jobs.run.whole import require_finished
from rsr.jobs.shards.inputs import find_inputs, is_parquet
from rsr.jobs.shards.parquet import open_parquet
from rsr.jobs.storage import is_remote


@dataclass(slots=True)
class HeldOutput:
    """OUTPUT, held by this process alone, for a run that may still be refused.

    earlier: the run that an earlier command left here. is_new: whether a run must begin here,
    because there is none or because it is to be discarded.
    """

    folder: RunFolder
    earlier: EarlierRun | None
    overwrite: bool
    has_begun: bool = False
    _staged: dict[str, bool] = field(default_factory=dict)

    @property
    def is_new(self) -> bool:
        return self.earlier is None or self.overwrite

    @property
    def num_rows_before(self) -> int:
        """Rows of the run that may go on here; 0 if a new one must begin."""
        if self.earlier is None or self.earlier.manifest is None or self.overwrite:
            return 0
        return self.earlier.manifest.num_rows

    def grows_to(self, wanted: Manifest) -> bool:
        """Whether the run that stands here goes on as `wanted`, which takes more rows."""
        manifest = self.earlier and self.earlier.manifest
        return bool(manifest and not self.overwrite and manifest.grows_to(wanted))

    def use_staged(self, name: str, *, is_new: bool) -> None:
        """Remember a staged file that the run reads.

        is_new: this process has made it; it goes again if the run does not begin.
        """
        self._staged[name] = is_new

    def go_on(self, wanted: Manifest, *, is_same_input: bool | None = None) -> Manifest:
        """The earlier run's manifest; `UsageError` naming what differs unless it is this run.

        is_same_input: whether the user vouches for inputs that were written again and have the
        same fingerprint; None where the command has no option to say so.
        """
        assert self.earlier is not None
        assert self.earlier.manifest is not None
        manifest = self.earlier.manifest
        if differences := manifest.differences(wanted):
            raise UsageError(
                f"{self.folder.root} holds a run with other settings: {'; '.join(differences)}. "
                "Choose another OUTPUT, or discard that run with --overwrite"
            )
        if self._was_written_again(wanted, is_same_input):
            manifest = replace(manifest, shards=wanted.shards)
            self.folder.write_manifest(manifest)
        self.has_begun = True
        return manifest

    def grow(self, wanted: Manifest, *, is_same_input: bool) -> Manifest:
        """Let the earlier run go on as `wanted`; see `grows_to`, and `go_on` for what is raised."""
        assert self.earlier is not None
        assert self.earlier.manifest is not None
        self._was_written_again(wanted, is_same_input)
        manifest = replace(wanted, created=self.earlier.manifest.created)
        self.folder.write_manifest(manifest)
        self.has_begun = True
        return manifest

    def _was_written_again(self, wanted: Manifest, is_same_input: bool | None) -> bool:
        """Whether inputs were; `UsageError` unless the user vouches for them."""
        assert self.earlier is not None
        assert self.earlier.manifest is not None
        written_again = self.earlier.manifest.written_again(wanted)
        if written_again and not is_same_input:
            copies = "" if is_same_input is None else "say --same-input if they are mere copies; "
            raise UsageError(
                f"inputs were written again since the run in {self.folder.root} began, with "
                f"the same size and footer: {written_again}; {copies}choose another "
                "OUTPUT, or discard that run with --overwrite"
            )
        return bool(written_again)

    def begin(self, manifest: Manifest) -> Manifest:
        """Begin a new run in the place of the one that was here, if there was one."""
        if self.earlier is not None:
            self.folder.clear(self.earlier, keep_staged=self._staged)
        self.folder.write_manifest(manifest)
        self.has_begun = True
        return manifest

    def take_back(self) -> None:
        """Remove the files that this process has put into OUTPUT."""
        for name, is_new in self._staged.items():
            if is_new:
                self.folder.storage.remove(name)
        self.folder.remove_empty_folders(STAGED)


@contextmanager
def hold_output(place: Path | str, *, writer: str, overwrite: bool) -> Iterator[HeldOutput]:
    """Hold OUTPUT from the first look to the last file: no other run may come in between.

    writer: the `rsr` command whose run it is. Raises `UsageError`, with nothing touched, if the
    folder is not a run's, is another command's, or is being written by somebody.
    """
    folder = RunFolder(place)
    _look(folder, writer, overwrite)
    lock_was_there = folder.storage.find(LOCK) is not None
    had_events = folder.events_path.exists()
    created = _create_folders(folder)
    try:
        with folder.lock():
            # Whoever held it until now may have begun a run.
            held = HeldOutput(folder, _look(folder, writer, overwrite), overwrite)
            try:
                folder.remove_leftovers()
                yield held
            except BaseException:
                if not held.has_begun:
                    held.take_back()
                    if not lock_was_there and not is_remote(str(place)):
                        folder.storage.remove(LOCK)
                    if not had_events:
                        _remove_events(folder)
                raise
            finally:
                if held.has_begun:
                    folder.publish_logs()
    finally:
        for path in created:
            # A folder that somebody uses by now is not empty, and stays.
            with suppress(OSError):
                path.rmdir()


class PlaceOptions(Protocol):
    """The options of a run that say where it reads and writes."""

    @property
    def input(self) -> str: ...

    @property
    def output(self) -> Path | str: ...

    @property
    def overwrite(self) -> bool: ...


@contextmanager
def open_places(
    options: PlaceOptions, *, writer: str, is_always_folder: bool = False
) -> Iterator[tuple[list[tuple[str, str]], HeldOutput]]:
    """The files behind INPUT, each with its output's name, and OUTPUT as `hold_output` has it.

    is_always_folder: OUTPUT cannot be one file. Raises `UsageError`, with nothing touched, where
    `require_finished`, `find_inputs`, `check_form`, `check_places` and `hold_output` do.
    """
    require_finished(options.input)
    files = find_inputs(options.input)
    check_form(options.output, None if is_always_folder else len(files))
    check_places(options.input, files, options.output)
    if RunFolder(options.output).lines is not None:
        for file in (file for file, _ in files if is_parquet(file)):
            with open_parquet(file) as opened:
                check_columns(options.output, opened.schema_arrow)
    with hold_output(options.output, writer=writer, overwrite=options.overwrite) as held:
        yield files, held


def _look(folder: RunFolder, writer: str, overwrite: bool) -> EarlierRun | None:
    earlier = folder.earlier_run(writer)
    if earlier is not None and earlier.manifest is None and not overwrite:
        raise UsageError(
            f"{folder.root} holds a run that nothing can go on with: {earlier.damage}. "
            "Discard that run with --overwrite, or choose another OUTPUT"
        )
    return earlier


def _remove_events(folder: RunFolder) -> None:
    """Remove the events of a run that never began; of a remote OUTPUT, with the folder for them."""
    # What cannot be removed must not hide why the run did not begin.
    with suppress(OSError):
        folder.events_path.unlink(missing_ok=True)
        if is_remote(str(folder.root)):
            folder.state.rmdir()


def _create_folders(folder: RunFolder) -> list[Path]:
    """Create the state folder of a local OUTPUT; what was missing, the innermost first.

    Only folders that this call itself has made are returned, not those that another process made
    in the same moment.
    """
    if is_remote(str(folder.root)):
        return []
    created: list[Path] = []
    missing = [path for path in (folder.state, *folder.state.parents) if not path.exists()]
    for path in reversed(missing):
        try:
            os.mkdir(path)
        except FileExistsError:
            continue
        except OSError as error:
            for made in created:
                made.rmdir()
            reason = error.strerror or error
            raise UsageError(f"OUTPUT {folder.root} cannot be written: {reason}") from error
        created.insert(0, path)
    return created
