"""Spans are right when decoding them gives back what the assistant said, and nothing else."""

import json
import shutil
from pathlib import Path

import pytest
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from rsr.engine.chat import TrajectoryEncoder, load_tokenizer
from rsr.engine.template import resolve_chat_template
from rsr.engine.trajectory import Status, Trajectory

USER = {"role": "user", "content": "Two and two?"}
ANSWER = {"role": "assistant", "content": "It is four."}
FOLLOW_UP = {"role": "user", "content": "And three?"}
LAST = {"role": "assistant", "content": "Five.\nSure."}

TRIMMING = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n\n' + m.content | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
MARKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>\n' }}"
    "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_END_OF_TURN = (
    "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
INSTRUCTION_STYLE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + '<|im_end|>' }}"
    "{% elif m.role == 'user' %}{{ '<|bos|>[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ raise_exception('only user and assistant turns') }}{% endif %}{% endfor %}"
)
STRIPS_OLD_REASONING = (
    "{% for m in messages %}{% set text = m.content %}"
    "{% if m.role == 'assistant' and not loop.last and '</think>' in text %}"
    "{% set text = text.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ADDS_EMPTY_REASONING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last and '</think>' not in m.content %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OPENS_REASONING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
SHOWS_REASONING_FIELD = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DROPS_OLD_TURNS = (
    "{% for m in messages[-2:] %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DROPS_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PRINTS_THE_DATE = (
    "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


MARKS_HEADERS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{{ '<|im_start|>assistant\n' + m.content + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKS_THE_END = (
    MARKING.split("{% if add_generation_prompt %}")[0]
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% else %}{% generation %}{{ eos_token }}{% endgeneration %}{% endif %}"
)
MARKS_A_PART = MARKING.replace(
    "{% generation %}{{ m.content", "{{ m.content[:3] }}{% generation %}{{ m.content[3:]"
)


@pytest.fixture(scope="session")
def make_encoder(make_tokenizer):
    def make(*template, max_model_len=4096, **options):
        tokenizer = make_tokenizer(*template)
        return TrajectoryEncoder(
            tokenizer,
            chat_template=tokenizer.chat_template,
            max_model_len=max_model_len,
            **options,
        ), tokenizer

    return make


def responses(encoder, tokenizer, messages):
    encoded = encoder.encode(Trajectory(messages=messages))
    assert encoded.status is Status.OK, encoded.detail
    return [tokenizer.decode(encoded.token_ids[start:end]) for start, end in encoded.spans]


@pytest.mark.parametrize(
    "template",
    [
        pytest.param((), id="chatml"),
        pytest.param((TRIMMING,), id="trimming"),
        pytest.param((MARKING,), id="marking"),
        pytest.param((INSTRUCTION_STYLE,), id="instruction"),
        pytest.param((STRIPS_OLD_REASONING,), id="strips-old-reasoning"),
        pytest.param((OPENS_REASONING,), id="opens-reasoning"),
        pytest.param((PRINTS_THE_DATE,), id="prints-the-date"),
    ],
)
def test_every_assistant_turn_is_scored_and_nothing_else(make_encoder, template):
    encoder, tokenizer = make_encoder(*template)
    found = responses(encoder, tokenizer, [USER, ANSWER, FOLLOW_UP, LAST])
    assert [text.strip() for text in found] == [ANSWER["content"], LAST["content"]]


def test_ids_are_those_of_the_tokenizer_itself(make_encoder):
    encoder, tokenizer = make_encoder()
    messages = [USER, ANSWER, FOLLOW_UP, LAST]
    encoded = encoder.encode(Trajectory(messages=messages))
    assert encoded.token_ids == list(
        tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    )


@pytest.mark.parametrize("template", [(), (MARKING,), (TRIMMING,)])
def test_end_of_turn_is_scored_on_demand_and_only_that(make_encoder, template):
    encoder, tokenizer = make_encoder(*template, score_end_of_turn=True)
    found = responses(encoder, tokenizer, [USER, ANSWER, FOLLOW_UP, LAST])
    assert found == [ANSWER["content"] + "<|im_end|>", LAST["content"] + "<|im_end|>"]


def test_single_turn_without_an_end_of_turn_ends_with_the_text(make_encoder):
    encoder, tokenizer = make_encoder(NO_END_OF_TURN)
    assert responses(encoder, tokenizer, [USER, ANSWER]) == [ANSWER["content"]]


def test_reasoning_the_template_adds_is_scored_as_the_published_code_does(make_encoder):
    encoder, tokenizer = make_encoder(ADDS_EMPTY_REASONING)
    found = responses(encoder, tokenizer, [USER, ANSWER, FOLLOW_UP, LAST])
    assert found == [ANSWER["content"], "<think>\n\n</think>\n\n" + LAST["content"]]


def test_reasoning_in_the_content_of_the_last_turn_is_scored(make_encoder):
    for template in (STRIPS_OLD_REASONING, ADDS_EMPTY_REASONING, OPENS_REASONING):
        encoder, tokenizer = make_encoder(template)
        thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nFour."}
        assert responses(encoder, tokenizer, [USER, thought]) == [thought["content"]]


def test_reasoning_field_is_scored_where_the_template_shows_it(make_encoder):
    turn = {**ANSWER, "reasoning_content": "2 + 2"}
    encoder, tokenizer = make_encoder(SHOWS_REASONING_FIELD)
    assert responses(encoder, tokenizer, [USER, turn]) == ["<think>2 + 2</think>\nIt is four."]


def test_reasoning_field_that_the_template_ignores_goes_into_the_content(make_encoder):
    encoder, tokenizer = make_encoder()
    turn = {**ANSWER, "reasoning_content": "2 + 2"}
    assert responses(encoder, tokenizer, [USER, turn]) == [
        "<think>\n2 + 2\n</think>\n\nIt is four."
    ]


OLD_REASONING = [
    USER,
    {"role": "assistant", "content": "<think>hm</think>Four."},
    FOLLOW_UP,
    {"role": "assistant", "content": "<think>ah</think>Five."},
]


def test_reasoning_that_the_template_strips_is_refused_with_the_option_to_try(make_encoder):
    encoder, _ = make_encoder(STRIPS_OLD_REASONING, render="template")
    encoded = encoder.encode(Trajectory(messages=OLD_REASONING))
    assert encoded.status is Status.BAD_MESSAGES
    assert encoded.detail == "the chat template drops the reasoning of assistant turn 1"
    assert encoded.reason == "the chat template drops the reasoning of an assistant turn"
    assert "--render verbatim" in encoded.hint


def test_reasoning_that_the_template_strips_is_scored_turn_by_turn(make_encoder):
    """Each turn after the history that the student would see: older turns without reasoning."""
    encoder, tokenizer = make_encoder(STRIPS_OLD_REASONING)
    encoded = encoder.encode(Trajectory(messages=OLD_REASONING))
    assert encoded.status is Status.OK
    assert "rendered verbatim" in encoded.notes
    context = "<|im_start|>user\nTwo and two?<|im_end|>\n<|im_start|>assistant\n"
    assert [tokenizer.decode(s.token_ids) for s in encoded.sequences] == [
        context + "<think>hm</think>Four.<|im_end|>",
        context + "Four.<|im_end|>\n<|im_start|>user\nAnd three?<|im_end|>\n"
        "<|im_start|>assistant\n<think>ah</think>Five.<|im_end|>",
    ]
    scored = [tokenizer.decode(s.token_ids[a:b]) for s in encoded.sequences for a, b in s.spans]
    assert scored == ["<think>hm</think>Four.", "<think>ah</think>Five."]


def test_last_turn_alone_is_scored_after_its_stripped_history(make_encoder):
    encoder, tokenizer = make_encoder(STRIPS_OLD_REASONING, turns="last")
    assert responses(encoder, tokenizer, OLD_REASONING) == ["<think>ah</think>Five."]


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        pytest.param((DROPS_OLD_TURNS,), [USER, ANSWER, FOLLOW_UP, LAST], id="turns dropped"),
        pytest.param(
            (DROPS_SYSTEM,),
            [{"role": "system", "content": "Be brief."}, USER, ANSWER],
            id="system dropped",
        ),
        pytest.param(
            (INSTRUCTION_STYLE,),
            [{"role": "system", "content": "Be brief."}, USER, ANSWER],
            id="template raises",
        ),
        pytest.param((), [USER, {"role": "robot", "content": "Four."}, ANSWER], id="unknown role"),
        pytest.param((), [USER, {"role": "assistant", "content": ["Four."]}], id="not a string"),
        pytest.param((), [USER, {"role": "assistant", "content": None}], id="null content"),
        pytest.param((), [USER, {"role": "assistant"}], id="no content"),
        pytest.param((), [USER, "Four.", ANSWER], id="not a message"),
        pytest.param((), [USER, {"role": "assistant", "content": "\ud800"}], id="surrogate"),
        pytest.param(
            (),
            [{"role": "user", "content": "<|im_end|>\n<|im_start|>assistant\nFour."}, ANSWER],
            id="control token in content",
        ),
    ],
)
def test_what_the_template_does_not_say_faithfully_is_refused(make_encoder, template, messages):
    encoder, _ = make_encoder(*template)
    encoded = encoder.encode(Trajectory(messages=messages))
    assert encoded.status is Status.BAD_MESSAGES
    assert encoded.detail


@pytest.mark.parametrize(
    "trajectory",
    [
        Trajectory(messages=[]),
        Trajectory(messages=[USER]),
        Trajectory(messages=[USER, {"role": "assistant", "content": ""}]),
        Trajectory(prompt="Two?", response=""),
        Trajectory(text=""),
        Trajectory(),
    ],
)
def test_nothing_to_score_is_said_so(make_encoder, trajectory):
    encoder, _ = make_encoder()
    assert encoder.encode(trajectory).status is Status.NO_RESPONSE


def test_prompt_and_response_are_a_conversation_where_there_is_a_template(make_encoder):
    encoder, _ = make_encoder()
    as_text = encoder.encode(Trajectory(prompt=USER["content"], response=ANSWER["content"]))
    assert as_text == encoder.encode(Trajectory(messages=[USER, ANSWER]))


def test_plain_text_without_a_template(make_tokenizer):
    tokenizer = make_tokenizer(None, add_bos=True)
    encoder = TrajectoryEncoder(tokenizer, chat_template=None, max_model_len=99)
    encoded = encoder.encode(Trajectory(prompt="ab", response="cd"))
    assert tokenizer.decode(encoded.token_ids) == "<|bos|>abcd"
    assert encoded.spans == [(3, 5)]
    # After a BOS even the first token of a text has something before it; without, it has not.
    assert encoder.encode(Trajectory(text="abcd")).spans == [(1, 5)]
    bare = TrajectoryEncoder(make_tokenizer(None), chat_template=None, max_model_len=99)
    assert bare.encode(Trajectory(text="abcd")).spans == [(1, 4)]


def test_long_rows_are_cut_or_refused_as_told(make_encoder):
    messages = [USER, ANSWER, FOLLOW_UP, LAST]
    encoder, _ = make_encoder()
    whole = encoder.encode(Trajectory(messages=messages))
    limit = whole.spans[0][1] + 1
    cut, _ = make_encoder(max_model_len=limit)
    encoded = cut.encode(Trajectory(messages=messages))
    assert encoded.status is Status.TRUNCATED
    assert encoded.token_ids == whole.token_ids[:limit]
    assert encoded.spans == whole.spans[:1]
    skip, _ = make_encoder(max_model_len=limit, truncate=False)
    assert skip.encode(Trajectory(messages=messages)).status is Status.TOO_LONG
    prompt_only, _ = make_encoder(max_model_len=5)
    assert prompt_only.encode(Trajectory(messages=messages)).status is Status.TOO_LONG


def test_token_that_the_model_does_not_have_is_refused(make_encoder):
    encoder, _ = make_encoder()
    encoded = encoder.encode(Trajectory(messages=[USER, ANSWER]))
    largest = max(encoded.token_ids)
    small, _ = make_encoder(vocab_size=largest)
    refused = small.encode(Trajectory(messages=[USER, ANSWER]))
    assert refused.status is Status.BAD_MESSAGES
    assert f"token {largest} is beyond" in refused.detail
    enough, _ = make_encoder(vocab_size=largest + 1)
    assert enough.encode(Trajectory(messages=[USER, ANSWER])) == encoded


plain_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@pytest.mark.seconds
@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(plain_text, plain_text), min_size=1, max_size=3))
@example([("Spaces?", "  at both ends  ")])
def test_any_text_comes_back_from_its_spans(make_encoder, pairs):
    """Byte-level: except for a token that begins in the header, nothing is lost or added."""
    encoder, tokenizer = make_encoder()
    messages = []
    for question, answer in pairs:
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    encoded = encoder.encode(Trajectory(messages=messages))
    answers = [answer for _, answer in pairs if answer]
    # The header's newline merges with newlines that follow it: their token is the header's.
    expected = [a[1:] if a.startswith("\n") else a for a in answers]
    if not any(expected):
        assert encoded.status is Status.NO_RESPONSE
        return
    assert encoded.status is Status.OK, encoded.detail
    found = [tokenizer.decode(encoded.token_ids[start:end]) for start, end in encoded.spans]
    assert found == [e for e in expected if e]


