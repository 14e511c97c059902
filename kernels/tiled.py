"""One pass over vocabulary tiles in torch, for machines without a GPU.

A tile of logits lives in a buffer that stays in the cache: GEMM into it, reduce it in place, next.
Each thread does whole tiles by itself. A tile's numbers do not depend on the thread that makes
them, and tiles are merged in their order: the same bits come out whatever the number of threads
and however fast each of them is.

Knows nothing of devices beyond whether the CPU gains by bf16 GEMMs, and compiles nothing:
the in-place passes below cost what a `torch.compile`d epilogue costs, without its 5 to 20 s start.

N is tokens, V the columns at hand, D the hidden size.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from rsr.kernels.cores import share_out
from rsr.kernels.logits import LogitTransform
from rsr.kernels.stats import VocabStats, merge_stacked

# A thread works on 512 × 1,024 logits at a time: 2 MiB in fp32, as much again for a second buffer,
# and at most 4 MiB of weights. Together with what all threads share and torch's temporaries two
# threads stay below 64 MiB whatever the shape.
TILE_ROWS = 512
MAX_TILE_COLUMNS = 1024
WEIGHT_BUFFER_BYTES = 4 << 20
MAX_BLOCK_ROWS = 2048
HIDDEN_BUFFER_BYTES = 16 << 20
# A thread takes one tile of the head against all rows of a block, so as to copy the weights once.
# Towards the end pieces are smaller, so that all threads finish at about the same time.
SMALL_PIECES_PER_THREAD = 8

# Below this, Σ exp has lost digits of what it exceeds 1 by; rows there are summed in fp64.
DOMINATED_SUM = 1.02

# Three bf16 numbers hold the 24 significant bits of any fp32 number.
NUM_BF16_PARTS = 3
# AMX multiplies bf16 in steps of 32 along D; a ragged D takes a slower path.
NATIVE_DEPTH_STEP = 32


def target_raw(
    hidden: torch.Tensor, weight: torch.Tensor, columns: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """h·w + b of one column per row, (N,) float32; 0 where `columns` (N,) is outside [0, V)."""
    num_columns, depth = weight.shape
    raw = torch.zeros(len(columns), dtype=torch.float32, device=hidden.device)
    for rows in _slices(len(columns), max(1, HIDDEN_BUFFER_BYTES // (16 * depth))):
        owned = (columns[rows] >= 0) & (columns[rows] < num_columns)
        safe = columns[rows].clamp(0, num_columns - 1)
        dots = torch.linalg.vecdot(hidden[rows].float(), weight[safe].float())
        if bias is not None:
            dots += bias[safe].float()
        raw[rows] = torch.where(owned, dots, 0.0)
    return raw


def vocab_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    columns: torch.Tensor,
    target_raw: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    transform: LogitTransform,
    entropy: bool,
    native_bf16: bool | None = None,
) -> VocabStats:
    """Statistics of every token over the V columns of `weight`, its own target left out.

    Args:
        hidden: (N, D) float32, float16 or bfloat16.
        weight: (V, D), same dtype.
        columns: (N,) int64, the target's column here; outside [0, V) where another shard has it.
        target_raw: (N,) float32, the target's h·w + b.
        bias: (V,) or None.
        transform: from h·w + b to the logit.
        entropy: fill `VocabStats.weighted`.
        native_bf16: whether bf16 operands go through bf16 GEMMs; None asks the CPU.
    """
    if native_bf16 is None:
        native_bf16 = hidden.device.type == "cpu" and cpu_gains_by_bf16()
    block_rows = HIDDEN_BUFFER_BYTES // (4 * weight.shape[1]) // TILE_ROWS * TILE_ROWS
    blocks = []
    for rows in _slices(hidden.shape[0], min(MAX_BLOCK_ROWS, max(TILE_ROWS, block_rows))):
        own = hidden[rows], weight, columns[rows], target_raw[rows], bias, transform, native_bf16
        blocks.append(_block_stats(*own, entropy=entropy))
    if not blocks:
        none = target_raw.new_empty(0)
        return VocabStats(none, none, none, none.to(torch.int32))
    return VocabStats(*(torch.cat(field) for field in zip(*blocks, strict=True)))


@functools.cache
def cpu_gains_by_bf16() -> bool:
    """Whether a bf16 GEMM is faster on this CPU than the fp32 GEMM of the same shape.

    AMX and SVE are made for it; that they and AMD's AVX-512 gain is taken from their descriptions,
    not measured. Intel's AVX-512 was: a bf16 GEMM takes 1.1 to 1.4 times as long, as operands have
    to be interleaved first. A CPU without any of these emulates it, in three to four times as long.
    """
    capabilities = torch.cpu.get_capabilities()
    if capabilities.get("amx_bf16") or capabilities.get("sve_bf16"):
        return True
    is_intel = str(capabilities.get("cpu_name", "")).startswith("Intel")
    return bool(capabilities.get("avx512_bf16")) and not is_intel


class _Fp32Product:
    """h·w + b of tiles through fp32 GEMMs; weights of another dtype are widened tile by tile.

    fp16 and bf16 fit in fp32, so this is the very product that fp32 accumulation means.
    """

    shift = None

    def __init__(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        self.weight, self.bias = weight, bias
        self.hidden = hidden.float()
        self.tile_columns = _tile_columns(weight, bytes_per_element=4)

    def for_thread(self) -> "_Fp32Tiles":
        """Buffers of a thread's own; the operands are everybody's."""
        return _Fp32Tiles(self)


class _Fp32Tiles:
    """One thread's tiles of an `_Fp32Product`."""

    def __init__(self, product: _Fp32Product) -> None:
        self._product = product
        if product.weight.dtype != torch.float32:
            self._buffer = product.hidden.new_empty(product.tile_columns, product.weight.shape[1])

    def load(self, columns: slice) -> None:
        """Take the tile of the head that `multiply` will use."""
        weight, bias = self._product.weight, self._product.bias
        tile = weight[columns]
        if tile.dtype != torch.float32:
            tile = self._buffer[: tile.shape[0]].copy_(tile)
        self._tile = tile
        self._tile_bias = None if bias is None else bias[columns].float()

    def multiply(self, rows: slice, out: torch.Tensor) -> None:
        """Write `rows` × tile to `out`, float32."""
        torch.mm(self._product.hidden[rows], self._tile.T, out=out)
        if self._tile_bias is not None:
            out += self._tile_bias


