"""What only the tiled pass has: bf16 operands, its two ways of multiplying, and its memory."""

import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch

from rsr.kernels import reference, tiled
from rsr.kernels.logits import LogitTransform
from rsr.kernels.stats import finish


def run(operands, native_bf16, transform=None, bias=None, entropy=True):
    """The tiled pass by a chosen GEMM, whichever this CPU would take."""
    transform = transform or LogitTransform()
    raw = tiled.target_raw(operands.hidden, operands.weight, operands.targets, bias)
    stats = tiled.vocab_stats(
        *operands,
        raw,
        bias=bias,
        transform=transform,
        entropy=entropy,
        native_bf16=native_bf16,
    )
    return finish(stats, raw, transform, entropy, len(operands.weight))


def truth_of(operands, transform=None, bias=None):
    return reference.rank_logprob(
        *operands,
        bias=bias,
        transform=transform or LogitTransform(),
        entropy=True,
        accumulate=torch.float64,
    )


@pytest.mark.parametrize("native_bf16", [True, False], ids=["bf16 gemm", "fp32 gemm"])
@pytest.mark.parametrize("entropy", [True, False], ids=["entropy", "no entropy"])
def test_bf16_operands_rank_exactly_beyond_bf16_logits(native_bf16, entropy, integer_operands):
    # Logits of some hundreds plus sixteenths need 12 bits and more; bf16 has 8.
    operands = integer_operands(70, 3000, 200, dtype=torch.bfloat16)
    bias = (torch.arange(3000) % 16 / 16).bfloat16()
    bias[::17] = -torch.inf
    result = run(operands, native_bf16, bias=bias, entropy=entropy)
    truth = truth_of(operands, bias=bias)
    rounded = truth_of(operands, LogitTransform(round_to=torch.bfloat16), bias=bias)
    assert torch.equal(result.rank, truth.rank)
    assert not torch.equal(rounded.rank, truth.rank)


@pytest.mark.parametrize("native_bf16", [True, False], ids=["bf16 gemm", "fp32 gemm"])
@pytest.mark.parametrize(
    "transform",
    [LogitTransform(), LogitTransform(scale=0.5), LogitTransform(soft_cap=20.0)],
    ids=["plain", "scaled", "capped"],
)
def test_bf16_logprobs_are_finer_than_bf16_logits(native_bf16, transform, normal_operands):
    operands = normal_operands(100, 4000, 96, dtype=torch.bfloat16)
    # Targets as a text's are, likely ones mostly: the product is finest near the target's logit.
    logits = transform(operands.hidden.float() @ operands.weight.float().T)
    targets = torch.multinomial(logits.softmax(1), 1, generator=torch.Generator().manual_seed(0))
    operands = replace(operands, targets=targets.squeeze(1))
    result, truth = run(operands, native_bf16, transform), truth_of(operands, transform)
    rounding = LogitTransform(transform.scale, transform.soft_cap, torch.bfloat16)
    rounded = truth_of(operands, rounding)
    error = (result.logprob - truth.logprob).abs()
    published_error = (rounded.logprob - truth.logprob).abs()
    assert (result.rank == truth.rank).float().mean() >= 0.99
    # The bf16 GEMM's rounding is relative to the target's logit, and averages out in the sum.
    assert error.mean() <= (published_error.mean() / 4 if native_bf16 else 2e-6)
    entropy_error = (result.entropy - truth.entropy).abs()
    if native_bf16:
        assert entropy_error.mean() <= (rounded.entropy - truth.entropy).abs().mean()
    else:
        assert (entropy_error / truth.entropy).max() <= 1e-4


@pytest.mark.parametrize("native_bf16", [True, False], ids=["bf16 gemm", "fp32 gemm"])
@pytest.mark.parametrize(("scale", "soft_cap"), [(1.0, None), (0.5, 40.0)], ids=["plain", "capped"])
def test_model_logits_in_bf16(native_bf16, scale, soft_cap, integer_operands):
    operands = integer_operands(70, 3000, 200, dtype=torch.bfloat16)
    bias = (torch.arange(3000) % 16 / 16).bfloat16()
    transform = LogitTransform(scale, soft_cap, torch.bfloat16)
    result, truth = run(operands, native_bf16, transform, bias), truth_of(operands, transform, bias)
    # fp32's tanh may fall on the other side of a rounding boundary than float64's.
    wrong = (result.rank != truth.rank).float().mean()
    assert wrong <= (0.0 if soft_cap is None else 0.03)
    if soft_cap is None:
        torch.testing.assert_close(result.logprob, truth.logprob, atol=2e-5, rtol=0)


def test_overflow_of_the_fast_sums_is_noticed(normal_operands):
    operands = normal_operands(20, 500, 16, spread=80.0)
    truth = truth_of(operands)
    assert truth.logprob.min() < -120  # e^120 is beyond fp32
    result = run(operands, native_bf16=False, entropy=False)
    torch.testing.assert_close(result.logprob, truth.logprob, atol=1e-4, rtol=1e-6)


def test_bf16_parts_sum_to_the_number():
    values = torch.tensor([0.0, 1.0, -3.14159274, 1e-20, 12345.678, -torch.inf, 16777215.0])
    parts = tiled._bf16_parts(values)
    assert parts.dtype == torch.bfloat16
    assert torch.equal(parts.float().sum(dim=1), values)


MEASURE = """
    import resource, torch
    from rsr.kernels import rank_logprob
    torch.set_num_threads(2)
    dtype, num_tokens, depth, vocab_size = torch.{dtype}, {num_tokens}, {depth}, {vocab_size}
    hidden = torch.full((num_tokens, depth), 0.01, dtype=dtype)
    weight = torch.full((vocab_size, depth), 0.01, dtype=dtype)
    targets = torch.zeros(num_tokens, dtype=torch.int64)
    # What GEMM libraries allocate once per process is not the operation's.
    rank_logprob(hidden[:1], weight, targets[:1], entropy=True)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rank_logprob(hidden, weight, targets, entropy=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib)
"""


@pytest.mark.seconds
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("num_tokens", "depth", "vocab_size"),
    [(4096, 64, 10_000), (512, 64, 100_000), (512, 4096, 4_000)],
    ids=["many tokens", "large vocabulary", "deep"],
)
def test_peak_memory_is_bounded_whatever_the_shape(num_tokens, depth, vocab_size, dtype):
    program = textwrap.dedent(MEASURE).format(**locals())
    result = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert int(result.stdout) <= 64 * 1024


@pytest.mark.parametrize(
    ("cpu_name", "instructions", "gains"),
    [
        ("Intel Xeon", ["avx512_bf16", "amx_bf16"], True),
        ("Intel Xeon", ["avx512_bf16"], False),
        ("AMD EPYC", ["avx512_bf16"], True),
        ("AMD EPYC", [], False),
        ("Neoverse V1", ["sve_bf16"], True),
    ],
)
def test_bf16_goes_through_gemms_that_gain_by_it(monkeypatch, cpu_name, instructions, gains):
    capabilities = {"cpu_name": cpu_name} | dict.fromkeys(instructions, True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert tiled.cpu_gains_by_bf16.__wrapped__() is gains
