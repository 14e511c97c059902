"""Operands that more than one test module draws."""

from dataclasses import dataclass

import pytest
import torch


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
