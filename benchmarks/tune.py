"""Which tiles a card is fastest with: every candidate timed, the best of each kind of call kept.

What `rsr bench kernel --tune` runs. Knows nothing of the command line.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version

import torch

from rsr.benchmarks.harness import time_calls
from rsr.benchmarks.shapes import HeadShape
from rsr.kernels import RankLogprob, VocabShard
from rsr.kernels.logits import LogitTransform
from rsr.kernels.tuned_tiles import TunedCard, TunedRow
from rsr.kernels.tuning import HOPPER_AND_BLACKWELL, Tiles

logger = logging.getLogger(__name__)

TOKEN_BUCKETS = (64, 256, 1024, 4096, 16_384)
"""A row holds for calls of at most so many tokens; the last one's for all longer calls too."""

SOFT_CAP = 30.0

POINTER = (
    Tiles(64, 64, 64, 4, 4, programs_per_multiprocessor=2),
    Tiles(128, 64, 64, 4, 3, programs_per_multiprocessor=2),
    Tiles(128, 128, 32, 8, 3),
    Tiles(128, 128, 64, 8, 3),
)
DESCRIPTOR = tuple(
    Tiles(rows, columns, depth, warps, stages, programs, design="descriptor")
    for rows, columns, depth, warps, stages, programs in (
        (64, 256, 64, 4, 3, 1),
        (128, 128, 64, 4, 3, 2),
        (128, 128, 64, 8, 3, 2),
        (128, 128, 64, 8, 4, 1),
        (128, 256, 64, 8, 3, 1),
        (128, 256, 64, 8, 4, 1),
        (128, 256, 128, 8, 2, 1),
    )
)


def candidates(capability: tuple[int, int]) -> tuple[Tiles, ...]:
    """Tiles worth timing with 16-bit operands on a GPU of this compute capability."""
    major, minor = capability
    is_described = 10 * major + minor in HOPPER_AND_BLACKWELL
    return DESCRIPTOR + POINTER if is_described else POINTER


def describe(tiles: Tiles) -> str:
    """In a few words, for tables."""
    sizes = f"{tiles.rows}×{tiles.columns}×{tiles.depth}"
    return f"{tiles.design} {sizes}, {tiles.num_warps} warps, {tiles.num_stages} stages"


def tune(
    shapes: Sequence[HeadShape],
    device: torch.device,
    tiles: Sequence[Tiles],
    *,
    token_buckets: Sequence[int] = TOKEN_BUCKETS,
    num_repetitions: int = 10,
) -> TunedCard:
    """The fastest of `tiles` for each head and bucket, in bf16, with and without a soft cap.

    Of heads of one hidden size, one is enough: what a program does depends on it alone. The
    largest one's tiles hold for all larger ones too.
    """
    heads = sorted({s.hidden_size: s for s in shapes}.values(), key=_hidden_size)
    rows = [
        replace(row, max_depth=None) if shape == heads[-1] else row
        for has_soft_cap in (False, True)
        for shape in heads
        for row in _tune_head(shape, device, tiles, token_buckets, num_repetitions, has_soft_cap)
    ]
    major, minor = _capability(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    libraries = f"torch {version('torch')}, triton {version('triton')}"
    return TunedCard(name, 10 * major + minor, tuple(rows), libraries)


def _hidden_size(shape: HeadShape) -> int:
    return shape.hidden_size


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _tune_head(
    shape: HeadShape,
    device: torch.device,
    tiles: Sequence[Tiles],
    token_buckets: Sequence[int],
    num_repetitions: int,
    has_soft_cap: bool,
) -> Iterator[TunedRow]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16  # as the interpreter can
    generator = torch.Generator(device).manual_seed(0)
    hidden, weight = (
        torch.randint(
            -3,
            4,
            (rows, shape.hidden_size),
            generator=generator,
            device=device,
            dtype=torch.int8,
        ).to(dtype)
        for rows in (max(token_buckets), shape.vocab_size)
    )
    targets = torch.randint(0, shape.vocab_size, (len(hidden),), generator=generator, device=device)
    transform = LogitTransform(soft_cap=SOFT_CAP if has_soft_cap else None)
    for bucket in token_buckets:
        operands = hidden[:bucket], weight, targets[:bucket]
        calls = dict(_sound_calls(operands, tiles, transform))
        if not calls:
            continue
        timings = time_calls(calls, device, num_repetitions)
        best = min(calls, key=lambda name: timings[name].time_ms_p50)
        flops = 2 * bucket * weight.numel()
        tflop_per_s = flops / timings[best].time_ms_p50 / 1e9
        logger.info("%d × %d: %s, %.3f TFLOP/s", bucket, shape.hidden_size, best, tflop_per_s)
        yield TunedRow(
            operand_bytes=dtype.itemsize,
            has_soft_cap=has_soft_cap,
            max_depth=shape.hidden_size,
            max_tokens=None if bucket == max(token_buckets) else bucket,
            tiles=next(t for t in tiles if describe(t) == best),
            tflop_per_s=round(tflop_per_s, 3),
        )


def _sound_calls(
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    tiles: Sequence[Tiles],
    transform: LogitTransform,
) -> Iterator[tuple[str, Callable[[], RankLogprob]]]:
    """Those that compile, fit on the card and give the ranks of the torch pass, run once."""
    hidden, weight, targets = operands
    expected = _run(*operands, None, transform).rank
    for candidate in tiles:
        name = describe(candidate)
        try:
            rank = _run(*operands, candidate, transform).rank
        except (RuntimeError, ValueError) as error:  # Triton's own errors are of these
            logger.info("%s: %s", name, error)
            continue
        if not torch.equal(rank, expected):
            raise AssertionError(f"{name} gives wrong ranks")
        yield name, partial(_run, hidden, weight, targets, candidate, transform)


def _run(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    tiles: Tiles | None,
    transform: LogitTransform,
) -> RankLogprob:
    """The pass with entropy, by `tiles`, or by torch for None."""
    from rsr.kernels import fused, tiled  # Triton is not everywhere that torch is

    shard = VocabShard(weight, soft_cap=transform.soft_cap)
    module = tiled if tiles is None else fused
    target_raw = module.target_raw(hidden, weight, targets, None)
    chosen = {} if tiles is None else {"tiles": tiles}
    stats = module.vocab_stats(
        hidden,
        weight,
        targets,
        target_raw,
        bias=None,
        transform=transform,
        entropy=True,
        **chosen,
    )
    return shard.finish([stats], target_raw, entropy=True)
