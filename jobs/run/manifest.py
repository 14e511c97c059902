"""A run's manifest: what it is, of which input, and the command that goes on with it.

Kept as JSON in OUTPUT/.rsr/manifest.json. OUTPUT may come from anybody, so everything in the file
is data: it is read into types, and names that point out of OUTPUT are refused.
"""

import importlib.metadata
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Self, TypeAlias

from rsr.jobs.shards.shard import Shard
from rsr.jobs.storage.hashing import hash_bytes
from rsr.jobs.terminal import shell_command

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
JsonObject: TypeAlias = Mapping[str, Json]

FORMAT = 3
"""Changes whenever an older manifest can no longer be understood."""

STATE_FOLDER = ".rsr"
"""What a run keeps beside its output stands in this folder of OUTPUT."""


def versions_of(*packages: str) -> dict[str, str]:
    """The versions of those of these packages that are installed, for `Identity.versions`."""
    found = {}
    for name in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


class ManifestError(ValueError):
    """A manifest is not one, or not one that this version understands; the text says why."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What decides a run's results; runs of equal `digest` may share an OUTPUT.

    settings: options by name. columns: the columns that hold the trajectories, by kind. model:
    what identifies the student's files. versions: of the libraries; recorded, and may change.
    """

    settings: JsonObject
    columns: JsonObject = field(default_factory=dict)
    model: JsonObject = field(default_factory=dict)
    versions: JsonObject = field(default_factory=dict)

    @classmethod
    def parse(cls, values: object) -> Self:
        """Raises `ManifestError` unless `values` is what `to_json` made."""
        parts = _object(values, "identity")
        return cls(*(_object(parts.get(part), part) for part in _PARTS))

    def to_json(self) -> dict[str, Json]:
        return {part: dict(getattr(self, part)) for part in _PARTS}

    @property
    def digest(self) -> str:
        """Hash of everything that decides the results."""
        deciding = {part: getattr(self, part) for part in _PARTS if part != "versions"}
        return hash_bytes(json.dumps(deciding, sort_keys=True, default=dict).encode())

    def differences(self, other: "Identity") -> list[str]:
        """What `other` has different, in words."""
        return [
            f"{key} was {before.get(key)!r} and is now {now.get(key)!r}"
            for before, now in (
                (self.settings, other.settings),
                (self.columns, other.columns),
                (self.model, other.model),
            )
            for key in {**before, **now}
            if before.get(key) != now.get(key)
        ]


_PARTS = ("settings", "columns", "model", "versions")


