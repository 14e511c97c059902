"""Tile sizes of the Triton pass, by GPU generation, operand width and number of tokens.

One table; each row says why it is there. `benchmarks/results/triton_resources.csv` has what the
compiler made of every row: registers, spills, shared memory, tensor-core instruction.
Knows no tensors.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tiles:
    """Blocks of the pass: tokens × vocabulary columns, accumulated over slices of the depth."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    parts: int = 1
    """In how many parts, one after the other, the epilogue takes a tile: a power of two."""


@dataclass(frozen=True)
class Rule:
    """Tiles for GPUs of at least `capability`, with operands and calls of at most these sizes."""

    capability: int
    """Compute capability as major · 10 + minor."""
    operand_bytes: int
    max_tokens: int | None
    tiles: Tiles
    reason: str


# First match wins.
RULES = (
    Rule(
        0,
        4,
        None,
        Tiles(64, 64, 32, num_warps=4, num_stages=2),
        "fp32 multiplies on the FMA units, by design: tensor cores would round operands to TF32. "
        "Small tiles leave registers for the operands those units take from registers.",
    ),
    Rule(
        0,
        2,
        64,
        Tiles(64, 64, 64, num_warps=4, num_stages=4),
        "Few tokens: reading the head from memory is the whole cost. 64 rows are the fewest that "
        "wgmma and tcgen05 take; four stages keep enough reads in flight.",
    ),
    Rule(
        90,
        2,
        None,
        Tiles(128, 128, 64, num_warps=8, num_stages=3, parts=4),
        "Two warp groups of 64 × 128 on wgmma, one tile in tensor memory on tcgen05: 64 logits per "
        "thread. The epilogue takes them in quarters: in halves a soft cap with rounding spills "
        "8 to 16 bytes, for 1 to 2 instructions fewer per logit. 128 × 256 spills.",
    ),
    Rule(
        0,
        2,
        None,
        Tiles(128, 128, 32, num_warps=8, num_stages=3, parts=4),
        "The same accumulators on mma.sync, at half the depth for cards with 99 KiB of shared "
        "memory. Whole, the epilogue spills 248 bytes, in halves 24.",
    ),
)


def choose_rule(capability: int, operand_bytes: int, num_tokens: int) -> Rule:
    """The first rule for this GPU, operand width and number of tokens."""
    for rule in RULES:
        if (
            capability >= rule.capability
            and operand_bytes == rule.operand_bytes
            and (rule.max_tokens is None or num_tokens <= rule.max_tokens)
        ):
            return rule
    raise ValueError(f"no tiles for operands of {operand_bytes} bytes")


# Row blocks that go through the vocabulary together: their hidden states and the few weight tiles
# in flight stay in the L2 cache, so the head is read from memory once per group, not per block.
GROUP_ROW_BLOCKS = 16
# Programs per multiprocessor over a whole launch: enough that a last, part-filled wave costs
# little, few enough that each program runs through many tiles.
PROGRAMS_PER_MULTIPROCESSOR = 4


def choose_num_splits(num_row_blocks: int, num_column_tiles: int, num_multiprocessors: int) -> int:
    """Into how many parts to cut the vocabulary, so that there is work for the whole GPU."""
    wanted = -(-PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors // num_row_blocks)
    tiles_per_split = max(1, num_column_tiles // wanted)
    return -(-num_column_tiles // tiles_per_split)
