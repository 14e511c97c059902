"""Vocabulary shards: any split of a head, merged in any grouping, is the whole head."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rsr.kernels import VocabShard, VocabStats, merge_stats, rank_logprob

VOCAB_SIZE = 97
OPTIONS = [
    {},
    {"scale": 0.5, "soft_cap": 20.0},
    {"logits_dtype": "model"},
]


def draw(seed, dtype=torch.float16, num_tokens=9, depth=12):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randint(-3, 4, (num_tokens, depth), generator=generator).to(dtype)
    weight = torch.randint(-3, 4, (VOCAB_SIZE, depth), generator=generator).to(dtype)
    bias = torch.randint(-2, 3, (VOCAB_SIZE,), generator=generator).float() / 7
    targets = torch.randint(0, VOCAB_SIZE, (num_tokens,), generator=generator)
    return hidden, weight, bias, targets


def shards_of(weight, bias, cuts, **options):
    edges = [0, *sorted(cuts), VOCAB_SIZE]
    return [
        VocabShard(weight[a:b], bias[a:b], vocab_start=a, vocab_size=len(weight), **options)
        for a, b in pairwise(edges)
        if a < b
    ]


@pytest.mark.seconds
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    cuts=st.lists(st.integers(0, VOCAB_SIZE), max_size=6),
    options=st.sampled_from(OPTIONS),
    entropy=st.booleans(),
    order=st.randoms(use_true_random=False),
)
def test_any_split_in_any_order_is_the_whole_head(seed, cuts, options, entropy, order):
    hidden, weight, bias, targets = draw(seed)
    shards = shards_of(weight, bias, cuts, **options)
    raw = sum(shard.target_raw(hidden, targets) for shard in shards)
    packed = [shard.stats(hidden, targets, raw, entropy).pack() for shard in shards]
    order.shuffle(packed)
    result = shards[0].finish([VocabStats.unpack(part) for part in packed], raw, entropy)

    whole = rank_logprob(hidden, weight, targets, bias=bias, entropy=True, **options)
    assert torch.equal(result.rank, whole.rank)
    torch.testing.assert_close(result.logprob, whole.logprob, atol=2e-6, rtol=4e-7)
    if entropy:
        torch.testing.assert_close(result.entropy, whole.entropy, atol=1e-7, rtol=1e-5)
    else:
        assert result.entropy is None


@pytest.mark.seconds
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    cuts=st.lists(st.integers(1, VOCAB_SIZE - 1), min_size=2, max_size=5, unique=True),
    where=st.floats(0, 1),
)
def test_merging_is_associative_and_exact_in_count(seed, cuts, where):
    hidden, weight, bias, targets = draw(seed)
    shards = shards_of(weight, bias, cuts)
    raw = sum(shard.target_raw(hidden, targets) for shard in shards)
    parts = [shard.stats(hidden, targets, raw, entropy=True) for shard in shards]
    middle = 1 + int(where * (len(parts) - 2))
    flat = merge_stats(parts)
    nested = merge_stats([merge_stats(parts[:middle]), merge_stats(parts[middle:])])
    assert torch.equal(flat.num_greater, nested.num_greater)
    assert torch.equal(flat.anchor, nested.anchor)
    torch.testing.assert_close(flat.rest, nested.rest, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(flat.weighted, nested.weighted, atol=1e-7, rtol=1e-6)


def test_each_target_has_one_owner():
    hidden, weight, bias, targets = draw(0)
    shards = shards_of(weight, bias, [30, 60])
    raws = torch.stack([shard.target_raw(hidden, targets) for shard in shards])
    owner = torch.bucketize(targets, torch.tensor([30, 60]), right=True)
    for shard, raw in enumerate(raws):
        assert (raw[owner != shard] == 0).all()
    expected = (hidden.float() * weight[targets].float()).sum(1) + bias[targets]
    torch.testing.assert_close(raws.sum(0), expected, atol=1e-6, rtol=0)


def test_a_shard_with_nothing_but_the_target():
    hidden, weight, bias, targets = draw(3, num_tokens=1)
    alone = int(targets[0])
    shards = shards_of(weight, bias, [alone, alone + 1])
    raw = sum(shard.target_raw(hidden, targets) for shard in shards)
    stats = [shard.stats(hidden, targets, raw, entropy=True) for shard in shards]
    result = shards[0].finish(stats, raw, entropy=True)
    whole = rank_logprob(hidden, weight, targets, bias=bias, entropy=True)
    assert result.rank == whole.rank
    torch.testing.assert_close(result.entropy, whole.entropy, atol=1e-7, rtol=1e-5)


def test_counts_survive_packing_up_to_the_largest_vocabulary():
    counts = torch.tensor([0, 1, 262_143], dtype=torch.int32)
    zeros = torch.zeros(3)
    packed = VocabStats(zeros - torch.inf, zeros - 1, zeros, counts).pack()
    assert packed.shape == (4, 3)
    assert packed.dtype == torch.float32
    assert torch.equal(VocabStats.unpack(packed).num_greater, counts)


def test_a_shard_that_does_not_know_its_head_is_refused():
    hidden, weight, _, targets = draw(0)
    with pytest.raises(ValueError, match="starts at column 3 needs the vocab_size"):
        VocabShard(weight, vocab_start=3)
    with pytest.raises(ValueError, match=r"\[3, 100\) are not in a vocabulary of 99"):
        VocabShard(weight, vocab_start=3, vocab_size=99)
    whole = VocabShard(weight)
    raw = whole.target_raw(hidden, targets)
    stats = whole.stats(hidden, targets, raw)
    with pytest.raises(ValueError, match="2 shards needs the vocab_size"):
        whole.finish([stats, stats], raw)


def test_merging_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one part"):
        merge_stats([])
