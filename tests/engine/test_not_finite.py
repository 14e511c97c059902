"""A student that gives NaN: the rows it spoils have no score, and all others have theirs."""

import math
import re

import pytest
import transformers
from safetensors.torch import load_file, save_file

from rsr.engine import DatasetRsr, Scorer, ScorerConfig, Status, Trajectory
from rsr.engine.prefill import CPU_BLOCK_SIZE

pytestmark = pytest.mark.vllm

# One byte is one token here, and the student's embedding of Z is not a number.
PROMPT = "How many legs do three spiders have? Eight legs each, they say. "
GOOD = [
    Trajectory(prompt=PROMPT, response="Three times eight is twenty-four. " * 3),
    Trajectory(prompt=PROMPT, response="Three times eight is twenty-four, so 24."),
    Trajectory(text="Seven apples cost 21 coins, so one apple costs 3 coins. "),
]
BAD = [
    Trajectory(prompt=PROMPT, response="Three times eight is twenty-four. Zero doubt. "),
    Trajectory(prompt=PROMPT, response="Three times eight is twenty-four. Zero more. "),
    Trajectory(prompt="Zeno asks: " + PROMPT, response="24."),
]


def spoil(folder, name, row):
    """Make one row of the checkpoint's matrix `name` NaN."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name][row] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def config(folder, **settings):
    return ScorerConfig(
        model=str(folder),
        dtype="float32",
        chat_template="none",
        # Every row goes through several steps.
        max_num_batched_tokens=96,
        **settings,
    )


@pytest.fixture(scope="module")
def folder(save_student, tiny_llama, tmp_path_factory):
    return save_student(tiny_llama(vocab_size=261), tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def spoilt(folder):
    """(a student to whom Z is NaN, what it scored before)."""
    with Scorer(config(folder, prefix_reuse="off")) as scorer:
        expected = scorer.score(GOOD)
    (row,) = transformers.AutoTokenizer.from_pretrained(folder).encode("Z")
    spoil(folder, "model.embed_tokens.weight", row)
    return folder, expected


@pytest.mark.parametrize(
    "settings",
    [
        {"prefix_reuse": "off"},
        {"prefix_reuse": "on", "token_scores": True},
        pytest.param({"scorer": "prompt-logprobs"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_rows_that_overflow_have_no_score_and_spoil_no_other(spoilt, settings):
    folder, expected = spoilt
    with Scorer(config(folder, **settings)) as scorer:
        for rows in ([*BAD, *GOOD], [*GOOD, *BAD]):
            scores = dict(zip(map(id, rows), scorer.score(rows), strict=True))
            for row in BAD:
                score = scores[id(row)]
                assert score.status is Status.NOT_FINITE
                assert (score.rsr, score.mean_rank, score.tokens) == (None, None, None)
                assert score.rank_sums == {}
                assert "no finite log-probability" in score.detail
            for row, truth in zip(GOOD, expected, strict=True):
                assert scores[id(row)].status is Status.OK
                assert scores[id(row)].rsr == pytest.approx(truth.rsr, rel=1e-4)
            assert DatasetRsr.of(scores.values()).num_trajectories == len(GOOD)
    text = f"{BAD[0].prompt}{BAD[0].response}"
    found = re.search(rf"position (\d+) of {len(text)}", scores[id(BAD[0])].detail)
    # At the latest the token after the Z; on a CPU the tokens before it in its KV block suffer too.
    assert text.index("Z") + 1 - CPU_BLOCK_SIZE < int(found[1]) <= text.index("Z") + 1


def test_head_with_a_row_that_is_no_number_scores_nothing(folder):
    spoil(folder, "lm_head.weight", 7)
    with Scorer(config(folder)) as scorer:
        assert scorer.kind == "kernel"
        scores = scorer.score(GOOD)
    assert [score.status for score in scores] == [Status.NOT_FINITE] * len(GOOD)
    assert [score.rsr for score in scores] == [None] * len(GOOD)
