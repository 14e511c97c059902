"""Instructions per tile, counted in disassemblies written by hand: the shapes compilers make."""

import pytest

from rsr.benchmarks.machine_code import tile_cost

LOGITS = 16
"""Per thread, and the exponentials of each way through a tile."""


def listing(*instructions: str) -> str:
    """As cuobjdump prints a program; a label names the address of what comes after it."""
    addresses, lines, address = {}, [], 0
    for text in instructions:
        if text.endswith(":"):
            addresses[text[:-1]] = address
        else:
            lines.append((address, text))
            address += 16
    for label, target in addresses.items():
        lines = [(at, text.replace(f"<{label}>", f"0x{target:x}")) for at, text in lines]
    return "\n".join(f"        /*{at:04x}*/                   {text} ;" for at, text in lines)


def way(num_more: int) -> list[str]:
    """An epilogue: an exponential per logit and some more."""
    return ["MUFU.EX2 R1, R2"] * LOGITS + ["FADD R1, R1, R2"] * num_more


# Two instructions before the loop of tiles; in it 1 + 5 of a check, a way of either kind, 1 at the
# end.
PROGRAM = [
    "MOV R1, c[0x0][0x28]",
    "MOV R2, RZ",
    "tiles:",
    "MOV R3, RZ",
    "multiply:",
    "LDS R4, [R5]",
    "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24",
    "@P0 BRA <multiply>",
    "ISETP.GE.AND P1, PT, R6, R7, PT",
    "@P1 BRA <masked>",
    *way(4),
    "BRA <end>",
    "masked:",
    *way(40),
    "end:",
    "@P2 BRA <tiles>",
    "EXIT",
]


def test_both_ways_through_a_tile_are_counted():
    cost = tile_cost(listing(*PROGRAM), LOGITS)
    common = 1 + 2 + 1  # before the loop, the check, the way back
    assert cost.unmasked == common + LOGITS + 4 + 1
    assert cost.masked == common + LOGITS + 40


def test_a_rare_branch_inside_a_way_is_not_on_it():
    rare = [
        "@P3 BRA <usual>",
        *["FMUL R1, R1, R2"] * 30,
        "usual:",
    ]
    at = PROGRAM.index("BRA <end>")
    cost = tile_cost(listing(*PROGRAM[:at], *rare, *PROGRAM[at:]), LOGITS)
    assert cost.unmasked == 4 + LOGITS + 4 + 1 + 1


def test_a_wait_put_behind_the_loop_is_no_way():
    wait = ["@P4 BRA <wait>", *PROGRAM[PROGRAM.index("ISETP.GE.AND P1, PT, R6, R7, PT") : -1]]
    start = PROGRAM[: PROGRAM.index("ISETP.GE.AND P1, PT, R6, R7, PT")]
    cost = tile_cost(listing(*start, *wait, "EXIT", "wait:", "NOP", "BRA <multiply>"), LOGITS)
    assert cost.unmasked == 4 + 1 + LOGITS + 4 + 1


def test_no_tensor_core_no_cost():
    plain = [text.replace("HGMMA.64x128x16.F32.BF16", "FFMA") for text in PROGRAM]
    assert tile_cost(listing(*plain), LOGITS) is None


def test_a_program_without_two_ways_is_refused():
    one_way = [text for text in PROGRAM if text not in ("@P1 BRA <masked>", "BRA <end>")]
    at = one_way.index("masked:")
    with pytest.raises(ValueError, match="no way with an exponential per logit"):
        tile_cost(listing(*one_way[:at], "@P2 BRA <tiles>", "EXIT"), LOGITS)
