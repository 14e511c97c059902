"""One pass over vocabulary tiles in Triton: the GEMM, and all that is wanted of it, in registers.

Device helpers, then each kernel under which its launcher stands. Knows the same contract as
`tiled.py`, whose functions have the same names; tiles come from `tuned_tiles.py` and `tuning.py`.
N is tokens, V the columns at hand, D the hidden size, K the parts the vocabulary is cut into.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code has no Python types; launchers do.

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from rsr.kernels import tuned_tiles, tuning
from rsr.kernels.logits import LogitTransform
from rsr.kernels.stats import VocabStats, merge_stacked

TARGET_ROWS = 4
TARGET_DEPTH = 512
# A soft cap needs a tile's logits and what they were before it at once: in halves they fit in
# registers.
PARTS_UNDER_CAP = 2

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Where a maximum begins. Minus infinity would make NaN out of the difference of two of them; no
# logit that counts is below it.
LOWEST = tl.constexpr(-1e38)
# 2 to this power is 0, and 0 when multiplied by it; minus infinity would be NaN.
FEWEST_BITS = tl.constexpr(-1e4)
NAN_STAYS = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _logit(
    raw, soft_cap, scale, HAS_CAP: tl.constexpr, HAS_SCALE: tl.constexpr, ROUND_TO: tl.constexpr
):
    """`LogitTransform`, on fp32 values."""
    logit = raw
    if HAS_CAP:
        # tanh(x) = 1 − 2 / (1 + exp(2x)), whose exponential may overflow to the right answer.
        bits_per_raw = 2.0 * LOG2_E / soft_cap
        logit = soft_cap - 2.0 * soft_cap / (1.0 + tl.exp2(raw * bits_per_raw))
    if HAS_SCALE:
        logit = logit * scale
    if ROUND_TO is not None:
        logit = logit.to(ROUND_TO).to(tl.float32)
    return logit


@triton.jit(do_not_specialize=["num_tokens"])
def _target_raw_kernel(
    hidden_ptr,
    weight_ptr,
    column_ptr,
    bias_ptr,
    out_ptr,
    num_tokens,
    num_columns,
    depth,
    stride_hn,
    stride_hd,
    stride_wv,
    stride_wd,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_range = rows < num_tokens
    columns = tl.load(column_ptr + rows, mask=in_range, other=-1)
    owned = (columns >= 0) & (columns < num_columns)
    sums = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for first in range(0, depth, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D).to(tl.int64)
        mask = owned[:, None] & (d < depth)[None, :]
        h = tl.load(hidden_ptr + rows[:, None] * stride_hn + d[None, :] * stride_hd, mask, 0.0)
        w = tl.load(weight_ptr + columns[:, None] * stride_wv + d[None, :] * stride_wd, mask, 0.0)
        sums += h.to(tl.float32) * w.to(tl.float32)
    raw = tl.sum(sums, axis=1)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + columns, owned, 0.0).to(tl.float32)
    tl.store(out_ptr + rows, raw, mask=in_range)


def target_raw(
    hidden: torch.Tensor, weight: torch.Tensor, columns: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """h·w + b of one column per row, (N,) float32; 0 where `columns` (N,) is outside [0, V)."""
    out = torch.empty(len(columns), dtype=torch.float32, device=hidden.device)
    if len(columns) == 0:
        return out
    _target_raw_kernel[(triton.cdiv(len(columns), TARGET_ROWS),)](
        hidden,
        weight,
        columns.contiguous(),
        None if bias is None else bias.contiguous(),
        out,
        hidden.shape[0],
        weight.shape[0],
        hidden.shape[1],
        *hidden.stride(),
        *weight.stride(),
        HAS_BIAS=bias is not None,
        BLOCK_N=TARGET_ROWS,
        BLOCK_D=TARGET_DEPTH,
        enable_fp_fusion=True,
    )
    return out


@triton.jit
def _as_lanes(
    tile,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
    RUN: tl.constexpr,
):
    """(BLOCK_N, BLOCK_V) as (BLOCK_N, LANES, BLOCK_V / LANES); runs of columns go round lanes."""
    runs = tl.reshape(tile, [BLOCK_N, BLOCK_V // (LANES * RUN), LANES, RUN])
    return tl.reshape(tl.permute(runs, [0, 2, 1, 3]), [BLOCK_N, LANES, BLOCK_V // LANES])


@triton.jit
def _halves(x, BLOCK_N: tl.constexpr, LANES: tl.constexpr, SIZE: tl.constexpr):
    """(BLOCK_N, LANES, SIZE) as two of half the size."""
    return tl.split(tl.permute(tl.reshape(x, [BLOCK_N, LANES, 2, SIZE // 2]), [0, 1, 3, 2]))


@triton.jit
def _add_terms(
    logits,
    top,
    sums,
    weighted,
    ENTROPY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LANES: tl.constexpr,
    SIZE: tl.constexpr,
):
    """The sums with the terms of `logits` (BLOCK_N, LANES, SIZE) in them, one after the other.

    In base 2, as one FMA and one exponential make a term of it.
    """
    if SIZE == 1:
        logits = tl.reshape(logits, [BLOCK_N, LANES])
        bits = tl.maximum(logits * LOG2_E - top * LOG2_E, FEWEST_BITS)
        exps = tl.exp2(bits)
        sums += exps
        if ENTROPY:
            weighted = bits * exps + weighted
    else:
        for half in tl.static_range(2):
            sums, weighted = _add_terms(
                _halves(logits, BLOCK_N, LANES, SIZE)[half],
                top,
                sums,
                weighted,
                ENTROPY,
                BLOCK_N,
                LANES,
                SIZE // 2,
            )
    return sums, weighted


@triton.jit
def _add_logits(
    logits,
    top,
    rest,
    weighted,
    ENTROPY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LANES: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Each lane's statistics with `logits` (BLOCK_N, LANES, SIZE) in them; `weighted` is in bits.

    Going down, the larger of each pair goes on to meet the next, and the last one meets the largest
    so far; going up, all that lost are summed. So the largest is never among what is summed, in
    which its 1 would drown the rest. A NaN logit makes a NaN of the largest.
    """
    if SIZE == 1:
        last = tl.reshape(logits, [BLOCK_N, LANES])
        new_top = tl.maximum(last, top, propagate_nan=NAN_STAYS)
        gap_bits = tl.maximum((top - new_top) * LOG2_E, FEWEST_BITS)
        scale = tl.exp2(gap_bits)
        if ENTROPY:
            weighted = (weighted + gap_bits * rest) * scale
        rest *= scale
        # The difference first: it is exact where the two are close.
        bits = tl.maximum((tl.minimum(last, top) - new_top) * LOG2_E, FEWEST_BITS)
        exps = tl.exp2(bits)
        rest += exps
        if ENTROPY:
            weighted += bits * exps
    else:
        left, right = _halves(logits, BLOCK_N, LANES, SIZE)
        winners = tl.maximum(left, right, propagate_nan=NAN_STAYS)
        losers = tl.minimum(left, right, propagate_nan=NAN_STAYS)
        new_top, rest, weighted = _add_logits(
            winners, top, rest, weighted, ENTROPY, BLOCK_N, LANES, SIZE // 2
        )
        rest, weighted = _add_terms(
            losers, new_top, rest, weighted, ENTROPY, BLOCK_N, LANES, SIZE // 2
        )
    return new_top, rest, weighted


