"""Local files that appear complete or not at all."""

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY_NAME = re.compile(r"\..+\.[0-9a-f]{8}\.rsr-tmp")
"""What a killed process may leave behind: nobody reads such a file, and no other program has a
file of such a name."""


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` that becomes `target` if the block ends well.

    The content reaches the disk before the name does, and both before this returns. If the block
    raises, nothing is left.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not the process id: machines that share a disk have the same ones.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.rsr-tmp")
    try:
        yield temporary
        _to_disk(temporary)
        os.replace(temporary, target)
        _to_disk(target.parent)
    except OSError as error:
        # A disk that is full does not say which file it was.
        if error.errno is not None and error.filename is None:
            error.filename = str(target)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text_atomically(target: Path, text: str) -> None:
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
