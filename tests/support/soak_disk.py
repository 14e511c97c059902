"""Where a soak happens: a small disk with its troubles, and files of others that stand around.

Nothing here knows what a run is.
"""

import hashlib
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

Seen = tuple[int, int, int, str]
"""Of a file: mode, bytes, time of writing, hash. A folder changes its size and time with what is
put into it, so that of a folder only the mode counts."""


@dataclass(frozen=True)
class SmallDisk:
    """A disk that can be filled, and whose folders can be locked, without harm to anybody.

    not_fillable, not_lockable: why that cannot be had on this machine; empty if it can.
    """

    folder: Path
    not_fillable: str = ""
    not_lockable: str = ""

    @property
    def ballast(self) -> Path:
        return self.folder / "ballast"

    def fill(self) -> Callable[[], None]:
        """Leave not one byte free; what is returned frees them."""
        assert not self.not_fillable
        with self.ballast.open("ab") as file:
            try:
                while True:
                    os.write(file.fileno(), bytes(1 << 20))
            except OSError:
                pass
        return self.ballast.unlink

    def lock(self, folder: Path) -> Callable[[], None]:
        """Let no name in `folder` and below appear, go or change; what is returned lets them."""
        assert not self.not_lockable
        _set_immutable("+i", folder)
        return lambda: _set_immutable("-i", folder)


@contextmanager
def small_disk(folder: Path, *, size_mib: int) -> Iterator[SmallDisk]:
    """A tmpfs at `folder`, or a plain folder where none can be mounted."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={size_mib}m"]
    mounted = subprocess.run(["mount", *options, "tmpfs", str(folder)], capture_output=True)
    try:
        not_fillable = "no tmpfs could be mounted" if mounted.returncode else ""
        yield SmallDisk(folder, not_fillable, _why_not_lockable(folder))
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def _why_not_lockable(folder: Path) -> str:
    """Tried out: it takes a file system that knows the attribute, and the right to set it."""
    trial = folder / "trial"
    trial.mkdir()
    try:
        _set_immutable("+i", trial)
        _set_immutable("-i", trial)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return f"chattr +i does not work here: {said.strip()}"
    finally:
        trial.rmdir()
    return ""


def _set_immutable(change: str, folder: Path) -> None:
    # The folders alone: files that are open already may grow, as on a disk remounted read-only
    # they could not; but a disk with an open file cannot be remounted.
    folders = [parent for parent, _, _ in os.walk(folder)]
    command = ["chattr", change, *folders]
    subprocess.run(command, check=True, capture_output=True, text=True)


class Others:
    """Files that are not the run's: how they looked once, and whether they still do."""

    def __init__(self) -> None:
        self._seen: dict[Path, dict[Path, Seen]] = {}

    def watch(self, root: Path) -> None:
        """Remember a folder and all below as they are now."""
        self._seen[root] = snapshot(root)

    def plant(self, root: Path) -> None:
        """Make a folder of somebody else's that looks much like a run, and watch it."""
        for name in ("shard-00.parquet", ".rsr/lock", ".rsr/manifest.json", ".rsr/receipts/a.json"):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(f"somebody else's {name}".encode())
        (root / ".rsr" / "units" / "empty").mkdir(parents=True)
        (root / ".shard-00.parquet.0123abcd.rsr-tmp").touch()
        (root / "link.parquet").symlink_to("shard-00.parquet")
        self.watch(root)

    def watches(self, root: Path) -> bool:
        return root in self._seen

    def forget(self, root: Path) -> None:
        del self._seen[root]

    def touched(self) -> list[Path]:
        """What is gone, new or different below the watched folders."""
        changed = []
        for root, seen in self._seen.items():
            now = snapshot(root)
            paths = sorted(seen.keys() | now.keys())
            changed += [path for path in paths if seen.get(path) != now.get(path)]
        return changed


def snapshot(root: Path) -> dict[Path, Seen]:
    """Every file, link and folder at and below `root`; nothing if it is not there."""
    found: dict[Path, Seen] = {}
    if root.exists():
        found[root] = _look_at(root)
    for parent, folders, files in os.walk(root):
        for name in [*folders, *files]:
            path = Path(parent) / name
            found[path] = _look_at(path)
    return found


def _look_at(path: Path) -> Seen:
    status = path.lstat()
    if stat.S_ISDIR(status.st_mode):
        return status.st_mode, 0, 0, ""
    content = os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
    digest = hashlib.blake2b(content).hexdigest()
    return status.st_mode, status.st_size, status.st_mtime_ns, digest
