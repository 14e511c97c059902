"""How rows of one group come together, whichever shards they are in: keys, parts and pieces.

A row goes to the part that its group's key says; a piece is what one call has for one part, as an
Arrow stream. Keys are the values themselves where these are integers of up to 64 bits, else two
64-bit hashes of them: that two of a billion groups share both has a chance below 10⁻²⁰. Knows
nothing of scores.
"""

import itertools
import socket
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rsr.jobs.errors import UsageError
from rsr.jobs.selection.numbering import encode

KEYS = ("key", "more_key")
"""Columns of a group's key; integers have the first alone."""
HASH_SEEDS = (1, 2)


def with_keys(frame: pl.DataFrame, values: pl.Series) -> pl.DataFrame:
    """`frame` with the keys of `values`, none of which is null."""
    if values.dtype.is_integer() and values.dtype not in (pl.Int128, pl.UInt128):
        numbers = values.cast(pl.Int64, wrap_numerical=True).reinterpret(signed=False)
        return frame.with_columns(numbers.alias(KEYS[0]))
    hashes = zip(KEYS, HASH_SEEDS, strict=True)
    return frame.with_columns(values.hash(seed).alias(name) for name, seed in hashes)


def keys_of(frame: pl.DataFrame) -> list[str]:
    return [name for name in KEYS if name in frame.columns]


def numbered(frame: pl.DataFrame, num_parts: int = 1) -> tuple[NDArray[np.int32], int]:
    """(N,) int32 numbers of the keys from 0, and a bound above them.

    num_parts: parts that there are, where all rows are of one.
    """
    names = keys_of(frame)
    if len(names) == 1:
        # What is left of a part's integers lies as closely together as all of them do.
        return encode(frame[names[0]] // num_parts)
    words = np.column_stack([frame[name].to_numpy() for name in names])
    buffers = [None, pa.py_buffer(words.data)]
    array: Any = pa.Array.from_buffers(pa.binary(words.itemsize * len(names)), len(words), buffers)
    encoded: Any = pc.dictionary_encode(array)
    return encoded.indices.to_numpy().astype(np.int32), len(encoded.dictionary)


def crowded(frame: pl.DataFrame, room: int) -> NDArray[np.int64]:
    """Ascending places of the rows whose group has more than `room` of them here.

    Among them may be rows of a small group, with which the first words of a large one's keys agree.
    """
    ordered = np.sort(frame[KEYS[0]].to_numpy())
    beyond = ordered[room:][ordered[room:] == ordered[:-room]]
    is_crowded = frame[KEYS[0]].is_in(pl.Series(np.unique(beyond)).implode())
    return np.flatnonzero(is_crowded.to_numpy())


def num_parts_upto(most: int) -> int:
    """The largest prime up to `most`, or 1: integers of any stride but its own fill all parts."""
    primes = (n for n in range(most, 1, -1) if all(n % divisor for divisor in range(2, n)))
    return next(primes, 1)


def split(frame: pl.DataFrame, num_parts: int) -> list[pl.DataFrame]:
    """The rows of each part, in their order."""
    if num_parts == 1 or not frame.height:
        return [frame] * num_parts
    parts = (frame[KEYS[0]].to_numpy() % np.uint64(num_parts)).astype(np.uint16)
    order = np.argsort(parts, kind="stable")
    edges = np.searchsorted(parts[order], np.arange(num_parts + 1))
    ordered = frame.rechunk()[order]
    return [ordered[start:stop] for start, stop in itertools.pairwise(edges)]


def joined(buffers: list[pa.Buffer]) -> pl.DataFrame:
    """The rows of all of them, one after another; without columns where there is no row."""
    frames = [frame for frame in map(unpacked, buffers) if frame.height]
    return pl.concat(frames, rechunk=True) if frames else pl.DataFrame()


def packed(frame: pl.DataFrame) -> pa.Buffer:
    table = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def unpacked(buffer: pa.Buffer) -> pl.DataFrame:
    with pa.ipc.open_stream(buffer) as reader:
        frame = pl.from_arrow(reader.read_all())
    assert isinstance(frame, pl.DataFrame)
    return frame


def hashes_of_this_machine() -> tuple[int, ...]:
    """What another machine must hash to the same."""
    texts, numbers = pl.Series(["", "rsr", "x" * 300]), pl.Series([0, 1 << 40])
    return tuple(h for seed in HASH_SEEDS for s in (texts, numbers) for h in s.hash(seed))


def require_hashes(expected: tuple[int, ...]) -> None:
    """Raises `UsageError` if this machine does not hash as another one does."""
    if hashes_of_this_machine() != expected:
        raise UsageError(
            f"the machine {socket.gethostname()} (Polars {pl.__version__}) hashes groups otherwise "
            "than the one that the command runs on: install the same Polars on every machine"
        )
