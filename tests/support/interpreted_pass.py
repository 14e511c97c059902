"""The Triton pass with tiles of one's choice; for a process in which Triton interprets.

Triton's interpreter reduces by a function of one's own element after element, in Python; for tiles
of 128 x 256 this takes twenty times as long as all the rest. `combine_slices` lets it combine
whole slices in the same order.
"""

from typing import Any
from unittest import mock

import numpy as np

from rsr.kernels import RankLogprob, rank_logprob
from rsr.kernels.tuning import RULES, Tiles, choose_lanes

TILES = {
    f"{tiles.design} {tiles.rows}x{tiles.columns}x{tiles.depth} by {tiles.num_warps}": tiles
    for tiles in dict.fromkeys(rule.tiles for rule in RULES)
}
"""Every row of the tile table, by a name."""


def rank_logprob_by(
    tiles: Tiles | None, capability: int, *args: Any, **options: Any
) -> RankLogprob:
    """`rank_logprob` with impl="fused", by `tiles` and with the lanes of a card.

    By the tiles that are chosen for the call for None, or where the operands cannot be described.
    """
    from rsr.kernels import fused, tuning

    def choose(hidden: Any, weight: Any, transform: Any) -> Tiles:
        is_described = fused.can_describe(hidden) and fused.can_describe(weight)
        if tiles is None or (tiles.design == "descriptor" and not is_described):
            return chosen(hidden, weight, transform)
        return tiles

    def lanes(_capability: int, tiles: Tiles) -> Any:
        return choose_lanes(capability, tiles)

    chosen = fused.choose_tiles
    with (
        mock.patch.object(fused, "choose_tiles", choose),
        mock.patch.object(tuning, "choose_lanes", lanes),
    ):
        return rank_logprob(*args, impl="fused", **options)


def combine_slices() -> None:
    """Let this process's Triton reduce tuples along an axis by whole slices."""
    from triton.runtime.interpreter import ReduceOps

    element_by_element = ReduceOps.generic_reduce

    def reduce(self: Any, values: Any) -> Any:
        if self.axis is None or self.keep_dims:
            return element_by_element(self, values)
        along = [np.moveaxis(value.handle.data, self.axis, 0) for value in values]
        slices = [
            [self.to_tensor(part, value.dtype) for part in parts]
            for parts, value in zip(along, values, strict=True)
        ]
        combined, *others = zip(*slices, strict=True)
        for other in others:
            combined = self.combine_fn.fn(*combined, *other)
        return list(combined)

    reduce.element_by_element = element_by_element  # type: ignore[attr-defined]
    ReduceOps.generic_reduce = reduce


def rank_logprob_by_elements(*args: Any, **options: Any) -> RankLogprob:
    """`rank_logprob_by` as Triton's own interpreter has it, after `combine_slices`."""
    from triton.runtime.interpreter import ReduceOps

    one_by_one = ReduceOps.generic_reduce.element_by_element
    with mock.patch.object(ReduceOps, "generic_reduce", one_by_one):
        return rank_logprob_by(*args, **options)
