"""Answers that no finished unit holds yet, one JSON line each, so that nothing is asked twice.

An answer may have cost money: it is written down as it comes. Kept where logs are, since it grows
while a run goes: beside an OUTPUT on an object store, which cannot append, on this machine alone.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rsr.jobs.refinement.outcome import Outcome
from rsr.jobs.shards.shard import Shard
from rsr.jobs.storage.hashing import hash_bytes

NAME = "answers.jsonl"


class Journal:
    """The answers of one run that are not yet in its units; a context manager that appends."""

    def __init__(self, path: Path, digest: str) -> None:
        """digest: of the run's identity; lines of another run are as good as none."""
        self._path, self._digest = path, digest
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(self._path, flags, 0o600)
        size = os.fstat(self._descriptor).st_size
        # An earlier start may have died within its last line.
        if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
            os.write(self._descriptor, b"\n")
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _where: TracebackType | None,
    ) -> None:
        assert self._descriptor is not None
        os.close(self._descriptor)
        self._descriptor = None

    def read(self) -> dict[tuple[str, str, int], Outcome]:
        """What was answered, by the shard's name and fingerprint and the row."""
        found: dict[tuple[str, str, int], Outcome] = {}
        if not self._path.exists():
            return found
        for line in self._path.read_bytes().splitlines():
            try:
                sealed = json.loads(line)
                answer = sealed["answer"]
                if sealed["blake2b"] != _seal(answer) or answer["settings"] != self._digest:
                    continue
                key = (str(answer["shard"]), str(answer["fingerprint"]), int(answer["row"]))
                found[key] = Outcome.parse(answer["outcome"])
            except (ValueError, KeyError, TypeError):
                continue
        return found

    def add(self, shard: Shard, row: int, outcome: Outcome) -> None:
        assert self._descriptor is not None, "a journal is written while it is open"
        answer = {
            "settings": self._digest,
            "shard": shard.name,
            "fingerprint": shard.fingerprint,
            "row": row,
            "outcome": outcome.to_json(),
        }
        line = json.dumps({"answer": answer, "blake2b": _seal(answer)}).encode() + b"\n"
        os.write(self._descriptor, line)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


def _seal(answer: Mapping[str, Any]) -> str:
    return hash_bytes(json.dumps(answer, sort_keys=True).encode())
