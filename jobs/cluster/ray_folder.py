"""What a Ray that a run starts for itself leaves on this machine: its folder and its token.

    TMPDIR/rsr-ray-XXXXXXXX/       Ray's session, and what vLLM puts among temporary files
    TMPDIR/rsr-ray-XXXXXXXX/lock   held while the run goes; the kernel lets go of it if it is killed
    ~/.ray/auth_token              what clients of Ray must know, as Ray keeps it for all sessions

The folder goes when the run ends, or when the next run begins on this machine and finds that
nobody holds it and no process works in it. Imports nothing of Ray.
"""

import fcntl
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rsr.jobs.errors import UsageError, first_line

PREFIX = "rsr-ray-"
LOCK = "lock"

MAX_SOCKET_PATH_BYTES = 107
"""The longest path of a Unix socket on Linux."""

LONGEST_SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""Below its folder Ray makes sockets of names as long as this one, with the driver's process id."""

REMOVAL_PATIENCE_S = 3.0
"""Ray's last processes may write a log line after it was told to end."""


@contextmanager
def ray_folder() -> Iterator[Path]:
    """A folder for one Ray of this machine, removed at the end with all that is in it.

    Raises `UsageError` if the folder of temporary files cannot be written, or if its name is too
    long for Ray's sockets.
    """
    parent = _temporary_folder()
    for other in parent.glob(f"{PREFIX}*"):
        _remove_if_abandoned(other)
    try:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    except OSError as error:
        raise _not_writable(parent, error.strerror or first_line(error)) from error
    try:
        with (folder / "new").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Under its name it is never seen but held.
            (folder / "new").rename(folder / LOCK)
            yield folder
    finally:
        _remove(folder)


def is_ray_folder(path: Path) -> bool:
    """Whether this is the folder of a Ray that a run started for itself."""
    return path.name.startswith(PREFIX)


def _temporary_folder() -> Path:
    """Where Ray's folder goes, as Ray itself would choose it."""
    for variable in ("RAY_TMPDIR", "TMPDIR"):
        if named := os.environ.get(variable):
            parent = Path(named).absolute()
            break
    else:
        variable, parent = "TMPDIR", Path(tempfile.gettempdir())
    if not parent.is_dir():
        raise _not_writable(parent, "there is no such folder")
    num_bytes = len(os.fsencode(parent / f"{PREFIX}00000000")) + len(LONGEST_SOCKET)
    if num_bytes > MAX_SOCKET_PATH_BYTES:
        raise UsageError(
            f"{variable}={parent} is {num_bytes - MAX_SOCKET_PATH_BYTES} bytes too long: Ray makes "
            f"sockets below it, whose paths are at most {MAX_SOCKET_PATH_BYTES} bytes; set "
            f"{variable} to a shorter path, such as /tmp"
        )
    return parent


def _not_writable(folder: Path, reason: str) -> UsageError:
    return UsageError(
        f"{folder} cannot be written ({reason}): Ray keeps its sockets and logs there; set TMPDIR "
        "to a folder that can be written"
    )


def _remove_if_abandoned(folder: Path) -> None:
    """Remove the folder of a run that was killed, unless some process still works in it."""
    try:
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            return
        with (folder / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_worked_in(folder):
                _remove(folder)
    except OSError:
        # Held, not finished yet, gone meanwhile, or not a folder of ours.
        return


def _is_worked_in(folder: Path) -> bool:
    """Whether a process of this machine was started with the folder among its arguments."""
    name = os.fsencode(folder)
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if name in (process / "cmdline").read_bytes():
                return True
    return False


def _remove(folder: Path) -> None:
    deadline = time.monotonic() + REMOVAL_PATIENCE_S
    while folder.exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():
            time.sleep(0.1)


def require_token() -> None:
    """Make the token that Ray would make, for nobody but this user to read.

    Ray itself lets everybody of this machine read it. Nothing is done if there is one, or if the
    environment names one or wants none. Raises `UsageError` if it cannot be kept.
    """
    named = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    if named or os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    path = Path("~/.ray/auth_token").expanduser()
    try:
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        # Whole under its name or not at all: another run may be about to do the same.
        descriptor, temporary = tempfile.mkstemp(prefix="auth_token.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(32))
            with suppress(FileExistsError):
                os.link(temporary, path)
        finally:
            os.unlink(temporary)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written ({error.strerror}): Ray keeps the token there without which "
            "nobody may use it; set HOME to a folder that can be written, or RAY_AUTH_TOKEN to a "
            "secret"
        ) from error
