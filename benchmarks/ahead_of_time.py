"""Compile the Triton pass for a GPU that need not be here, and read what came out.

Real machine code for a named generation, from which registers, spills, shared memory and the
tensor-core instruction can be read. Knows nothing of speed.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rsr.benchmarks.machine_code import tile_cost
from rsr.kernels import fused, tuning
from rsr.kernels.logits import LogitTransform

# The largest shared memory one program may ask for, in bytes (CUDA C++ programming guide,
# "Compute Capabilities").
SHARED_MEMORY_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}

# Of one multiprocessor (the same guide): 32-bit registers, shared memory, and the part of it that
# the system takes for each program.
REGISTERS = 64 << 10
MULTIPROCESSOR_SHARED_BYTES = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
RESERVED_SHARED_BYTES = 1 << 10

TENSOR_CORE_INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


_ELEMENT_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Variant:
    """What the pass is specialised for, besides its tiles."""

    dtype: torch.dtype
    depth: int
    transform: LogitTransform = field(default_factory=LogitTransform)
    has_bias: bool = False
    entropy: bool = True


@dataclass(frozen=True)
class Resources:
    """What one compiled pass takes, per thread and per program."""

    num_registers: int
    stack_bytes: int
    local_load_instructions: int
    shared_bytes: int
    tensor_core_instruction: str
    """PTX name, with the shape where the name has one; empty where the FMA units multiply."""
    programs_per_multiprocessor: int
    """As far as registers and shared memory go."""
    instructions_per_logit: float | None
    """Outside of the multiply loop, in tiles with neither a target nor the vocabulary's end.

    The rare branch for a new largest logit that is nearly alone is not in it. None where the FMA
    units multiply.
    """
    instructions_per_masked_logit: float | None
    """Likewise, in tiles with a target or the end."""

    @property
    def spills(self) -> bool:
        """Whether registers overflow to local memory."""
        return self.stack_bytes > 0 or self.local_load_instructions > 0


def compile_pass(capability: int, tiles: tuning.Tiles, variant: Variant) -> Resources:
    """Compile `_vocab_stats_kernel` for compute capability major · 10 + minor."""
    kernel = fused._vocab_stats_kernel
    constants = fused.constants(
        capability,
        tiles,
        variant.has_bias,
        variant.transform,
        variant.entropy,
        variant.depth,
    )
    if not variant.has_bias:
        constants["bias_ptr"] = None
    if tiles.design == "pointer":
        constants |= {"stride_hd": 1, "stride_wd": 1}
    signature = {name: _type_of(name, tiles, variant) for name in kernel.arg_names}
    signature.update(dict.fromkeys(constants, "constexpr"))
    # What the launcher finds out by itself: aligned pointers and strides.
    aligned = [
        i
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in ("stride_hn", "stride_wv", "depth")
    ]
    compiled = triton.compile(
        ASTSource(
            kernel,
            signature,
            constants,
            attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
        ),
        target=GPUTarget("cuda", capability, 32),
        options=fused.compiler_options(tiles),
    )
    return _read(compiled, capability, tiles)


def _type_of(name: str, tiles: tuning.Tiles, variant: Variant) -> str:
    element = _ELEMENT_NAMES[variant.dtype]
    if name in ("hidden", "weight") and tiles.design == "descriptor":
        rows = tiles.rows if name == "hidden" else tiles.columns
        return f"tensordesc<{element}[{rows}, {tiles.depth}]>"
    if name in ("hidden", "weight", "bias_ptr"):
        return f"*{element}"
    if name in ("column_ptr", "num_greater_ptr"):
        return {"column_ptr": "*i64", "num_greater_ptr": "*i32"}[name]
    if name.endswith("_ptr"):
        return "*fp32"
    return "fp32" if name in ("soft_cap", "scale") else "i32"


def _read(
    compiled: triton.compiler.CompiledKernel, capability: int, tiles: tuning.Tiles
) -> Resources:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "pass.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _cuobjdump("--dump-resource-usage", cubin)
        code = _cuobjdump("--dump-sass", cubin)
    instructions = [
        name for name in TENSOR_CORE_INSTRUCTION.values() if name in compiled.asm["ptx"]
    ]
    # With the widest shape it multiplies: of wgmma alone the name says it.
    widths = re.findall(r"wgmma\.mma_async\S*?\.m64n(\d+)", compiled.asm["ptx"])
    if widths:
        instructions = [f"wgmma.mma_async m64n{max(map(int, widths))}"]
    num_registers = int(_only(r"REG:(\d+)", usage))
    num_threads = 32 * tiles.num_warps
    logits_per_thread = tiles.rows * tiles.columns // num_threads
    cost = tile_cost(code, logits_per_thread)
    return Resources(
        num_registers=num_registers,
        stack_bytes=int(_only(r"STACK:(\d+)", usage)),
        local_load_instructions=len(re.findall(r"\bLDL\b", code)),
        shared_bytes=compiled.metadata.shared,
        tensor_core_instruction=" ".join(instructions),
        programs_per_multiprocessor=min(
            REGISTERS // (num_threads * _rounded_up(num_registers, 8)),
            MULTIPROCESSOR_SHARED_BYTES[capability]
            // (compiled.metadata.shared + RESERVED_SHARED_BYTES),
        ),
        instructions_per_logit=None
        if cost is None
        else round(cost.unmasked / logits_per_thread, 1),
        instructions_per_masked_logit=None
        if cost is None
        else round(cost.masked / logits_per_thread, 1),
    )


def _rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _only(pattern: str, text: str) -> str:
    found: list[str] = re.findall(pattern, text)
    assert len(found) == 1, f"{pattern} matches {len(found)} times in:\n{text}"
    return found[0]


def _cuobjdump(option: str, cubin: Path) -> str:
    command = [triton.knobs.nvidia.cuobjdump.path, option, str(cubin)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
