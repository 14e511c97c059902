"""What `rsr bench kernel` runs: the rank kernel beside everything else one would use.

Each row is checked against the reference before it is timed; a wrong one is listed, never timed.
Knows nothing of the command line. Shapes are (N tokens, D hidden, V vocabulary).
"""

import logging
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch

from rsr.benchmarks.child import ChildProcess
from rsr.benchmarks.harness import busy_loops, keep_no_freed_memory, peak_extra_mib, time_calls
from rsr.benchmarks.shapes import HeadShape
from rsr.kernels import RankLogprob, rank_logprob, tiled

logger = logging.getLogger(__name__)

RANK_CLIP = 100  # the authors' r_max
CHECK_ROWS = 256
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class BenchRow:
    """One operation on one shape: times are over the repetitions, memory is above the operands."""

    preset: str
    num_tokens: int
    hidden_size: int
    vocab_size: int
    dtype: str
    operation: str
    device: str
    num_threads: int
    torch_version: str
    busy_cores: int = 0
    """On how many cores a busy loop ran meanwhile."""
    failed_check: str | None = None
    time_ms_p20: float | None = None
    time_ms_p50: float | None = None
    time_ms_p80: float | None = None
    tokens_per_s: float | None = None
    tflop_per_s: float | None = None
    share_of_gemm: float | None = None
    slow_down: float | None = None
    """Time as a multiple of the same operation's with no busy core."""
    peak_extra_mib: float | None = None


@dataclass(frozen=True)
class _Operands:
    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor

    @property
    def logits(self) -> torch.Tensor:
        """As a model hands them out: in the operands' dtype."""
        return self.hidden @ self.weight.T


@dataclass(frozen=True)
class _Truth:
    """What the fp32 logits say, with the ranks that an error of their rounding may lead to."""

    logprob: torch.Tensor
    bounds: dict[bool, tuple[torch.Tensor, torch.Tensor]]
    """By whether logits are rounded to the operands' dtype: lowest and highest rank."""


@dataclass(frozen=True)
class _Operation:
    run: Callable[[_Operands], Any]
    rounds_logits: bool = False
    clip: int | None = None
    has_rank: bool = True


def bench_kernel(
    preset: str,
    shape: HeadShape,
    dtype: str,
    device: torch.device,
    num_repetitions: int,
    busy_cores: int = 0,
) -> Iterator[BenchRow]:
    """Every operation that this machine has, on one head; `dtype` is a key of `DTYPES`.

    With `busy_cores`, once more while busy loops take part of as many of this process's cores.
    """
    operands, truth = _draw(shape, DTYPES[dtype], device)
    facts = (preset, shape.num_tokens, shape.hidden_size, shape.vocab_size, dtype)
    machine = (_device_name(device), torch.get_num_threads(), version("torch"))
    operations = dict(_operations(device, operands.weight.dtype))
    failures = {name: _check(op, operands, truth) for name, op in operations.items()}
    sound = {name: op for name, op in operations.items() if failures[name] is None}
    logger.info("%s %s: timing %s", preset, dtype, ", ".join(sound))
    calls = {name: (lambda op=op: op.run(operands)) for name, op in sound.items()}
    timings = {}
    for num_busy in sorted({0, busy_cores}):
        with busy_loops(num_busy):
            timings[num_busy] = time_calls(calls, device, num_repetitions)
    with ChildProcess() as child:
        memory = child.call(_peak_extra_mib, shape, dtype, str(device), list(sound))
    for num_busy, timing_of in timings.items():
        for name in operations:
            common = BenchRow(*facts, name, *machine, num_busy, failures[name])
            if name not in timing_of:
                yield common
                continue
            time_ms = timing_of[name].time_ms_p50
            yield replace(
                common,
                tokens_per_s=shape.num_tokens / time_ms * 1e3,
                tflop_per_s=shape.gemm_flops / time_ms / 1e9,
                share_of_gemm=timing_of["gemm"].time_ms_p50 / time_ms,
                slow_down=time_ms / timings[0][name].time_ms_p50,
                peak_extra_mib=memory[name],
                **asdict(timing_of[name]),
            )


def _peak_extra_mib(
    shape: HeadShape, dtype: str, device_name: str, names: list[str]
) -> dict[str, float]:
    """Of each operation named, once it has run; to be called in a fresh process."""
    keep_no_freed_memory()
    device = torch.device(device_name)
    operands, _ = _draw(shape, DTYPES[dtype], device)
    peaks = {}
    for name, operation in _operations(device, operands.weight.dtype):
        if name in names:
            # GEMM libraries allocate buffers once per process, which are not the operation's.
            first = _Operands(operands.hidden[:1], operands.weight, operands.targets[:1])
            operation.run(first)
            peaks[name] = peak_extra_mib(partial(operation.run, operands), device)
    return peaks


def _draw(shape: HeadShape, dtype: torch.dtype, device: torch.device) -> tuple[_Operands, _Truth]:
    """Gaussian logits with a spread of three nats; targets drawn from what they predict."""
    generator = torch.Generator(device).manual_seed(0)
    hidden, weight = (
        torch.randn(rows, shape.hidden_size, generator=generator, device=device, dtype=dtype)
        for rows in (shape.num_tokens, shape.vocab_size)
    )
    weight *= 3 / shape.hidden_size**0.5
    parts = [_truth(rows, weight, generator) for rows in hidden.split(CHECK_ROWS)]
    targets, logprob, exact_low, exact_high, rounded_low, rounded_high = (
        torch.cat(field) for field in zip(*parts, strict=True)
    )
    bounds = {False: (exact_low, exact_high), True: (rounded_low, rounded_high)}
    return _Operands(hidden, weight, targets), _Truth(logprob, bounds)


