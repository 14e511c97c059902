"""Rows longer than a prefill step, longer than the model, and what they cost in memory."""

import pytest

from rsr.engine import Scorer, ScorerConfig, Status, Trajectory

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

MAX_MODEL_LEN = 32_768


@pytest.fixture(scope="module")
def student(save_student, tiny_llama, tmp_path_factory):
    """Two layers, two heads: attention over 32k tokens in seconds."""
    config = tiny_llama(
        vocab_size=261, max_position_embeddings=MAX_MODEL_LEN, initializer_range=0.1
    )
    return save_student(config, tmp_path_factory.mktemp("student"))


def text(num_tokens: int) -> str:
    """A byte is a token; no line repeats."""
    lines = "".join(f"{i} times {i} is {i * i}. " for i in range(num_tokens // 8))
    return lines[:num_tokens]


def test_row_of_the_models_whole_length_goes_through_in_chunks(student, assert_like_transformers):
    row = Trajectory(text=text(MAX_MODEL_LEN))
    config = ScorerConfig(
        model=str(student), dtype="float32", token_scores=True, max_num_batched_tokens=1000
    )
    with Scorer(config) as scorer:
        (score,) = scorer.score([row])
    assert (score.status, score.num_tokens) == (Status.OK, MAX_MODEL_LEN - 1)
    assert_like_transformers(student, [row], [score])


def test_longer_rows_are_cut_or_skipped(student, assert_like_transformers):
    long, short = Trajectory(text=text(700)), Trajectory(prompt=text(200), response=" so 3.")
    hidden = Trajectory(prompt=text(600), response=" out of reach")
    scores = {}
    for on_long in ("truncate", "skip"):
        config = ScorerConfig(
            model=str(student),
            dtype="float32",
            token_scores=True,
            max_model_len=512,
            on_long=on_long,
            max_num_batched_tokens=100,
        )
        with Scorer(config) as scorer:
            scores[on_long] = scorer.score([long, short, hidden])
    assert [s.status for s in scores["truncate"]] == ["truncated", "ok", "too_long"]
    assert [s.status for s in scores["skip"]] == ["too_long", "ok", "too_long"]
    assert scores["skip"][0].num_tokens == 0
    assert_like_transformers(student, [Trajectory(text=text(512)), short], scores["truncate"][:2])
