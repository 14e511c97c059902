"""A temporary file that has no name: it is gone with its process, however that ends."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def nameless_file() -> Iterator[Path]:
    """A path at which this process alone can open a new file; with a name where there is no /proc.

    A worker that is killed, as Ray does when a run is told to stop, removes nothing any more.
    """
    with tempfile.TemporaryFile(prefix="rsr-") as file:
        path = Path(f"/proc/self/fd/{file.fileno()}")
        if path.exists():
            yield path
            return
    with tempfile.TemporaryDirectory(prefix="rsr-") as folder:
        yield Path(folder) / "file"
