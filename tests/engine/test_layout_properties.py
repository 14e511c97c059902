"""Whatever the template and the messages, a row is scored on exactly its responses or refused.

Templates are put together at random; a second copy of each prints marks around every response,
which say where they stand without any of the engine's code.
"""

import re
from dataclasses import dataclass

import pytest
from hypothesis import Phase, event, given, settings
from hypothesis import strategies as st
from toy_students import ToyStudent

from rsr.engine.chat import TrajectoryEncoder
from rsr.engine.form import forms
from rsr.engine.messages import to_conversation
from rsr.engine.trajectory import Status, Trajectory

START, END = "\ue000", "\ue001"
CONTROLS = ["<|a|>", "<|b|>", "<|end|>", "<|stop|>"]
CLOSED = "<think>\n\n</think>\n\n"

BODIES = {
    "as it is": "{{ m.content }}",
    "trimmed": "{{ m.content | trim }}",
    "history stripped": "{{ m.content if loop.last else m.content.split('</think>')[-1] }}",
    "all stripped": "{{ m.content.split('</think>')[-1] }}",
    "reprinted": (
        "{% set c = m.content %}{% set r = m.reasoning_content or '' %}"
        "{% if not r and '</think>' in c %}"
        "{% set r = c.split('</think>')[0].split('<think>')[-1] %}"
        "{% set c = c.split('</think>')[-1] %}{% endif %}"
        "{% if loop.last or r %}{{ '<think>\n' + r.strip('\n') + '\n</think>\n\n' }}{% endif %}"
        "{{ c.lstrip('\n') }}"
    ),
    "in a channel": (
        "{% if m.thinking %}{{ '<|b|>analysis\n' + m.thinking + '<|b|>' }}{% endif %}"
        "{{ m.content }}"
    ),
    "opened by the template": "{{ '<think>\n' + m.content }}",
    "upper case": "{{ m.content | upper }}",
    "only its end": "{{ m.content[-4:] }}",
}
HEADERS = ["'<|a|>' + m.role + '\n'", "'<|a|>' + m.role + ':'", "'[' + m.role + ']\n\n'"]
ENDS = ["{{ '<|end|>\n' }}", "{{ '<|stop|>' if loop.last else '<|end|>' }}", "{{ '\n' }}", ""]
PROMPTS = ["", "<think>\n", CLOSED, "Answer: ", "<|b|>final\n"]
CONTEXTS = ["{{ m.content }}", "{{ m.content | trim }}", "{{ m.content | tojson }}", "{{ 'Q' }}"]


@dataclass(frozen=True)
class RandomTemplate:
    """Parts of a chat template; `source` puts them together, with or without marks."""

    body: str
    header: str
    end: str
    prompt: str
    context: str
    before: str

    def source(self, *, marked: bool) -> str:
        start, end = (f"{{{{ '{mark}' if marked else '' }}}}" for mark in (START, END))
        set_marked = "{% set marked = " + ("true" if marked else "false") + " %}"
        prompt = self.header.replace("m.role", "'assistant'")
        return (
            set_marked + self.before + "{% for m in messages %}{{ " + self.header + " }}"
            "{% if m.role == 'assistant' %}" + start + BODIES[self.body] + end + self.end
            + "{% else %}" + self.context + "{{ '<|end|>\n' }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ " + prompt + " + '" + self.prompt + "' }}{% endif %}"
        )  # fmt: skip


templates = st.builds(
    RandomTemplate,
    body=st.sampled_from(sorted(BODIES)),
    header=st.sampled_from(HEADERS),
    end=st.sampled_from(ENDS),
    prompt=st.sampled_from(PROMPTS),
    context=st.sampled_from(CONTEXTS),
    before=st.sampled_from(["", "{{ bos_token }}", "{{ '<|b|>Be brief.\n' }}"]),
)
words = st.one_of(
    st.text("ab <>/\n[]\"'\\é🙂", max_size=12),
    st.sampled_from(
        ["assistant", "[user]\n\n", "Zq1q0Z", "thought\n", "\n\n", "Q", " ", "Answer: 4"]
    ),
)
contents = st.one_of(
    words,
    st.builds("<think>\n{}\n</think>\n\n{}".format, words, words),
    st.builds("<think>{}</think>{}".format, words, words),
    st.builds("{}</think>{}".format, words, words),
    st.builds("<think>{}".format, words),
)
phases = [phase for phase in Phase if phase is not Phase.explain]
fields = st.sampled_from(["reasoning_content", "thinking"])
rounds = st.lists(st.tuples(words, contents, st.none() | words, fields), min_size=1, max_size=3)


def _conversation(drawn):
    messages = []
    for question, content, reasoning, field in drawn:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": content, field: reasoning})
    return messages


