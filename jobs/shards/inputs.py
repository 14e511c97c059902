"""Which files stand behind INPUT, and what their outputs are called.

INPUT is a file, a folder or a glob, on a disk, an object store or the Hugging Face hub.
"""

import glob
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from rsr.jobs.errors import UsageError
from rsr.jobs.shards.json_file import COMPRESSIONS, JSON_NAME, JSON_SUFFIXES, is_json
from rsr.jobs.storage import is_remote, locate, open_storage
from rsr.jobs.storage.hub import HUB_SCHEME, pin_revision
from rsr.jobs.storage.walk import leads_nowhere, walk

logger = logging.getLogger(__name__)

PARQUET_SUFFIXES = (".parquet", ".pq")
OTHER_DATA_SUFFIXES = {
    *(".csv", ".tsv", ".arrow", ".feather", ".ipc", ".orc", ".avro", ".lance", ".msgpack"),
    *(".xlsx", ".xls", ".h5", ".hdf5", ".npy", ".npz", ".pkl", ".pickle", ".tfrecord", ".warc"),
    *(".db", ".sqlite", ".duckdb", ".tar", ".tgz", ".zip", ".7z", ".rar"),
    *(".gz", ".bz2", ".zst", ".xz", ".lz4", ".br", ".zstd"),
}
"""Suffixes of files that may hold rows and are not read."""
BESIDE_DATA_SUFFIXES = (".md", ".md5", ".sha1", ".sha256", ".crc", ".lock", ".metadata")
"""Suffixes of files that are named after data and hold none."""
EXPECTED = (
    f"{', '.join(PARQUET_SUFFIXES + JSON_SUFFIXES)}, the last three also with "
    f"{', '.join(f'.{suffix}' for suffix in COMPRESSIONS)}"
)
NAMES_SHOWN = 3


def find_inputs(pattern: str) -> list[tuple[str, str]]:
    """Files behind INPUT (a file, a folder or a glob), each with its output's path.

    Names whatever in a folder looks like data and is not read. Raises `UsageError` if there are
    no files, if one is not a data file or is a link that leads nowhere, or if two would have the
    same output.
    """
    if not pattern:
        raise UsageError("INPUT is empty; expected a file, a folder or a glob")
    _require_utf8(pattern)
    found = _find_remote(pattern) if is_remote(pattern) else _find_local(pattern)
    for file, _ in found:
        _require_utf8(file)
        if not (is_parquet(file) or is_json(file)):
            raise UsageError(f"{file}: expected a file named {EXPECTED}")
    named = [(file, _output_name(name)) for file, name in found]
    _require_distinct_outputs(named)
    return named


def is_parquet(path: str) -> bool:
    """Whether a file's name says that it is Parquet."""
    return path.lower().endswith(PARQUET_SUFFIXES)


def _output_name(name: str) -> str:
    json_name = JSON_NAME.fullmatch(name)
    stem = json_name["stem"] if json_name else str(PurePosixPath(name).with_suffix(""))
    return f"{stem}.parquet"


def _find_local(pattern: str) -> list[tuple[str, str]]:
    path = Path(pattern)
    if leads_nowhere(path):
        raise UsageError(f"{pattern} is a link that leads nowhere, to {os.readlink(path)}")
    if path.is_file():
        return [(pattern, path.name)]
    if path.is_dir():
        tree = walk(path, _is_hidden)
        names = _files_of_folder(pattern, tree.files, tree.broken)
        return [(str(path / name), name) for name in names]
    if not glob.has_magic(pattern):
        raise UsageError(f"no such file or folder: {pattern}")
    root = Path(*_fixed_parts(path.parts))
    if "**" in path.parts:
        # Not by `glob`, which goes round in cycles of links as long as paths may be.
        tree = walk(root, lambda name: name.startswith("."))
        wanted = _glob_pattern(str(path.relative_to(root)))
        files = [root / name for name in tree.files if wanted.fullmatch(name)]
        broken = [root / name for name in tree.broken if wanted.fullmatch(name)]
    else:
        matching = [Path(name) for name in sorted(glob.glob(pattern))]
        files = _each_once([file for file in matching if file.is_file()], root)
        broken = [file for file in matching if leads_nowhere(file)]
    if broken:
        raise _broken_links(pattern, [str(file) for file in broken])
    if not files:
        raise UsageError(f"no file matches {pattern}")
    return [(str(file), str(file.relative_to(root))) for file in files]


