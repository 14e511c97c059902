"""What the driver packs is what the worker reads, and the other way round."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rsr.engine import ScorerConfig
from rsr.engine.wire import (
    REST_COLUMNS,
    SUM_COLUMNS,
    TOKEN_COLUMNS,
    PrefillRequest,
    PrefillScores,
    ScoredTokens,
    WorkerSettings,
    pack_scores,
)


@st.composite
def requests(draw) -> PrefillRequest:
    """Any request: spans are ascending and disjoint, and begin at position 1 or later."""
    token_ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=2, max_size=40))
    bounds = draw(
        st.lists(st.integers(1, len(token_ids)), min_size=2, unique=True).map(
            lambda found: sorted(found[: len(found) // 2 * 2])
        )
    )
    spans = list(zip(bounds[::2], bounds[1::2], strict=True))
    num_scored = sum(end - start for start, end in spans)
    parts = draw(st.binary(min_size=num_scored, max_size=num_scored) | st.just(b""))
    return PrefillRequest(token_ids, spans, draw(st.integers(0, 41)), draw(st.booleans()), parts)


@pytest.mark.seconds
@given(requests())
def test_a_request_says_which_tokens_to_score(request):
    scored = ScoredTokens.unpack(request.pack())
    positions = [p for start, end in request.spans for p in range(start, end)]
    assert scored.positions.tolist() == positions
    assert scored.targets.tolist() == [request.token_ids[p] for p in positions]
    assert scored.detail_end == request.detail_end
    assert scored.parts.tobytes() == (request.parts or bytes(len(positions)))
    # Each target's hidden state is computed, and nothing that no target needs.
    assert request.computed_ids == request.token_ids[: positions[-1]]


any_float = st.floats(allow_nan=True, allow_infinity=True, width=32)


@given(
    st.integers(0, 2**24),
    st.integers(0, 2**40),
    hnp.arrays(np.float64, len(REST_COLUMNS) - 3, elements=any_float),
    hnp.arrays(
        np.float32, st.tuples(st.integers(0, 9), st.just(len(TOKEN_COLUMNS))), elements=any_float
    ),
)
def test_scores_come_back_bit_for_bit(num_rest, rest_position_sum, rest_sums, tokens):
    rest = [num_rest, rest_position_sum, *rest_sums.tolist(), num_rest / 2]
    rows = torch.from_numpy(tokens)
    num_first = len(rows) // 2
    # In one piece, in two, and of a request that wants none.
    pieces = [[rows], [rows[:num_first], rows[num_first:]], []]
    flats = pack_scores(torch.tensor([rest] * 3, dtype=torch.float64), pieces)
    for flat, expected in zip(flats, [tokens, tokens, tokens[:0]], strict=True):
        scores = PrefillScores.unpack(flat.numpy())
        assert (scores.num_rest, scores.rest_position_sum) == (num_rest, rest_position_sum)
        together = np.concatenate([scores.rest_sums, scores.rest_metric_sums])
        np.testing.assert_array_equal(together, rest_sums)
        assert len(scores.rest_sums) == len(SUM_COLUMNS) - 2
        assert scores.rest_first_not_finite == num_rest / 2
        np.testing.assert_array_equal(scores.tokens, expected)


@pytest.mark.parametrize("rank_clip", [None, 50])
def test_settings_come_back(rank_clip):
    config = ScorerConfig(model="any", logits_dtype="model", entropy=False, rank_clip=rank_clip)
    packed = WorkerSettings.of(config).pack()
    assert WorkerSettings.unpack(packed) == WorkerSettings("model", False, rank_clip, True)
