"""Whether two Arrow arrays, or the columns that two files share, hold the same bits."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from rsr.jobs.shards.parquet import open_parquet
from rsr.jobs.shards.reader import ShardReader


def same_bits(first: "pa.Array[Any]", second: "pa.Array[Any]") -> bool:
    """Whether two arrays of one type hold the same values, NaN and −0.0 told by their bits."""
    return bool(_as_bits(first).equals(_as_bits(second)))


def _as_bits(array: Any) -> Any:
    """An array or chunked array as one array of integers; its methods depend on its type."""
    if isinstance(array, pa.ChunkedArray):
        array = pa.array([], array.type) if not array.num_chunks else array.chunk(0)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    return array.view(_bits_type(array.type))


def _bits_type(kind: Any) -> Any:
    """The Arrow type `kind` with unsigned integers in the place of floats, however deep."""
    if pa.types.is_floating(kind):
        return {16: pa.uint16(), 32: pa.uint32(), 64: pa.uint64()}[kind.bit_width]
    if pa.types.is_struct(kind):
        return pa.struct([f.with_type(_bits_type(f.type)) for f in kind])
    if pa.types.is_map(kind):
        key, item = kind.key_field, kind.item_field
        return pa.map_(key.with_type(_bits_type(key.type)), item.with_type(_bits_type(item.type)))
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_bits_type(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_bits_type(kind.value_type)))
    if pa.types.is_fixed_size_list(kind):
        inner = kind.value_field.with_type(_bits_type(kind.value_type))
        return pa.list_(inner, kind.list_size)
    return kind


def first_difference(
    source: str, written: str, num_rows: int, *, is_added: Callable[[str], bool], repeats: int = 1
) -> str | None:
    """Where the input's columns differ from the output's in type, metadata, or a bit; or None.

    is_added: whether a name is that of a column which the run adds, in the place of the input's.
    repeats: how often in a row the output has each row of the input.
    """
    before, after = open_parquet(source).schema_arrow, open_parquet(written).schema_arrow
    there = open_parquet(source).metadata.num_rows
    if there < num_rows:
        return f"its input has {there:,} rows, not the {num_rows:,} that the run took"
    kept = [i for i, name in enumerate(before.names) if not is_added(name)]
    for place, index in enumerate(kept):
        if not before.field(index).equals(after.field(place), check_metadata=True):
            old, new = before.field(index), after.field(place)
            return (
                f"column {old.name!r} of the input is {old.type} {old.metadata or ''}; the output "
                f"has {new.name!r}, {new.type} {new.metadata or ''}"
            )
    reader, first = ShardReader(written), 0
    for expected in ShardReader(source).rows(0, num_rows):
        stop = first + expected.num_rows
        rows = pa.Table.from_batches(reader.rows(repeats * first, repeats * stop))
        places = np.repeat(np.arange(expected.num_rows), repeats)
        for place, index in enumerate(kept):
            found = rows.column(place).combine_chunks()
            wanted = expected.column(index)
            if not same_bits(wanted if repeats == 1 else wanted.take(places), found):
                return f"column {before.names[index]!r} differs in rows {first:,} to {stop - 1:,}"
        first = stop
    return None