class _Bf16Product:
    """h·w + b of tiles through bf16 GEMMs, for CPUs that gain by them.

    Such a GEMM accumulates in fp32 but hands out bf16. With `shift`, (rows,) float32, it computes
    h·w + b − shift: three more columns of the hidden states hold −shift, against ones in the
    weights. With the target's logit for a shift, no rounding on the way out can change which side
    of the target a column is on, and the closer a logit is to the target's, the finer it is kept.
    Without, the rounded product is what `logits_dtype="model"` asks for.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        shift: torch.Tensor | None,
    ) -> None:
        self.weight, self.bias, self.shift = weight, bias, shift
        depth = weight.shape[1]
        end_of_shift = depth + (0 if shift is None else NUM_BF16_PARTS)
        end_of_bias = end_of_shift + (0 if bias is None else NUM_BF16_PARTS)
        padded = -(-end_of_bias // NATIVE_DEPTH_STEP) * NATIVE_DEPTH_STEP
        self.shift_at = slice(depth, end_of_shift)
        self.bias_at = slice(end_of_shift, end_of_bias)

        self.tile_columns = _tile_columns(weight, bytes_per_element=2)
        self.hidden = hidden.new_zeros(hidden.shape[0], padded)
        self.hidden[:, :depth] = hidden
        self.hidden[:, self.bias_at] = 1
        if shift is not None:
            self.hidden[:, self.shift_at] = _bf16_parts(-shift)

    def for_thread(self) -> "_Bf16Tiles":
        """Buffers of a thread's own; the operands are everybody's."""
        return _Bf16Tiles(self)


class _Bf16Tiles:
    """One thread's tiles of a `_Bf16Product`."""

    def __init__(self, product: _Bf16Product) -> None:
        self._product = product
        weight, columns = product.weight, product.tile_columns
        self._buffer = weight.new_zeros(columns, product.hidden.shape[1])
        self._buffer[:, product.shift_at] = 1
        self._rounded = weight.new_empty(TILE_ROWS * columns)

    def load(self, columns: slice) -> None:
        """Take the tile of the head that `multiply` will use."""
        product = self._product
        tile = product.weight[columns]
        self._tile = self._buffer[: tile.shape[0]]
        self._tile[:, : tile.shape[1]] = tile
        if product.bias is not None:
            self._tile[:, product.bias_at] = _bf16_parts(product.bias[columns].float())

    def multiply(self, rows: slice, out: torch.Tensor) -> None:
        """Write `rows` × tile to `out`, float32."""
        rounded = self._rounded[: out.numel()].view_as(out)
        torch.mm(self._product.hidden[rows], self._tile.T, out=rounded)
        out.copy_(rounded)