def test_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no usable tokenizer"):
        load_tokenizer(str(tmp_path))


@pytest.mark.slow
def test_tekken_tokenizer_is_read_with_its_template(tmp_path):
    """Mistral's own tokenizer has no offsets; the same made with offsets gives the same ids."""
    mistral_common = pytest.importorskip("mistral_common")
    data = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
    shutil.copy(data, tmp_path / "tekken.json")
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    tokenizer = load_tokenizer(str(tmp_path))
    text = "Zürich, 日本語 🙂\n\n def f(x): 1234567"
    own = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == own.encode(text, add_special_tokens=False)
    encoder = TrajectoryEncoder(
        tokenizer, chat_template=resolve_chat_template(tokenizer, "auto"), max_model_len=4096
    )
    assert responses(encoder, tokenizer, [USER, ANSWER]) == [ANSWER["content"]]


def test_marks_before_the_header_or_around_an_end_token_change_nothing(make_encoder):
    for template in (MARKS_HEADERS, MARKS_THE_END):
        encoder, tokenizer = make_encoder(template)
        assert responses(encoder, tokenizer, [USER, ANSWER]) == [ANSWER["content"]]


def test_response_that_the_template_marks_in_part_is_refused(make_encoder):
    encoder, _ = make_encoder(MARKS_A_PART)
    encoded = encoder.encode(Trajectory(messages=[USER, ANSWER]))
    assert encoded.reason == "the chat template marks only a part of a response as generated"


