"""Operands that more than one test module draws, and the implementations under test.

Triton runs in its interpreter, in a process of its own, because TRITON_INTERPRET has to be set
before the first import.
"""

import functools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec

import pytest
import torch
from interpreted_pass import TILES, combine_slices, rank_logprob_by

from rsr.kernels import rank_logprob


@dataclass(frozen=True)
class Operands:
    """hidden (N, D), weight (V, D), targets (N,)."""

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor

    def __iter__(self):
        return iter((self.hidden, self.weight, self.targets))


@pytest.fixture
def integer_operands():
    """Small integers, exact in every dtype and in any order of summation; ties are common."""

    def draw(num_tokens, vocab_size, depth, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randint(-3, 4, (num_tokens, depth), generator=generator)
        weight = torch.randint(-3, 4, (vocab_size, depth), generator=generator)
        # Each row of the second half is one of the first half's: exact duplicates everywhere.
        half = vocab_size // 2
        if half:
            weight[-half:] = weight[torch.randint(0, half, (half,), generator=generator)]
        targets = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
        return Operands(hidden.to(dtype), weight.to(dtype), targets)

    return draw


@pytest.fixture
def normal_operands():
    """Gaussian operands whose logits have a spread of about `spread` nats."""

    def draw(num_tokens, vocab_size, depth, dtype=torch.float32, spread=3.0, seed=0):
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(num_tokens, depth, generator=generator)
        weight = torch.randn(vocab_size, depth, generator=generator) * spread / depth**0.5
        targets = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
        return Operands(hidden.to(dtype), weight.to(dtype), targets)

    return draw


@pytest.fixture(scope="session")
def interpreter():
    """A process in which Triton interprets."""
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=combine_slices) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            patch.setenv("OMP_NUM_THREADS", "1")
            pool.submit(os.getpid).result()  # starts the child, which keeps this environment
        yield pool


@pytest.fixture(scope="session")
def interpreted(interpreter):
    """`rank_logprob` with impl="fused" where Triton interprets, by the tiles named `tiles`."""

    def run(*args, tiles=None, capability=0, **options):
        chosen = None if tiles is None else TILES[tiles]
        call = interpreter.submit(rank_logprob_by, chosen, capability, *args, **options)
        return call.result()

    return run


@pytest.fixture(params=["tiled", "reference", pytest.param("fused", marks=pytest.mark.seconds)])
def op(request):
    """`rank_logprob` by one implementation."""
    if request.param == "fused":
        return request.getfixturevalue("interpreted")
    return functools.partial(rank_logprob, impl=request.param)
