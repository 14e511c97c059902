"""Which files stand behind INPUT, and what their outputs are called.

INPUT is a file, a folder or a glob, on a disk or an object store.
"""

import glob
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from rsr.jobs.errors import UsageError
from rsr.jobs.storage import is_remote, locate, open_storage

PARQUET_SUFFIXES = (".parquet", ".pq")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")


def find_inputs(pattern: str) -> list[tuple[str, str]]:
    """Files behind INPUT (a file, a folder or a glob), each with its output's path.

    Raises `UsageError` if there are none, or if two would have the same output.
    """
    found = _find_remote(pattern) if is_remote(pattern) else _find_local(pattern)
    for file, _ in found:
        if PurePosixPath(file).suffix not in PARQUET_SUFFIXES + JSON_SUFFIXES:
            raise UsageError(
                f"{file}: expected a {', '.join(PARQUET_SUFFIXES + JSON_SUFFIXES)} file"
            )
    named = [(file, str(PurePosixPath(name).with_suffix(".parquet"))) for file, name in found]
    _require_distinct_outputs(named)
    return named


def _find_local(pattern: str) -> list[tuple[str, str]]:
    path = Path(pattern)
    if path.is_file():
        return [(pattern, path.name)]
    if path.is_dir():
        names = [file.name for file in open_storage(path).list()]
        return [(str(path / name), name) for name in _files_of_folder(pattern, names)]
    if not glob.has_magic(pattern):
        raise UsageError(f"no such file or folder: {pattern}")
    root = Path(*_fixed_parts(path.parts))
    files = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    found = [(str(file), str(file.relative_to(root))) for file in files if file.is_file()]
    if not found:
        raise UsageError(f"no file matches {pattern}")
    return found


def _find_remote(url: str) -> list[tuple[str, str]]:
    storage, name = locate(url.rstrip("/"))
    if not glob.has_magic(url):
        if storage.find(name) is not None:
            return [(url, name)]
        folder = open_storage(url)
        names = [file.name for file in folder.list()]
        if not names:
            raise UsageError(f"no such file or folder: {url}")
        return [(folder.describe(n), n) for n in _files_of_folder(url, names)]
    scheme, _, rest = url.partition("://")
    fixed = "/".join(_fixed_parts(tuple(rest.split("/"))))
    root = open_storage(f"{scheme}://{fixed}")
    matching = _glob_pattern(rest[len(fixed) :].lstrip("/"))
    found = [(root.describe(f.name), f.name) for f in root.list() if matching.fullmatch(f.name)]
    if not found:
        raise UsageError(f"no file matches {url}")
    return found


def _glob_pattern(pattern: str) -> re.Pattern[str]:
    """What `glob` takes, for names that are not on a disk."""
    words = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[!?[^\]]+\])", pattern)
    return re.compile(
        "".join(
            words[part]
            if part in words
            else (f"[^{part[2:]}" if part.startswith("[!") else part)
            if index % 2
            else re.escape(part)
            for index, part in enumerate(parts)
        )
    )


def _files_of_folder(folder: str, names: Sequence[str]) -> list[str]:
    visible = [
        name for name in names if not any(part.startswith((".", "_")) for part in name.split("/"))
    ]
    parquet = [name for name in visible if name.endswith(PARQUET_SUFFIXES)]
    other = [name for name in visible if name.endswith(JSON_SUFFIXES)]
    if parquet and other:
        raise UsageError(
            f"{folder} holds both Parquet ({parquet[0]}, …) and JSON files "
            f"({other[0]}, …); name one kind with a glob such as '{folder}/**/*.parquet'"
        )
    if not parquet and not other:
        raise UsageError(f"{folder} holds no Parquet, JSON or JSON-lines file")
    return parquet or other


def _fixed_parts(parts: tuple[str, ...]) -> list[str]:
    fixed: list[str] = []
    for part in parts[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return fixed


def _require_distinct_outputs(named: list[tuple[str, str]]) -> None:
    by_name: dict[str, str] = {}
    for file, name in named:
        if (other := by_name.setdefault(name, file)) != file:
            raise UsageError(f"{other} and {file} would both become {name}; score them apart")
