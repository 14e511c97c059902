"""One pass over vocabulary tiles in torch, for machines without a GPU.

A tile of logits lives in a buffer that stays in the cache: GEMM into it, reduce it in place, next.
Knows nothing of devices beyond whether the CPU multiplies bf16 natively, and compiles nothing:
the in-place passes below cost what a `torch.compile`d epilogue costs, without its 5 to 20 s start.

N is tokens, V the columns at hand, D the hidden size.
"""

import functools
from collections.abc import Iterator

import torch

from rsr.kernels.logits import LogitTransform
from rsr.kernels.stats import VocabStats, merge_stacked

# 512 × 2,048 logits in fp32 are 4 MiB: with two threads, the fastest of ten sizes tried, level
# with one GEMM over the whole vocabulary. The other buffers are bounded so that all of them,
# with torch's temporaries, stay below 64 MiB whatever the shape.
TILE_ROWS = 512
MAX_TILE_COLUMNS = 2048
MAX_BLOCK_ROWS = 2048
OPERAND_BUFFER_BYTES = 16 << 20

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
    for rows in _slices(len(columns), max(1, OPERAND_BUFFER_BYTES // (16 * depth))):
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
        native_bf16 = hidden.device.type == "cpu" and cpu_multiplies_bf16()
    block_rows = OPERAND_BUFFER_BYTES // (4 * weight.shape[1]) // TILE_ROWS * TILE_ROWS
    blocks = []
    for rows in _slices(hidden.shape[0], min(MAX_BLOCK_ROWS, max(TILE_ROWS, block_rows))):
        block = _block(
            hidden[rows], weight, columns[rows], target_raw[rows], bias, transform, native_bf16
        )
        blocks.append(block.stats(entropy))
    if not blocks:
        none = target_raw.new_empty(0)
        return VocabStats(none, none, none, none.to(torch.int32))
    return VocabStats(*(torch.cat(field) for field in zip(*blocks, strict=True)))


@functools.cache
def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bf16 multiply instructions, without which a bf16 GEMM is emulated.

    Emulated, it takes four times as long as the fp32 GEMM of the same shape.
    """
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "sve_bf16"))


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
        if weight.dtype != torch.float32:
            self._buffer = self.hidden.new_empty(self.tile_columns, weight.shape[1])

    def load(self, columns: slice) -> None:
        """Take the tile of the head that `multiply` will use."""
        tile = self.weight[columns]
        if tile.dtype != torch.float32:
            tile = self._buffer[: tile.shape[0]].copy_(tile)
        self._tile = tile
        self._tile_bias = None if self.bias is None else self.bias[columns].float()

    def multiply(self, rows: slice, out: torch.Tensor) -> None:
        """Write `rows` × tile to `out`, float32."""
        torch.mm(self.hidden[rows], self._tile.T, out=out)
        if self._tile_bias is not None:
            out += self._tile_bias


class _Bf16Product:
    """h·w + b of tiles through bf16 GEMMs, at three times fp32's speed where the CPU has them.

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
        self._bias_at = slice(end_of_shift, end_of_bias)

        self.tile_columns = _tile_columns(weight, bytes_per_element=2)
        self._buffer = weight.new_zeros(self.tile_columns, padded)
        self._rounded = weight.new_empty(TILE_ROWS * self.tile_columns)
        self.hidden = hidden.new_zeros(hidden.shape[0], padded)
        self.hidden[:, :depth] = hidden
        self.hidden[:, self._bias_at] = 1
        if shift is not None:
            self.hidden[:, depth:end_of_shift] = _bf16_parts(-shift)
            self._buffer[:, depth:end_of_shift] = 1

    def load(self, columns: slice) -> None:
        """Take the tile of the head that `multiply` will use."""
        tile = self.weight[columns]
        self._tile = self._buffer[: tile.shape[0]]
        self._tile[:, : tile.shape[1]] = tile
        if self.bias is not None:
            self._tile[:, self._bias_at] = _bf16_parts(self.bias[columns].float())

    def multiply(self, rows: slice, out: torch.Tensor) -> None:
        """Write `rows` × tile to `out`, float32."""
        rounded = self._rounded[: out.numel()].view_as(out)
        torch.mm(self.hidden[rows], self._tile.T, out=rounded)
        out.copy_(rounded)


_Product = _Fp32Product | _Bf16Product


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
        self.tile, self.scratch = target_raw.new_empty(2, TILE_ROWS * product.tile_columns)

    def stats(self, entropy: bool) -> VocabStats:
        """Merged over all tiles."""
        if not entropy:
            stats = self._stats(around_max=False)
            # Around the target's logit, sums overflow where a rival is 88 nats above it and vanish
            # where all are 100 below.
            if stats.anchor.isfinite().all():
                return stats
        return self._stats(around_max=True)

    def _stats(self, around_max: bool) -> VocabStats:
        """`around_max` finds each tile's largest logit first, which the entropy needs."""
        num_columns = self.product.weight.shape[0]
        tiles = []
        for tile in _slices(num_columns, self.product.tile_columns):
            self.product.load(tile)
            row_tiles = []
            for rows in _slices(len(self.columns), TILE_ROWS):
                logits, scratch, num_greater = self._rank_tile(tile, rows)
                if around_max:
                    anchor, rest, weighted = _sums_around_max(logits, scratch)
                else:
                    around = None if self.sum_anchor is None else self.sum_anchor[rows]
                    anchor, rest, weighted = _sums_around(around, logits, scratch)
                row_tiles.append((anchor + self.base[rows], rest, weighted, num_greater))
            tiles.append([torch.cat(field) for field in zip(*row_tiles, strict=True)])
        return merge_stacked(VocabStats(*map(torch.stack, zip(*tiles, strict=True))))

    def _rank_tile(
        self, tile: slice, rows: slice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The tile's logits less `base`, scratch space of the same shape, and greater counts."""
        shape = (rows.stop - rows.start, tile.stop - tile.start)
        logits = self.tile[: shape[0] * shape[1]].view(shape)
        scratch = self.scratch[: logits.numel()].view(shape)
        self.product.multiply(rows, logits)
        # The target's own column: in a tile it can differ from `target_raw` in the last bit.
        own = self.columns[rows] - tile.start
        own_row = ((own >= 0) & (own < shape[1])).nonzero().squeeze(1)
        own = own[own_row]
        logits[own_row, own] = -torch.inf
        if self.transform.round_to is None:
            num_greater = _count_greater(logits, self.target_raw[rows], scratch)
        if not self.transform.is_identity:
            if self.product.shift is not None:
                logits += self.product.shift[rows, None]
            logits = self.transform(logits)
            logits[own_row, own] = -torch.inf  # a cap has lifted it
        if self.transform.round_to is not None:
            num_greater = _count_greater(logits, self.target_logit[rows], scratch)
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
    fit = OPERAND_BUFFER_BYTES // (bytes_per_element * depth) // 64 * 64
    return min(num_columns, MAX_TILE_COLUMNS, max(64, fit))


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
