"""A worker's part of scoring without vLLM, on a real GPU and by the real kernel."""

import numpy as np
import pytest
import torch

from rsr.engine.scored_rows import Chunk, StepScorer
from rsr.engine.wire import ScoredTokens
from rsr.kernels import RankLogprob, rank_logprob

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

VOCAB_SIZE, HIDDEN_SIZE = 5_000, 128


class KernelHead:
    """A model that is its head, on the card."""

    def __init__(self) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        self.weight = torch.randn(
            VOCAB_SIZE, HIDDEN_SIZE, generator=generator, device="cuda", dtype=torch.bfloat16
        )

    def prepare(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, "KernelHead"]:
        return hidden_states, self

    def score(
        self, hidden_states: torch.Tensor, targets: torch.Tensor, *, entropy: bool
    ) -> RankLogprob:
        return rank_logprob(hidden_states, self.weight, targets, impl="fused", entropy=entropy)


def request_of(num_tokens: int, detail_end: int = 0) -> ScoredTokens:
    positions = np.arange(1, num_tokens, dtype=np.int32)
    return ScoredTokens(positions, positions * 7 % VOCAB_SIZE, detail_end)


def states_of(num_tokens: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(num_tokens)
    shape = (num_tokens, HIDDEN_SIZE)
    return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)


def scorer() -> StepScorer:
    return StepScorer(KernelHead(), entropy=True, rank_clip=100)


def test_steps_of_a_long_row_give_what_one_step_gives():
    request, states = request_of(32_768, detail_end=20), states_of(32_768)
    (whole,) = scorer().score(states, [Chunk.of(request, 0, 32_768, is_last=True)], [[]])
    kept, answer = [], None
    for start in range(0, 32_768, 8_192):
        is_last = start == 24_576
        chunk = Chunk.of(request, start, 8_192, is_last=is_last)
        (answer,) = scorer().score(states[start : start + 8_192], [chunk], [kept])
    assert answer is not None
    assert whole is not None
    torch.testing.assert_close(answer.cpu(), whole.cpu(), rtol=1e-5, atol=1e-5)


def test_a_step_of_a_thousand_requests_with_nothing_to_score():
    nothing = ScoredTokens(np.empty(0, np.int32), np.empty(0, np.int32), 0)
    chunks = [Chunk.of(nothing, 0, 1, is_last=True) for _ in range(1_024)]
    answers = scorer().score(states_of(1_024), chunks, [[] for _ in chunks])
    assert all(answer is not None for answer in answers)


def test_a_step_on_the_card_gives_what_it_gives_on_the_cpu():
    lengths = [3, 900, 64, 1]
    states = states_of(sum(lengths))
    chunks = [Chunk.of(request_of(n, 2), 0, n, is_last=True) for n in lengths]
    on_card = scorer().score(states, chunks, [[] for _ in chunks])
    head = KernelHead()
    head.weight = head.weight.cpu()
    head.score = lambda hidden, targets, *, entropy: rank_logprob(
        hidden, head.weight, targets, impl="tiled", entropy=entropy
    )
    on_cpu = StepScorer(head, entropy=True, rank_clip=100).score(
        states.cpu(), chunks, [[] for _ in chunks]
    )
    for ours, theirs in zip(on_card, on_cpu, strict=True):
        # A rank may differ by a rival within an accumulation error of the target.
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-3, atol=1e-3)
