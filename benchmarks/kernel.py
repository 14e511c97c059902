"""What `rsr bench kernel` runs: the rank kernel beside everything else one would use.

Each row is checked against the reference before it is timed; a wrong one is listed, never timed.
Knows nothing of the command line. Shapes are (N tokens, D hidden, V vocabulary).
"""

import logging
import platform
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from shutil import which
from typing import Any

import torch

from rsr.benchmarks.child import ChildProcess
from rsr.benchmarks.harness import busy_loops, keep_no_freed_memory, peak_extra_mib, time_calls
from rsr.benchmarks.shapes import HeadShape
from rsr.benchmarks.tune import candidates, describe
from rsr.kernels import RankLogprob, VocabShard, rank_logprob, tiled
from rsr.kernels.tuning import Tiles

logger = logging.getLogger(__name__)

RANK_CLIP = 100  # the authors' r_max
CHECK_ROWS = 256
# Sorting 8,192 × 151,936 numbers takes some 35 GB.
MAX_SORTED_TOKENS = 1024
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
    triton_version: str
    driver: str
    """Of the GPU; empty on a CPU."""
    busy_cores: int = 0
    """On how many cores a busy loop ran meanwhile."""
    failed_check: str | None = None
    time_ms_p20: float | None = None
    time_ms_p50: float | None = None
    time_ms_p80: float | None = None
    tokens_per_s: float | None = None
    tflop_per_s: float | None = None
    gb_per_s: float | None = None
    """Hidden states and head, each read once: what limits few tokens."""
    share_of_gemm: float | None = None
    """The bare GEMM's time for as many tokens over this one's."""
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

    def first(self, num_tokens: int | None) -> "_Operands":
        """The first tokens alone; all of them for None."""
        return _Operands(self.hidden[:num_tokens], self.weight, self.targets[:num_tokens])


@dataclass(frozen=True)
class _Truth:
    """What the fp32 logits say, with the ranks that an error of their rounding may lead to."""

    logprob: torch.Tensor
    bounds: dict[bool, tuple[torch.Tensor, torch.Tensor]]
    """By whether logits are rounded to the operands' dtype: lowest and highest rank."""

    def first(self, num_tokens: int | None) -> "_Truth":
        """Of the first tokens alone; of all of them for None."""
        bounds = {
            rounds: (low[:num_tokens], high[:num_tokens])
            for rounds, (low, high) in self.bounds.items()
        }
        return _Truth(self.logprob[:num_tokens], bounds)


@dataclass(frozen=True)
class _Operation:
    run: Callable[[_Operands], Any]
    rounds_logits: bool = False
    clip: int | None = None
    has_rank: bool = True
    max_tokens: int | None = None
    """Tokens that it is given at most, for want of memory."""


def bench_kernel(
    preset: str,
    shape: HeadShape,
    dtype: str,
    device: torch.device,
    num_repetitions: int,
    busy_cores: int = 0,
    tell: Callable[[str], None] = logger.info,
) -> Iterator[BenchRow]:
    """Every operation that this machine has, on one head; `dtype` is a key of `DTYPES`.

    With `busy_cores`, once more while busy loops take part of as many of this process's cores.
    tell: is told what is done next, a few seconds to a minute each.
    """
    tell("computing what is right")
    operands, truth = _draw(shape, DTYPES[dtype], device)
    facts = (preset, shape.num_tokens, shape.hidden_size, shape.vocab_size, dtype)
    operations = dict(_operations(device, operands.weight.dtype))
    common = {name: BenchRow(*facts, name, *_machine(device)) for name in operations}
    for name, operation in operations.items():
        tell(f"checking {name}")
        first = operation.max_tokens
        failure = _check(operation, operands.first(first), truth.first(first))
        common[name] = replace(common[name], failed_check=failure)
        _give_memory_back(device)
    sound = {name: op for name, op in operations.items() if common[name].failed_check is None}
    tell("measuring memory")
    memory = _peaks_extra_mib(shape, dtype, device, operands, list(sound))
    calls = {name: partial(op.run, operands.first(op.max_tokens)) for name, op in sound.items()}
    timings = {}
    for num_busy in sorted({0, busy_cores}):
        with busy_loops(num_busy):
            timings[num_busy] = time_calls(calls, device, num_repetitions, tell)
    for num_busy, timing_of in timings.items():
        for name, operation in operations.items():
            row = replace(common[name], busy_cores=num_busy)
            if name not in timing_of:
                yield row
                continue
            time_ms = timing_of[name].time_ms_p50
            num_tokens = min(shape.num_tokens, operation.max_tokens or shape.num_tokens)
            share = num_tokens / shape.num_tokens
            yield replace(
                row,
                num_tokens=num_tokens,
                tokens_per_s=num_tokens / time_ms * 1e3,
                tflop_per_s=share * shape.gemm_flops / time_ms / 1e9,
                gb_per_s=(share * _num_bytes(operands.hidden) + _num_bytes(operands.weight))
                / time_ms
                / 1e6,
                share_of_gemm=share * timing_of["gemm"].time_ms_p50 / time_ms,
                slow_down=time_ms / timings[0][name].time_ms_p50,
                peak_extra_mib=memory[name],
                **asdict(timing_of[name]),
            )


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _machine(device: torch.device) -> tuple[str, int, str, str, str]:
    triton_version = version("triton") if find_spec("triton") else ""
    name, num_threads = _device_name(device), torch.get_num_threads()
    return name, num_threads, version("torch"), triton_version, _driver(device)