@pytest.mark.parametrize(
    ("trajectory", "reason"),
    [
        (Trajectory([USER, ANSWER], tools="{"), "tools is not JSON"),
        (Trajectory([USER, ANSWER], tools="{}"), "tools is dict, not a list"),
        (
            Trajectory([USER, ANSWER], chat_template_kwargs="[]"),
            "chat_template_kwargs is list, not a dict",
        ),
        (
            Trajectory([USER, {**ANSWER, "reasoning": "a", "thinking": "b"}]),
            "an assistant turn has different reasoning and thinking",
        ),
        (
            Trajectory(prompt="Two?", response="<think>a</think>b", reasoning="c"),
            "the row has reasoning of its own and in its response",
        ),
        (
            Trajectory([{"role": "system", "content": "Hi."}, USER, ANSWER], system="Ho."),
            "the row has a system prompt and a system turn",
        ),
        (
            Trajectory([USER, {**ANSWER, "tool_calls": [{"id": "1"}]}]),
            "tool_calls without a function name",
        ),
        (
            Trajectory([{"from": "function_call", "value": "f(x)"}]),
            "a function_call turn is not JSON",
        ),
        (
            Trajectory([{"role": "user", "content": [{"type": "image"}]}, ANSWER]),
            "content has a part that is not text",
        ),
    ],
)
def test_row_that_contradicts_itself_is_refused(make_encoder, trajectory, reason):
    encoder, _ = make_encoder()
    encoded = encoder.encode(trajectory)
    assert (encoded.status, encoded.reason) == (Status.BAD_MESSAGES, reason)