@dataclass(frozen=True, slots=True)
class InputShard:
    """One input file as the run found it.

    name: the output's path below OUTPUT. num_rows: that the run takes of it. fingerprint, version:
    as `Shard` has them. source: path or URL of the file, as every machine finds it.
    """

    name: str
    num_rows: int
    fingerprint: str
    version: str
    source: str

    @classmethod
    def of(cls, shard: Shard, source: str) -> Self:
        return cls(shard.name, shard.num_rows, shard.fingerprint, shard.version, source)

    @classmethod
    def parse(cls, values: object) -> Self:
        """Raises `ManifestError` unless `values` describe a shard inside OUTPUT."""
        parts = _object(values, "a shard")
        shard = cls(
            _text(parts, "name"),
            _count(parts, "num_rows"),
            _text(parts, "fingerprint"),
            _text(parts, "version"),
            _text(parts, "source"),
        )
        require_inside(shard.name)
        return shard


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a run is. Two starts of one run have equal `identity` and `shards`.

    writer: the `rsr` command whose run it is. subject: in a few words, what it is about. command:
    the words that were typed. directory: where they were typed. output: OUTPUT, as typed. created:
    local time. limit: the most rows that the run takes of INPUT; None is all of them. unit_rows,
    unit_bytes: how units are cut, for as long as the run takes the same rows.
    """

    writer: str
    identity: Identity
    shards: tuple[InputShard, ...]
    subject: str = ""
    command: tuple[str, ...] = ()
    directory: str = field(default_factory=os.getcwd)
    output: str = ""
    created: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    limit: int | None = None
    unit_rows: int = 1
    unit_bytes: int = 1

    @classmethod
    def parse(cls, text: str | bytes) -> Self:
        """Raises `ManifestError` unless this is the text of a manifest of this format."""
        try:
            values = _object(json.loads(text), "it")
        except (ValueError, RecursionError) as error:
            raise ManifestError(f"it is not JSON ({error})") from error
        if values.get("format") != FORMAT:
            found = values.get("format", "an older one")
            raise ManifestError(f"its format is {found}; this version of rsr writes {FORMAT}")
        shards, command = values.get("shards"), values.get("command")
        if not isinstance(shards, list) or not isinstance(command, list):
            raise ManifestError("it lists no shards or no command")
        return cls(
            writer=_text(values, "writer"),
            identity=Identity.parse(values.get("identity")),
            shards=tuple(InputShard.parse(shard) for shard in shards),
            subject=_text(values, "subject"),
            command=tuple(str(word) for word in command),
            directory=_text(values, "directory"),
            output=_text(values, "output"),
            created=_text(values, "created"),
            limit=None if values.get("limit") is None else _count(values, "limit"),
            unit_rows=_count(values, "unit_rows"),
            unit_bytes=_count(values, "unit_bytes"),
        )

    def to_json(self) -> str:
        values = {name: getattr(self, name) for name in self.__slots__}
        values |= {
            "identity": self.identity.to_json(),
            "shards": [asdict(shard) for shard in self.shards],
        }
        return json.dumps({"format": FORMAT, **values}, indent=2)

    @property
    def num_rows(self) -> int:
        return sum(shard.num_rows for shard in self.shards)

    @property
    def exploded(self) -> list[str]:
        """Columns of lists of the inputs that the run made rows of; see `TrajectoryColumns`."""
        names = self.identity.columns.get("exploded")
        return [str(name) for name in names] if isinstance(names, list) else []

    def differences(self, other: "Manifest") -> list[str]:
        """Why `other` is not a further start of this run, in words; nothing if it is one."""
        found = self.identity.differences(other.identity)
        if self._begins(other) or other._begins(self):
            if self._extent == other._extent:
                return found
            words = ("not given" if limit is None else limit for limit in (self.limit, other.limit))
            return [*found, "--limit was {} and is now {}: it can be raised only".format(*words)]
        before = {shard.name: shard for shard in self.shards}
        now = {shard.name: shard for shard in other.shards}
        kinds = {
            "changed": [n for n in now if n in before and not _same_input(now[n], before[n])],
            "new": [n for n in now if n not in before],
            "gone": [n for n in before if n not in now],
        }
        told = [f"{kind}: {_first_of(names)}" for kind, names in kinds.items() if names]
        return found + ([f"input shards {', '.join(told)}"] if told else [])

    def grows_to(self, other: "Manifest") -> bool:
        """Whether `other` is this run with more rows of the same input: its --limit was raised."""
        return (
            self._begins(other)
            and self._extent < other._extent
            and not self.identity.differences(other.identity)
        )

    @property
    def _extent(self) -> tuple[int, int]:
        return self.num_rows, len(self.shards)

    def _begins(self, other: "Manifest") -> bool:
        """Whether this run's rows are the first of `other`'s, and it took no more for its limit."""
        pairs = list(zip(self.shards, other.shards, strict=False))
        return (
            self.limit == self.num_rows
            and 0 < len(self.shards) <= len(other.shards)
            and all((a.name, a.fingerprint) == (b.name, b.fingerprint) for a, b in pairs)
            and all(a.num_rows == b.num_rows for a, b in pairs[:-1])
            and pairs[-1][0].num_rows <= pairs[-1][1].num_rows
        )

    def written_again(self, other: "Manifest") -> str:
        """Say which inputs of `other` are as they were but for the time of writing."""
        before = {shard.name: shard.version for shard in self.shards}
        names = [s.name for s in other.shards if before.get(s.name, s.version) != s.version]
        return _first_of(names) if names else ""

    def shell_command(self, output: str, *more: str) -> str:
        """What to type here and now to go on with the run, which stands in `output` today."""
        words = [output if word == self.output else word for word in self.command]
        line = shell_command([*words, *more])
        if _is_here(self.directory):
            return line
        return f"{shell_command(['cd', self.directory])} && {line}"


def require_inside(name: str) -> None:
    """Raises `ManifestError` unless `name` is a file's below OUTPUT and not of `STATE_FOLDER`."""
    path = PurePosixPath(name)
    is_inside = path.parts and not path.is_absolute() and ".." not in path.parts
    if not is_inside or path.parts[0] == STATE_FOLDER or "\0" in name:
        raise ManifestError(f"it names {name!r}, which is no file of OUTPUT")


def _same_input(first: InputShard, second: InputShard) -> bool:
    # A file may have moved: what it is decides, not where it is.
    return (first.num_rows, first.fingerprint) == (second.num_rows, second.fingerprint)


def _first_of(names: Iterable[str]) -> str:
    first, *others = names
    return first + (f" and {len(others)} more" if others else "")


def _is_here(directory: str) -> bool:
    try:
        return os.path.samefile(directory, os.getcwd())
    except OSError:
        return False


def _object(value: object, what: str) -> Mapping[str, Json]:
    if not isinstance(value, dict):
        raise ManifestError(f"{what} is {type(value).__name__}, not an object")
    return value


def _text(values: JsonObject, key: str) -> str:
    value = values.get(key)
    if not isinstance(value, str):
        raise ManifestError(f"{key} is {value!r}, not a text")
    return value


def _count(values: JsonObject, key: str) -> int:
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ManifestError(f"{key} is {value!r}, not a number of 0 or more")
    return value
