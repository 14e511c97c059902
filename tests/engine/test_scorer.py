"""The front door: what it gives does not depend on what else is asked for, or on how it ran."""

import numpy as np
import pytest

from rsr.engine import Scorer, ScorerConfig, Trajectory
from rsr.engine.metrics import score_tokens
from rsr.engine.prefill import CPU_BLOCK_SIZE

# One byte is one token here. Responses share whole blocks with their siblings', and two of them
# part at the very end of a block, where no sibling has the score that is missing.
PROMPT = "A crate holds twelve jars, and a shelf holds nine crates. How many jars? " * 2
SHARED = "Nine crates of twelve jars each: " * 4
AT_BLOCK_END = SHARED[: -((len(PROMPT) + len(SHARED)) % CPU_BLOCK_SIZE)]
ROWS = [
    Trajectory(prompt=PROMPT, response=response)
    for response in (
        SHARED + "108.",
        SHARED + "9 × 12 = 108, so 108 jars.",
        AT_BLOCK_END + "? Let me count.",
        AT_BLOCK_END + "! No need to count.",
        "108",
    )
] + [
    # Goes on where the first of them ends.
    Trajectory(prompt=PROMPT + SHARED + "108.", response=" Is that all? It is."),
    Trajectory(prompt="Two and two?", response=" Four."),
    Trajectory(prompt="Alone", response=""),
]


def config(student, **settings):
    return ScorerConfig(
        model=str(student),
        dtype="float32",
        chat_template="none",
        # Every row goes through several steps.
        max_num_batched_tokens=96,
        **settings,
    )


@pytest.fixture(scope="module")
def token_scores(tiny_student):
    """By `prefix_reuse`: scores of ROWS with their tokens, and of ROWS given backwards."""
    scores = {}
    for prefix_reuse in ("off", "on"):
        with Scorer(config(tiny_student, prefix_reuse=prefix_reuse, token_scores=True)) as scorer:
            scores[prefix_reuse] = scorer.score(ROWS), scorer.score(ROWS[::-1])[::-1]
    return scores


@pytest.mark.vllm
@pytest.mark.parametrize("prefix_reuse", ["off", "on"])
def test_sums_formed_in_the_worker_are_those_of_the_tokens(
    tiny_student, token_scores, prefix_reuse
):
    with_tokens, _ = token_scores[prefix_reuse]
    with Scorer(config(tiny_student, prefix_reuse=prefix_reuse)) as scorer:
        with_sums = scorer.score(ROWS)
    for detailed, summed, row in zip(with_tokens, with_sums, ROWS, strict=True):
        assert summed.status == detailed.status
        assert summed.tokens is None
        if not row.response:
            assert summed.num_tokens == 0
            continue
        expected = score_tokens(detailed.tokens)
        assert summed.num_tokens == expected.num_tokens == len(row.response.encode())
        assert summed.rank_sums == detailed.rank_sums == expected.rank_sums
        for sums in (summed, detailed):
            assert sums.surprisal_sum_nats == pytest.approx(expected.surprisal_sum_nats, rel=1e-9)
            assert sums.entropy_sum_nats == pytest.approx(expected.entropy_sum_nats, rel=1e-9)
            assert sums.rsr == pytest.approx(expected.rsr, rel=1e-9)


@pytest.mark.vllm
@pytest.mark.parametrize("prefix_reuse", ["off", "on"])
def test_metric_sums_are_those_of_the_tokens(tiny_student, token_scores, prefix_reuse):
    """Formed in the worker or here, of tokens that were computed or supplied; prompts too."""
    with_tokens, _ = token_scores[prefix_reuse]
    with Scorer(config(tiny_student, prefix_reuse=prefix_reuse, prompt_metrics=True)) as scorer:
        with_prompts = scorer.score(ROWS)
        texts = [Trajectory(text=row.prompt + row.response) for row in ROWS if row.response]
        whole = scorer.score(texts)
    texts_of = iter(whole)
    for detailed, summed, row in zip(with_tokens, with_prompts, ROWS, strict=True):
        if not row.response:
            assert summed.metric_sums is None
            continue
        tokens, sums = detailed.tokens, summed.metric_sums
        assert summed.rank_sums == detailed.rank_sums
        assert summed.num_tokens == detailed.num_tokens
        surprisals = -tokens.logprobs.astype(np.float64)
        ranks = np.minimum(tokens.ranks, 100)
        length = len(ranks)
        for quarter, found in enumerate(sums.quarters):
            inside = 4 * np.arange(length) // length == quarter
            assert found.num_tokens == inside.sum()
            assert found.rank_sum == ranks[inside].sum()
            assert found.surprisal_sum_nats == pytest.approx(surprisals[inside].sum(), rel=1e-5)
        # One byte is one token: a step begins after ". " or "? ".
        text = row.response.encode()
        begins = [0] + [i for i in range(2, length) if text[i - 2 : i] in (b". ", b"? ")]
        assert sums.step_firsts.num_tokens == len(begins)
        assert sums.step_firsts.rank_sum == ranks[begins].sum()
        # The first byte of all is nowhere scored.
        assert sums.prompt.num_tokens == len(row.prompt.encode()) - 1
        together = sums.prompt.surprisal_sum_nats + summed.surprisal_sum_nats
        assert together == pytest.approx(next(texts_of).surprisal_sum_nats, rel=1e-5)
        for name in ("surprisal_squared_nats2", "rank_per_surprisal", "surprisal_per_entropy"):
            expected = getattr(detailed.metric_sums, name)
            assert getattr(sums, name) == pytest.approx(expected, rel=1e-4)