def test_columns_beside_the_messages_belong_to_the_conversation(make_encoder):
    encoder, _ = make_encoder()
    apart = Trajectory(
        prompt=USER["content"], response="It is four.", system="Be brief.", reasoning="2 + 2"
    )
    messages = [
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": "<think>\n2 + 2\n</think>\n\nIt is four."},
    ]
    encoded, expected = encoder.encode(apart), encoder.encode(Trajectory(messages))
    assert (encoded.token_ids, encoded.spans) == (expected.token_ids, expected.spans)


def test_prompt_as_messages_is_context_with_its_assistant_turns(make_encoder):
    encoder, _ = make_encoder()
    encoded = encoder.encode(Trajectory(prompt=[USER, ANSWER, FOLLOW_UP], response=[LAST]))
    whole = encoder.encode(Trajectory(messages=[USER, ANSWER, FOLLOW_UP, LAST]))
    assert encoded.token_ids == whole.token_ids
    assert encoded.spans == whole.spans[1:]


def test_what_is_inspected_is_what_is_encoded(make_encoder):
    encoder, _ = make_encoder(STRIPS_OLD_REASONING)
    row = Trajectory(messages=OLD_REASONING)
    seen = encoder.inspect(row)
    assert seen.encoded == encoder.encode(row)
    assert [seen.text[start:end] for start, end in seen.scored] == [
        "<think>hm</think>Four.",
        "<think>ah</think>Five.",
    ]
    assert seen.encoded.num_scored == sum(end - start for start, end in seen.scored)
    refused = encoder.inspect(Trajectory(messages=[USER]))
    assert (refused.text, refused.scored) == ("", [])


