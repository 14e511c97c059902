"""Whether two Arrow arrays hold the same bits, whatever their types."""

from typing import Any

import pyarrow as pa


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