@triton.jit
def _add_part(
    raw,
    counts,
    target_raw,
    target_logit,
    top,
    rest,
    weighted,
    num_greater,
    soft_cap,
    scale,
    HAS_CAP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ROUND_TO: tl.constexpr,
    ENTROPY: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LANES: tl.constexpr,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Each lane's statistics with h·w + b in them, `raw` (BLOCK_N, LANES, SIZE).

    In `PARTS` parts, one after the other: what is made of all need not fit in registers together.
    """
    if PARTS > 1:
        raws = _halves(raw, BLOCK_N, LANES, SIZE)
        halves_of_counts = _halves(counts, BLOCK_N, LANES, SIZE)
        for half in tl.static_range(2):
            top, rest, weighted, num_greater = _add_part(
                raws[half],
                halves_of_counts[half],
                target_raw,
                target_logit,
                top,
                rest,
                weighted,
                num_greater,
                soft_cap,
                scale,
                HAS_CAP,
                HAS_SCALE,
                ROUND_TO,
                ENTROPY,
                MASKED,
                BLOCK_N,
                LANES,
                SIZE // 2,
                PARTS // 2,
            )
    else:
        logits = _logit(raw, soft_cap, scale, HAS_CAP, HAS_SCALE, ROUND_TO)
        if MASKED and HAS_CAP:
            logits = tl.where(counts, logits, float("-inf"))  # the cap has lifted it
        if ROUND_TO is None:
            is_greater = raw > target_raw[:, None, None]
        else:
            is_greater = logits > target_logit[:, None, None]
        # Flags summed as fp32 take one instruction less each than as integers.
        num_greater += tl.sum(is_greater.to(tl.float32), axis=2)
        top, rest, weighted = _add_logits(
            logits, top, rest, weighted, ENTROPY, BLOCK_N, LANES, SIZE
        )
    return top, rest, weighted, num_greater


@triton.jit
def _add_tile(
    raw,
    first,
    num_columns,
    targets,
    target_raw,
    target_logit,
    bias_ptr,
    top,
    rest,
    weighted,
    num_greater,
    soft_cap,
    scale,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ROUND_TO: tl.constexpr,
    ENTROPY: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
    RUN: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Each lane's statistics with a tile of h·w in them, `raw` (BLOCK_N, BLOCK_V).

    Where `MASKED`, columns beyond the last and the target's count for nothing: computed twice, a
    target can differ in the last bit and outrank itself.
    """
    columns = first + tl.arange(0, BLOCK_V)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + columns, columns < num_columns, 0.0).to(tl.float32)[None, :]
    counts = raw
    if MASKED:
        counts = (columns < num_columns)[None, :] & (columns[None, :] != targets[:, None])
        raw = tl.where(counts, raw, float("-inf"))
    return _add_part(
        _as_lanes(raw, BLOCK_N, BLOCK_V, LANES, RUN),
        _as_lanes(counts, BLOCK_N, BLOCK_V, LANES, RUN),
        target_raw,
        target_logit,
        top,
        rest,
        weighted,
        num_greater,
        soft_cap,
        scale,
        HAS_CAP,
        HAS_SCALE,
        ROUND_TO,
        ENTROPY,
        MASKED,
        BLOCK_N,
        LANES,
        BLOCK_V // LANES,
        PARTS,
    )


