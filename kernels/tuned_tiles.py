"""Tiles that were measured on a card, which go before the rules of `tuning.py`.

`tuned/CARD.json` comes with the package; a user's own file, which the environment variable
`RSR_TUNED_TILES` names, goes before those. `rsr bench kernel --tune` writes such files. Nothing is
measured inside a job: the choice would differ between restarts, and bits with it. Knows no tensors.
"""

import functools
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

from rsr.kernels.tuning import Call, Tiles

FILE_VARIABLE = "RSR_TUNED_TILES"
FOLDER = Path(__file__).parent / "tuned"


class TunedFileError(ValueError):
    """A file of tuned tiles is missing or is not one; the text says which and why."""


@dataclass(frozen=True)
class TunedRow:
    """The fastest tiles for calls of one kind, of those that were measured."""

    operand_bytes: int
    has_soft_cap: bool
    max_depth: int | None
    max_tokens: int | None
    tiles: Tiles
    tflop_per_s: float | None = None
    """What was measured; decides nothing."""

    def fits(self, call: Call) -> bool:
        return (
            call.operand_bytes == self.operand_bytes
            and call.has_soft_cap == self.has_soft_cap
            and (self.max_depth is None or call.depth <= self.max_depth)
            and (self.max_tokens is None or call.num_tokens <= self.max_tokens)
            and (call.can_describe or self.tiles.design == "pointer")
        )


@dataclass(frozen=True)
class TunedCard:
    """What one file says: rows for one card, of which the first that fits is taken."""

    card: str
    capability: int
    rows: tuple[TunedRow, ...]
    measured_with: str = ""
    """Versions of torch and Triton."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError, KeyError or TypeError unless this is what `to_json` made."""
        values: dict[str, Any] = json.loads(text)
        rows = [TunedRow(**{**row, "tiles": Tiles(**row["tiles"])}) for row in values.pop("rows")]
        return cls(**values, rows=tuple(rows))

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    def find(self, call: Call) -> Tiles | None:
        return next((row.tiles for row in self.rows if row.fits(call)), None)


def find_tiles(card: str, call: Call) -> Tiles | None:
    """Tiles from the user's file, else by the card's name, else by its compute capability.

    None where nobody has measured such a call. Raises `TunedFileError`.
    """
    return _find_tiles(card, call, os.environ.get(FILE_VARIABLE))


@functools.lru_cache(maxsize=4096)
def _find_tiles(card: str, call: Call, own_file: str | None) -> Tiles | None:
    named, alike = [], []
    for tuned in _read_all(own_file):
        if tuned.card == card:
            named.append(tuned)
        elif tuned.capability == call.capability:
            alike.append(tuned)
    found = (tuned.find(call) for tuned in named + alike)
    return next((tiles for tiles in found if tiles is not None), None)


def own_file_text() -> str | None:
    """The user's file, which decides in which order a card adds; None where there is none.

    Raises `TunedFileError` if it cannot be used.
    """
    name = os.environ.get(FILE_VARIABLE)
    if not name:
        return None
    _read(Path(name))
    return Path(name).read_text()


def adopt(own_file: str | None) -> None:
    """Let this process, and those that it starts, go by another machine's user's file, or by none.

    own_file: its text.
    """
    if own_file is None:
        os.environ.pop(FILE_VARIABLE, None)
        return
    path = Path(tempfile.mkdtemp(prefix="rsr-tuned-")) / f"{hash_of(own_file)}.json"
    path.write_text(own_file)
    os.environ[FILE_VARIABLE] = str(path)


def hash_of(text: str) -> str:
    """What a run's manifest says of a file."""
    return sha256(text.encode()).hexdigest()[:16]


def shipped_hash() -> str:
    """The hash of all files that come with the package."""
    return sha256(b"".join(path.read_bytes() for path in _shipped())).hexdigest()[:16]


def file_name(card: str) -> str:
    """The name of a card's file, in letters that every file system takes."""
    words = "".join(c if c.isalnum() else " " for c in card).split()
    return f"{'_'.join(words)}.json"


def _shipped() -> list[Path]:
    return sorted(FOLDER.glob("*.json"))


def _read_all(own_file: str | None) -> Iterator[TunedCard]:
    if own_file:
        yield _read(Path(own_file))
    yield from map(_read, _shipped())


@functools.cache
def _read(path: Path) -> TunedCard:
    try:
        return TunedCard.parse(path.read_text())
    except OSError as error:
        reason = error.strerror or str(error)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"it is not what `rsr bench kernel --tune` writes ({error})"
    raise TunedFileError(
        f"tuned tiles {path} cannot be used: {reason}; write it anew or unset {FILE_VARIABLE}"
    )
