"""Numbers for groups: small integers in the place of the values that rows of one group share."""

from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray


def encode(values: pl.Series) -> tuple[NDArray[np.int32], int]:
    """(N,) int32 numbers, one for each distinct value, −1 for null, and a bound above them."""
    if (compact := _compact_integers(values)) is not None:
        return compact
    array: Any = values.to_arrow(compat_level=pl.CompatLevel.oldest())
    if pa.types.is_null(array.type):
        return np.full(len(array), -1, np.int32), 0
    encoded = pc.dictionary_encode(array)
    numbers = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    return numbers.astype(np.int32), len(encoded.dictionary)


def _compact_integers(values: pl.Series) -> tuple[NDArray[np.int32], int] | None:
    """Integers without nulls of a narrow range are numbers already, up to their offset."""
    if not values.dtype.is_integer() or values.null_count() or not len(values):
        return None
    low, high = int(values.min()), int(values.max())  # type: ignore[arg-type]
    if high - low >= min(2 * len(values), np.iinfo(np.int32).max):
        return None
    numbers = np.empty(len(values), np.int32)
    np.subtract(values.to_numpy(), low, out=numbers, casting="unsafe")
    return numbers, high - low + 1
