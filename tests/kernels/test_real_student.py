"""Real hidden states of a real student on real trajectories, against an fp32 head on the same.

Random operands say little about rounding: a text's targets are mostly the student's first choices,
where a bf16 logit ties and a rank jumps.
"""

from dataclasses import dataclass

import polars as pl
import pytest
import torch

from rsr.kernels import rank_logprob, reference, tiled
from rsr.kernels.logits import LogitTransform
from rsr.kernels.stats import finish

NUM_TRAJECTORIES = 30
RANK_CLIP = 100

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Tokens:
    """Response tokens of all trajectories, one after another."""

    hidden: torch.Tensor  # (N, D) bfloat16
    weight: torch.Tensor  # (V, D) bfloat16
    targets: torch.Tensor  # (N,)
    trajectory: torch.Tensor  # (N,) which trajectory a token is of


@pytest.fixture(scope="module")
def tokens(real_student, shared_data):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_student)
    model = AutoModelForCausalLM.from_pretrained(real_student, dtype=torch.float32)
    rows = pl.read_parquet(shared_data / "gsm8k_teachers.parquet", n_rows=NUM_TRAJECTORIES)
    hidden, targets, trajectory = [], [], []
    for i, messages in enumerate(rows["messages"]):
        prompt, response = (tokenizer(m["content"]).input_ids for m in messages)
        with torch.inference_mode():
            states = model.model(torch.tensor([prompt + response])).last_hidden_state[0]
        hidden.append(states[len(prompt) - 1 : -1].bfloat16())
        targets.append(torch.tensor(response))
        trajectory.append(torch.full((len(response),), i))
    weight = model.lm_head.weight.detach().bfloat16()
    return Tokens(torch.cat(hidden), weight, torch.cat(targets), torch.cat(trajectory))


def rsr_of(result, tokens):
    """Rank-Surprisal Ratio of each trajectory (Eq. 7)."""
    sums = torch.zeros(2, NUM_TRAJECTORIES, dtype=torch.float64)
    sums[0].index_add_(0, tokens.trajectory, result.rank.clamp(max=RANK_CLIP).double())
    sums[1].index_add_(0, tokens.trajectory, -result.logprob.double())
    return sums[0] / sums[1]


def by_bf16_gemm(hidden, weight, targets):
    """What a CPU with bf16 instructions would do, on any CPU."""
    transform = LogitTransform()
    raw = tiled.target_raw(hidden, weight, targets, None)
    stats = tiled.vocab_stats(
        hidden,
        weight,
        targets,
        raw,
        bias=None,
        transform=transform,
        entropy=False,
        native_bf16=True,
    )
    return finish(stats, raw, transform, entropy=False, vocab_size=len(weight))


@pytest.mark.parametrize("run", [rank_logprob, by_bf16_gemm], ids=["default", "bf16 gemm"])
def test_bf16_head_gives_the_fp32_heads_numbers(run, tokens):
    result = run(tokens.hidden, tokens.weight, tokens.targets)
    truth = reference.rank_logprob(
        tokens.hidden,
        tokens.weight,
        tokens.targets,
        bias=None,
        transform=LogitTransform(),
        entropy=False,
    )
    equal_ranks = (result.rank == truth.rank).double().mean().item()
    error_nats = (result.logprob - truth.logprob).abs().mean().item()
    rsr_error = (rsr_of(result, tokens) / rsr_of(truth, tokens) - 1).abs().max().item()
    print(f"{len(tokens.targets)} tokens: {equal_ranks=:.5f} {error_nats=:.2g} {rsr_error=:.2g}")
    assert equal_ranks >= 0.999
    assert error_nats <= 0.002
    assert rsr_error <= 0.001