_Product = _Fp32Product | _Bf16Product


def _block_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    columns: torch.Tensor,
    target_raw: torch.Tensor,
    bias: torch.Tensor | None,
    transform: LogitTransform,
    native_bf16: bool,
    entropy: bool,
) -> VocabStats:
    """`vocab_stats` of one block of rows."""

    def stats_of(rows: slice | torch.Tensor, around_max: bool) -> VocabStats:
        own = hidden[rows], weight, columns[rows], target_raw[rows], bias, transform, native_bf16
        return _block(*own).stats(around_max)

    stats = stats_of(slice(None), around_max=entropy)
    if not entropy:
        # Around the target's logit, sums overflow where a rival is 88 nats above it and vanish
        # where all are 100 below. A target that is not finite gains nothing from better sums.
        again = ~stats.anchor.isfinite() & transform(target_raw).isfinite()
        rows = again.nonzero().squeeze(1)
        if len(rows):
            for field, better in zip(stats, stats_of(rows, around_max=True), strict=True):
                field[rows] = better
    return stats


def _block(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    columns: torch.Tensor,
    target_raw: torch.Tensor,
    bias: torch.Tensor | None,
    transform: LogitTransform,
    native_bf16: bool,
) -> "_Block":
    product: _Product
    if native_bf16 and weight.dtype == torch.bfloat16:
        if transform.round_to is None:
            shift = torch.where(target_raw.isfinite(), target_raw, 0.0)
            product = _Bf16Product(hidden, weight, bias, shift)
            return _Block(product, columns, target_raw, transform)
        if transform.only_rounds:
            product = _Bf16Product(hidden, weight, bias, shift=None)
            return _Block(product, columns, transform(target_raw), LogitTransform())
    # Rounding after a cap or a scale is fp32's too: a bf16 GEMM would round before them as well.
    product = _Fp32Product(hidden, weight, bias)
    return _Block(product, columns, target_raw, transform)


class _Piece(NamedTuple):
    """What one thread does in one go: a tile of the head against some slices of a block's rows."""

    tile_index: int
    columns: slice
    rows: list[slice]


