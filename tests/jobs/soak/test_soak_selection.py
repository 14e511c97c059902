"""Nights of `rsr filter` and `rsr select`: faults by the dice, and every row as without them."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from soak_corpus import write_corpus
from soak_night import RSR, Night, Report

NUM_SHARDS_LONG, NUM_SHARDS_SHORT = 30, 10
ROWS_PER_SHARD = 10_000
"""Many shards leave time and places for several faults in a round, of which each has an end."""
MOST_SECONDS = 900

ARGUMENTS = {
    "filter": ["--keep-fraction", "1/2", "--min-tokens", "5"],
    "select": ["--group-by", "problem", "--keep", "2"],
}
REFUSED_ARGUMENTS = {
    "filter": ["--max-rsr", "-1"],
    "select": ["--group-by", "problem", "--max-share-per", "teacher=0.1"],
}
"""Found out when the scores have been read: nothing would be kept."""

SHARE = 30 / 320
"""Of all faults of a long soak, for each of the two commands."""
SHORT_FAULTS = 6
"""Together the two short nights see almost every kind of fault: the second goes on where the
first has ended."""

pytestmark = pytest.mark.slow


class SelectionNight(Night):
    """A night of one of the two commands."""

    def __init__(self, command: str, source: Path, *more: object) -> None:
        self.command = command
        super().__init__(source, *more)

    def arguments(self, output: Path) -> list[str]:
        return [str(self.source), str(output), "--json", *ARGUMENTS[self.command]]

    def refused_arguments(self, output: Path) -> list[str]:
        return [str(self.source), str(output), "--json", *REFUSED_ARGUMENTS[self.command]]


@pytest.fixture(scope="module")
def num_shards(soak_length) -> int:
    return NUM_SHARDS_LONG if soak_length.is_long else NUM_SHARDS_SHORT


@pytest.fixture(scope="module")
def scored_corpus(
    tmp_path_factory: pytest.TempPathFactory, write_scored: Callable[..., Path], num_shards: int
) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), write_scored, num_shards, ROWS_PER_SHARD)


@pytest.mark.timeout(MOST_SECONDS + 300)
@pytest.mark.parametrize("command", ["filter", "select"])
def test_nights_cost_no_row(
    command, tmp_path, scored_corpus, num_shards, soak_disk, soak_length, telling
):
    quiet = tmp_path / "quiet"
    report = Report(soak_length.seed, num_shards * ROWS_PER_SHARD)
    night = SelectionNight(command, scored_corpus, quiet, soak_disk, tmp_path / "log", report)
    subprocess.run([*RSR, command, *night.arguments(quiet)], check=True, capture_output=True)
    num_faults = soak_length.num_faults(SHARE, SHORT_FAULTS)
    with telling(night):
        first = SHORT_FAULTS if command == "select" else 0
        night.run(num_faults, time.monotonic() + MOST_SECONDS, first=first)
    assert report.faults.total() == num_faults
    assert report.rows_lost == report.rows_duplicated == report.rows_with_other_bits == 0
    assert report.files_of_others_touched == 0
