"""Tuning, as far as it goes without a GPU: in Triton's interpreter, on a head of a few columns."""

import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from rsr.benchmarks.tune import candidates, describe
from rsr.jobs.cli import main
from rsr.kernels.tuned_tiles import TunedCard
from rsr.kernels.tuning import RULES

TUNE = """
import torch
from rsr.benchmarks.shapes import HeadShape
from rsr.benchmarks.tune import tune
from rsr.kernels.tuning import Tiles
tiles = [Tiles(16, 32, 16, 4, 2), Tiles(16, 64, 16, 4, 2, design="descriptor")]
heads = [HeadShape(1, 16, 100), HeadShape(1, 32, 90), HeadShape(2, 32, 90)]
card = tune(heads, torch.device("cpu"), tiles, token_buckets=(4, 20), num_repetitions=1)
print(card.to_json())
"""


@pytest.mark.slow
def test_a_file_has_a_row_for_every_kind_of_call():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TUNE], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    card = TunedCard.parse(done.stdout)
    assert (card.card, card.capability) == ("interpreter", 0)
    assert [(row.has_soft_cap, row.max_depth, row.max_tokens) for row in card.rows] == [
        (has_soft_cap, depth, tokens)
        for has_soft_cap in (False, True)
        for depth in (16, None)
        for tokens in (4, None)
    ]
    assert all(row.tiles.rows == 16 and row.tflop_per_s is not None for row in card.rows)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
def test_what_the_rules_take_is_among_the_candidates(capability):
    tiles = candidates(capability)
    assert len({describe(t) for t in tiles}) == len(tiles)
    major, minor = capability
    for rule in RULES:
        is_here = 10 * major + minor in rule.capabilities and rule.operand_bytes == 2
        assert not is_here or describe(rule.tiles) in map(describe, tiles)


def test_without_a_gpu_it_is_refused():
    result = CliRunner().invoke(main, ["bench", "kernel", "--tune", "--device", "cpu"])
    assert result.exit_code == 2
    assert "--tune needs an NVIDIA GPU, got --device cpu" in result.output
