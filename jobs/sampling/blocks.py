"""Which samples of each problem a file of the output holds.

A file has samples [first, stop) of the problems of one input file. To raise n adds files beside
those that are there, and touches none of them.
"""

import re
from dataclasses import dataclass

BLOCK_NAME = re.compile(
    r"(?P<stem>.*)\.samples-(?P<first>\d{5})-(?P<last>\d{5})\.parquet", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Block:
    """Samples [first, stop) of each problem of the input whose output would be `stem`.parquet."""

    stem: str
    first: int
    stop: int

    @classmethod
    def parse(cls, name: str) -> "Block":
        """The block that a file's name stands for; raises `ValueError` for another."""
        match = BLOCK_NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{name} is no file of samples")
        return cls(match["stem"], int(match["first"]), int(match["last"]) + 1)

    @property
    def name(self) -> str:
        return f"{self.stem}.samples-{self.first:05d}-{self.stop - 1:05d}.parquet"

    @property
    def samples(self) -> tuple[int, int]:
        return self.first, self.stop

    @property
    def num_samples(self) -> int:
        return self.stop - self.first
