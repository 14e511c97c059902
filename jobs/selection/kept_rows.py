"""Which rows of SCORED a file of a selection took, kept beside it for `rsr verify`.

One JSON object a line for each shard that the file was made of, in order: the shard's name, its
number of rows, and a bit for each row, compressed.
"""

import base64
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rsr.jobs.run.folder import RunFolder
from rsr.jobs.selection.layout import Mask


@dataclass(frozen=True, slots=True)
class KeptRows:
    """Rows that were taken of one shard. mask: (num_rows,) of that shard."""

    shard_name: str
    mask: Mask

    def to_json(self) -> str:
        """One line, without its end."""
        bits = zlib.compress(np.packbits(self.mask).tobytes(), level=1)
        return json.dumps(
            {
                "shard": self.shard_name,
                "num_rows": len(self.mask),
                "rows": base64.b64encode(bits).decode(),
            }
        )


def read_kept_rows(folder: RunFolder, file_name: str) -> Iterator[KeptRows]:
    """What a file of OUTPUT was made of, one shard at a time.

    Raises `OSError` if it is not there, `ValueError` if it is damaged.
    """
    for line in folder.storage.read(folder.kept_rows_name(file_name)).splitlines():
        try:
            values = json.loads(line)
            name, num_rows = str(values["shard"]), int(values["num_rows"])
            packed = zlib.decompress(base64.b64decode(values["rows"], validate=True))
        except (zlib.error, KeyError, TypeError) as error:
            raise ValueError(repr(error)) from error
        bits = np.unpackbits(np.frombuffer(packed, np.uint8))
        if len(bits) - num_rows not in range(8):
            raise ValueError(f"it is of about {len(bits)} rows of {name}, not of {num_rows}")
        yield KeptRows(name, bits[:num_rows].astype(bool))
