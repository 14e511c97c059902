"""The Triton pass on a real GPU: what the interpreter cannot show.

bf16 operands, machine code, 64-bit offsets into full-size operands, fresh memory full of NaN, and
memory that does not grow with tokens × vocabulary. Skipped, and said so, where there is no GPU.
"""

import pytest
import torch

pytest.importorskip("triton")

from rsr.benchmarks.tune import candidates, describe
from rsr.kernels import VocabShard, VocabStats, fused, rank_logprob, reference
from rsr.kernels.logits import LogitTransform
from rsr.kernels.stats import finish

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

DEVICE = "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (N tokens, V vocabulary, D hidden)
SHAPES = {
    "one token": (1, 49_152, 576),
    "few tokens": (63, 49_152, 576),
    "ragged": (257, 50_257, 123),
    "Qwen3's vocabulary": (512, 151_936, 1_024),
}
MAX_EXTRA_BYTES = 64 << 20


def integers(num_tokens, vocab_size, depth, dtype):
    """Exact in every dtype and any order of summation, with ties and duplicated rows."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    hidden, weight = (
        torch.randint(-2, 3, (rows, depth), generator=generator, device=DEVICE).to(dtype)
        for rows in (num_tokens, vocab_size)
    )
    weight[vocab_size // 2 :] = weight[: vocab_size - vocab_size // 2].clone()
    targets = torch.randint(0, vocab_size, (num_tokens,), generator=generator, device=DEVICE)
    return hidden, weight, targets


def truth_of(hidden, weight, targets, *, bias=None, entropy=True, **transform):
    """In float64, a few rows at a time."""
    parts = [
        reference.rank_logprob(
            rows,
            weight,
            row_targets,
            bias=bias,
            transform=LogitTransform(**transform),
            entropy=entropy,
            accumulate=torch.float64,
        )
        for rows, row_targets in zip(hidden.split(64), targets.split(64), strict=True)
    ]
    return [torch.cat(field) for field in zip(*parts, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_integer_operands_give_exact_ranks(shape, dtype):
    operands = integers(*shape, dtype)
    result = rank_logprob(*operands, impl="fused", entropy=True)
    rank, logprob, entropy = truth_of(*operands)
    assert torch.equal(result.rank, rank)
    torch.testing.assert_close(result.logprob, logprob, atol=2e-5, rtol=1e-6)
    torch.testing.assert_close(result.entropy, entropy, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normal_operands_are_accumulated_in_fp32(dtype):
    generator = torch.Generator(DEVICE).manual_seed(1)
    hidden = torch.randn(300, 576, generator=generator, device=DEVICE).to(dtype)
    weight = (torch.randn(49_152, 576, generator=generator, device=DEVICE) / 8).to(dtype)
    targets = torch.randint(0, 49_152, (300,), generator=generator, device=DEVICE)
    result = rank_logprob(hidden, weight, targets, impl="fused", entropy=True)
    rank, logprob, entropy = truth_of(hidden, weight, targets)
    torch.testing.assert_close(result.logprob, logprob, atol=2e-5, rtol=0)
    torch.testing.assert_close(result.entropy, entropy, atol=0, rtol=1e-4)
    # 49,151 rivals, and about one in 10⁵ of them within an accumulation error of the target.
    assert (result.rank - rank).abs().max() <= 2


def test_every_option_at_once_on_bf16():
    operands = integers(130, 50_000, 200, torch.bfloat16)
    bias = (torch.arange(50_000, device=DEVICE) % 7).to(torch.bfloat16)
    bias[::11] = -torch.inf
    bias[operands[2]] = 0
    options = {"scale": 0.5, "soft_cap": 30.0}
    for logits_dtype, round_to in (("float32", None), ("model", torch.bfloat16)):
        result = rank_logprob(
            *operands, bias=bias, impl="fused", entropy=True, logits_dtype=logits_dtype, **options
        )
        rank, logprob, _ = truth_of(*operands, bias=bias, round_to=round_to, **options)
        if round_to is None:
            assert torch.equal(result.rank, rank)
        # The card's exp and the reference's tanh may round a capped logit to either side.
        tolerance_nats = 2e-5 if round_to is None else 0.13
        torch.testing.assert_close(result.logprob, logprob, atol=tolerance_nats, rtol=1e-6)


DESIGNS = candidates(torch.cuda.get_device_capability()) if torch.cuda.is_available() else ()


@pytest.mark.parametrize("soft_cap", [None, 30.0], ids=["plain", "capped"])
@pytest.mark.parametrize("tiles", DESIGNS, ids=map(describe, DESIGNS))
def test_every_design_gives_exact_ranks(tiles, soft_cap):
    """At sizes around the edges of a tile: the last rows, columns and slices are part-filled."""
    for num_tokens, vocab_size in ((1, 999), (65, 1_025), (128, 1_024), (129, 1_153), (300, 5_001)):
        hidden, weight, targets = integers(num_tokens, vocab_size, 136, torch.bfloat16)
        transform = LogitTransform(soft_cap=soft_cap)
        target_raw = fused.target_raw(hidden, weight, targets, None)
        stats = fused.vocab_stats(
            hidden,
            weight,
            targets,
            target_raw,
            bias=None,
            transform=transform,
            entropy=True,
            tiles=tiles,
        )
        result = finish(stats, target_raw, transform, True, vocab_size)
        rank, logprob, entropy = truth_of(hidden, weight, targets, soft_cap=soft_cap)
        assert torch.equal(result.rank, rank)
        torch.testing.assert_close(result.logprob, logprob, atol=2e-5, rtol=1e-6)
        torch.testing.assert_close(result.entropy, entropy, atol=1e-6, rtol=1e-4)


def test_two_shards_merged_are_the_whole_head():
    hidden, weight, targets = integers(200, 30_001, 256, torch.bfloat16)
    cut = 12_345
    shards = [
        VocabShard(weight[:cut], vocab_size=len(weight), impl="fused"),
        VocabShard(weight[cut:], vocab_start=cut, vocab_size=len(weight), impl="fused"),
    ]
    raw = sum(shard.target_raw(hidden, targets) for shard in shards)
    packed = [shard.stats(hidden, targets, raw, entropy=True).pack() for shard in shards]
    parts = [VocabStats.unpack(part) for part in packed]
    result = shards[0].finish(parts, raw, entropy=True)
    rank, logprob, entropy = truth_of(hidden, weight, targets)
    assert torch.equal(result.rank, rank)
    torch.testing.assert_close(result.logprob, logprob, atol=2e-5, rtol=1e-6)
    torch.testing.assert_close(result.entropy, entropy, atol=1e-6, rtol=1e-4)


def test_operands_of_more_than_two_to_the_31_elements():
    depth, num_tokens, vocab_size = 4_096, 524_352, 524_352
    # The operands are 8 GiB, and the truth's float64 weight is twice as much again.
    if torch.cuda.mem_get_info()[0] < 32 << 30:
        pytest.skip("needs 32 GiB of free GPU memory")
    hidden, weight = (
        torch.zeros(rows, depth, dtype=torch.bfloat16, device=DEVICE)
        for rows in (num_tokens, vocab_size)
    )
    assert min(hidden.numel(), weight.numel()) > 1 << 31
    generator = torch.Generator(DEVICE).manual_seed(0)
    weight[-64:] = torch.randint(-3, 4, (64, depth), generator=generator, device=DEVICE)
    hidden[-64:] = torch.randint(-3, 4, (64, depth), generator=generator, device=DEVICE)
    targets = torch.arange(vocab_size - 64, vocab_size, device=DEVICE)
    # The last rows of all tokens: their offsets are beyond 2³¹, and the answer is known.
    result = rank_logprob(hidden[-64:], weight, targets, impl="fused")
    rank, logprob, _ = truth_of(hidden[-64:], weight, targets, entropy=False)
    assert torch.equal(result.rank, rank)
    torch.testing.assert_close(result.logprob, logprob, atol=2e-5, rtol=1e-6)
    # All tokens, against a small vocabulary.
    everything = rank_logprob(
        hidden, weight[-1_000:], torch.full((num_tokens,), 999, device=DEVICE), impl="fused"
    )
    assert (everything.rank[:-64] == 1).all(), "all logits are equal"
    last = truth_of(hidden[-64:], weight[-1_000:], torch.full((64,), 999, device=DEVICE))
    assert torch.equal(everything.rank[-64:], last[0])


def test_result_does_not_depend_on_what_buffers_held():
    operands = integers(100, 5_000, 96, torch.bfloat16)
    expected = rank_logprob(*operands, impl="fused", entropy=True)
    torch.use_deterministic_algorithms(True)  # which fills fresh memory with NaN
    try:
        again = rank_logprob(*operands, impl="fused", entropy=True)
    finally:
        torch.use_deterministic_algorithms(False)
    for before, after in zip(expected, again, strict=True):
        assert torch.equal(before, after)


@pytest.mark.seconds
def test_memory_does_not_grow_with_tokens_times_vocabulary():
    extra_bytes = []
    for num_tokens in (1_024, 8_192):
        operands = integers(num_tokens, 151_936, 256, torch.bfloat16)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        rank_logprob(*operands, impl="fused", entropy=True)
        extra_bytes.append(torch.cuda.max_memory_allocated() - before)
    assert max(extra_bytes) <= MAX_EXTRA_BYTES
