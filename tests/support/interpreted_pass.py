"""The Triton pass with tiles of one's choice; for a process in which Triton interprets."""

from typing import Any
from unittest import mock

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
