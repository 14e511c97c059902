"""The two engines against each other, and what they refuse to start with."""

import logging

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rsr.engine import Scorer, ScorerConfig, Trajectory, prefill, vllm_plugin

MAX_MODEL_LEN = 128
ROWS = (
    Trajectory(text="Seven apples cost 21 coins, so one apple costs 3 coins. " * 4),
    Trajectory(prompt="How many legs do three spiders have?", response=" 3 × 8 = 24 legs."),
)


def config(student, **settings):
    return ScorerConfig(
        model=str(student),
        dtype="float32",
        token_scores=True,
        max_model_len=MAX_MODEL_LEN,
        chat_template="none",
        **settings,
    )


@pytest.mark.vllm
def test_prompt_logprobs_agree_with_the_kernel(tiny_student):
    scores = {}
    for kind in ("kernel", "prompt-logprobs"):
        with Scorer(config(tiny_student, scorer=kind)) as scorer:
            assert scorer.kind == kind
            scores[kind] = scorer.score(ROWS)
    for ours, stock in zip(scores["kernel"], scores["prompt-logprobs"], strict=True):
        assert ours.status == stock.status
        np.testing.assert_array_equal(ours.tokens.ranks, stock.tokens.ranks)
        np.testing.assert_allclose(ours.tokens.logprobs, stock.tokens.logprobs, rtol=0, atol=1e-5)
        assert ours.entropy_sum_nats is not None
        assert stock.entropy_sum_nats is None


@pytest.mark.vllm
def test_unusual_head_is_scored_by_vllm_with_a_warning(tiny_student, monkeypatch, caplog):
    from vllm.model_executor.models.llama import LlamaForCausalLM

    compute_logits = LlamaForCausalLM.compute_logits

    def halved(self, hidden_states):
        return compute_logits(self, hidden_states) / 2

    monkeypatch.setattr(LlamaForCausalLM, "compute_logits", halved)
    with caplog.at_level(logging.WARNING), Scorer(config(tiny_student)) as scorer:
        assert scorer.kind == "prompt-logprobs"
        (row,) = scorer.score(ROWS[1:])
    assert "not a plain matrix" in caplog.text
    assert row.entropy_sum_nats is None

    tokenizer = AutoTokenizer.from_pretrained(tiny_student)
    model = AutoModelForCausalLM.from_pretrained(tiny_student, dtype=torch.float32)
    ids = tokenizer(ROWS[1].prompt + ROWS[1].response, return_tensors="pt").input_ids
    with torch.inference_mode():
        logprobs = (model(ids).logits[0, :-1] / 2).log_softmax(1).gather(1, ids[0, 1:, None])
    expected = logprobs[-row.num_tokens :, 0].numpy()
    np.testing.assert_allclose(row.tokens.logprobs, expected, rtol=0, atol=1e-4)


@pytest.mark.vllm
def test_a_class_that_is_not_ours_is_noticed(tiny_student, monkeypatch):
    monkeypatch.setattr(vllm_plugin, "choose", lambda architectures: None)
    with pytest.raises(RuntimeError, match="does not run the scoring model class"):
        Scorer(config(tiny_student))


@pytest.mark.parametrize("version", ["0.32.0", "0.33.0", "0.33.1rc1", "0.32.1.dev7+gabc"])
def test_tested_versions_pass(version):
    prefill._check_version(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "1.0.0"])
def test_untested_versions_are_refused_in_one_line(version):
    with pytest.raises(RuntimeError, match=f"vLLM {version} is not supported") as refusal:
        prefill._check_version(version)
    assert "\n" not in str(refusal.value)
