"""What the compiler makes of every tile size in the table, for GPUs that are not here."""

import pytest
import torch

from rsr.kernels import tuning
from rsr.kernels.logits import LogitTransform

pytest.importorskip("triton")

from rsr.benchmarks.ahead_of_time import (
    SHARED_MEMORY_BYTES,
    TENSOR_CORE_INSTRUCTION,
    Variant,
    compile_pass,
)

CAPABILITIES = (80, 90, 100)
# Sizes of a head reach the code only through whether the tiles divide the depth: even for every
# student in the benchmark's presets, ragged for the sake of all others.
VARIANTS = {
    "bf16": Variant(torch.bfloat16, depth=4096),
    "bf16-no-entropy": Variant(torch.bfloat16, depth=576, entropy=False),
    "fp16-everything": Variant(
        torch.float16,
        depth=4090,
        transform=LogitTransform(scale=0.5, soft_cap=30.0, round_to=torch.float16),
        has_bias=True,
    ),
    "fp32": Variant(torch.float32, depth=4096),
}


@pytest.mark.slow
@pytest.mark.parametrize("num_tokens", [1, 8192])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_reachable_rule_compiles_without_spills(capability, variant, num_tokens):
    rule = tuning.choose_rule(capability, variant.dtype.itemsize, num_tokens)
    resources = compile_pass(capability, rule.tiles, variant)
    assert not resources.spills, resources
    assert resources.shared_bytes <= SHARED_MEMORY_BYTES[capability]
    # fp32 operands stay off the tensor cores, which would round them to TF32.
    is_wide = variant.dtype == torch.float32
    expected = "" if is_wide else TENSOR_CORE_INSTRUCTION[capability]
    assert resources.tensor_core_instruction == expected
    if not is_wide:
        per_logit, masked = (
            resources.instructions_per_logit,
            resources.instructions_per_masked_logit,
        )
        # Compare, count, maximum, scale, exponential and sum take six; a program needs some more.
        assert 6 < per_logit < masked


# On mma.sync a quarter of a tile has to be put together from several warps.
MOST_PER_LOGIT = {80: (39, 42), 90: (16, 20), 100: (12, 17)}


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_epilogue_is_lean(capability):
    tiles = tuning.choose_rule(capability, 2, 8192).tiles
    resources = compile_pass(capability, tiles, VARIANTS["bf16"])
    most, most_masked = MOST_PER_LOGIT[capability]
    assert resources.instructions_per_logit <= most, resources
    assert resources.instructions_per_masked_logit <= most_masked, resources


def test_every_rule_is_reachable():
    reached = {
        tuning.choose_rule(capability, operand_bytes, num_tokens)
        for capability in CAPABILITIES
        for operand_bytes in (2, 4)
        for num_tokens in (1, 8192)
    }
    assert reached == set(tuning.RULES)
