"""Quarters, first tokens of steps and prompts, and the sums over them, beside plain definitions."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsr.engine import ScorerConfig, Trajectory
from rsr.engine.chat import TrajectoryEncoder
from rsr.engine.metric_sums import SUMS, MetricSums, sum_metrics
from rsr.engine.parts import NUM_PARTS, NUM_QUARTERS, PROMPT, with_parts
from rsr.engine.trajectory import EncodedTrajectory

DEFAULT_STEPS = ScorerConfig(model="any").step_pattern


def numbers(encoded: EncodedTrajectory) -> list[int]:
    """Parts of all sequences, one after another."""
    return [part for sequence in encoded.sequences for part in sequence.parts]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
def test_quarters_do_not_depend_on_how_a_trajectory_is_cut(lengths, data):
    """One sequence, the same tokens in several spans, or in several sequences."""
    total = sum(lengths)
    expected = [NUM_QUARTERS * k // total for k in range(total)]
    whole = EncodedTrajectory([0] * (total + 3), [(3, total + 3)])
    assert numbers(with_parts(whole, prompt=False)) == expected
    spans, position = [], 1
    for length in lengths:
        position += data.draw(st.integers(0, 3))
        spans.append((position, position + length))
        position += length
    assert numbers(with_parts(EncodedTrajectory([0] * position, spans), prompt=False)) == expected
    first, *others = [
        EncodedTrajectory([0] * (length + 2), [(2, length + 2)]) for length in lengths
    ]
    parted = EncodedTrajectory(first.token_ids, first.spans, more=tuple(others))
    assert numbers(with_parts(parted, prompt=False)) == expected
    counts = np.bincount(expected, minlength=NUM_QUARTERS)
    assert counts.max() - counts.min() <= 1


def test_the_prompt_is_what_comes_before_the_first_response():
    encoded = EncodedTrajectory(
        [0] * 9,
        [(4, 6), (7, 9)],
        more=(EncodedTrajectory([0] * 6, [(5, 6)]),),
        step_starts=(4, 8),
    )
    first, second = with_parts(encoded, prompt=True).sequences
    assert first.scored_spans == [(1, 4), (4, 6), (7, 9)]
    assert list(first.parts) == [PROMPT] * 3 + [0 + NUM_QUARTERS, 0, 1, 2 + NUM_QUARTERS]
    assert second.scored_spans == [(5, 6)]
    assert list(second.parts) == [3]
    assert with_parts(encoded, prompt=True).num_head_rows == 8
    assert with_parts(encoded, prompt=False).num_head_rows == 5
    # Nothing precedes a first token, nor does anything stand before it.
    bare = with_parts(EncodedTrajectory([0] * 3, [(1, 3)]), prompt=True)
    assert bare.scored_spans == [(1, 3)]


@pytest.mark.parametrize(
    ("text", "pattern", "steps"),
    [
        ("Six. Then 4.5 eggs? Yes.", DEFAULT_STEPS, ["Six. ", "Then 4.5 eggs? ", "Yes."]),
        ("No steps at all", DEFAULT_STEPS, ["No steps at all"]),
        ("It ends. ", DEFAULT_STEPS, ["It ends. "]),
        ("A?  B", DEFAULT_STEPS, ["A? ", " B"]),
        ("one;;two;three", ";+", ["one;;", "two;", "three"]),
        ("é. ü. 漢字", DEFAULT_STEPS, ["é. ", "ü. ", "漢字"]),
    ],
)
def test_a_step_begins_after_what_ends_the_one_before(make_tokenizer, text, pattern, steps):
    """One byte is one token here: a step's first token is its first byte."""
    encoder = TrajectoryEncoder(
        make_tokenizer(), chat_template=None, max_model_len=999, step_pattern=pattern
    )
    encoded = encoder.encode(Trajectory(prompt="Question. ", response=text))
    begins = [place for place, part in enumerate(encoded.parts) if part >= NUM_QUARTERS]
    lengths = [len(step.encode()) for step in steps]
    assert begins == [0, *np.cumsum(lengths)[:-1].tolist()]


def test_every_turn_begins_a_step(make_tokenizer):
    tokenizer = make_tokenizer()
    encoder = TrajectoryEncoder(
        tokenizer,
        chat_template=tokenizer.chat_template,
        max_model_len=999,
        step_pattern=DEFAULT_STEPS,
    )
    messages = [
        {"role": role, "content": content}
        for role, content in (
            ("user", "Hi. Ho?"),
            ("assistant", "Ay. Be"),
            ("user", "Go. On"),
            ("assistant", "See"),
        )
    ]
    encoded = encoder.encode(Trajectory(messages=messages))
    begins = [place for place, part in enumerate(encoded.parts) if part >= NUM_QUARTERS]
    assert begins == [0, 4, 6]


def test_without_metrics_nobody_looks_for_parts(make_tokenizer):
    encoder = TrajectoryEncoder(make_tokenizer(), chat_template=None, max_model_len=999)
    encoded = encoder.encode(Trajectory(prompt="a", response="b. c"))
    assert (encoded.parts, encoded.step_starts) == (b"", (encoded.spans[0][0],))


@pytest.mark.parametrize("pattern", ["(", "x*", ""])
def test_a_pattern_that_ends_no_step_is_refused(pattern):
    with pytest.raises(ValueError, match=r"step_pattern=.*matches no empty text"):
        ScorerConfig(model="any", step_pattern=pattern)


def test_prompts_have_no_sums_where_metrics_have_none():
    with pytest.raises(ValueError, match="prompt_metrics=True"):
        ScorerConfig(model="any", metrics="rsr", prompt_metrics=True)


tokens = st.tuples(
    st.integers(1, 100),
    st.floats(0, 50, allow_subnormal=False),
    st.floats(0, 12, allow_subnormal=False),
    st.integers(0, NUM_PARTS - 1),
)


@pytest.mark.seconds
@given(st.lists(tokens, min_size=2, max_size=60), st.data())
def test_sums_of_halves_add_up(rows, data):
    columns = np.array(rows, dtype=np.float64).T
    whole = MetricSums.of(sum_metrics(*columns), has_entropy=True)
    cut = data.draw(st.integers(0, len(rows)))
    halves = [
        MetricSums.of(sum_metrics(*part), has_entropy=True)
        for part in (columns[:, :cut], columns[:, cut:])
    ]
    total = halves[0] + halves[1]
    np.testing.assert_allclose(total.values, whole.values, rtol=1e-9, atol=1e-300)
    ranks, surprisals, entropies, parts = columns
    own = parts != PROMPT
    assert whole.surprisal_squared_nats2 == pytest.approx(math.fsum(surprisals[own] ** 2))
    floored = np.maximum(entropies[own], 1e-3)
    assert whole.rank_per_entropy == pytest.approx(math.fsum(ranks[own] / floored))
    assert sum(q.num_tokens for q in whole.quarters) == own.sum()
    prompt = whole.prompt
    assert (prompt is None) == own.all()
    assert prompt is None or prompt.surprisal_sum_nats == pytest.approx(math.fsum(surprisals[~own]))
    assert len(whole.values) == len(SUMS)