def _driver(device: torch.device) -> str:
    if device.type != "cuda" or which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    return found[0] if found else ""


def _give_memory_back(device: torch.device) -> None:
    """What one operation's temporaries took is the next one's to take."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _peaks_extra_mib(
    shape: HeadShape, dtype: str, device: torch.device, operands: _Operands, names: list[str]
) -> dict[str, float]:
    """Of each operation named. A GPU counts its memory; a CPU needs a process of its own."""
    if device.type == "cuda":
        return dict(_measure_peaks(operands, device, names))
    with ChildProcess() as child:
        return child.call(_peaks_of_fresh_process, shape, dtype, names)


def _peaks_of_fresh_process(shape: HeadShape, dtype: str, names: list[str]) -> dict[str, float]:
    """`_measure_peaks` on a CPU; to be called in a fresh process."""
    keep_no_freed_memory()
    device = torch.device("cpu")
    operands, _ = _draw(shape, DTYPES[dtype], device)
    return dict(_measure_peaks(operands, device, names))


def _measure_peaks(
    operands: _Operands, device: torch.device, names: list[str]
) -> Iterator[tuple[str, float]]:
    for name, operation in _operations(device, operands.weight.dtype):
        if name in names:
            # GEMM libraries allocate buffers once per process, which are not the operation's.
            operation.run(operands.first(1))
            given = operands.first(operation.max_tokens)
            yield name, peak_extra_mib(partial(operation.run, given), device)
            _give_memory_back(device)


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
    except (RuntimeError, ValueError, TypeError, ImportError) as error:
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
    if device.type == "cuda" and dtype != torch.float32:
        for tiles in candidates(torch.cuda.get_device_capability(device)):
            yield f"rsr {describe(tiles)} with entropy", _Operation(_by_tiles(tiles))
    yield "authors", _Operation(_authors, rounds_logits=True, clip=RANK_CLIP)
    yield "vllm", _Operation(_vllm, rounds_logits=True)
    yield "log-softmax and sort", _Operation(_sort, True, max_tokens=MAX_SORTED_TOKENS)
    if device.type == "cuda" and find_spec("liger_kernel"):
        yield "liger (log-probability only)", _Operation(_liger, has_rank=False)
        yield "liger FLSCE (no rank)", _Operation(_liger_flsce, has_rank=False)
    if device.type == "cuda" and find_spec("cut_cross_entropy"):
        yield "cut-cross-entropy (log-probability only)", _Operation(_cce, has_rank=False)


def _ours(impl: Any, logits_dtype: Any, entropy: bool = False) -> Callable[[_Operands], Any]:
    """What the engine calls: unlike `rank_logprob`, it does not wait to look at the targets."""

    def run(x: _Operands) -> RankLogprob:
        if impl == "reference":
            return rank_logprob(x.hidden, x.weight, x.targets, impl=impl, logits_dtype=logits_dtype)
        shard = VocabShard(x.weight, impl=impl, logits_dtype=logits_dtype)
        target_raw = shard.target_raw(x.hidden, x.targets)
        stats = shard.stats(x.hidden, x.targets, target_raw, entropy)
        return shard.finish([stats], target_raw, entropy)

    return run


def _by_tiles(tiles: Tiles) -> Callable[[_Operands], RankLogprob]:
    """The Triton pass by tiles of one's choice, with entropy."""

    def run(x: _Operands) -> RankLogprob:
        from rsr.kernels import fused  # Triton is not everywhere that torch is

        shard = VocabShard(x.weight, impl="fused")
        target_raw = shard.target_raw(x.hidden, x.targets)
        stats = fused.vocab_stats(
            x.hidden,
            x.weight,
            x.targets,
            target_raw,
            bias=None,
            transform=shard.transform,
            entropy=True,
            tiles=tiles,
        )
        return shard.finish([stats], target_raw, entropy=True)

    return run


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
    """What vLLM does for `prompt_logprobs` of 0: log-softmax, gather, count of `>=`."""
    logprobs = x.logits.log_softmax(dim=-1, dtype=torch.float32)
    own = logprobs.gather(-1, x.targets[:, None])
    return RankLogprob((logprobs >= own).sum(-1), own.squeeze(1), None)


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


def _liger_flsce(x: _Operands) -> RankLogprob:
    """Its operation of log-probability and entropy: on Hopper the fastest in public."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Flsce

    temperature, ignore_index, m_tiles_per_cluster, with_entropy = 1.0, -100, 1, True
    nll, entropy = Flsce.apply(
        x.hidden, x.weight, x.targets, temperature, ignore_index, m_tiles_per_cluster, with_entropy
    )
    return RankLogprob(torch.zeros_like(x.targets), -nll.float(), entropy)


def _cce(x: _Operands) -> RankLogprob:
    from cut_cross_entropy import linear_cross_entropy

    loss = linear_cross_entropy(x.hidden, x.weight, x.targets, reduction="none")
    return RankLogprob(torch.zeros_like(x.targets), -loss.float(), None)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.cpu.get_capabilities().get("cpu_name") or platform.machine()
