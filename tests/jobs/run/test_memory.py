"""What needs more memory than there is is refused before anything but footers is read."""

import os
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from typed import rsr

from rsr.jobs.run.memory import _left_to_group_bytes, free_memory_bytes
from rsr.jobs.selection.filter import BYTES_PER_ROW

GROUP_ROWS, NUM_GROUPS, NUM_NAMES = 1 << 20, 8, 400
"""One file of rows that are all alike, under many names: a corpus by its footers."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, write_scored) -> Path:
    """Three billion scored rows in 400 files that take no room."""
    needed = GROUP_ROWS * NUM_GROUPS * NUM_NAMES * BYTES_PER_ROW
    if psutil.virtual_memory().available + psutil.swap_memory().free > needed:
        pytest.skip(f"this machine has more than {needed >> 30} GiB of memory free")
    root = tmp_path_factory.mktemp("large")
    row = {"id": ["a"], "problem_id": [1], "teacher": ["t"]}
    small = pq.read_table(write_scored(root / "small.parquet", [2.0], columns=row))
    group = small.take(np.zeros(GROUP_ROWS, np.int64))
    folder = root / "scored"
    folder.mkdir()
    first = folder / "0000.parquet"
    with pq.ParquetWriter(first, group.schema) as writer:
        for _ in range(NUM_GROUPS):
            writer.write_table(group)
    for number in range(1, NUM_NAMES):
        os.link(first, folder / f"{number:04}.parquet")
    return folder


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("words", "way_out"),
    [
        (("filter", "--keep-fraction", "0.2"), "--address"),
        (("select", "--group-by", "problem_id"), "--address"),
        (("teachers", "--max-rows", "4000000000"), "fewer with --max-rows"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_corpus_that_does_not_fit_is_refused(corpus, tmp_path, words, way_out):
    command, *options = words
    output = tmp_path / "out"
    places = [corpus] if command == "teachers" else [corpus, output]
    refused = rsr(command, *places, *options, exit_code=2)
    (line,) = refused.stderr.strip().splitlines()
    assert "of the 3,355,443,200 rows" in line or "among 3,355,443,200 rows" in line
    assert "GiB are free here" in line
    assert way_out in line
    assert not output.exists()


def test_free_memory_is_what_the_machine_says():
    free = free_memory_bytes()
    assert free is not None
    assert 0 < free <= psutil.virtual_memory().total


def test_files_kept_in_memory_leave_room_to_a_container(tmp_path):
    assert _left_to_group_bytes(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 400\nactive_file 150\n")
    assert _left_to_group_bytes(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert _left_to_group_bytes(tmp_path) == 1000 - 900 + 550