def _truth(
    hidden: torch.Tensor, weight: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, ...]:
    logits = torch.cat([hidden.float() @ part.float().T for part in weight.split(16_384)], dim=1)
    noise = torch.rand(logits.shape, generator=generator, device=logits.device)
    targets = (logits - noise.log_().neg_().log_()).argmax(dim=1)  # Gumbel's way to sample
    own = logits.gather(1, targets[:, None])
    logprob = (own - logits.logsumexp(dim=1, keepdim=True)).squeeze(1)
    rounding = 2 * torch.finfo(weight.dtype).eps * logits.abs().amax(dim=1, keepdim=True)
    bounds = []
    for error in (1e-4, rounding):
        bounds.append(1 + (logits > own + error).sum(dim=1))
        bounds.append((logits >= own - error).sum(dim=1))
    return targets, logprob, *bounds


def _check(operation: _Operation, operands: _Operands, truth: _Truth) -> str | None:
    """Why the operation's result is not to be trusted, or None."""
    try:
        result = operation.run(operands)
    except (RuntimeError, ValueError, ImportError) as error:
        return f"{type(error).__name__}: {error}"
    if isinstance(result, torch.Tensor):  # the bare GEMM
        own = result.gather(1, operands.targets[:, None]).squeeze(1).float()
        expected = tiled.target_raw(operands.hidden, operands.weight, operands.targets, None)
        wrong = (own - expected).abs().max().item()
        return None if wrong < 0.2 else f"a target's logit is off by {wrong:.2g}"
    # fp32 operands leave nothing to round; a bf16 GEMM's rounding is finest near the target.
    tolerance_nats = 1e-3 if operands.weight.dtype == torch.float32 else 0.2
    wrong = (result.logprob - truth.logprob).abs().max().item()
    if not wrong < tolerance_nats:
        return f"a log-probability is off by {wrong:.2g} nats"
    if operation.has_rank:
        clip = operation.clip or operands.weight.shape[0]
        low, high = (bound.clamp(max=clip) for bound in truth.bounds[operation.rounds_logits])
        num_wrong = int(((result.rank < low) | (result.rank > high)).sum())
        if num_wrong:
            return f"{num_wrong} of {len(low)} ranks are wrong"
    return None


def _operations(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, _Operation]]:
    yield "gemm", _Operation(lambda x: x.logits)
    for impl in (
        ("fused", "tiled", "reference") if device.type == "cuda" else ("tiled", "reference")
    ):
        for logits_dtype in ("float32", "model"):
            rounds = logits_dtype == "model"
            yield f"rsr {impl} {logits_dtype}", _Operation(_ours(impl, logits_dtype), rounds)
    yield "rsr auto float32 with entropy", _Operation(_ours("auto", "float32", entropy=True))
    yield "authors", _Operation(_authors, rounds_logits=True, clip=RANK_CLIP)
    if find_spec("vllm"):
        yield "vllm", _Operation(_vllm, rounds_logits=True)
    yield "log-softmax and sort", _Operation(_sort, rounds_logits=True)
    if device.type == "cuda" and find_spec("liger_kernel"):
        yield "liger (log-probability only)", _Operation(_liger, has_rank=False)
    if device.type == "cuda" and find_spec("cut_cross_entropy"):
        yield "cut-cross-entropy (log-probability only)", _Operation(_cce, has_rank=False)


def _ours(impl: Any, logits_dtype: Any, entropy: bool = False) -> Callable[[_Operands], Any]:
    return lambda x: rank_logprob(
        x.hidden, x.weight, x.targets, impl=impl, logits_dtype=logits_dtype, entropy=entropy
    )


def _authors(x: _Operands) -> RankLogprob:
    """The published script's operation: logits, fp32 logsumexp, rank among the top 100."""
    logits = x.logits
    wide = logits.float()
    own = wide.gather(1, x.targets[:, None])
    logprob = own.squeeze(1) - wide.logsumexp(dim=1)
    leaders = logits.topk(min(RANK_CLIP, logits.shape[1]), dim=1).values
    rank = 1 + (leaders.float() > own).sum(dim=1)
    return RankLogprob(rank.clamp(max=RANK_CLIP), logprob, None)


def _vllm(x: _Operands) -> RankLogprob:
    """vLLM's log-probability and rank (which counts `>=`, the target itself included)."""
    from vllm.v1.sample.sampler import Sampler

    found = Sampler.gather_logprobs(Sampler.compute_logprobs(x.logits), 0, x.targets)
    return RankLogprob(found.selected_token_ranks, found.logprobs[:, 0], None)


def _sort(x: _Operands) -> RankLogprob:
    """The obvious way: sort the whole vocabulary and look the target up."""
    logprobs = x.logits.float().log_softmax(dim=1)
    order = logprobs.argsort(dim=1, descending=True, stable=True)
    rank = 1 + (order == x.targets[:, None]).int().argmax(dim=1)
    return RankLogprob(rank, logprobs.gather(1, x.targets[:, None]).squeeze(1), None)


def _liger(x: _Operands) -> RankLogprob:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss = liger_fused_linear_cross_entropy(x.hidden, x.weight, x.targets, reduction="none")
    return RankLogprob(torch.zeros_like(x.targets), -loss.float(), None)


def _cce(x: _Operands) -> RankLogprob:
    from cut_cross_entropy import linear_cross_entropy

    loss = linear_cross_entropy(x.hidden, x.weight, x.targets, reduction="none")
    return RankLogprob(torch.zeros_like(x.targets), -loss.float(), None)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.cpu.get_capabilities().get("cpu_name") or platform.machine()
