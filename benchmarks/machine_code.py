"""Reads a GPU program's disassembly: how many instructions a tile costs besides its multiplying.

The loop of tensor-core instructions lies inside the loop over tiles. What a tile costs around it is
the shortest way through the program from where that loop ends to where it begins again. Knows
nothing of Triton.
"""

import heapq
import re
from dataclasses import dataclass, field

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);")
_LEAVES = re.compile(r"^(?:@!?U?P\w+\s+)?(BRA|EXIT|BRX|RET|JMP)\b(.*)")
_MULTIPLIES = re.compile(r"HGMMA|HMMA|UTCHMMA")
_EXPONENTIAL = "MUFU.EX2"


@dataclass
class _Block:
    """A run of instructions with one way in, and the blocks that may come next."""

    instructions: list[str] = field(default_factory=list)
    next: list[int] = field(default_factory=list)

    def count(self, name: str) -> int:
        return sum(name in instruction for instruction in self.instructions)


@dataclass(frozen=True)
class TileCost:
    """Instructions per tile and thread outside of the multiply loop."""

    unmasked: int
    """In a tile with neither a target nor the vocabulary's end, on its usual way."""
    masked: int
    """In a tile with either."""


def tile_cost(disassembly: str, logits_per_thread: int) -> TileCost | None:
    """The cost of a tile; None where no tensor cores multiply.

    Raises ValueError where the program does not look like a loop over tiles with a branch for
    masked ones, whose ways each take an exponential per logit.
    """
    blocks = _blocks(disassembly)
    loop = _multiply_loop(blocks)
    if loop is None:
        return None
    costs, avoid = [], set(loop)
    for _ in range(2):
        path = _shortest_path(blocks, loop, avoid, logits_per_thread)
        costs.append(sum(len(blocks[i].instructions) for i in path))
        # The other way is one that shares no block full of exponentials with this one.
        avoid |= {i for i in path if blocks[i].count(_EXPONENTIAL) > 8}
    return TileCost(*costs)


def _blocks(disassembly: str) -> list[_Block]:
    found = [m.groups() for m in map(_INSTRUCTION.match, disassembly.splitlines()) if m]
    index_of = {int(address, 16): i for i, (address, _) in enumerate(found)}
    starts, leaves = {0}, {}
    for i, (_, text) in enumerate(found):
        if match := _LEAVES.match(text):
            target = re.search(r"0x([0-9a-f]+)", match[2]) if match[1] == "BRA" else None
            to = index_of[int(target[1], 16)] if target else None
            # A guard before the instruction, a condition before its target, or divergence.
            conditional = re.match(r"@|BRA[^0]*?(\.DIV|U?P\d)", text) is not None
            leaves[i] = to, conditional
            starts |= {i + 1} | ({to} if to is not None else set())
    order = sorted(start for start in starts if start < len(found))
    number = {start: n for n, start in enumerate(order)}
    blocks = []
    for start, end in zip(order, [*order[1:], len(found)], strict=True):
        to, goes_on = leaves.get(end - 1, (None, True))
        following = [number[to]] if to is not None else []
        if goes_on and end < len(found):
            following.append(number[end])
        blocks.append(_Block([text for _, text in found[start:end]], following))
    return blocks


def _multiply_loop(blocks: list[_Block]) -> range | None:
    """The tightest loop around a tensor-core instruction, by its blocks."""
    multiplying = [i for i, b in enumerate(blocks) if any(map(_MULTIPLIES.search, b.instructions))]
    loops = [
        range(head, tail + 1)
        for tail, block in enumerate(blocks)
        for head in block.next
        if any(head <= i <= tail for i in multiplying)
    ]
    return min(loops, key=len, default=None)


def _shortest_path(
    blocks: list[_Block], loop: range, avoid: set[int], num_exponentials: int
) -> list[int]:
    """The blocks from the loop's end to its beginning with the fewest instructions (Dijkstra).

    Ways with too few exponentials are waits that the compiler put elsewhere, back into the loop.
    """
    starts = {i for j in loop for i in blocks[j].next if i not in avoid}
    queue = [(len(blocks[i].instructions), [i]) for i in starts]
    heapq.heapify(queue)
    done = set()
    while queue:
        cost, path = heapq.heappop(queue)
        if path[-1] in done:
            continue
        done.add(path[-1])
        for i in blocks[path[-1]].next:
            if i in loop:
                if sum(blocks[j].count(_EXPONENTIAL) for j in path) >= num_exponentials:
                    return path
            elif i not in avoid:
                heapq.heappush(queue, (cost + len(blocks[i].instructions), [*path, i]))
    raise ValueError("no way with an exponential per logit leads back to the multiply loop")