def _each_once(files: list[Path], root: Path) -> list[Path]:
    """`files` without those found again through a link to their folder."""
    folders = {file.parent for file in files}
    real = {folder: os.path.realpath(folder) for folder in folders}
    real_root = os.path.realpath(root)

    def distance(folder: Path) -> tuple[bool, int, Path]:
        direct = os.path.normpath(Path(real_root) / folder.relative_to(root))
        return real[folder] != direct, len(folder.parts), folder

    chosen: dict[str, Path] = {}
    for folder in sorted(folders, key=distance):
        chosen.setdefault(real[folder], folder)
    return [file for file in files if chosen[real[file.parent]] == file.parent]


def _find_remote(url: str) -> list[tuple[str, str]]:
    if url.startswith(f"{HUB_SCHEME}://"):
        url = pin_revision(url)
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


def _files_of_folder(folder: str, names: Sequence[str], broken: Sequence[str] = ()) -> list[str]:
    """The files of a folder that are to be read; others that look like data are named or refused.

    broken: links that lead nowhere.
    """
    if missing := [name for name in broken if is_parquet(name) or is_json(name)]:
        raise _broken_links(folder, missing)
    visible = [name for name in names if not any(map(_is_hidden, name.split("/")))]
    parquet = [name for name in visible if is_parquet(name)]
    other = [name for name in visible if is_json(name)]
    if parquet and other:
        raise UsageError(
            f"{folder} holds both Parquet ({parquet[0]}, …) and JSON files "
            f"({other[0]}, …); name one kind with a glob such as '{folder}/**/*.parquet'"
        )
    chosen = parquet or other
    is_chosen = set(chosen)
    unread = [name for name in visible if name not in is_chosen and _looks_like_data(name)]
    if not chosen:
        others = f" but {_named(unread, 'other file')}" if unread else ""
        raise UsageError(
            f"{folder} holds no Parquet, JSON or JSON-lines file{others}; expected {EXPECTED}"
        )
    if unread:
        what = _named(unread, "file")
        logger.warning("%s: not read, though it looks like data: %s", folder, what)
    if broken:
        logger.warning("%s: not followed, for want of a target: %s", folder, _named(broken, "link"))
    return chosen


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_"))


def _looks_like_data(name: str) -> bool:
    suffixes = PurePosixPath(name.lower()).suffixes
    known = OTHER_DATA_SUFFIXES.union(PARQUET_SUFFIXES, JSON_SUFFIXES)
    return bool(suffixes) and suffixes[-1] not in BESIDE_DATA_SUFFIXES and bool(known & {*suffixes})


def _broken_links(place: str, links: Sequence[str]) -> UsageError:
    return UsageError(
        f"{place}: rows would be missing, for data files are links without a target: "
        f"{_named(links, 'link')}; fetch what they link to, or remove them"
    )


def _named(names: Sequence[str], noun: str) -> str:
    """How many there are, and the first of them."""
    shown = ", ".join(printable(name) for name in names[:NAMES_SHOWN])
    more = f" and {len(names) - NAMES_SHOWN:,} more" if len(names) > NAMES_SHOWN else ""
    return f"{len(names):,} {noun}{'s' if len(names) > 1 else ''} ({shown}{more})"


def printable(name: str) -> str:
    """A file's name with bytes that are not UTF-8 as escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _require_utf8(name: str) -> None:
    if printable(name) != name:
        raise UsageError(f"the name {printable(name)} is not UTF-8; rename the file or folder")


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
