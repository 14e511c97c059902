"""Quotas on a selection: no value of a column may make up more than its share.

The rule is one sentence: rows are admitted from the best to the worst, each if its group has
room and none of its values is full. A value is full at its share of the rows selected in the
end; since that number follows from the quotas themselves, the admission starts from the number
there would be without them and is repeated with the number it yields until the shares hold.

Between two moments in which some value becomes full, only the groups' room matters; so each
admission is a few vectorised passes, not a loop over rows. Knows rows by position only.
"""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Quota:
    """A limit on the share of selected rows that one value of a column may have.

    values: (M,) int32 in [0, num_values), one a row. max_share: of the selected rows.
    """

    values: NDArray[np.int32]
    num_values: int
    max_share: Fraction

    def counts(self, chosen: Mask) -> NDArray[np.int64]:
        return np.bincount(self.values[chosen], minlength=self.num_values)

    def cap(self, num_selected: int) -> int:
        return int(self.max_share * num_selected)


def admit(groups: NDArray[np.int32], keep: int, quotas: list[Quota]) -> Mask:
    """(M,) mask of the rows admitted; rows come best first.

    groups: (M,) int32. keep: room of each group. The mask is empty if no selection can meet the
    quotas, for instance with a share of a half of fewer than two values.
    """
    layout = np.argsort(groups, kind="stable")
    num_selected = int(np.minimum(np.bincount(groups), keep).sum())
    while True:
        caps = [quota.cap(num_selected) for quota in quotas]
        admitted = _admit_under(groups, layout, keep, quotas, caps)
        num_selected = int(np.count_nonzero(admitted))
        if all(
            quota.counts(admitted).max(initial=0) <= quota.cap(num_selected) for quota in quotas
        ):
            return admitted


def _admit_under(
    groups: NDArray[np.int32],
    layout: NDArray[np.int64],
    keep: int,
    quotas: list[Quota],
    caps: list[int],
) -> Mask:
    """Admission with every value of quota i full at caps[i] rows."""
    allowed = np.ones(len(groups), bool)
    full = [np.zeros(quota.num_values, bool) for quota in quotas]
    while True:
        admitted = first_of_groups(groups, layout, keep, allowed)
        overflows = [
            _first_overflow(quota, cap, admitted) for quota, cap in zip(quotas, caps, strict=True)
        ]
        place = min(place for place, _ in overflows)
        if place == len(groups):
            return admitted
        # Up to here the admission is final; from here on, the values now full are out.
        allowed[:place] = admitted[:place]
        for quota, is_full, (own_place, value) in zip(quotas, full, overflows, strict=True):
            if own_place == place:
                is_full[value] = True
                allowed[place:] &= ~is_full[quota.values[place:]]


def first_of_groups(
    groups: NDArray[np.int32], layout: NDArray[np.int64], keep: int, allowed: Mask
) -> Mask:
    """The first `keep` allowed rows of each group. layout: rows in order of group, then place."""
    ordered = allowed[layout]
    so_far = np.cumsum(ordered)
    groups_of_layout = groups[layout]
    is_start = np.ones(len(groups), bool)
    is_start[1:] = groups_of_layout[1:] != groups_of_layout[:-1]
    before_group = np.maximum.accumulate(np.where(is_start, so_far - ordered, 0))
    first: Mask = np.zeros(len(groups), bool)
    first[layout] = ordered & (so_far - before_group <= keep)
    return first


def _first_overflow(quota: Quota, cap: int, admitted: Mask) -> tuple[int, int]:
    """Place of the first admitted row whose value is full already, and the value; else (M, 0)."""
    over = quota.counts(admitted) > cap
    places = np.flatnonzero(admitted & over[quota.values])
    if not len(places):
        return len(admitted), 0
    values = quota.values[places]
    by_value = np.argsort(values, kind="stable")
    _, starts = np.unique(values[by_value], return_index=True)
    place = int(places[by_value[starts + cap]].min())
    return place, int(quota.values[place])