class _Block:
    """One block of rows against all vocabulary tiles.

    A tile arrives as h·w + b − shift. Its logits are worked on relative to `base`, which is the
    shift as well, unless the transform has to see them whole.
    """

    def __init__(
        self,
        product: _Product,
        columns: torch.Tensor,
        target_raw: torch.Tensor,
        transform: LogitTransform,
    ) -> None:
        self.product, self.columns, self.transform = product, columns, transform
        zeros = torch.zeros_like(target_raw)
        shift = zeros if product.shift is None else product.shift
        self.base = shift if transform.is_identity else zeros
        self.target_raw = target_raw - shift
        self.target_logit = transform(target_raw) - self.base
        # A tile that is relative to the target's logit already needs no second subtraction.
        self.sum_anchor = None if self.base is product.shift else self.target_logit

    def stats(self, around_max: bool) -> VocabStats:
        """Merged over all tiles.

        `around_max` finds each tile's largest logit first, which the entropy needs.
        """
        tiles = list(_slices(self.product.weight.shape[0], self.product.tile_columns))
        floats = self.target_raw.new_empty(3, len(tiles), len(self.columns))
        parts = VocabStats(
            floats[0], floats[1], floats[2], torch.empty_like(floats[0], dtype=torch.int32)
        )
        share_out(self._pieces(tiles), lambda: _Tiles(self, parts, around_max))
        return merge_stacked(parts)

    def _pieces(self, tiles: list[slice]) -> Iterator[_Piece]:
        """Every tile of the head against every slice of rows."""
        rows = list(_slices(len(self.columns), TILE_ROWS))
        num_small = -(-SMALL_PIECES_PER_THREAD * torch.get_num_threads() // len(rows))
        for i, tile in enumerate(tiles):
            if i < len(tiles) - num_small:
                yield _Piece(i, tile, rows)
            else:
                yield from (_Piece(i, tile, [part]) for part in rows)


class _Tiles:
    """One thread's part of a block: does what pieces it is called with, in buffers of its own."""

    def __init__(self, block: _Block, parts: VocabStats, around_max: bool) -> None:
        self._block, self._parts, self._around_max = block, parts, around_max
        self._product = block.product.for_thread()
        num_rows = min(TILE_ROWS, len(block.columns))
        size = num_rows * block.product.tile_columns
        self._logits, self._scratch = block.target_raw.new_empty(2, size)
        self._loaded: slice | None = None

    def __call__(self, piece: _Piece) -> None:
        """Write the piece's statistics to `parts`, relative to nothing."""
        block = self._block
        if piece.columns != self._loaded:
            self._product.load(piece.columns)
            self._loaded = piece.columns
        for rows in piece.rows:
            logits, scratch, num_greater = self._rank(piece.columns, rows)
            if self._around_max:
                anchor, rest, weighted = _sums_around_max(logits, scratch)
            else:
                around = None if block.sum_anchor is None else block.sum_anchor[rows]
                anchor, rest, weighted = _sums_around(around, logits, scratch)
            found = VocabStats(anchor + block.base[rows], rest, weighted, num_greater)
            for field, value in zip(self._parts, found, strict=True):
                field[piece.tile_index, rows] = value

    def _rank(self, columns: slice, rows: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The tile's logits less `base`, scratch space of the same shape, and greater counts."""
        block, transform = self._block, self._block.transform
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        logits = self._logits[: shape[0] * shape[1]].view(shape)
        scratch = self._scratch[: logits.numel()].view(shape)
        self._product.multiply(rows, logits)
        # The target's own column: in a tile it can differ from `target_raw` in the last bit.
        own = block.columns[rows] - columns.start
        own_row = ((own >= 0) & (own < shape[1])).nonzero().squeeze(1)
        own = own[own_row]
        logits[own_row, own] = -torch.inf
        if transform.round_to is None:
            num_greater = _count_greater(logits, block.target_raw[rows], scratch)
        if not transform.is_identity:
            if block.product.shift is not None:
                logits += block.product.shift[rows, None]
            logits = transform(logits)
            logits[own_row, own] = -torch.inf  # a cap has lifted it
        if transform.round_to is not None:
            num_greater = _count_greater(logits, block.target_logit[rows], scratch)
        return logits, scratch, num_greater


def _count_greater(logits: torch.Tensor, than: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    # Flags as fp32 take torch's vectorised paths, booleans do not: 29 ms for 10⁸ logits, not 140.
    return torch.gt(logits, than[:, None], out=scratch).sum(dim=1).to(torch.int32)


def _sums_around(
    around: torch.Tensor | None, logits: torch.Tensor, scratch: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(anchor, rest, weighted) of `VocabStats` without the entropy's part; overwrites `logits`."""
    if around is not None:
        logits.sub_(around[:, None])
    log_sum = torch.exp(logits, out=scratch).sum(dim=1).log()
    zeros = torch.zeros_like(log_sum)
    return log_sum if around is None else around + log_sum, zeros, zeros


def _sums_around_max(
    logits: torch.Tensor, scratch: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(anchor, rest, weighted) of `VocabStats`; overwrites `logits`."""
    anchor = logits.amax(dim=1)
    finite_anchor = torch.where(anchor == -torch.inf, 0.0, anchor)
    # exp(−1e4) is 0 as exp(−inf) is, and unlike −inf gives 0 when multiplied by it.
    gaps = logits.sub_(finite_anchor[:, None]).clamp_(min=-1e4)
    exps = torch.exp(gaps, out=scratch)
    sums = exps.sum(dim=1)
    rest = sums - 1
    dominated = (sums < DOMINATED_SUM).nonzero().squeeze(1)
    rest[dominated] = (exps[dominated].sum(dim=1, dtype=torch.float64) - 1).float()
    return anchor, rest, gaps.mul_(exps).sum(dim=1)


def _bf16_parts(values: torch.Tensor) -> torch.Tensor:
    """(n,) float32 to (n, 3) bfloat16 that sum to it exactly; an infinity is its own first part."""
    parts = []
    remainder = values
    for _ in range(NUM_BF16_PARTS):
        part = remainder.to(torch.bfloat16)
        parts.append(part)
        remainder = torch.where(part.isfinite(), remainder - part.float(), 0.0)
    return torch.stack(parts, dim=1)


def _tile_columns(weight: torch.Tensor, bytes_per_element: int) -> int:
    """Columns per tile, such that a tile's copy of the weights stays within its buffer."""
    num_columns, depth = weight.shape
    fit = WEIGHT_BUFFER_BYTES // (bytes_per_element * depth) // 64 * 64
    return min(num_columns, MAX_TILE_COLUMNS, max(64, fit))


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
