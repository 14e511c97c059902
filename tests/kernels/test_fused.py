"""The Triton pass by every row of the tile table, in Triton's interpreter.

Programs, lanes, parts and loads are those of a card. What only machine code can show is in
`test_gpu.py` and `tests/benchmarks/test_ahead_of_time.py`. fp16, as the interpreter's `tl.dot`
multiplies the stored bits of bf16.
"""

import pytest
import torch
from interpreted_pass import TILES, rank_logprob_by_elements

from rsr.kernels import rank_logprob, reference
from rsr.kernels.logits import LogitTransform
from rsr.kernels.tuning import (
    RULES,
    Call,
    choose_group_blocks,
    choose_lanes,
    choose_num_splits,
    choose_rule,
)

# Rows, columns and depth of a call, of the tiles' own; tensor descriptors take all of these.
SHAPES = {
    "aligned": lambda tiles: (tiles.rows, 2 * tiles.columns, tiles.depth),
    "ragged": lambda tiles: (tiles.rows + 1, 2 * tiles.columns + 1, tiles.depth + 8),
    "one token, vocabulary below a tile": lambda _: (1, 40, 64),
    "no token": lambda _: (0, 70, 64),
}
OPTIONS = {
    "plain": {},
    "no entropy": {"entropy": False},
    "scale and bias": {"scale": 0.7, "bias": True},
    "soft cap": {"soft_cap": 30.0, "bias": True},
    "model": {"logits_dtype": "model", "bias": True},
}


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        pytest.param(shape, options, id=f"{name}, {kind}")
        for name, shape in SHAPES.items()
        for kind, options in OPTIONS.items()
        if name == "ragged" or kind in ("plain", "model")
    ],
)
@pytest.mark.parametrize("tiles", TILES)
def test_ranks_are_the_reference_s(interpreted, tiles, shape, options, integer_operands):
    operands = integer_operands(*shape(TILES[tiles]), dtype=torch.float16)
    vocab_size = len(operands.weight)
    options = {"entropy": True} | options
    bias = None
    if options.pop("bias", False):
        bias = (torch.arange(vocab_size) % 64 / 1024).half()
        bias[::11] = -torch.inf
        bias[operands.targets] = 0
    result = interpreted(*operands, bias=bias, tiles=tiles, **options)
    truth = reference.rank_logprob(
        *operands,
        bias=bias,
        transform=LogitTransform(
            scale=options.get("scale", 1.0),
            soft_cap=options.get("soft_cap"),
            round_to=torch.float16 if "logits_dtype" in options else None,
        ),
        entropy=options["entropy"],
        accumulate=torch.float64,
    )
    assert torch.equal(result.rank, truth.rank)
    torch.testing.assert_close(result.logprob, truth.logprob, atol=2e-5, rtol=0)
    if options["entropy"]:
        torch.testing.assert_close(result.entropy, truth.entropy, atol=1e-6, rtol=1e-4)


