"""NaN, infinities and fp16 overflow: every implementation finds the same rows to have no softmax.

Comparisons with NaN are false, so a token whose logits are NaN outranks everything unless somebody
looks. The reference looks at every logit; the passes tell from their sums alone.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rsr.kernels import RankLogprob, VocabShard, VocabStats, rank_logprob, tiled
from rsr.kernels.logits import LogitTransform
from rsr.kernels.stats import finish

VOCAB_SIZE = 150
DEPTH = 20
NUM_TOKENS = 6
NOT_FINITE = [torch.nan, torch.inf, -torch.inf]
HUGE = 6e4
"""A factor that takes fp16 logits beyond 65,504, their largest number."""
OPTIONS = [
    {},
    {"scale": 0.5},
    {"soft_cap": 20.0},
    {"logits_dtype": "model"},
    {"logits_dtype": "model", "scale": 0.5, "soft_cap": 20.0},
]


@dataclass(frozen=True)
class Case:
    """hidden (N, D), weight (V, D), targets (N,), bias (V,), some of them not finite."""

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    bias: torch.Tensor

    def run(self, op, **options) -> RankLogprob:
        return op(self.hidden, self.weight, self.targets, bias=self.bias, **options)


@st.composite
def cases(draw, dtypes):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    shapes = {"hidden": (NUM_TOKENS, DEPTH), "weight": (VOCAB_SIZE, DEPTH), "bias": (VOCAB_SIZE,)}
    dtype = draw(st.sampled_from(dtypes))
    operands = {
        name: torch.randint(-3, 4, shape, generator=generator).to(dtype)
        for name, shape in shapes.items()
    }
    targets = torch.randint(0, VOCAB_SIZE, (NUM_TOKENS,), generator=generator)
    for _ in range(draw(st.integers(1, 3))):
        operand = operands[draw(st.sampled_from(list(shapes)))]
        value = draw(st.sampled_from([*NOT_FINITE, HUGE, -HUGE]))
        operand.view(-1)[draw(st.integers(0, operand.numel() - 1))] = value
    if draw(st.booleans()):
        targets[0] = int(operands["bias"].float().abs().nan_to_num(nan=torch.inf).argmax())
    return Case(targets=targets, **operands)


def assert_agree(result, expected, is_exact):
    """Same rows without a softmax, and the same numbers elsewhere.

    To 0.01 nats, as finite logits here go to some 10⁵, where fp32's are 0.008 apart.
    """
    is_undefined = expected.logprob.isnan()
    assert torch.equal(result.logprob.isnan(), is_undefined)
    assert (result.rank[is_undefined] == VOCAB_SIZE).all()
    assert result.logprob[~is_undefined].isfinite().all()
    if result.entropy is not None:
        assert torch.equal(result.entropy.isnan(), is_undefined)
    if is_exact:
        assert torch.equal(result.rank, expected.rank)
        torch.testing.assert_close(
            result.logprob, expected.logprob, atol=1e-2, rtol=1e-6, equal_nan=True
        )
        if result.entropy is not None:
            torch.testing.assert_close(
                result.entropy, expected.entropy, atol=1e-2, rtol=1e-4, equal_nan=True
            )


def rounds_after_a_cap(options):
    """Two ways to compute tanh may round to either side, which moves ranks."""
    return options.keys() >= {"logits_dtype", "soft_cap"}


@pytest.mark.seconds
def test_implementations_agree(op, request):
    # A second each in Triton's interpreter.
    is_interpreted = request.node.callspec.params["op"] == "fused"

    @settings(max_examples=20 if is_interpreted else 60, deadline=None)
    @given(
        case=cases([torch.float32, torch.float16]),
        options=st.sampled_from(OPTIONS),
        entropy=st.booleans(),
    )
    def agree(case, options, entropy):
        expected = case.run(rank_logprob, impl="reference", entropy=entropy, **options)
        result = case.run(op, entropy=entropy, **options)
        assert_agree(result, expected, is_exact=not rounds_after_a_cap(options))

    agree()


@settings(max_examples=60, deadline=None)
@given(
    case=cases([torch.bfloat16]),
    options=st.sampled_from(OPTIONS),
    entropy=st.booleans(),
    native_bf16=st.booleans(),
)
def test_bf16_products_agree(case, options, entropy, native_bf16):
    expected = case.run(rank_logprob, impl="reference", entropy=entropy, **options)
    options = {"scale": 1.0, "soft_cap": None, "logits_dtype": "float32"} | options
    transform = LogitTransform.of(torch.bfloat16, **options)
    raw = tiled.target_raw(case.hidden, case.weight, case.targets, case.bias)
    stats = tiled.vocab_stats(
        case.hidden,
        case.weight,
        case.targets,
        raw,
        bias=case.bias,
        transform=transform,
        entropy=entropy,
        native_bf16=native_bf16,
    )
    assert_agree(finish(stats, raw, transform, entropy, VOCAB_SIZE), expected, is_exact=False)


@pytest.mark.seconds
@settings(max_examples=60, deadline=None)
@given(
    case=cases([torch.float32, torch.float16, torch.bfloat16]),
    options=st.sampled_from(OPTIONS),
    entropy=st.booleans(),
    cuts=st.lists(st.integers(1, VOCAB_SIZE - 1), max_size=4, unique=True),
)
def test_shards_agree_whichever_holds_what_is_not_finite(case, options, entropy, cuts):
    expected = case.run(rank_logprob, impl="reference", entropy=entropy, **options)
    edges = pairwise([0, *sorted(cuts), VOCAB_SIZE])
    shards = [
        VocabShard(
            case.weight[a:b], case.bias[a:b], vocab_start=a, vocab_size=VOCAB_SIZE, **options
        )
        for a, b in edges
    ]
    raw = sum(shard.target_raw(case.hidden, case.targets) for shard in shards)
    packed = [shard.stats(case.hidden, case.targets, raw, entropy).pack() for shard in shards]
    result = shards[0].finish([VocabStats.unpack(part) for part in packed], raw, entropy)
    is_exact = case.weight.dtype != torch.bfloat16 and not rounds_after_a_cap(options)
    assert_agree(result, expected, is_exact)


def plain_case():
    generator = torch.Generator().manual_seed(0)
    return Case(
        torch.randn(NUM_TOKENS, DEPTH, generator=generator),
        torch.randn(VOCAB_SIZE, DEPTH, generator=generator),
        torch.arange(NUM_TOKENS) * 7,
        torch.zeros(VOCAB_SIZE),
    )


@pytest.mark.seconds
@pytest.mark.parametrize("value", NOT_FINITE, ids=str)
def test_a_hidden_state_that_is_not_finite_costs_its_own_row(op, value):
    case, row = plain_case(), 2
    sound = case.run(op, entropy=True)
    hidden = case.hidden.clone()
    hidden[row, 5] = value
    result = replace(case, hidden=hidden).run(op, entropy=True)
    assert result.rank[row] == VOCAB_SIZE
    assert result.logprob[row].isnan()
    assert result.entropy[row].isnan()
    others = torch.arange(NUM_TOKENS) != row
    for before, after in zip(sound, result, strict=True):
        torch.testing.assert_close(before[others], after[others])


@pytest.mark.seconds
@pytest.mark.parametrize("soft_cap", [None, 30.0], ids=["plain", "capped"])
@pytest.mark.parametrize("value", NOT_FINITE, ids=str)
def test_a_target_that_is_not_finite_has_no_score(op, value, soft_cap):
    case = plain_case()
    bias = case.bias.clone()
    bias[case.targets[3]] = value
    result = replace(case, bias=bias).run(op, soft_cap=soft_cap)
    assert result.rank[3] == VOCAB_SIZE
    assert result.logprob[3].isnan()


def test_columns_without_a_chance_are_probabilities_of_zero(op):
    case = plain_case()
    keeps = torch.arange(VOCAB_SIZE) < 60
    bias = torch.where(keeps, 0.0, -torch.inf)
    result = replace(case, bias=bias).run(op, entropy=True)
    expected = replace(case, weight=case.weight[keeps], bias=case.bias[keeps]).run(op, entropy=True)
    for with_others, without in zip(result, expected, strict=True):
        torch.testing.assert_close(with_others, without)


def test_fp16_logits_overflow_where_fp32_logits_do_not(op):
    hidden = torch.full((2, 4), 300.0, dtype=torch.float16)
    weight = torch.stack([torch.full((4,), value) for value in (0.0, 100.0, -100.0)]).half()
    targets = torch.tensor([1, 0])
    wide = op(hidden, weight, targets)
    assert wide.rank.tolist() == [1, 2]
    assert wide.logprob.tolist() == [0.0, -120_000.0]
    rounded = op(hidden, weight, targets, logits_dtype="model")
    assert rounded.rank.tolist() == [3, 3]
    assert rounded.logprob.isnan().all()
