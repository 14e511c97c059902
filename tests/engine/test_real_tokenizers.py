"""Rows read by tokenizers and chat templates as students are shipped with.

What toy tokenizers cannot have: merges over a header's edge, byte fallback, metaspaces, control
tokens that are not called special.
"""

import os
import re
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from labelled_rows import labelled_rows, scored_ids
from npm_packages import NotAvailableError
from npm_tokenizers import PACKAGES, npm_tokenizer
from toy_students import STUDENTS
from trl_rule import chat_labels, text_labels

from rsr.engine.chat import TrajectoryEncoder
from rsr.engine.fast_ids import FastIds
from rsr.engine.trajectory import Status, Trajectory

LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content }}"
    "{{ ' [/INST]' }}{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TOYS = {student.name: student.template for student in STUDENTS} | {"Llama-2": LLAMA2}
ADDED = r"<think>\n\n</think>\n\n|<\|channel\|>final<\|message\|>"
"""What a student writes first where there is no reasoning: Qwen3 an empty thought, gpt-oss where
the answer goes. Its template adds it, and training puts loss on it."""
BEFORE = {"Llama-2": " "}
"""Of a token that begins with the response."""
LARGE = ("Gemma-3", "gpt-oss", "Llama-3.1")
"""Vocabularies that take ten seconds to load and to go through; Qwen's stays with the others."""


def _cases(cases):
    """Test cases whose first value is a tokenizer; those of a large one are slow."""
    slow = pytest.mark.slow
    return [pytest.param(*c, marks=[slow] if c[0] in LARGE else []) for c in cases]


@cache
def _tokenizer(name):
    try:
        return npm_tokenizer(name)
    except NotAvailableError as error:
        pytest.skip(str(error))


@cache
def _encoder(name, template, **options):
    """Made in seconds where the vocabulary is large."""
    return TrajectoryEncoder(
        _tokenizer(name), chat_template=template, max_model_len=1 << 20, **options
    )


@pytest.fixture(autouse=True, scope="module")
def _no_encoder_stays():
    """In memory, beside what other tests take."""
    yield
    _encoder.cache_clear()
    _tokenizer.cache_clear()


def _templates(name):
    """The one that it is shipped with, and the one that behaves like its student's."""
    toy = TOYS[name]
    if name == "R1-Qwen":
        toy = toy.replace("<|User|>", "<｜User｜>").replace("<|Assistant|>", "<｜Assistant｜>")
    return [t for t in (_tokenizer(name).chat_template, toy) if t]


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("name", "render"),
    # Verbatim, a response of gpt-oss has to name its channel itself.
    _cases(
        [(name, "template") for name in PACKAGES]
        + [(name, "verbatim") for name in PACKAGES if name != "gpt-oss"]
    ),
)
def test_scored_characters_are_the_response(name, render):
    for template in _templates(name):
        encoder = _encoder(name, template, render=render)
        for prompt, completion in labelled_rows(reasoning="none", has_system=name != "Llama-2"):
            seen = encoder.inspect(Trajectory(messages=[*prompt, completion]))
            assert seen.encoded.status is Status.OK, seen.encoded.detail
            scored = [seen.text[start:end] for start, end in seen.scored]
            said = [m["content"] for m in (*prompt, completion) if m["role"] == "assistant"]
            assert [
                re.sub(ADDED, "", text).removeprefix(BEFORE.get(name, "")) for text in scored
            ] == said


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("name", "reasoning", "end_of_turn"),
    _cases(
        [
            ("Qwen3", "content", "<|im_end|>\n"),
            ("Qwen3", "field", "<|im_end|>\n"),
            ("Llama-3.1", "content", "<|eot_id|>"),
            ("Gemma-3", "content", "<end_of_turn>\n"),
        ]
    ),
)
def test_scored_tokens_of_a_chat_row_are_its_labels(name, reasoning, end_of_turn):
    tokenizer = _tokenizer(name)
    encoder = _encoder(name, tokenizer.chat_template, render="template")
    ending = tokenizer.encode(end_of_turn, add_special_tokens=False)
    for prompt, completion in labelled_rows(reasoning=reasoning):
        labels = chat_labels(tokenizer, prompt, [completion])
        assert labels[-len(ending) :] == ending
        found = scored_ids(encoder, Trajectory(prompt=prompt, response=[completion]))
        assert found == labels[: -len(ending)]


@pytest.mark.seconds
@pytest.mark.parametrize("name", _cases([("Qwen3",), ("R1-Qwen",), ("Llama-3.1",), ("Gemma-3",)]))
def test_scored_tokens_of_a_verbatim_row_are_the_labels_of_its_text(name):
    tokenizer = _tokenizer(name)
    for template in _templates(name):
        encoder = _encoder(name, template, render="verbatim")
        for prompt, completion in labelled_rows(reasoning="content"):
            text = tokenizer.apply_chat_template(
                prompt, chat_template=template, tokenize=False, add_generation_prompt=True
            )
            response = completion["content"]
            if text.endswith("<think>\n"):
                response = response.removeprefix("<think>\n")
            labels = text_labels(tokenizer, text, response)
            found = scored_ids(encoder, Trajectory(prompt=prompt, response=completion["content"]))
            assert found == labels[:-1]


NUM_TEXTS = int(os.environ.get("RSR_FUZZ_CASES", "500"))
SPACES = [" ", "  ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u2028", "\u3000", "\x85", "\u200b"]
TOLD_APART = [
    *SPACES,
    *("'s", "'LL", "’re", "don't", "WE'RE", "\u017f", "\u212a", "12345678", "1,234.5", "½", "१२३"),
    *("the", " Word", "camelCase", "snake_case", "\\frac{1}{2}", "</div>", "x=y+1;", "...", "—"),
    *("é", "e\u0301", "日本語", "한국어", "👩\u200d👩\u200d👧", "ﬁ", "İ", "ab" * 40, "<", "|>"),
    *(
        "<|im_start|>",
        "<|im_end|>",
        "<think>",
        "</think>",
        "<|eot_id|>",
        "<｜User｜>",
        "<|channel|>",
    ),
]
"""What programs that read the same tokenizer.json may cut in two ways."""


@pytest.mark.seconds
@pytest.mark.parametrize(
    "name",
    [
        "Qwen3",
        # Ten seconds each.
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("R1-Qwen", "Llama-3.1", "gpt-oss")),
    ],
)
def test_ids_by_fastokens_are_the_same(name):
    reference = _tokenizer(name).backend_tokenizer
    fast = FastIds(reference)

    @settings(max_examples=NUM_TEXTS, deadline=None)
    @given(st.lists(st.sampled_from(TOLD_APART) | st.text(max_size=8), max_size=40).map("".join))
    def hold(text):
        (ids,) = fast.encode([text])
        assert ids.tolist() == reference.encode(text, add_special_tokens=False).ids

    hold()