@pytest.mark.seconds
def test_reducing_by_slices_changes_no_bit(interpreter, interpreted, normal_operands):
    operands = normal_operands(9, 300, 64, dtype=torch.float16)
    (tiles,) = [name for name in TILES if name.startswith("descriptor 128x256")]
    by_slices = interpreted(*operands, tiles=tiles, entropy=True)
    call = interpreter.submit(rank_logprob_by_elements, TILES[tiles], 0, *operands, entropy=True)
    for ours, theirs in zip(by_slices, call.result(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.seconds
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("tiles", TILES)
def test_lanes_of_a_card_give_the_same_ranks(interpreted, tiles, capability, integer_operands):
    operands = integer_operands(3, 300, 8, dtype=torch.float16)
    result = interpreted(*operands, tiles=tiles, capability=capability, entropy=True)
    expected = rank_logprob(*operands, impl="reference", entropy=True)
    assert torch.equal(result.rank, expected.rank)
    torch.testing.assert_close(result.logprob, expected.logprob, atol=2e-5, rtol=0)
    torch.testing.assert_close(result.entropy, expected.entropy, atol=1e-6, rtol=1e-4)


@pytest.mark.seconds
@pytest.mark.parametrize("tiles", TILES)
def test_one_dominant_token_leaves_its_tiny_entropy_exact(interpreted, tiles):
    weight = torch.zeros(600, 8, dtype=torch.float16)
    weight[3] = 3.75
    hidden, targets = torch.ones(3, 8, dtype=torch.float16), torch.tensor([0, 3, 599])
    result = interpreted(hidden, weight, targets, tiles=tiles, entropy=True)
    truth = rank_logprob(hidden.float(), weight.float(), targets, entropy=True)
    assert result.rank.tolist() == [2, 1, 2]
    # 599 others, each 30 nats below: e⁻³⁰ of probability, 31 nats of surprisal.
    expected = torch.full((3,), 599 * torch.tensor(-30.0).exp() * 31)
    torch.testing.assert_close(result.entropy, expected, atol=0, rtol=1e-4)
    torch.testing.assert_close(result.logprob, truth.logprob, atol=2e-5, rtol=0)


@pytest.mark.seconds
@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_column_that_is_not_finite(interpreted, tiles, value, integer_operands):
    operands = integer_operands(9, 300, 64, dtype=torch.float16)
    operands.weight[17, 5] = value
    operands.hidden[:, 5] = 1
    operands.targets[operands.targets == 17] = 18
    result = interpreted(*operands, tiles=tiles, entropy=True)
    expected = rank_logprob(*operands, impl="reference", entropy=True)
    for ours, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4, equal_nan=True)


def test_operands_that_cannot_be_described_go_by_pointers(interpreted, integer_operands):
    operands = integer_operands(5, 60, 24, dtype=torch.float16)
    odd = torch.zeros(60, 25, dtype=torch.float16)[:, 1:]
    odd.copy_(operands.weight)
    (descriptor,) = [name for name in TILES if name.startswith("descriptor 128x256")]
    result = interpreted(operands.hidden, odd, operands.targets, tiles=descriptor)
    assert torch.equal(result.rank, rank_logprob(*operands, impl="reference").rank)


def call(**changes) -> Call:
    usual = {
        "capability": 90,
        "operand_bytes": 2,
        "num_tokens": 8192,
        "depth": 4096,
        "has_soft_cap": False,
        "can_describe": True,
    }
    return Call(**usual | changes)


@pytest.mark.parametrize(
    ("changes", "design", "columns"),
    [
        ({"depth": 896}, "descriptor", 128),
        ({}, "descriptor", 256),
        ({"has_soft_cap": True}, "descriptor", 128),
        ({"can_describe": False}, "pointer", 128),
        ({"capability": 80}, "pointer", 128),
        ({"capability": 120}, "pointer", 128),
        ({"operand_bytes": 4}, "pointer", 64),
    ],
    ids=str,
)
def test_a_call_gets_its_design(changes, design, columns):
    tiles = choose_rule(call(**changes)).tiles
    assert (tiles.design, tiles.columns) == (design, columns)


def test_every_rule_says_why():
    assert all(rule.reason for rule in RULES)
    with pytest.raises(ValueError, match="no tiles for operands of 8 bytes"):
        choose_rule(call(operand_bytes=8))


@pytest.mark.parametrize("num_row_blocks", [1, 8, 64, 640])
@pytest.mark.parametrize("num_tiles", [1, 192, 594, 1187])
@pytest.mark.parametrize("num_places", [1, 108, 264])
def test_a_gpu_is_busy_to_the_end(num_row_blocks, num_tiles, num_places):
    group_blocks = min(num_row_blocks, 11)
    num_splits = choose_num_splits(num_row_blocks, num_tiles, num_places, group_blocks)
    assert 1 <= num_splits <= num_tiles
    num_waves = -(-num_row_blocks * num_splits // num_places)
    longest = num_waves * -(-num_tiles // num_splits)
    ideal = num_row_blocks * num_tiles / num_places
    assert longest <= max(1.12 * ideal, -(-ideal // 1))
    if group_blocks < num_row_blocks:  # one group fills the GPU
        assert group_blocks * num_splits >= min(num_places, group_blocks * num_tiles)


def test_groups_of_row_blocks_fit_in_the_cache_and_are_of_one_size():
    assert choose_group_blocks(64, block_bytes=1 << 20, l2_bytes=50 << 20) == 11  # 6 groups
    assert choose_group_blocks(64, block_bytes=1 << 30, l2_bytes=50 << 20) == 1
    assert choose_group_blocks(3, block_bytes=1, l2_bytes=50 << 20) == 3


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
def test_lanes_share_all_columns(capability, tiles):
    lanes = choose_lanes(capability, tiles)
    assert tiles.columns % (lanes.count * lanes.run) == 0