@triton.jit
def _merge_lanes(top_a, rest_a, weighted_a, top_b, rest_b, weighted_b):
    """Statistics of two lanes' columns together; `stats.merge_stats`, in bits."""
    top = tl.maximum(top_a, top_b, propagate_nan=NAN_STAYS)
    bits_a = tl.maximum((top_a - top) * LOG2_E, FEWEST_BITS)
    bits_b = tl.maximum((top_b - top) * LOG2_E, FEWEST_BITS)
    exps_a = tl.exp2(bits_a)
    exps_b = tl.exp2(bits_b)
    lower_bits = tl.minimum(bits_a, bits_b)
    lower_exps = tl.exp2(lower_bits)
    rest = rest_a * exps_a + rest_b * exps_b + lower_exps
    weighted = (
        (weighted_a + bits_a * rest_a) * exps_a
        + (weighted_b + bits_b * rest_b) * exps_b
        + lower_bits * lower_exps
    )
    return top, rest, weighted


# A new batch size is not a new kernel.
@triton.jit(do_not_specialize=["num_tokens", "num_splits", "group_blocks"])
def _vocab_stats_kernel(
    hidden,
    weight,
    column_ptr,
    target_raw_ptr,
    bias_ptr,
    anchor_ptr,
    rest_ptr,
    weighted_ptr,
    num_greater_ptr,
    num_tokens,
    num_columns,
    depth,
    num_splits,
    group_blocks,
    stride_hn,
    stride_hd,
    stride_wv,
    stride_wd,
    soft_cap,
    scale,
    DESCRIPTORS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ROUND_TO: tl.constexpr,
    ENTROPY: tl.constexpr,
    EVEN_D: tl.constexpr,
    LANES: tl.constexpr,
    RUN: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Statistics of BLOCK_N rows over one part of the vocabulary, kept in registers throughout.

    A row's columns are dealt to `LANES` lanes, each with statistics of its own. Where a lane is
    what one thread holds of a row, threads exchange nothing until all tiles are done.

    `hidden` and `weight` are tensor descriptors where `DESCRIPTORS`, else pointers.
    """
    num_row_blocks = tl.cdiv(num_tokens, BLOCK_N)
    programs_per_group = group_blocks * num_splits
    first_block = tl.program_id(0) // programs_per_group * group_blocks
    blocks_in_group = tl.minimum(num_row_blocks - first_block, group_blocks)
    within_group = tl.program_id(0) % programs_per_group
    split = within_group // blocks_in_group
    first_row = (first_block + within_group % blocks_in_group) * BLOCK_N

    rows = first_row.to(tl.int64) + tl.arange(0, BLOCK_N)
    in_range = rows < num_tokens
    rows = tl.minimum(rows, num_tokens - 1)  # loads need no mask then; only the store does
    targets = tl.load(column_ptr + rows).to(tl.int32)
    target_raw = tl.load(target_raw_ptr + rows)
    target_logit = _logit(target_raw, soft_cap, scale, HAS_CAP, HAS_SCALE, ROUND_TO)
    if not DESCRIPTORS:
        h_ptrs = hidden + rows[:, None] * stride_hn
        d = tl.arange(0, BLOCK_D).to(tl.int64)

    top = tl.full([BLOCK_N, LANES], LOWEST, dtype=tl.float32)
    rest = tl.zeros([BLOCK_N, LANES], dtype=tl.float32)
    weighted = tl.zeros([BLOCK_N, LANES], dtype=tl.float32)
    num_greater = tl.zeros([BLOCK_N, LANES], dtype=tl.float32)

    num_tiles = tl.cdiv(num_columns, BLOCK_V)
    tl.assume(depth > 0)
    for tile in range(split * num_tiles // num_splits, (split + 1) * num_tiles // num_splits):
        first = tile * BLOCK_V
        has_target = (targets >= first) & (targets < first + BLOCK_V)
        is_masked = tl.max(has_target.to(tl.int32), axis=0) > 0
        is_masked |= first + BLOCK_V > num_columns
        if not DESCRIPTORS:
            columns = tl.minimum(first + tl.arange(0, BLOCK_V), num_columns - 1).to(tl.int64)
            w_ptrs = weight + columns[:, None] * stride_wv
        raw = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)
        for k in range(0, depth, BLOCK_D):
            if DESCRIPTORS:  # which give zeros beyond the last row and the depth
                h = hidden.load([first_row, k])
                w = weight.load([first, k])
            elif EVEN_D:
                h = tl.load(h_ptrs + (k + d)[None, :] * stride_hd)
                w = tl.load(w_ptrs + (k + d)[None, :] * stride_wd)
            else:
                mask = (k + d)[None, :] < depth
                h = tl.load(h_ptrs + (k + d)[None, :] * stride_hd, mask, 0.0)
                w = tl.load(w_ptrs + (k + d)[None, :] * stride_wd, mask, 0.0)
            raw = tl.dot(h, tl.trans(w), raw, input_precision="ieee")
        # The branch is the same for all threads, and about one tile in ten has a target in it.
        if is_masked:
            top, rest, weighted, num_greater = _add_tile(
                raw,
                first,
                num_columns,
                targets,
                target_raw,
                target_logit,
                bias_ptr,
                top,
                rest,
                weighted,
                num_greater,
                soft_cap,
                scale,
                HAS_BIAS,
                HAS_CAP,
                HAS_SCALE,
                ROUND_TO,
                ENTROPY,
                True,
                BLOCK_N,
                BLOCK_V,
                LANES,
                RUN,
                PARTS,
            )
        else:
            top, rest, weighted, num_greater = _add_tile(
                raw,
                first,
                num_columns,
                targets,
                target_raw,
                target_logit,
                bias_ptr,
                top,
                rest,
                weighted,
                num_greater,
                soft_cap,
                scale,
                HAS_BIAS,
                HAS_CAP,
                HAS_SCALE,
                ROUND_TO,
                ENTROPY,
                False,
                BLOCK_N,
                BLOCK_V,
                LANES,
                RUN,
                PARTS,
            )

    anchor, rest, weighted = tl.reduce((top, rest, weighted), 1, _merge_lanes)
    # A largest logit of NaN or +inf leaves no softmax. No logit at all is no 1 to leave out.
    rest = tl.where(anchor < float("inf"), rest, float("nan"))
    is_empty = anchor == LOWEST
    rest = tl.where(is_empty, -1.0, rest)
    weighted = tl.where(is_empty, 0.0, weighted)
    anchor = tl.where(is_empty, float("-inf"), anchor)
    out = split.to(tl.int64) * num_tokens + rows
    tl.store(anchor_ptr + out, anchor, mask=in_range)
    tl.store(rest_ptr + out, rest, mask=in_range)
    tl.store(weighted_ptr + out, weighted * LN_2, mask=in_range)
    tl.store(num_greater_ptr + out, tl.sum(num_greater, axis=1).to(tl.int32), mask=in_range)


def vocab_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    columns: torch.Tensor,
    target_raw: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    transform: LogitTransform,
    entropy: bool,
    tiles: tuning.Tiles | None = None,
) -> VocabStats:
    """Statistics of every token over the V columns of `weight`, its own target left out.

    Arguments as for `tiled.vocab_stats`, on one GPU. `tiles` are chosen for the call where None.
    Besides the result it allocates 16 bytes per token and part of the vocabulary.
    """
    num_tokens, depth = hidden.shape
    num_columns = weight.shape[0]
    if tiles is None:
        tiles = choose_tiles(hidden, weight, transform)
    gpu = _gpu(hidden.device)
    num_row_blocks = max(1, triton.cdiv(num_tokens, tiles.rows))
    group_blocks = tuning.choose_group_blocks(
        num_row_blocks, tiles.rows * depth * hidden.element_size(), gpu.l2_bytes
    )
    num_splits = tuning.choose_num_splits(
        num_row_blocks,
        triton.cdiv(num_columns, tiles.columns),
        gpu.num_multiprocessors * tiles.programs_per_multiprocessor,
        group_blocks,
    )
    floats = torch.empty(3, num_splits, num_tokens, dtype=torch.float32, device=hidden.device)
    counts = torch.empty_like(floats[0], dtype=torch.int32)
    parts = VocabStats(floats[0], floats[1], floats[2], counts)
    if num_tokens > 0:
        operands: tuple[object, object] = hidden, weight
        strides = (*hidden.stride(), *weight.stride())
        if tiles.design == "descriptor":
            operands = (
                TensorDescriptor.from_tensor(hidden, [tiles.rows, tiles.depth]),
                TensorDescriptor.from_tensor(weight, [tiles.columns, tiles.depth]),
            )
            strides = (0, 0, 0, 0)
        _vocab_stats_kernel[(num_row_blocks * num_splits,)](
            *operands,
            columns.contiguous(),
            target_raw,
            None if bias is None else bias.contiguous(),
            *parts,
            num_tokens,
            num_columns,
            depth,
            num_splits,
            group_blocks,
            *strides,
            transform.soft_cap or 1.0,
            transform.scale,
            **constants(gpu.capability, tiles, bias is not None, transform, entropy, depth),
            **compiler_options(tiles),
        )
    return merge_stacked(parts)


def choose_tiles(
    hidden: torch.Tensor, weight: torch.Tensor, transform: LogitTransform
) -> tuning.Tiles:
    """What was measured on this card for such a call, or else what the rules say."""
    gpu = _gpu(hidden.device)
    call = tuning.Call(
        gpu.capability,
        hidden.element_size(),
        num_tokens=hidden.shape[0],
        depth=hidden.shape[1],
        has_soft_cap=transform.soft_cap is not None,
        can_describe=can_describe(hidden) and can_describe(weight),
    )
    return tuned_tiles.find_tiles(gpu.name, call) or tuning.choose_rule(call).tiles


def can_describe(matrix: torch.Tensor) -> bool:
    """Whether a tensor descriptor takes it: rows of neighbours, whole 16 bytes apart."""
    row_stride, stride = matrix.stride()
    return (
        stride == 1
        and row_stride >= matrix.shape[1]
        and row_stride * matrix.element_size() % 16 == 0
        and matrix.data_ptr() % 16 == 0
    )


def constants(
    capability: int,
    tiles: tuning.Tiles,
    has_bias: bool,
    transform: LogitTransform,
    entropy: bool,
    depth: int,
) -> dict[str, object]:
    """What `_vocab_stats_kernel` is compiled for."""
    lanes = tuning.choose_lanes(capability, tiles)
    has_cap = transform.soft_cap is not None
    return {
        "DESCRIPTORS": tiles.design == "descriptor",
        "HAS_BIAS": has_bias,
        "HAS_CAP": has_cap,
        "HAS_SCALE": transform.scale != 1.0,
        "ROUND_TO": _TRITON_DTYPES[transform.round_to],
        "ENTROPY": entropy,
        "EVEN_D": depth % tiles.depth == 0,
        "LANES": lanes.count,
        "RUN": lanes.run,
        "PARTS": PARTS_UNDER_CAP if has_cap else 1,
        "BLOCK_N": tiles.rows,
        "BLOCK_V": tiles.columns,
        "BLOCK_D": tiles.depth,
    }


def compiler_options(tiles: tuning.Tiles) -> dict[str, Any]:
    """How `_vocab_stats_kernel` is compiled."""
    return {
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
        "enable_fp_fusion": True,
    }


_TRITON_DTYPES = {None: None, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def is_interpreted() -> bool:
    """Whether TRITON_INTERPRET was set when Triton was imported: kernels then run on the CPU."""
    return not isinstance(_vocab_stats_kernel, triton.JITFunction)


@dataclass(frozen=True)
class _Gpu:
    """What the pass wants to know of a device."""

    name: str
    capability: int
    num_multiprocessors: int
    l2_bytes: int


@functools.cache
def _gpu(device: torch.device) -> _Gpu:
    if device.type != "cuda":
        return _Gpu("interpreter", 0, 1, 1 << 20)
    found = torch.cuda.get_device_properties(device)
    return _Gpu(
        found.name,
        found.major * 10 + found.minor,
        found.multi_processor_count,
        found.L2_cache_size,
    )
