"""Token ids are the tokenizer's own, by either backend, and borders those of its offsets."""

import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rsr.engine.chat import TrajectoryEncoder, load_tokenizer
from rsr.engine.config import TokenizerBackend
from rsr.engine.fast_ids import FastIds
from rsr.engine.template import resolve_chat_template
from rsr.engine.tokenizer import TextTokenizer
from rsr.engine.trajectory import Status, Trajectory

WILD = st.lists(
    st.one_of(
        st.text(max_size=12),
        # Not composed, composed otherwise than it was, and longer composed than not.
        st.sampled_from(["e\u0301", "\u0958", "\u2126", "\ud55c", "😀\u200d", "\n\n", ".\n", "  "]),
        st.sampled_from(["<|im_start|>", "<|im_end|>", "<|bos|>", " so the sum", "\ud800"]),
    ),
    max_size=8,
).map("".join)


def both(
    tokenizer: PreTrainedTokenizerFast, backend: TokenizerBackend
) -> tuple[TextTokenizer, Tokenizer]:
    """Ours, and the tokenizer as it is shipped but for offsets that tile the text."""
    shipped = tokenizer.backend_tokenizer.to_str()
    untrimmed = shipped.replace('"trim_offsets":true', '"trim_offsets":false')
    return TextTokenizer(tokenizer, backend=backend), Tokenizer.from_str(untrimmed)


def hold_against_offsets(
    ours: TextTokenizer, backend: Tokenizer, texts: list[str], *, add_special_tokens: bool
) -> None:
    positions = [list(range(len(text) + 1)) for text in texts]
    found = ours.tokenize(texts, positions, add_special_tokens=add_special_tokens)
    assert len(found) == len(texts)
    for text, tokenized in zip(texts, found, strict=True):
        if "\ud800" in text:
            assert tokenized is None
            continue
        encoding = backend.encode(text, add_special_tokens=add_special_tokens)
        assert tokenized is not None
        assert tokenized.token_ids == encoding.ids
        own = [i for i, special in enumerate(encoding.special_tokens_mask) if not special]
        starts = [(encoding.offsets[i][0], i) for i in own]
        last = own[-1] + 1 if own else 0
        for position, border in enumerate(tokenized.borders):
            expected = next((i for start, i in starts if start >= position), last)
            assert border == expected, (text, position)


def make_kind(make_tokenizer, kind):
    made = make_tokenizer(add_bos=kind == "bos")
    if kind == "nfc":
        made.backend_tokenizer.normalizer = normalizers.NFC()
    if kind == "lowercase":
        made.backend_tokenizer.normalizer = normalizers.Lowercase()
    if kind == "prefix space":
        made.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return made


BY_OFFSETS = ("prefix space", "lowercase")
KINDS = [
    *((kind, "tokenizers") for kind in ("plain", "bos", "nfc", *BY_OFFSETS)),
    *((kind, "fastokens") for kind in ("plain", "bos", "nfc")),
]


@pytest.fixture(scope="module", params=KINDS, ids=" by ".join)
def tokenizers(request, make_tokenizer):
    kind, backend = request.param
    return both(make_kind(make_tokenizer, kind), backend)


@pytest.fixture(scope="module", params=["tokenizers", "fastokens"])
def real_tokenizers(request, real_student):
    return both(load_tokenizer(str(real_student)), request.param)


@pytest.mark.parametrize("kind", BY_OFFSETS)
def test_fastokens_is_refused_where_it_could_not_place_its_tokens(make_tokenizer, kind):
    with pytest.raises(ValueError, match=r"not byte-level.*leave out tokenizer_backend"):
        TextTokenizer(make_kind(make_tokenizer, kind), backend="fastokens")


def test_fastokens_that_is_not_there_is_told(make_tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastokens", None)
    with pytest.raises(ValueError, match=r"pip install 'rsr-engine\[fastokens\]'"):
        TextTokenizer(make_tokenizer(), backend="fastokens")


def test_other_ids_by_fastokens_are_refused(make_tokenizer):
    reference = make_tokenizer().backend_tokenizer
    fast = FastIds(reference)
    (ids,) = fast.encode(["so far"])
    assert ids.tolist() == reference.encode("so far").ids
    reference.add_tokens(["so"])
    with pytest.raises(ValueError, match="other tokens than tokenizers for 'and so on'"):
        fast.encode(["and", "and so on"])


def test_text_on_whose_case_engines_differ_is_left_to_the_reference(make_tokenizer):
    reference = make_tokenizer().backend_tokenizer
    fast = FastIds(reference)
    reference.add_tokens(["so"])
    (ids,) = fast.encode(["so it i\u017f"])
    assert ids.tolist() == reference.encode("so it i\u017f").ids


@pytest.mark.seconds
@settings(max_examples=60)
@given(texts=st.lists(WILD, max_size=4), add_special_tokens=st.booleans())
@example(texts=["e\u0301\u0958 abc"], add_special_tokens=False)
def test_borders_are_those_of_the_offsets(tokenizers, texts, add_special_tokens):
    hold_against_offsets(*tokenizers, texts, add_special_tokens=add_special_tokens)


@pytest.mark.seconds
@settings(max_examples=40)
@given(texts=st.lists(WILD, max_size=4))
def test_borders_of_a_real_students_tokens(real_tokenizers, texts):
    hold_against_offsets(*real_tokenizers, texts, add_special_tokens=False)


@pytest.mark.seconds
@settings(max_examples=40)
@given(rows=st.lists(st.tuples(WILD, WILD), max_size=5), max_model_len=st.integers(4, 60))
def test_rows_are_encoded_together_as_they_are_alone(make_tokenizer, rows, max_model_len):
    tokenizer = make_tokenizer()
    encoder = TrajectoryEncoder(
        tokenizer,
        chat_template=resolve_chat_template(tokenizer, "auto"),
        max_model_len=max_model_len,
        vocab_size=len(tokenizer),
    )
    trajectories = [
        trajectory
        for prompt, response in rows
        for trajectory in (
            Trajectory(prompt=prompt, response=response),
            Trajectory(text=response),
            Trajectory(messages=[{"role": "user", "content": prompt}]),
        )
    ]
    together = encoder.encode_all(trajectories)
    assert together == [encoder.encode(trajectory) for trajectory in trajectories]
    for trajectory, encoded in zip(trajectories, together, strict=True):
        seen = encoder.inspect(trajectory)
        assert seen.encoded == encoded
        if encoded.status is Status.OK:
            expected = trajectory.text if trajectory.response is None else trajectory.response
            scored = "".join(seen.text[start:end] for start, end in seen.scored)
            assert expected.endswith(scored)
