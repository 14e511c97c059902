"""What GPUs can do at best, from their makers' public data sheets.

Dense rates, without the sparsity that doubles the headline figures; bf16 on tensor cores, fp32
without TF32, which would round hidden states. A prediction takes a share of these, never all.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gpu:
    """memory_bytes as sold, in powers of ten. source: the data sheet that says so."""

    name: str
    memory_bytes: int
    bf16_flop_per_s: float
    fp32_flop_per_s: float
    source: str


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a10", 24 * 10**9, 125e12, 31.2e12, "NVIDIA A10 data sheet"),
        Gpu("a100-40gb", 40 * 10**9, 312e12, 19.5e12, "NVIDIA A100 data sheet"),
        Gpu("a100", 80 * 10**9, 312e12, 19.5e12, "NVIDIA A100 data sheet, 80 GB SXM"),
        Gpu("l4", 24 * 10**9, 121e12, 30.3e12, "NVIDIA L4 data sheet"),
        Gpu("l40s", 48 * 10**9, 362e12, 91.6e12, "NVIDIA L40S data sheet"),
        Gpu("h100-pcie", 80 * 10**9, 756e12, 51e12, "NVIDIA H100 data sheet, PCIe"),
        Gpu("h100", 80 * 10**9, 989e12, 67e12, "NVIDIA H100 data sheet, SXM"),
        Gpu("h200", 141 * 10**9, 989e12, 67e12, "NVIDIA H200 data sheet, SXM"),
        Gpu("b200", 180 * 10**9, 2250e12, 75e12, "NVIDIA DGX B200 data sheet, one of eight"),
    )
}
