"""Nights of `rsr filter` and `rsr select` on a Ray cluster of three nodes: faults in each pass."""

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from soak_bucket import BucketPassesNight
from soak_cluster import SoakCluster
from soak_corpus import write_corpus
from soak_night import RSR, Report
from soak_passes import DiskPassesNight, PassesNight

NUM_NODES = 3
NUM_SHARDS_LONG, NUM_SHARDS_SHORT = 12, 6
ROWS_PER_SHARD = 4_000
MOST_SECONDS = 1500
REMOVAL_PATIENCE_S = 15.0

PASSES = {
    "filter": ("count", "refine", "limits", "copy", "describe"),
    "select": ("gather", "rank", "ids", "admit", "choose", "copy", "describe"),
}
OPTIONS = {
    "filter": ["--keep-fraction", "1/2", "--within", "teacher", "--min-tokens", "5"],
    "select": ["--group-by", "problem", "--keep", "2", "--max-share-per", "teacher=0.4"],
}
REFUSED_OPTIONS = {
    "filter": ["--max-rsr", "-1"],
    "select": ["--group-by", "problem", "--min-tokens", "1000"],
}
"""Found out when the scores have been read: nothing would be kept."""

SHARE = 50 / 320
"""Of all faults of a long soak, for each of the four nights."""
SHORT_FAULTS = 4
FAULTS_FOR_ALL_PASSES = 30
"""From so many on every pass must have had one."""
FIRST_FAULTS = {("filter", "disk"): 0, ("select", "bucket"): 3}
"""The nights that have a short version, and where in its list of kinds each begins."""

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(MOST_SECONDS + 300)]


@contextmanager
def removed_in_the_end(folder: str) -> Iterator[None]:
    """Ray's last processes write a while after it was told to end."""
    try:
        yield
    finally:
        deadline = time.monotonic() + REMOVAL_PATIENCE_S
        while Path(folder).exists() and time.monotonic() < deadline:
            shutil.rmtree(folder, ignore_errors=True)
            time.sleep(0.5)


@pytest.fixture(scope="module")
def cluster(s3) -> Iterator[SoakCluster]:
    """One for all nights; its workers reach the bucket as this process does."""
    # Short: the paths of Ray's sockets may be no longer than 107 bytes.
    folder = tempfile.mkdtemp(prefix="rsr")
    with pytest.MonkeyPatch.context() as patch, removed_in_the_end(folder):
        # Nobody else's Ray on this machine is to find this cluster, nor it theirs. What killed
        # processes leave among temporary files goes with the folder.
        for name in ("RAY_TMPDIR", "TMPDIR"):
            patch.setenv(name, folder)
        patch.setattr(tempfile, "tempdir", folder)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        cluster = SoakCluster(NUM_NODES)
        try:
            yield cluster
        finally:
            cluster.shutdown()


@pytest.fixture(scope="module")
def num_shards(soak_length) -> int:
    return NUM_SHARDS_LONG if soak_length.is_long else NUM_SHARDS_SHORT


@pytest.fixture(scope="module")
def scored_corpus(tmp_path_factory, write_scored, num_shards) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    return write_corpus(folder, write_scored, num_shards, ROWS_PER_SHARD)


@pytest.fixture
def make_night(tmp_path, scored_corpus, num_shards, soak_disk, soak_length, cluster, s3, s3_url):
    """Makes the night of a command at a place, before it the undisturbed run on this machine."""

    def make(command: str, place: str) -> PassesNight:
        quiet = tmp_path / "quiet"
        report = Report(soak_length.seed, num_shards * ROWS_PER_SHARD, NUM_NODES)
        what = (command, PASSES[command], OPTIONS[command], REFUSED_OPTIONS[command], cluster)
        where = (scored_corpus, quiet, soak_disk, tmp_path / "log", report)
        if place == "bucket":
            night = BucketPassesNight(*what, *where, proxy=s3, url=s3_url)
        else:
            night = DiskPassesNight(*what, *where)
        arguments = [str(scored_corpus), str(quiet), "--json", *OPTIONS[command]]
        subprocess.run([*RSR, command, *arguments], check=True, capture_output=True)
        return night

    return make


@pytest.mark.parametrize("place", ["disk", "bucket"])
@pytest.mark.parametrize("command", ["filter", "select"])
def test_nights_cost_no_row(command, place, make_night, soak_length, telling):
    if not soak_length.is_long and (command, place) not in FIRST_FAULTS:
        pytest.skip("a night of the long soak alone: make soak")
    night = make_night(command, place)
    num_faults = soak_length.num_faults(SHARE, SHORT_FAULTS)
    with telling(night):
        first = FIRST_FAULTS.get((command, place), 0)
        night.run(num_faults, time.monotonic() + MOST_SECONDS, first=first)
    report = night.report
    assert report.faults.total() == num_faults
    if num_faults >= FAULTS_FOR_ALL_PASSES:
        assert report.faults_by_pass.keys() == set(PASSES[command])
    assert report.rows_lost == report.rows_duplicated == report.rows_with_other_bits == 0
    assert report.files_with_other_bytes == report.files_of_others_touched == 0
