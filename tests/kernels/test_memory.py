"""Where the passes read and write: rows further apart than 2³¹ elements, and buffers full of NaN.

Each case runs in a process of its own: fresh memory stays NaN-filled once torch is told so, and
Triton interprets only when it is told before it is imported.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

IMPLS = ["tiled", "fused"]

# A storage of 2³¹ + 2²⁷ elements, of which only the rows are ever touched: memory that nothing
# touches costs nothing. Row 2 of `hidden` and rows 32 to 33 of `weight` start beyond 2³¹.
FAR_APART = """
storage = torch.empty((1 << 31) + (1 << 27), dtype=torch.float16)
hidden = storage.as_strided((3, 64), (1 << 30, 1), 0)
weight = storage.as_strided((34, 64), (1 << 26, 1), 4096)
generator = torch.Generator().manual_seed(0)
for rows in (hidden, weight):
    rows.copy_(torch.randint(-3, 4, rows.shape, generator=generator))
assert (hidden.storage_offset() + 2 * hidden.stride(0)) >= 1 << 31
targets = torch.tensor([33, 5, 32])
"""

# Fills what `torch.empty` and its like return with NaN, or with the largest integer.
NAN_FILLED = """
torch.use_deterministic_algorithms(True)
assert torch.utils.deterministic.fill_uninitialized_memory
assert torch.empty(3).isnan().all()
generator = torch.Generator().manual_seed(0)
hidden, weight = (
    torch.randint(-3, 4, (rows, 33), generator=generator).half() for rows in (40, 507)
)
targets = torch.randint(0, 507, (40,), generator=generator)
"""

CHECK = """
from rsr.kernels import rank_logprob
result = rank_logprob(hidden, weight, targets, impl=impl, entropy=True)
truth = rank_logprob(hidden.contiguous(), weight.contiguous(), targets, impl="reference",
                     entropy=True)
assert torch.equal(result.rank, truth.rank), (result.rank, truth.rank)
torch.testing.assert_close(result.logprob, truth.logprob, atol=2e-5, rtol=0)
torch.testing.assert_close(result.entropy, truth.entropy, atol=1e-6, rtol=1e-4)
"""


def run(impl: str, operands: str) -> None:
    if impl == "fused" and find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    interpreted = {"TRITON_INTERPRET": "1"} if impl == "fused" else {}
    code = f"import torch\nimpl = {impl!r}\n{operands}{CHECK}"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | interpreted, capture_output=True, text=True
    )
    if "can't allocate memory" in done.stderr:
        pytest.skip("this machine does not lend 4.5 GB of addresses")
    assert done.returncode == 0, done.stderr


@pytest.mark.seconds
@pytest.mark.parametrize("impl", IMPLS)
def test_rows_beyond_two_to_the_31_elements(impl):
    run(impl, FAR_APART)


@pytest.mark.seconds
@pytest.mark.parametrize("impl", IMPLS)
def test_result_does_not_depend_on_what_buffers_held(impl):
    run(impl, NAN_FILLED)
