"""What must hold before a run writes into OUTPUT; whatever does not is refused, OUTPUT untouched.

Knows folders and disks, and neither models nor what the run is about.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rsr.jobs.errors import UsageError
from rsr.jobs.storage import is_remote


@contextmanager
def refusing_what_cannot_be_reached() -> Iterator[None]:
    """Report a disk or a bucket that does not answer as a `UsageError`."""
    try:
        yield
    except OSError as error:
        raise UsageError(str(error)) from error


SUFFIXES_OF_FILES = (".parquet", ".jsonl", ".json", ".csv")
"""Who calls OUTPUT so expects one file."""


def check_places(input: str, files: Sequence[tuple[str, str]], output: Path | str) -> None:
    """Raises `UsageError` unless OUTPUT is a folder apart from INPUT and its `files`.

    files: path and output name of each.
    """
    folder = Path(output)
    if not is_remote(str(output)) and folder.exists() and not folder.is_dir():
        raise UsageError(f"OUTPUT {output} is a file; expected a folder to be created")
    if not is_remote(str(output)) and not folder.exists() and folder.suffix in SUFFIXES_OF_FILES:
        raise UsageError(
            f"OUTPUT {output} has the name of a file and would be a folder, with one Parquet file "
            f"for each of INPUT; name it {folder.with_suffix('')}, say"
        )
    root, source = canonical(output), canonical(input)
    for file, name in files:
        if f"{root}/{name}" == canonical(file):
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
