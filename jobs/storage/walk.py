"""The files below a folder of this machine, links to folders followed once each."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from errno import ELOOP, ENOENT, ENOTDIR
from pathlib import Path

LEADS_NOWHERE = (ENOENT, ENOTDIR, ELOOP)
"""What looking through a link says whose target is missing, or which leads to itself."""


@dataclass(slots=True)
class Tree:
    """What is below a folder, by paths relative to it, sorted. broken: links that lead nowhere."""

    files: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


def walk(root: Path, is_skipped: Callable[[str], bool]) -> Tree:
    """All regular files below `root`, each folder looked at once.

    is_skipped: whether a file or folder of this name, links included, is left out. A folder that
    is reached both directly and by a link is listed where it stands; a link to a folder that is
    listed already, or that `root` lies in, adds nothing. Raises `OSError` for a folder that cannot
    be read.
    """
    tree = Tree()
    seen = {_identity(folder) for folder in root.resolve().parents}
    folders, linked = [root], list[Path]()
    while folders or linked:
        # Links last: what they lead to may yet be found where it stands.
        folder = folders.pop() if folders else linked.pop(0)
        if (identity := _identity(folder)) in seen:
            continue
        seen.add(identity)
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda e: e.name):
                if is_skipped(entry.name):
                    continue
                path = Path(entry.path)
                if leads_nowhere(path):
                    tree.broken.append(path.relative_to(root).as_posix())
                elif entry.is_file():
                    tree.files.append(path.relative_to(root).as_posix())
                elif entry.is_dir():
                    (linked if entry.is_symlink() else folders).append(path)
    tree.files.sort()
    tree.broken.sort()
    return tree


def leads_nowhere(path: Path) -> bool:
    """Whether the path is a link whose target is not there, or that leads to itself."""
    if not path.is_symlink():
        return False
    try:
        path.stat()
    except OSError as error:
        if error.errno in LEADS_NOWHERE:
            return True
        raise
    return False


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
