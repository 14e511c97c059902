"""Which text of a row is its answer, and which its gold; knows no verifier."""

import json
from dataclasses import dataclass
from typing import Any

from rsr.engine.messages import BadMessagesError, to_conversation
from rsr.engine.tags import REASONING_TAG
from rsr.engine.trajectory import Trajectory
from rsr.jobs.grading.grades import Grade, GradeStatus

CUT_OFF = "length"
"""The `finish_reason` of a response that reached its limit of tokens, as OpenAI's API has it."""


@dataclass(frozen=True, slots=True)
class GradableRow:
    """An answer, after its reasoning, and the text that it should equal."""

    answer: str
    gold: str


def gradable(trajectory: Trajectory, gold: Any, finish_reason: Any) -> GradableRow | Grade:
    """What a verifier is to compare, or the grade of a row where there is nothing to compare.

    gold: a value of the answer column. finish_reason: of the response, None where it is unknown.
    """
    gold_text = text_of(gold)
    if not gold_text.strip():
        return Grade(GradeStatus.GOLD_UNPARSABLE, detail="the row has no gold answer")
    try:
        response = _last_response(trajectory)
    except BadMessagesError as error:
        return Grade(GradeStatus.ERROR, detail=error.detail)
    if finish_reason == CUT_OFF:
        return Grade(GradeStatus.TRUNCATED, detail="the response reached its limit of tokens")
    answer = after_reasoning(response)
    if answer is None:
        return Grade(GradeStatus.TRUNCATED, detail="the reasoning never ends")
    if not answer.strip():
        return Grade(GradeStatus.NO_ANSWER)
    return GradableRow(answer, gold_text)


def after_reasoning(response: str) -> str | None:
    """What stands after the last `</think>` or its like; None if the last one only opens."""
    tags = list(REASONING_TAG.finditer(response))
    if not tags:
        return response
    last = tags[-1]
    return response[last.end() :] if "/" in last.group() else None


def text_of(value: Any) -> str:
    """A gold value as text: numbers without a `.0`, other values as JSON, nothing as ""."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return json.dumps(value, ensure_ascii=False, default=str)


def _last_response(trajectory: Trajectory) -> str:
    """The content of the last assistant turn; "" if there is none.

    Raises `BadMessagesError` if the row is no conversation.
    """
    if trajectory.text is not None:
        return trajectory.text
    turns = to_conversation(trajectory, {}).turns
    return next((t["content"] for t in reversed(turns) if t["role"] == "assistant"), "")
