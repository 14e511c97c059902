"""How long a soak is and where it happens.

The short version runs with the suite; `make soak` injects 320 faults and keeps the report.
RSR_SOAK_FAULTS (over all nights), RSR_SOAK_SEED and RSR_SOAK_REPORT (a file to write it to) say
otherwise.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from soak_disk import SmallDisk, small_disk
from soak_night import Night

OUTPUT_DISK_MIB = 256
LAST_WORDS_CHARS = 5000


@dataclass(frozen=True)
class Length:
    """How many faults a soak injects. all_faults: over all nights; None is a short one each."""

    all_faults: int | None
    seed: int

    @property
    def is_long(self) -> bool:
        return self.all_faults is not None

    def num_faults(self, share: float, short: int) -> int:
        """Of a night that has this share of all."""
        return short if self.all_faults is None else round(share * self.all_faults)


@pytest.fixture(scope="session")
def soak_length() -> Length:
    faults = os.environ.get("RSR_SOAK_FAULTS")
    return Length(int(faults) if faults else None, int(os.environ.get("RSR_SOAK_SEED", "0")))


@pytest.fixture
def soak_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", size_mib=OUTPUT_DISK_MIB) as disk:
        yield disk


@pytest.fixture
def telling() -> Callable[[Night], AbstractContextManager[None]]:
    """Ends a night, however it went, and prints its report; keeps it if it went well."""

    @contextmanager
    def tell(night: Night) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            night.close()
            night.report.seconds = round(time.monotonic() - started, 1)
            print(json.dumps({night.name: vars(night.report)}, indent=2))
            print(night.log.read_text(errors="replace")[-LAST_WORDS_CHARS:])
        if file := os.environ.get("RSR_SOAK_REPORT"):
            night.report.keep(Path(file), night.name)

    return tell
