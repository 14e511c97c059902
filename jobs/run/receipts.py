"""Receipts: what vouches for a written file, so that a later run can trust it or do it again.

A unit's receipt is the first line of its file, a shard's is a file of its own, since the output
is the user's and stays plain Parquet. A receipt that is torn, damaged or of another run is the
same as none. Knows nothing of where files are kept.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from rsr.engine.metrics import DatasetRsr
from rsr.jobs.shards.score_columns import Reason, Summary
from rsr.jobs.shards.shard import Shard
from rsr.jobs.storage.hashing import hash_bytes


@dataclass(frozen=True, slots=True)
class Receipt:
    """Rows [start, stop) of one shard, written.

    fingerprint: of the input shard. settings: `Identity.digest` of the run. content_bytes,
    content_blake2b: of the file. version: what the storage calls this writing of it (see
    `StoredFile.version`), "" where the receipt is part of the file. first_finished_s,
    finished_s: Unix times between which its units finished.
    """

    start: int
    stop: int
    fingerprint: str
    settings: str
    content_bytes: int
    content_blake2b: str
    version: str
    first_finished_s: float
    finished_s: float
    summary: Summary

    @classmethod
    def parse(cls, text: str | bytes) -> Self | None:
        """None if this is not a receipt as it was written, to the last digit."""
        try:
            sealed = json.loads(text)
            values = sealed["receipt"]
            if sealed["blake2b"] != _seal(values):
                return None
            summary = values.pop("summary")
            dataset = DatasetRsr(**summary.pop("dataset"))
            reasons = {name: Reason(**r) for name, r in summary.pop("reasons").items()}
            whole = Summary(**summary, dataset=dataset, reasons=reasons)
            return cls(**values, summary=whole)
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def to_json(self) -> str:
        """One line, with a hash of its own."""
        values = asdict(self)
        return json.dumps({"receipt": values, "blake2b": _seal(values)})

    def is_for(self, shard: Shard, start: int, stop: int, settings: str) -> bool:
        """Whether it vouches for these rows of this very input under these settings."""
        return (self.start, self.stop, self.fingerprint, self.settings) == (
            start,
            stop,
            shard.fingerprint,
            settings,
        )


def _seal(values: Mapping[str, Any]) -> str:
    return hash_bytes(json.dumps(values, sort_keys=True).encode())
