"""Second passes: the same tokens are scored, after less than stood before them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsr.engine import Scorer, ScorerConfig, Trajectory
from rsr.engine.chat import TrajectoryEncoder
from rsr.engine.context import with_window, without_prompt
from rsr.engine.student import open_student
from rsr.engine.trajectory import EncodedTrajectory


def scored_ids(encoded: EncodedTrajectory) -> list[int]:
    return [
        token
        for sequence in encoded.sequences
        for start, end in sequence.spans
        for token in sequence.token_ids[start:end]
    ]


@st.composite
def trajectories(draw: st.DrawFn) -> EncodedTrajectory:
    """One or two sequences of some responses, with steps anywhere."""
    made = []
    for number in range(draw(st.integers(1, 2))):
        spans, position = [], 1
        for length in draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)):
            position += draw(st.integers(0, 3))
            spans.append((position, position + length))
            position += length
        steps = draw(st.lists(st.integers(0, position), max_size=6))
        ids = [1000 * number + i for i in range(position + draw(st.integers(0, 2)))]
        made.append(EncodedTrajectory(ids, spans, step_starts=tuple(steps)))
    first, *others = made
    return EncodedTrajectory(
        first.token_ids, first.spans, step_starts=first.step_starts, more=tuple(others)
    )


@pytest.mark.seconds
@given(trajectories(), st.integers(1, 3))
def test_the_tokens_that_are_scored_stay_in_their_order(whole, num_steps):
    for made in (without_prompt(whole, 7), with_window(whole, num_steps)):
        assert scored_ids(made) == scored_ids(whole)
        assert made.num_scored == whole.num_scored


@given(trajectories())
def test_a_response_without_its_prompt_stands_after_one_token(whole):
    made = without_prompt(whole, 7)
    assert [s.token_ids[0] for s in made.sequences] == [7] * len(made.sequences)
    assert all(s.spans == [(1, len(s.token_ids))] for s in made.sequences)
    assert len(made.sequences) == sum(len(s.spans) for s in whole.sequences)


@given(trajectories(), st.integers(1, 3))
def test_a_step_stands_after_its_prompt_and_the_steps_before_it(whole, num_steps):
    windows = iter(with_window(whole, num_steps).sequences)
    for sequence in whole.sequences:
        for start, end in sequence.spans:
            inside = {s for s in sequence.step_starts if start < s < end}
            borders = [start, *sorted(inside), end]
            for number in range(len(borders) - 1):
                window = next(windows)
                first = borders[max(0, number - num_steps)]
                expected = (
                    sequence.token_ids[:start]
                    + sequence.token_ids[first:][: borders[number + 1] - first]
                )
                assert window.token_ids == expected
                length = borders[number + 1] - borders[number]
                assert window.spans == [(len(expected) - length, len(expected))]
    assert next(windows, None) is None


def test_a_window_over_all_steps_is_the_whole_history():
    whole = EncodedTrajectory(list(range(12)), [(3, 12)], step_starts=(5, 9))
    made = with_window(whole, 99)
    assert [s.token_ids for s in made.sequences] == [list(range(n)) for n in (5, 9, 12)]


def test_refused_rows_stay_refused(make_tokenizer):
    for passes in ({"unconditional": True}, {"window": 2}):
        encoder = TrajectoryEncoder(
            make_tokenizer(), chat_template=None, max_model_len=64, step_pattern="x", **passes
        )
        refused = encoder.encode(Trajectory(prompt="a", response=""))
        assert not refused.sequences
        assert refused.detail == "empty response"


def test_a_student_without_a_token_to_begin_with_is_refused(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a BOS nor an EOS token"):
        TrajectoryEncoder(tokenizer, chat_template=None, max_model_len=64, unconditional=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"unconditional": True, "window": 2},
        {"unconditional": True, "token_scores": True},
        {"window": 2, "prompt_metrics": True},
        {"window": 0},
    ],
)
def test_passes_that_contradict_themselves_are_refused(settings):
    with pytest.raises(ValueError, match="expected"):
        ScorerConfig(model="any", **settings)


@pytest.mark.slow
@pytest.mark.vllm
def test_second_passes_score_what_a_text_of_their_own_would(tiny_student, make_tokenizer):
    """Beside the same texts as trajectories of plain text; one byte is one token."""
    tokenizer = make_tokenizer()
    prompt, steps = "Six sevens? ", ["Six tens are 60. ", "Minus 18. ", "Is it 42? ", "Yes"]
    row = Trajectory(prompt=prompt, response="".join(steps))
    settings = {"model": str(tiny_student), "dtype": "float32", "chat_template": "none"}

    def encode(**passes):
        return open_student(ScorerConfig(**settings, **passes)).encoder().encode(row)

    with Scorer(ScorerConfig(**settings)) as scorer:
        unconditional, local = scorer.score_encoded([encode(unconditional=True), encode(window=1)])
        alone = scorer.score([Trajectory(text=tokenizer.bos_token + "".join(steps))])[0]
        before = ["", *steps[:-1]]
        texts = [(prompt + history, step) for history, step in zip(before, steps, strict=True)]
        by_step = scorer.score([Trajectory(prompt=p, response=r) for p, r in texts])
    assert unconditional.num_tokens == alone.num_tokens == local.num_tokens
    assert unconditional.surprisal_sum_nats == pytest.approx(alone.surprisal_sum_nats, rel=1e-6)
    assert unconditional.rank_sum == alone.rank_sum
    assert local.surprisal_sum_nats == pytest.approx(
        sum(s.surprisal_sum_nats for s in by_step), rel=1e-6
    )
    means = [s.mean_surprisal_nats for s in by_step]
    np.testing.assert_allclose(local.sequence_means_nats, means, rtol=1e-6)
