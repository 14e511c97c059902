"""Whether another machine sees the files that this one does, where they are on local disks."""

import secrets
import socket
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rsr.jobs.run.folder import RunFolder
from rsr.jobs.storage import is_remote


@contextmanager
def probe_of(folder: RunFolder) -> Iterator[tuple[Path, ...]]:
    """A file to look for that no folder has but this run's OUTPUT; none on an object store."""
    if is_remote(str(folder.root)):
        yield ()
        return
    # Named as a half-written file is: what a killed run leaves of it, the next run removes.
    name = f".probe-{uuid.uuid4().hex}.{secrets.token_hex(4)}.rsr-tmp"
    path = folder.state.resolve() / name
    path.touch()
    try:
        yield (path,)
    finally:
        # An OUTPUT that nobody may write to now keeps it until the next run.
        with suppress(OSError):
            path.unlink()


def local_files(*places: str) -> tuple[Path, ...]:
    """Those of these that are files or folders here, which another machine must see too."""
    return tuple(Path(p).resolve() for p in places if not is_remote(p) and Path(p).exists())


def told_missing(must_see: Sequence[Path]) -> str | None:
    """Which of these files this machine does not see, in a line for a user; None if it sees all."""
    if missing := [str(path) for path in must_see if not path.exists()]:
        return (
            f"the machine {socket.gethostname()} has no {', '.join(missing)}: every machine "
            "of the cluster must see the same files there"
        )
    return None
