"""The contract of the public operation, for every implementation that runs without a GPU.

Truth is the reference in float64. bf16 operands are left out for Triton, since `tl.dot` of Triton
3.9's interpreter multiplies their stored bits.
"""

import pytest
import torch

from rsr.kernels import rank_logprob, reference, tiled
from rsr.kernels.logits import LogitTransform

LOGPROB_ATOL_NATS = 2e-5
ENTROPY_RTOL = 1e-4
# (N tokens, V vocabulary, D hidden)
SHAPES = {
    "aligned": (256, 512, 128),
    "ragged": (255, 507, 123),
    "one token, vocabulary below a tile": (1, 40, 64),
    "no token": (0, 507, 123),
    "several row and vocabulary tiles": (150, 700, 40),
}
# All unusual options at once.
EVERYTHING = {"scale": 0.7, "soft_cap": 30.0, "entropy": True}


def truth_of(hidden, weight, targets, *, bias=None, round_to=None, **options):
    entropy = options.pop("entropy", True)
    return reference.rank_logprob(
        hidden,
        weight,
        targets,
        bias=bias,
        transform=LogitTransform(round_to=round_to, **options),
        entropy=entropy,
        accumulate=torch.float64,
    )


def assert_close(result, truth, entropy_atol=0.0):
    torch.testing.assert_close(result.logprob, truth.logprob, atol=LOGPROB_ATOL_NATS, rtol=0)
    if result.entropy is not None:
        torch.testing.assert_close(
            result.entropy, truth.entropy, atol=entropy_atol, rtol=ENTROPY_RTOL
        )


def assert_ranks_between(result, operands, error):
    """Equal to the truth's wherever no rival is within `error` of the target's logit."""
    logits = operands.hidden.double() @ operands.weight.double().T
    own = logits.gather(1, operands.targets[:, None])
    fewest = 1 + (logits > own + error).sum(1)
    logits.scatter_(1, operands.targets[:, None], -torch.inf)
    most = 1 + (logits > own - error).sum(1)
    assert (result.rank >= fewest).all()
    assert (result.rank <= most).all()
    assert (fewest == most).float().mean() > 0.9  # else the bounds say little


@pytest.mark.seconds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_integer_operands_give_exact_ranks(op, shape, dtype, integer_operands):
    operands = integer_operands(*shape, dtype=dtype)
    result = op(*operands, entropy=True)
    truth = truth_of(*operands)
    assert result.rank.dtype == torch.int32
    assert torch.equal(result.rank, truth.rank)
    # The reference is plain fp32; the passes hold an entropy near 0 as exactly as any other.
    assert_close(result, truth, entropy_atol=1e-6)


@pytest.mark.seconds
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_normal_operands(op, shape, normal_operands):
    operands = normal_operands(*shape)
    result = op(*operands, entropy=True)
    assert_close(result, truth_of(*operands))
    if shape[0] > 1:
        assert_ranks_between(result, operands, error=2e-5)


