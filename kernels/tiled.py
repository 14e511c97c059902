"""One pass over vocabulary tiles in torch, for machines without a GPU.

N is tokens, V the columns at hand, D the hidden size.
"""

import torch

from rsr.kernels.logits import LogitTransform
from rsr.kernels.stats import VocabStats, merge_stats

ROWS = 512
COLUMNS = 2048


def target_raw(
    hidden: torch.Tensor, weight: torch.Tensor, columns: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """h·w + b of one column per row, float32; 0 where `columns` is outside [0, V)."""
    num_columns = weight.shape[0]
    raw = torch.zeros(len(columns), dtype=torch.float32, device=hidden.device)
    for start in range(0, len(columns), ROWS):
        rows = slice(start, start + ROWS)
        chosen = columns[rows]
        owned = (chosen >= 0) & (chosen < num_columns)
        safe = chosen.clamp(0, num_columns - 1)
        dots = torch.linalg.vecdot(hidden[rows].float(), weight[safe].float())
        if bias is not None:
            dots = dots + bias[safe].float()
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
) -> VocabStats:
    """Statistics of every token over the V columns of `weight`, its own target left out.

    `columns` (N,) is the target's column here, outside [0, V) where another shard has it.
    """
    if hidden.shape[0] == 0:
        return VocabStats.empty(0, hidden.device)
    blocks = []
    for start in range(0, hidden.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        block = hidden[rows].float()
        stats = VocabStats.empty(block.shape[0], hidden.device)
        for first in range(0, weight.shape[0], COLUMNS):
            tile = weight[first : first + COLUMNS]
            raw = block @ tile.float().T
            if bias is not None:
                raw += bias[first : first + COLUMNS].float()
            tile_stats = _tile_stats(raw, columns[rows] - first, target_raw[rows], transform)
            stats = merge_stats([stats, tile_stats])
        blocks.append(stats)
    return VocabStats(*(torch.cat(parts) for parts in zip(*blocks, strict=True)))


def _tile_stats(
    raw: torch.Tensor, columns: torch.Tensor, target_raw: torch.Tensor, transform: LogitTransform
) -> VocabStats:
    own = ((columns >= 0) & (columns < raw.shape[1])).nonzero().squeeze(1)
    logits = transform(raw)
    logits[own, columns[own]] = -torch.inf
    raw[own, columns[own]] = -torch.inf
    if transform.round_to is None:
        greater = raw > target_raw[:, None]
    else:
        greater = logits > transform(target_raw)[:, None]
    max_logit = logits.amax(dim=1)
    anchor = torch.where(max_logit == -torch.inf, 0.0, max_logit)[:, None]
    gap = logits - anchor
    exp = torch.exp(gap)
    below = logits < max_logit[:, None]
    num_at_max = (logits == max_logit[:, None]).sum(dim=1)
    return VocabStats(
        max_logit,
        torch.where(below, exp, 0.0).sum(dim=1) + (num_at_max - 1),
        torch.where(exp > 0, gap * exp, 0.0).sum(dim=1),
        greater.sum(dim=1, dtype=torch.int32),
    )
