"""What must hold before a run writes into OUTPUT; whatever does not is refused, OUTPUT untouched.

Knows folders and disks, and neither models nor what the run is about.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from rsr.jobs.errors import UsageError
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.shards.lines_file import require_json_types
from rsr.jobs.storage import is_remote


@contextmanager
def refusing_what_cannot_be_reached() -> Iterator[None]:
    """Report a disk or a bucket that does not answer as a `UsageError`."""
    try:
        yield
    except OSError as error:
        raise UsageError(str(error)) from error


NOT_WRITTEN_SUFFIXES = (".json", ".csv")
"""Who calls OUTPUT so expects a file that no command writes."""


def check_form(output: Path | str, num_files: int | None) -> None:
    """Raises `UsageError` unless OUTPUT can hold what will be written.

    num_files: how many files; None of a command that always writes a folder.
    """
    folder = Path(output)
    as_folder = f"{str(output).removesuffix(folder.suffix)}, say, is a folder"
    if folder.suffix in NOT_WRITTEN_SUFFIXES and not folder.is_dir():
        stem = str(output).removesuffix(folder.suffix)
        as_file = f"name it {stem}.parquet or {stem}.jsonl"
        raise UsageError(
            f"OUTPUT {output} has the name of a {folder.suffix} file, and rows are written as "
            f"Parquet or JSON lines: {f'{as_file}, or ' if num_files == 1 else ''}{as_folder}"
        )
    if RunFolder(output).is_one_file:
        if num_files is None:
            why = "this command writes a folder of files"
        elif num_files > 1:
            why = f"INPUT has {num_files:,} files, each of which becomes one"
        elif not is_remote(str(output)) and folder.is_symlink():
            why = f"it is a link; name what it leads to, {os.readlink(folder)}"
        else:
            return
        raise UsageError(f"OUTPUT {output} has the name of one file: {why}; {as_folder}")
    if not is_remote(str(output)) and folder.exists() and not folder.is_dir():
        raise UsageError(f"OUTPUT {output} is a file; expected a folder to be created")


def check_columns(output: Path | str, schema: pa.Schema) -> None:
    """Raises `UsageError` unless OUTPUT can hold these columns of INPUT."""
    if RunFolder(output).lines is not None:
        require_json_types(schema, str(output))


def check_places(input: str, files: Sequence[tuple[str, str]], output: Path | str) -> None:
    """Raises `UsageError` unless OUTPUT is apart from INPUT and its `files`.

    files: path and output name of each.
    """
    root, source = canonical(output), canonical(input)
    folder = RunFolder(output)
    rows = None if folder.lines is None else canonical(folder.lines.rows_path)
    for file, name in files:
        written = root if folder.is_one_file else f"{root}/{name}"
        if canonical(file) in (written, rows):
            raise UsageError(f"OUTPUT {output} would overwrite its own input {file}")
    is_folder = all(canonical(file) != source for file, _ in files)
    if is_folder and f"{root}/".startswith(f"{source}/"):
        raise UsageError(f"OUTPUT {output} lies inside INPUT {input}")


def canonical(place: Path | str) -> str:
    """One spelling for each place."""
    return str(place).rstrip("/") if is_remote(str(place)) else str(Path(place).resolve())


def require_disk_space(output: Path | str, needed_bytes: float) -> None:
    """Raises `UsageError` if the disk of a local `output` has less than `needed_bytes` free."""
    if is_remote(str(output)):
        return
    root = Path(output).resolve()
    existing = next(p for p in (root, *root.parents) if p.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise UsageError(
            f"OUTPUT {output} needs about {needed_bytes / 2**20:,.1f} MiB, and "
            f"{existing} has {free_bytes / 2**20:,.1f} MiB free"
        )