@pytest.mark.seconds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_everything_at_once(op, dtype, integer_operands):
    operands = integer_operands(37, 507, 123, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    bias = torch.randint(-3, 4, (507,), generator=generator).to(dtype)
    bias[torch.randperm(507, generator=generator)[:30]] = -torch.inf
    bias[operands.targets] = 0
    result = op(*operands, bias=bias, **EVERYTHING)
    truth = truth_of(*operands, bias=bias, scale=0.7, soft_cap=30.0)
    assert torch.equal(result.rank, truth.rank)
    assert_close(result, truth, entropy_atol=1e-6)


def test_rows_that_are_not_contiguous(op, integer_operands):
    operands = integer_operands(64, 300, 40)
    wide_hidden = torch.full((128, 90), torch.nan)
    wide_hidden[::2, 5:45] = operands.hidden
    wide_weight = torch.full((40, 600), torch.nan)
    wide_weight[:, ::2] = operands.weight.T
    targets = operands.targets.repeat_interleave(2)[::2].int()
    result = op(wide_hidden[::2, 5:45], wide_weight[:, ::2].T, targets)
    assert torch.equal(result.rank, truth_of(*operands).rank)
    assert result.entropy is None


@pytest.mark.seconds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_model_logits_are_rounded_once(op, dtype, integer_operands):
    operands = integer_operands(65, 700, 50, dtype=dtype)
    # Multiples of 1/1024 are exact in fp32; in fp16 only up to 2, so rounding ties many logits.
    bias = (torch.arange(700) % 64 / 1024).to(dtype)
    result = op(*operands, bias=bias, logits_dtype="model", entropy=True)
    round_to = dtype if dtype != torch.float32 else None
    truth = truth_of(*operands, bias=bias, round_to=round_to)
    assert torch.equal(result.rank, truth.rank)
    assert_close(result, truth, entropy_atol=1e-6)
    if round_to is not None:
        assert not torch.equal(truth.rank, truth_of(*operands, bias=bias).rank)


EXTREMES = {
    "all equal": (torch.zeros(300), torch.arange(8)),
    "ten thousand up": (torch.linspace(-1e4, 1e4, 300), torch.tensor([0, 7, 150, 298, 299])),
    "one dominant, not the target": (
        torch.zeros(300).index_fill_(0, torch.tensor([3]), 30.0),
        torch.tensor([0, 2, 299]),
    ),
    "one dominant, the target": (
        torch.zeros(300).index_fill_(0, torch.tensor([3]), 30.0),
        torch.tensor([3]),
    ),
    "overwhelming rival": (
        torch.zeros(300).index_fill_(0, torch.tensor([3]), 1e4),
        torch.tensor([0, 3]),
    ),
    "all but one impossible": (
        torch.full((300,), -torch.inf).index_fill_(0, torch.tensor([3]), 1.0),
        torch.tensor([3]),
    ),
}


@pytest.mark.seconds
@pytest.mark.parametrize("entropy", [True, False], ids=["entropy", "no entropy"])
@pytest.mark.parametrize(("bias", "targets"), EXTREMES.values(), ids=EXTREMES.keys())
def test_extreme_logits(op, bias, targets, entropy, request):
    hidden, weight = torch.ones(len(targets), 4), torch.zeros(300, 4)
    result = op(hidden, weight, targets, bias=bias, entropy=entropy)
    truth = truth_of(hidden, weight, targets, bias=bias)
    assert torch.equal(result.rank, truth.rank)
    is_reference = request.node.callspec.params["op"] == "reference"
    # A log-probability of −2e4 has an ulp of 2e-3.
    torch.testing.assert_close(result.logprob, truth.logprob, atol=LOGPROB_ATOL_NATS, rtol=1e-7)
    if entropy:
        # Below 1e-12 the float64 truth itself has lost its digits.
        atol = 1e-6 if is_reference else 1e-12
        torch.testing.assert_close(result.entropy, truth.entropy, atol=atol, rtol=ENTROPY_RTOL)


def test_weights_that_require_gradients_are_welcome(integer_operands):
    hidden, weight, targets = integer_operands(5, 60, 8)
    result = rank_logprob(hidden, weight.requires_grad_(), targets)
    assert not result.logprob.requires_grad


GOOD = {
    "hidden": torch.zeros(4, 8),
    "weight": torch.zeros(10, 8),
    "targets": torch.tensor([0, 3, 9, 9]),
}
BAD = {
    "target too high": ({"targets": torch.tensor([0, 3, 9, 10])}, r"in \[0, 10\).*from 0 to 10"),
    "target negative": ({"targets": torch.tensor([0, 3, 9, -1])}, r"in \[0, 10\).*from -1 to 9"),
    "targets of another length": ({"targets": torch.zeros(3, dtype=torch.int64)}, "targets must"),
    "float targets": ({"targets": torch.zeros(4)}, "targets must be int64"),
    "another depth": ({"hidden": torch.zeros(4, 9)}, "hidden must be"),
    "another dtype": ({"hidden": torch.zeros(4, 8).half()}, "hidden must be"),
    "fp64": ({"hidden": torch.zeros(4, 8).double(), "weight": torch.zeros(10, 8).double()}, "one"),
    "empty head": ({"weight": torch.zeros(0, 8)}, "non-empty"),
    "bias of another length": ({"bias": torch.zeros(9)}, "bias must be"),
    "scale zero": ({"scale": 0.0}, "scale must be positive"),
    "scale negative": ({"scale": -1.0}, "scale must be positive"),
    "cap zero": ({"soft_cap": 0.0}, "soft_cap must be"),
    "unknown logits_dtype": ({"logits_dtype": "bf16"}, "float32.*model"),
    "unknown impl": ({"impl": "cuda"}, "auto.*fused.*tiled.*reference"),
    "another device": ({"targets": torch.zeros(4, dtype=torch.int64, device="meta")}, "device"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        rank_logprob(**{**GOOD, **change})


def test_fused_on_a_cpu_is_refused_with_the_reason():
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="needs tensors on a CUDA GPU, got cpu"):
        rank_logprob(**GOOD, impl="fused")


def test_auto_says_once_what_it_took(caplog):
    from rsr.kernels import vocab_shard

    vocab_shard._is_fused_usable.cache_clear()
    with caplog.at_level("INFO", logger="rsr.kernels"):
        rank_logprob(**GOOD)
        rank_logprob(**GOOD)
    assert [r.message for r in caplog.records] == ["rank kernel: tiled torch on cpu"]


@pytest.mark.parametrize(("capability", "is_fused"), [((7, 5), False), ((8, 0), True)])
def test_auto_leaves_gpus_without_bf16_tensor_cores_to_the_tiled_pass(
    monkeypatch, capability, is_fused
):
    pytest.importorskip("triton")
    from rsr.kernels import vocab_shard

    # There is no such card here: what torch would say of it.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    vocab_shard._is_fused_usable.cache_clear()
    assert vocab_shard._is_fused_usable("cuda") is is_fused
    vocab_shard._is_fused_usable.cache_clear()


def test_tiled_and_reference_agree_beyond_one_block(normal_operands, monkeypatch):
    monkeypatch.setattr(tiled, "MAX_BLOCK_ROWS", 64)
    monkeypatch.setattr(tiled, "TILE_ROWS", 32)
    monkeypatch.setattr(tiled, "MAX_TILE_COLUMNS", 256)
    operands = normal_operands(200, 3000, 48)
    for entropy in (True, False):
        result = rank_logprob(*operands, entropy=entropy)
        assert_close(result, truth_of(*operands))
        assert_ranks_between(result, operands, error=2e-5)