@pytest.mark.vllm
def test_reuse_and_order_change_last_bits_at_most(token_scores):
    expected, _ = token_scores["off"]
    for scores in token_scores["on"]:
        for score, truth in zip(scores, expected, strict=True):
            assert score.status == truth.status
            if truth.tokens is None:
                continue
            np.testing.assert_array_equal(score.tokens.ranks, truth.tokens.ranks)
            np.testing.assert_allclose(score.tokens.logprobs, truth.tokens.logprobs, atol=2e-5)


@pytest.mark.vllm
def test_turns_with_histories_of_their_own_add_up(tiny_student, tmp_path):
    """Three turns rendered verbatim score as three rows that stop after one of them each."""
    template = tmp_path / "plain.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    messages = [
        {"role": role, "content": content}
        for question, answer in (("Two and two?", "Four."), ("And three?", "Five."), ("OK?", "Yes"))
        for role, content in (("user", question), ("assistant", answer))
    ]
    settings = {"dtype": "float32", "chat_template": str(template), "render": "verbatim"}
    with Scorer(ScorerConfig(model=str(tiny_student), token_scores=True, **settings)) as scorer:
        whole, *parts = scorer.score(
            [
                Trajectory(messages=messages),
                *(
                    Trajectory(prompt=messages[: i - 1], response=messages[i - 1 : i])
                    for i in (2, 4, 6)
                ),
            ]
        )
    assert whole.num_tokens == sum(part.num_tokens for part in parts) == len("Four.Five.Yes")
    assert whole.rank_sum == sum(part.rank_sum for part in parts)
    assert whole.surprisal_sum_nats == pytest.approx(
        sum(part.surprisal_sum_nats for part in parts), rel=1e-6
    )
    assert whole.tokens.token_ids.tolist() == [
        token for part in parts for token in part.tokens.token_ids.tolist()
    ]


@pytest.mark.vllm
def test_rows_may_be_mappings_one_alone_or_any_iterable(tiny_student, capfd):
    """What is no trajectory has a status, as any bad row; what is no row is refused."""
    with Scorer(config(tiny_student)) as scorer:
        expected = scorer.score(ROWS)
        mappings = [{"prompt": r.prompt, "completion": r.response, "id": 7} for r in ROWS]
        assert scorer.score(iter(mappings)) == expected
        assert scorer.score(ROWS[6]) == scorer.score(mappings[6]) == scorer.score(ROWS[6:7])[0]
        streamed = list(scorer.stream(iter(mappings), batch_size=len(ROWS)))
        assert streamed == expected
        by_threes = list(scorer.stream(mappings, batch_size=3))
        assert [s.num_tokens for s in by_threes] == [s.num_tokens for s in expected]
        bad = scorer.score([{"question": "?"}, ROWS[6], Trajectory(prompt="a", text="b")])
        assert [s.status for s in bad] == ["bad_messages", "ok", "bad_messages"]
        assert "it has question" in bad[0].detail
        assert bad[1].num_tokens == expected[6].num_tokens
        assert scorer.score([]) == []
        for wrong in ("text", 3, ["text"], [[ROWS[0]]]):
            with pytest.raises(TypeError, match="mapping"):
                scorer.score(wrong)
        with pytest.raises(ValueError, match="at least 1"):
            next(scorer.stream(ROWS, batch_size=0))
