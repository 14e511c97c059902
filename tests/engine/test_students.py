"""Rows of reasoning as public data sets write them, read by students as they are.

Each of 28 toy students behaves like one that people distil into; each of 27 styles is a way in
which reasoning rows are written. A row is scored on exactly what it says, with what the template
adds, or it is refused.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from reasoning_rows import STYLES, Style
from toy_students import STUDENTS, SYSTEM, TOOL_REASONING, TOOLS, ToyStudent

from rsr.engine.chat import TrajectoryEncoder
from rsr.engine.trajectory import Status, Trajectory

MIN_SCORED = 0.95
MIN_SCORED_VERBATIM = 0.98
ADDED_TO_REASONING = r"</?think>|\[/?THINK\]"
HARMONY = r"<\|(?:channel|message|start|end)\|>|analysis|final|assistant"
ADDED_TO_CALLS = (
    r"</?(?:tool_call|function|parameter|arg_key|arg_value|TOOLCALL)>|<\|?[a-z_]+\|?>"
    r"|\[(?:TOOL_CALLS|ARGS)\]|call|type|functions?|commentary|json|assistant|to"
    r"|name|arguments|parameters?|city|days|[^\w\s]"
)


@dataclass(frozen=True)
class Outcome:
    """What became of one row: refused, or scored with `scored` as its text."""

    student: ToyStudent
    style: Style
    turns: str
    status: Status
    detail: str
    scored: str

    @property
    def is_expressible(self) -> bool:
        """Whether this student's template has a way to say all that is to be scored."""
        needs = set()
        if self.style.has_system:
            needs.add(SYSTEM)
        if self.style.has_calls:
            needs.add(TOOLS)
        if self.style.has_calls and self.turns == "all" and len(self.style.said[0]) > 3:
            needs.add(TOOL_REASONING)
        return not needs & self.student.cannot

    @property
    def problem(self) -> str:
        """What is missing from the scored text or should not be in it; "" if nothing."""
        rest, position = _squeeze(self.scored), 0
        for turn in self.style.said if self.turns == "all" else self.style.said[-1:]:
            for text in turn:
                found = rest.find(_squeeze(text), position)
                if found < 0:
                    return f"{text!r} is missing"
                rest = rest[:found] + rest[found + len(_squeeze(text)) :]
                position = found
        allowed = ADDED_TO_REASONING
        if self.student.name == "gpt-oss":
            allowed += "|" + HARMONY
        if self.style.has_calls:
            allowed += "|" + ADDED_TO_CALLS
        left = re.sub(allowed, "", rest)
        return f"{left!r} is not the row's" if left else ""


def _outcomes(turns: str, **options: str) -> Iterator[Outcome]:
    for student in STUDENTS:
        encoder = TrajectoryEncoder(
            student.tokenizer(),
            chat_template=student.template,
            max_model_len=1 << 20,
            turns=turns,
            **options,
        )
        for style in STYLES:
            seen = encoder.inspect(Trajectory(messages=style.messages))
            scored = "\n".join(seen.text[start:end] for start, end in seen.scored)
            encoded = seen.encoded
            yield Outcome(student, style, turns, encoded.status, encoded.detail, scored)


@pytest.fixture(scope="module")
def by_default() -> list[Outcome]:
    return list(_outcomes("all"))


@pytest.fixture(scope="module")
def verbatim_last() -> list[Outcome]:
    return list(_outcomes("last", render="verbatim"))


@pytest.mark.seconds
def test_no_row_is_scored_wrongly(by_default, verbatim_last):
    outcomes = [o for o in (*by_default, *verbatim_last) if o.status is Status.OK]
    wrong = [f"{o.student.name}, {o.style.name}: {o.problem}" for o in outcomes if o.problem]
    assert not wrong


@pytest.mark.seconds
def test_what_a_template_cannot_say_is_refused_with_a_reason(by_default):
    refused = [o for o in by_default if not o.is_expressible]
    assert {o.status for o in refused} == {Status.BAD_MESSAGES}
    assert all(o.detail for o in refused)


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("fixture", "least"), [("by_default", MIN_SCORED), ("verbatim_last", MIN_SCORED_VERBATIM)]
)
def test_what_a_template_can_say_is_scored(request, fixture, least):
    outcomes = [o for o in request.getfixturevalue(fixture) if o.is_expressible]
    refused = [f"{o.student.name}, {o.style.name}: {o.detail}" for o in outcomes if o.detail]
    scored = 1 - len(refused) / len(outcomes)
    print(f"{fixture}: {scored:.1%} of {len(outcomes)} rows that can be said are scored", *refused)
    assert scored >= least, refused


@pytest.mark.seconds
@pytest.mark.parametrize("student", STUDENTS, ids=lambda student: student.name)
def test_what_was_read_before_changes_nothing(student):
    """Whatever a worker has seen, a unit's rows come out the same: a resumed run counts on it."""

    def encoded(styles):
        encoder = TrajectoryEncoder(
            student.tokenizer(), chat_template=student.template, max_model_len=1 << 20
        )
        return {style.name: encoder.encode(Trajectory(messages=style.messages)) for style in styles}

    forwards, backwards = encoded(STYLES), encoded(STYLES[::-1])
    assert forwards == backwards


def _squeeze(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize(("name", "end"), [("Qwen3", "<|im_end|>"), ("Llama-3.1", "<|eot_id|>")])
def test_end_of_turn_token_that_a_response_brings_along(name, end):
    """Engines leave it there with special tokens kept; the student is to write it once."""
    (student,) = (student for student in STUDENTS if student.name == name)

    def encode(answer: str, render: str):
        encoder = TrajectoryEncoder(
            student.tokenizer(), chat_template=student.template, max_model_len=999, render=render
        )
        user = {"role": "user", "content": "2+2?"}
        rounds = [user, {"role": "assistant", "content": answer}] * 2
        return encoder.encode(Trajectory(messages=rounds))

    plain = encode("It is 4.", "verbatim")
    for tail in (end, f"{end}\n"):
        ended = encode(f"It is 4.{tail}", "verbatim")
        assert [s.token_ids for s in ended.sequences] == [s.token_ids for s in plain.sequences]
        assert [s.spans for s in ended.sequences] == [s.spans for s in plain.sequences]
        assert set(ended.notes) - set(plain.notes) == {"end-of-turn token of their own left out"}
        refused = encode(f"It is 4.{tail}", "auto")
        assert refused.status is Status.BAD_MESSAGES
        assert refused.hint.startswith("try --render verbatim")
    for answer in (f"It is 4.{end}{end}", f"It{end} is 4."):
        assert encode(answer, "verbatim").status is Status.BAD_MESSAGES
    assert not encode(f"It{end} is 4.", "auto").hint
    assert encode(end, "verbatim").status is Status.NO_RESPONSE