def _responses(template, tokenizer, row):
    """Text to responses, for every form in which the row may have been rendered."""
    turns = to_conversation(row, {}).turns
    says_something = [
        bool(turn["content"] or "reasoning" in turn)
        for turn in turns
        if turn["role"] == "assistant"
    ]
    responses = {}
    for form in forms(turns):
        messages = [form.message(turn) for turn in turns]
        try:
            marked = tokenizer.apply_chat_template(
                messages, chat_template=template.source(marked=True), tokenize=False
            )
        except Exception:
            continue
        between = [part.split(END)[0] for part in marked.split(START)[1:]]
        if template.prompt != "<think>\n":
            between = [part.removeprefix(template.prompt) for part in between]
        text = marked.replace(START, "").replace(END, "")
        responses[text] = [
            part for part, says in zip(between, says_something, strict=True) if says and part
        ]
    return responses


def _said(text):
    """Text without white space and what templates write by themselves."""
    return re.sub(r"</?think>|<\|b\|>(analysis|final)?|Answer:|\s", "", text)


@pytest.mark.seconds
@settings(max_examples=400, deadline=None, phases=phases)
@given(templates, rounds)
def test_rows_by_template_are_scored_on_their_responses_or_refused(template, drawn):
    student = ToyStudent("random", template.source(marked=False), CONTROLS)
    tokenizer = student.tokenizer()
    encoder = TrajectoryEncoder(
        tokenizer, chat_template=student.template, max_model_len=1 << 20, render="template"
    )
    row = Trajectory(messages=_conversation(drawn))
    encoded = encoder.encode(row)
    event(f"{encoded.status}: {encoded.reason}")
    if encoded.status is not Status.OK:
        assert encoded.detail
        return
    text = tokenizer.decode(encoded.token_ids)
    scored = [tokenizer.decode(encoded.token_ids[start:end]) for start, end in encoded.spans]
    assert "".join(scored) == "".join(_responses(template, tokenizer, row)[text])
    said = [
        turn.get("reasoning", "") + turn["content"]
        for turn in to_conversation(row, {}).turns
        if turn["role"] == "assistant"
    ]
    assert _said("".join(scored)) == _said("".join(said))


@pytest.mark.parametrize(
    ("prompt", "content", "scored"),
    [
        (CLOSED, f"{CLOSED}word", "word"),
        (CLOSED, "<think></think>word", "<think></think>word"),
        (CLOSED, "<think>\nwhy\n</think>\n\nword", "<think>\nwhy\n</think>\n\nword"),
        (CLOSED, f"{CLOSED}{CLOSED}", CLOSED),
        ("<think>\n", "<think>\nwhy\n</think>\n\nword", "<think>\nwhy\n</think>\n\nword"),
        ("Answer: ", "Answer: word", "word"),
        ("Answer: ", "word", "word"),
    ],
)
def test_what_the_generation_prompt_prints_is_not_scored(prompt, content, scored):
    """Of a message that begins with it, prompt-completion training has the loss on the rest."""
    header, end = "'<|a|>' + m.role + '\n'", "{{ '<|end|>\n' }}"
    template = RandomTemplate("as it is", header, end, prompt, "{{ m.content }}", "")
    student = ToyStudent("random", template.source(marked=False), CONTROLS)
    tokenizer = student.tokenizer()
    encoder = TrajectoryEncoder(
        tokenizer, chat_template=student.template, max_model_len=1 << 20, render="template"
    )
    turn = [{"role": "user", "content": "q"}, {"role": "assistant", "content": content}]
    encoded = encoder.encode(Trajectory(messages=turn * 2))
    spans = [tokenizer.decode(encoded.token_ids[start:end]) for start, end in encoded.spans]
    assert spans == [scored] * 2


@pytest.mark.seconds
@settings(max_examples=200, deadline=None, phases=phases)
@given(templates, rounds)
def test_verbatim_rows_are_scored_on_their_responses_or_refused(template, drawn):
    student = ToyStudent("random", template.source(marked=False), CONTROLS)
    tokenizer = student.tokenizer()
    encoder = TrajectoryEncoder(
        tokenizer, chat_template=student.template, max_model_len=1 << 20, render="verbatim"
    )
    messages = [
        {key: value for key, value in message.items() if key in ("role", "content")}
        for message in _conversation(drawn)
    ]
    encoded = encoder.encode(Trajectory(messages=messages))
    event(f"{encoded.status}: {encoded.reason}")
    if encoded.status is not Status.OK:
        assert encoded.detail
        return
    expected = [message["content"] for message in messages[1::2] if message["content"]]
    given = {"<think>\n": r"^\s*<think>\s*", CLOSED: r"^\s*<think>\s*</think>\s*"}
    if template.prompt in given:
        # What the prompt has said already is not said once more.
        expected = [re.sub(given[template.prompt], "", text) for text in expected]
    scored = [
        tokenizer.decode(sequence.token_ids[start:end])
        for sequence in encoded.sequences
        for start, end in sequence.spans
    ]
    assert scored == [text for text in expected if text]
