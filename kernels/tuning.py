"""Which tiles the Triton pass takes, by GPU, operand width, depth and number of tokens.

A table of rules, each of which says why it is there, and the arithmetic of sharing tiles out among
programs. `tuned_tiles.py` has what was measured on a card, which goes first.
`benchmarks/results/triton_resources.csv` has what the compiler made of every row: registers,
spills, shared memory, instructions. Knows no tensors.
"""

import functools
from dataclasses import dataclass
from typing import Literal

Design = Literal["pointer", "descriptor"]
"""How a program loads its operands. Tensor descriptors need neither registers for addresses nor
masks, but a GPU of compute capability 9.0 or more, and operands as `fused.can_describe` says."""


@dataclass(frozen=True)
class Tiles:
    """Blocks of the pass: tokens × vocabulary columns, accumulated over slices of the depth."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    programs_per_multiprocessor: int = 1
    """Programs that run at once, as far as registers and shared memory go."""
    design: Design = "pointer"


@dataclass(frozen=True)
class Call:
    """What of a call decides its tiles."""

    capability: int
    """The GPU's compute capability as major · 10 + minor; 0 in Triton's interpreter."""
    operand_bytes: int
    num_tokens: int
    depth: int
    has_soft_cap: bool
    can_describe: bool
    """Whether the operands can be loaded through tensor descriptors."""


ANY_GPU = range(0, 1_000)
# These multiply in groups of warps, from shared memory: wgmma and tcgen05. Later ones of 12.0, for
# desktops, have mma.sync alone again, and 99 KiB of shared memory.
HOPPER_AND_BLACKWELL = range(90, 120)


@dataclass(frozen=True)
class Rule:
    """Tiles for calls of one kind."""

    capabilities: range
    operand_bytes: int
    tiles: Tiles
    reason: str
    max_tokens: int | None = None
    max_depth: int | None = None
    takes_soft_cap: bool = True

    def fits(self, call: Call) -> bool:
        return (
            call.capability in self.capabilities
            and call.operand_bytes == self.operand_bytes
            and (self.max_tokens is None or call.num_tokens <= self.max_tokens)
            and (self.max_depth is None or call.depth <= self.max_depth)
            and (self.takes_soft_cap or not call.has_soft_cap)
            and (call.can_describe or self.tiles.design == "pointer")
        )


# First match wins.
RULES = (
    Rule(
        ANY_GPU,
        4,
        Tiles(64, 64, 32, num_warps=4, num_stages=2, programs_per_multiprocessor=2),
        "fp32 multiplies on the FMA units, by design: tensor cores would round operands to TF32. "
        "Small tiles leave registers for the operands those units take from registers.",
    ),
    Rule(
        HOPPER_AND_BLACKWELL,
        2,
        Tiles(128, 128, 64, 4, 3, programs_per_multiprocessor=2, design="descriptor"),
        "Two programs per multiprocessor: one multiplies while the other reduces its tile, which "
        "is a large part of the time where the depth is small. With 4 warps each thread has 128 "
        "logits, over which it spreads what a tile costs besides; with 8 it has 64.",
        max_depth=2048,
        takes_soft_cap=False,
    ),
    Rule(
        HOPPER_AND_BLACKWELL,
        2,
        Tiles(128, 256, 64, 8, 3, design="descriptor"),
        "The widest instruction there is, and three quarters of the traffic from L2 per FLOP, "
        "which is what limits a large depth.",
        takes_soft_cap=False,
    ),
    Rule(
        HOPPER_AND_BLACKWELL,
        2,
        Tiles(128, 128, 64, 8, 3, design="descriptor"),
        "A soft cap needs a tile's logits and what they were before it at once: 64 of each per "
        "thread fit in registers, 128 do not.",
    ),
    Rule(
        ANY_GPU,
        2,
        Tiles(64, 64, 64, 4, 4, programs_per_multiprocessor=2),
        "Few tokens: reading the head from memory is the whole cost. 64 rows are the fewest that "
        "wgmma and tcgen05 take; four stages keep enough reads in flight.",
        max_tokens=64,
    ),
    Rule(
        ANY_GPU,
        2,
        Tiles(128, 128, 32, 8, 3),
        "By pointers: for mma.sync, at half the depth for cards with 99 KiB of shared memory, and "
        "for operands that cannot be described.",
    ),
)


def choose_rule(call: Call) -> Rule:
    """The first rule that fits. Raises ValueError for operands of another width."""
    for rule in RULES:
        if rule.fits(call):
            return rule
    raise ValueError(f"no tiles for operands of {call.operand_bytes} bytes")


@dataclass(frozen=True)
class Lanes:
    """How a tile's columns are dealt to the statistics that a program keeps of each row.

    `count` lanes take `run` neighbouring columns each in turn. Any numbers give right results. It
    costs least where a lane's columns are those that one thread holds of a row.
    """

    count: int
    run: int


def choose_lanes(capability: int, tiles: Tiles) -> Lanes:
    """The lanes to which tensor cores give a tile: PTX ISA, "Matrix Fragments" of wgmma and mma."""
    if capability == 0:  # the interpreter: operations are long rather than many
        return Lanes(tiles.columns // 8, 2)
    if 100 <= capability < 120:
        # Tensor memory gives a thread part of one row: every four warps have a share of columns,
        # and every half warp where 64 rows are all.
        count = max(1, tiles.num_warps // 4) * (2 if tiles.rows == 64 else 1)
        return Lanes(count, tiles.columns // count)
    return Lanes(4, 2)


# At most this share of the L2 cache is for the hidden states of row blocks that go through the
# vocabulary together. The rest is for the weight tiles in flight; a GPU with two L2 halves keeps
# copies of what both read.
GROUP_SHARE_OF_L2 = 4


def choose_group_blocks(num_row_blocks: int, block_bytes: int, l2_bytes: int) -> int:
    """How many row blocks go through the vocabulary together, in groups of about one size.

    The head is read from memory once per group, their hidden states once.
    """
    most = max(1, l2_bytes // (GROUP_SHARE_OF_L2 * block_bytes))
    num_groups = -(-num_row_blocks // most)
    return -(-num_row_blocks // num_groups)


# What a program costs besides its tiles, in tiles: starting, filling the pipeline, writing.
PROGRAM_COST_TILES = 0.25
# Times that all places on the GPU are filled, at most: each part of the vocabulary is written and
# merged by itself.
MAX_WAVES = 16


@functools.lru_cache(maxsize=4096)
def choose_num_splits(
    num_row_blocks: int, num_column_tiles: int, num_places: int, group_blocks: int
) -> int:
    """Into how many parts to cut the vocabulary, so that all programs end at about one time.

    `num_places` is how many programs the GPU runs at once. One group of row blocks takes all of
    them: two at once would share the cache. Of the numbers that end first, within a hundredth, the
    fewest.
    """
    least = -(-num_places // group_blocks) if group_blocks < num_row_blocks else 1
    most = max(least, MAX_WAVES * num_places // num_row_blocks, 1)
    choices = range(min(least, num_column_tiles), min(most, num_column_tiles) + 1)

    def end(num_splits: int) -> float:
        num_waves = -(-num_row_blocks * num_splits // num_places)
        return num_waves * (-(-num_column_tiles // num_splits) + PROGRAM_COST_TILES)

    first_end = min(map(end, choices))
    return next(n for n in choices if end(n) <= 1.01 * first_end)