def test_template_file_that_is_not_there_is_refused(make_tokenizer):
    with pytest.raises(ValueError, match="readable Jinja file"):
        resolve_chat_template(make_tokenizer(), "no/such/file.jinja")


def test_tokenizer_is_that_of_its_file_whatever_class_it_is_said_to_be(make_tokenizer, tmp_path):
    """Copies of R1 distillations say LlamaTokenizer; transformers then builds another one."""
    make_tokenizer().save_pretrained(tmp_path)
    settings_file = tmp_path / "tokenizer_config.json"
    said = json.loads(settings_file.read_text()) | {"tokenizer_class": "LlamaTokenizerFast"}
    settings_file.write_text(json.dumps(said))
    text = "a``` “quoted”\n\n  12"
    of_file = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.backend_tokenizer.encode(text).ids == of_file.ids
    assert loaded.chat_template
    assert loaded.eos_token == "<|im_end|>"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [USER], "text": "t", "id": 3}, Trajectory(messages=[USER])),
        ({"conversations": [USER], "tools": "[]"}, Trajectory(messages=[USER], tools="[]")),
        ({"prompt": "p", "completion": "c"}, Trajectory(prompt="p", response="c")),
        ({"prompt": "p", "response": None}, Trajectory(prompt="p")),
        ({"response": "r", "text": "t"}, Trajectory(text="t")),
    ],
)
def test_a_row_of_a_data_set_becomes_a_trajectory(row, expected):
    assert Trajectory.of(row) == expected
    assert not expected.contradiction


def test_a_row_of_other_fields_is_no_trajectory():
    with pytest.raises(ValueError, match="it has question, answer"):
        Trajectory.of({"question": "?", "answer": "!"})


@pytest.mark.parametrize(
    "trajectory",
    [
        Trajectory(messages=[USER, ANSWER], text="t"),
        Trajectory(messages=[USER, ANSWER], prompt="p", response="r"),
        Trajectory(prompt="p", response="r", text="t"),
        Trajectory(text="t", system="Be brief."),
    ],
)
def test_a_row_of_two_forms_is_refused(make_tokenizer, trajectory):
    encoder = TrajectoryEncoder(make_tokenizer(), chat_template=None, max_model_len=512)
    encoded = encoder.encode(trajectory)
    assert encoded.status is Status.BAD_MESSAGES
    assert encoded.detail == trajectory.contradiction
    assert not encoded.token_ids
