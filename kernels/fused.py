"""One pass over vocabulary tiles in Triton: the GEMM, and all that is wanted of it, in registers.

Device helpers, then each kernel under which its launcher stands. Knows the same contract as
`tiled.py`, whose functions have the same names, and takes its tile sizes from `tuning.py`.
N is tokens, V the columns at hand, D the hidden size, K the parts the vocabulary is cut into.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code has no Python types; launchers do.

import torch
import triton
import triton.language as tl

from rsr.kernels import tuning
from rsr.kernels.logits import LogitTransform
from rsr.kernels.stats import VocabStats, merge_stacked

TARGET_ROWS = 4
TARGET_DEPTH = 512

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Where a maximum begins. Minus infinity would make NaN out of the difference of two of them; no
# logit that counts is below it.
LOWEST = tl.constexpr(-1e38)
# Below this, Σ exp has lost digits of what it exceeds 1 by.
DOMINATED_SUM = tl.constexpr(1.02)


@triton.jit
def _logit(
    raw, soft_cap, scale, HAS_CAP: tl.constexpr, HAS_SCALE: tl.constexpr, ROUND_TO: tl.constexpr
):
    """`LogitTransform`, on fp32 values."""
    logit = raw
    if HAS_CAP:
        # tanh(x) = 1 − 2 / (1 + exp(2x)), whose exponential may overflow to the right answer.
        logit = soft_cap - 2.0 * soft_cap / (1.0 + tl.exp(2.0 * raw / soft_cap))
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
def _add_part(
    raw,
    columns,
    end,
    targets,
    target_raw,
    target_logit,
    bias_ptr,
    anchor,
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
):
    """The statistics with some more columns of h·w in them; `weighted` is in bits here.

    An online softmax in base 2, as one FMA and one exponential make a term of it. Where `MASKED`,
    columns from `end` on and the target's count for nothing: computed twice, a target can differ in
    the last bit and outrank itself.

    A NaN logit, and the one that +inf − +inf makes, survive in the sum of exponentials.
    """
    if HAS_BIAS:
        raw += tl.load(bias_ptr + columns, columns < end, 0.0).to(tl.float32)[None, :]
    if MASKED:
        counts = (columns < end)[None, :] & (columns[None, :] != targets[:, None])
        raw = tl.where(counts, raw, float("-inf"))
    logits = _logit(raw, soft_cap, scale, HAS_CAP, HAS_SCALE, ROUND_TO)
    if MASKED and HAS_CAP:
        logits = tl.where(counts, logits, float("-inf"))  # a cap has lifted it
    # Flags summed as fp32 take one instruction less each than as integers.
    if ROUND_TO is None:
        num_greater += tl.sum((raw > target_raw[:, None]).to(tl.float32), axis=1)
    else:
        num_greater += tl.sum((logits > target_logit[:, None]).to(tl.float32), axis=1)

    new_anchor = tl.maximum(anchor, tl.max(logits, axis=1))
    is_new = new_anchor > anchor
    anchor_bits = new_anchor * LOG2_E
    bits = logits * LOG2_E - anchor_bits[:, None]
    exps = tl.exp2(bits)
    sums = tl.sum(exps, axis=1)
    if ENTROPY:
        # −1e4 is 0 when multiplied by its exponential, and −inf would be NaN.
        terms = tl.sum(tl.maximum(bits, -1e4) * exps, axis=1)
    without_top = sums - 1.0
    # Where a new largest logit is nearly alone, the others have to be summed without its 1. That
    # is so for a few parts in a hundred, and the branch is the same for all threads.
    is_dominated = is_new & (sums < DOMINATED_SUM)
    if tl.max(is_dominated.to(tl.int32), axis=0) > 0:
        others = tl.where(logits < new_anchor[:, None], exps, 0.0)
        without_top = tl.where(is_dominated, tl.sum(others, axis=1), without_top)
        if ENTROPY:
            other_terms = tl.sum(tl.maximum(bits, -1e4) * others, axis=1)
            terms = tl.where(is_dominated, other_terms, terms)

    gap_bits = (anchor - new_anchor) * LOG2_E
    kept = (1.0 + rest) * tl.exp2(gap_bits)
    if ENTROPY:
        weighted = weighted * tl.exp2(gap_bits) + gap_bits * kept + terms
    rest = tl.where(is_new, kept + without_top, rest + sums)
    return new_anchor, rest, weighted, num_greater


@triton.jit
def _add_tile(
    raw,
    first,
    end,
    targets,
    target_raw,
    target_logit,
    bias_ptr,
    anchor,
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
    PARTS: tl.constexpr,
):
    """`_add_part` for a tile in `PARTS` parts, one after the other.

    A tile and what is made of it need not fit in registers together then.
    """
    if PARTS == 1:
        anchor, rest, weighted, num_greater = _add_part(
            raw,
            first + tl.arange(0, BLOCK_V),
            end,
            targets,
            target_raw,
            target_logit,
            bias_ptr,
            anchor,
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
            MASKED,
        )
    else:
        halves = tl.permute(tl.reshape(raw, [BLOCK_N, 2, BLOCK_V // 2]), [0, 2, 1])
        left, right = tl.split(halves)
        for half in tl.static_range(2):
            anchor, rest, weighted, num_greater = _add_tile(
                left if half == 0 else right,
                first + half * (BLOCK_V // 2),
                end,
                targets,
                target_raw,
                target_logit,
                bias_ptr,
                anchor,
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
                MASKED,
                BLOCK_N,
                BLOCK_V // 2,
                PARTS // 2,
            )
    return anchor, rest, weighted, num_greater


# A new batch size is not a new kernel.
@triton.jit(do_not_specialize=["num_tokens", "num_splits", "columns_per_split"])
def _vocab_stats_kernel(
    hidden_ptr,
    weight_ptr,
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
    columns_per_split,
    stride_hn,
    stride_hd,
    stride_wv,
    stride_wd,
    soft_cap,
    scale,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ROUND_TO: tl.constexpr,
    ENTROPY: tl.constexpr,
    EVEN_D: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    """Statistics of BLOCK_N rows over one part of the vocabulary, kept in registers throughout."""
    num_row_blocks = tl.cdiv(num_tokens, BLOCK_N)
    programs_per_group = GROUP_N * num_splits
    first_block = tl.program_id(0) // programs_per_group * GROUP_N
    blocks_in_group = tl.minimum(num_row_blocks - first_block, GROUP_N)
    within_group = tl.program_id(0) % programs_per_group
    split = within_group // blocks_in_group
    row_block = first_block + within_group % blocks_in_group

    rows = row_block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_range = rows < num_tokens
    rows = tl.minimum(rows, num_tokens - 1)  # loads need no mask then; only the store does
    targets = tl.load(column_ptr + rows).to(tl.int32)
    target_raw = tl.load(target_raw_ptr + rows)
    target_logit = _logit(target_raw, soft_cap, scale, HAS_CAP, HAS_SCALE, ROUND_TO)
    h_ptrs = hidden_ptr + rows[:, None] * stride_hn
    d = tl.arange(0, BLOCK_D).to(tl.int64)

    anchor = tl.full([BLOCK_N], LOWEST, dtype=tl.float32)
    rest = tl.full([BLOCK_N], -1.0, dtype=tl.float32)
    weighted = tl.zeros([BLOCK_N], dtype=tl.float32)
    num_greater = tl.zeros([BLOCK_N], dtype=tl.float32)

    begin = split * columns_per_split
    end = tl.minimum(begin + columns_per_split, num_columns)
    for first in range(begin, end, BLOCK_V):
        columns = first + tl.arange(0, BLOCK_V)
        safe_columns = tl.minimum(columns, num_columns - 1).to(tl.int64)
        w_ptrs = weight_ptr + safe_columns[:, None] * stride_wv
        raw = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)
        for k in range(0, depth, BLOCK_D):
            if EVEN_D:
                h = tl.load(h_ptrs + (k + d)[None, :] * stride_hd)
                w = tl.load(w_ptrs + (k + d)[None, :] * stride_wd)
            else:
                mask = (k + d)[None, :] < depth
                h = tl.load(h_ptrs + (k + d)[None, :] * stride_hd, mask, 0.0)
                w = tl.load(w_ptrs + (k + d)[None, :] * stride_wd, mask, 0.0)
            raw = tl.dot(h, tl.trans(w), raw, input_precision="ieee")
        # The branch is the same for all threads, and about one tile in ten has a target in it.
        has_target = (targets >= first) & (targets < first + BLOCK_V)
        if (tl.max(has_target.to(tl.int32), axis=0) > 0) | (first + BLOCK_V > end):
            anchor, rest, weighted, num_greater = _add_tile(
                raw,
                first,
                end,
                targets,
                target_raw,
                target_logit,
                bias_ptr,
                anchor,
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
                PARTS,
            )
        else:
            anchor, rest, weighted, num_greater = _add_tile(
                raw,
                first,
                end,
                targets,
                target_raw,
                target_logit,
                bias_ptr,
                anchor,
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
                PARTS,
            )

    anchor = tl.where(anchor == LOWEST, float("-inf"), anchor)
    out = split.to(tl.int64) * num_tokens + rows
    tl.store(anchor_ptr + out, anchor, mask=in_range)
    tl.store(rest_ptr + out, rest, mask=in_range)
    tl.store(weighted_ptr + out, weighted * LN_2, mask=in_range)
    tl.store(num_greater_ptr + out, num_greater.to(tl.int32), mask=in_range)


def vocab_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    columns: torch.Tensor,
    target_raw: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    transform: LogitTransform,
    entropy: bool,
) -> VocabStats:
    """Statistics of every token over the V columns of `weight`, its own target left out.

    Arguments as for `tiled.vocab_stats`, on one GPU. Besides the result it allocates 16 bytes per
    token and part of the vocabulary.
    """
    num_tokens, depth = hidden.shape
    num_columns = weight.shape[0]
    tiles = tuning.choose_rule(
        _capability(hidden.device),
        hidden.element_size(),
        num_tokens,
    ).tiles
    num_row_blocks = max(1, triton.cdiv(num_tokens, tiles.rows))
    num_tiles = triton.cdiv(num_columns, tiles.columns)
    num_splits = tuning.choose_num_splits(
        num_row_blocks, num_tiles, _num_multiprocessors(hidden.device)
    )
    floats = torch.empty(3, num_splits, num_tokens, dtype=torch.float32, device=hidden.device)
    counts = torch.empty_like(floats[0], dtype=torch.int32)
    parts = VocabStats(floats[0], floats[1], floats[2], counts)
    if num_tokens > 0:
        _vocab_stats_kernel[(num_row_blocks * num_splits,)](
            hidden,
            weight,
            columns.contiguous(),
            target_raw,
            None if bias is None else bias.contiguous(),
            *parts,
            num_tokens,
            num_columns,
            depth,
            num_splits,
            triton.cdiv(num_tiles, num_splits) * tiles.columns,
            *hidden.stride(),
            *weight.stride(),
            transform.soft_cap or 1.0,
            transform.scale,
            **constants(tiles, bias is not None, transform, entropy, depth),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            enable_fp_fusion=True,
        )
    return merge_stacked(parts)


def constants(
    tiles: tuning.Tiles, has_bias: bool, transform: LogitTransform, entropy: bool, depth: int
) -> dict[str, object]:
    """What `_vocab_stats_kernel` is compiled for."""
    return {
        "HAS_BIAS": has_bias,
        "HAS_CAP": transform.soft_cap is not None,
        "HAS_SCALE": transform.scale != 1.0,
        "ROUND_TO": _TRITON_DTYPES[transform.round_to],
        "ENTROPY": entropy,
        "EVEN_D": depth % tiles.depth == 0,
        "PARTS": tiles.parts,
        "BLOCK_N": tiles.rows,
        "BLOCK_V": tiles.columns,
        "BLOCK_D": tiles.depth,
        "GROUP_N": tuning.GROUP_ROW_BLOCKS,
    }


_TRITON_DTYPES = {None: None, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def is_interpreted() -> bool:
    """Whether TRITON_INTERPRET was set when Triton was imported: kernels then run on the CPU."""
    return not isinstance(_vocab_stats_kernel, triton.JITFunction)


def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def _num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
