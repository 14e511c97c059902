"""What the compiler makes of every tile size in the table, for GPUs that are not here."""

from functools import cache

import pytest
import torch

from rsr.kernels import tuning
from rsr.kernels.logits import LogitTransform

pytest.importorskip("triton")

from rsr.benchmarks import ahead_of_time
from rsr.benchmarks.ahead_of_time import SHARED_MEMORY_BYTES, TENSOR_CORE_INSTRUCTION, Variant

# Several kinds of call lead to one kernel, which takes seconds to compile.
compile_pass = cache(ahead_of_time.compile_pass)

CAPABILITIES = (80, 90, 100)
# Sizes of a head reach the code only through whether the tiles divide the depth: even for every
# student in the benchmark's presets, ragged for the sake of all others.
VARIANTS = {
    "bf16": Variant(torch.bfloat16, depth=4096),
    "bf16-no-entropy": Variant(torch.bfloat16, depth=576, entropy=False),
    "bf16-bias": Variant(torch.bfloat16, depth=896, has_bias=True),
    "bf16-model": Variant(
        torch.bfloat16, depth=4096, transform=LogitTransform(round_to=torch.bfloat16)
    ),
    "bf16-cap": Variant(torch.bfloat16, depth=2304, transform=LogitTransform(soft_cap=30.0)),
    "fp16-everything": Variant(
        torch.float16,
        depth=4088,
        transform=LogitTransform(scale=0.5, soft_cap=30.0, round_to=torch.float16),
        has_bias=True,
    ),
    "fp32": Variant(torch.float32, depth=4096),
}


def choose(
    capability: int, variant: Variant, *, num_tokens: int = 8192, can_describe: bool = True
) -> tuning.Rule:
    call = tuning.Call(
        capability,
        variant.dtype.itemsize,
        num_tokens,
        variant.depth,
        has_soft_cap=variant.transform.soft_cap is not None,
        can_describe=can_describe,
    )
    return tuning.choose_rule(call)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_tokens", "can_describe"),
    [(8192, True), (8192, False), (1, False)],
    ids=["described", "by pointers", "one token"],
)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_reachable_rule_compiles_without_spills(
    capability, variant, num_tokens, can_describe
):
    tiles = choose(capability, variant, num_tokens=num_tokens, can_describe=can_describe).tiles
    resources = compile_pass(capability, tiles, variant)
    assert not resources.spills, resources
    assert resources.shared_bytes <= SHARED_MEMORY_BYTES[capability]
    assert resources.programs_per_multiprocessor >= tiles.programs_per_multiprocessor
    # fp32 operands stay off the tensor cores, which would round them to TF32.
    is_wide = variant.dtype == torch.float32
    expected = "" if is_wide else TENSOR_CORE_INSTRUCTION[capability]
    assert resources.tensor_core_instruction.split(" ")[0] == expected
    if not is_wide:
        per_logit, masked = (
            resources.instructions_per_logit,
            resources.instructions_per_masked_logit,
        )
        # Compare, count, larger, smaller, scale, exponential and sum take seven.
        assert 7 < per_logit < masked


MOST_PER_LOGIT = {80: (13, 16), 90: (11, 18), 100: (11, 18)}


@pytest.mark.slow
@pytest.mark.parametrize("depth", [896, 4096])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_epilogue_is_lean(capability, depth):
    variant = Variant(torch.bfloat16, depth)
    tiles = choose(capability, variant).tiles
    resources = compile_pass(capability, tiles, variant)
    most, most_masked = MOST_PER_LOGIT[capability]
    assert resources.instructions_per_logit <= most, resources
    assert resources.instructions_per_masked_logit <= most_masked, resources


@pytest.mark.slow
def test_hopper_s_designs_are_what_they_are_chosen_for():
    small, large = (Variant(torch.bfloat16, depth) for depth in (896, 4096))
    found = compile_pass(90, choose(90, small).tiles, small)
    assert found.programs_per_multiprocessor == 2
    found = compile_pass(90, choose(90, large).tiles, large)
    assert found.tensor_core_instruction == "wgmma.mma_async m64n256"


def test_every_rule_is_reachable():
    reached = {
        choose(capability, variant, num_tokens=num_tokens, can_describe=can_describe)
        for capability in CAPABILITIES
        for variant in VARIANTS.values()
        for num_tokens in (1, 8192)
        for can_describe in (True, False)
    }
    assert reached == set(tuning.RULES)
