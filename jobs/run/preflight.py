"""What must hold before a run writes into OUTPUT; whatever does not is refused, OUTPUT untouched.

Knows folders, disks and manifests, and neither models nor what the run is about.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rsr.jobs.errors import UsageError
from rsr.jobs.run.folder import MANIFEST, STATE_FOLDER, OutputFolder
from rsr.jobs.shards.shard import Shard
from rsr.jobs.storage import is_remote


@contextmanager
def refusing_what_cannot_be_reached() -> Iterator[None]:
    """A disk or a bucket that does not answer is the user's to know, in one line."""
    try:
        yield
    except OSError as error:
        raise UsageError(str(error)) from error


def missing_folders(output: OutputFolder) -> list[Path]:
    """Folders of this machine that a run would create, the innermost first."""
    return [p for p in (output.state, *output.state.parents) if not p.exists()]


@contextmanager
def kept_as_it_was(output: OutputFolder, missing: list[Path]) -> Iterator[None]:
    """Leave nothing behind if the block refuses to run. missing: folders there were not."""
    try:
        yield
    except BaseException:
        if output.storage.find(MANIFEST) is None:
            output.storage.remove_folder(f"{STATE_FOLDER}/staged")
        if missing:
            shutil.rmtree(missing[-1], ignore_errors=True)
        raise


def check_places(input: str, files: Sequence[tuple[str, str]], output: Path | str) -> None:
    """Raises `UsageError` unless OUTPUT is a folder apart from INPUT and its `files`.

    files: path and output name of each.
    """
    folder = Path(output)
    if not is_remote(str(output)) and folder.exists() and not folder.is_dir():
        raise UsageError(f"OUTPUT {output} is a file; expected a folder to be created")
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


def describe_inputs(shards: Sequence[Shard]) -> list[dict[str, Any]]:
    """What a manifest says of the input."""
    return [{"name": s.name, "num_rows": s.num_rows, "fingerprint": s.fingerprint} for s in shards]


def require_same_run(
    manifest: dict[str, Any], identity: dict[str, Any], output: Path | str
) -> None:
    """Raises `UsageError` naming what differs, unless both are runs of one meaning."""
    differences = [
        f"{key} was {before.get(key)!r} and is now {now.get(key)!r}"
        for part in ("settings", "columns", "model")
        for before, now in ((manifest.get(part, {}), identity.get(part, {})),)
        for key in now
        if before.get(key) != now[key]
    ]
    if manifest["shards"] != identity["shards"]:
        differences.append(_describe_input_change(manifest["shards"], identity["shards"]))
    if differences:
        raise UsageError(
            f"{output} holds a run with other settings: {'; '.join(differences)}. Choose another "
            "OUTPUT, or discard that run with --overwrite"
        )


def _describe_input_change(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> str:
    old = {s["name"]: s for s in before}
    new = {s["name"]: s for s in now}
    changed = [name for name in new if name in old and new[name] != old[name]]
    added = [name for name in new if name not in old]
    gone = [name for name in old if name not in new]
    parts = (("changed", changed), ("new", added), ("gone", gone))
    return "input shards " + ", ".join(
        f"{word}: {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        for word, names in parts
        if names
    )


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
